"""HTTP servers in a thread of this process, certificates for them, and addresses at which nobody answers."""

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Site(BaseHTTPRequestHandler):
    """What a test answers with; quiet."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.respond()

    def do_HEAD(self) -> None:
        self.respond()

    def respond(self) -> None:
        raise NotImplementedError

    def answer(self, status: int, content: bytes = b"", /, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(content)


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what is tested."""


@contextmanager
def serving(
    handler: Callable[..., BaseHTTPRequestHandler], tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """The address of a server whose requests go to `handler`."""
    with _Quiet(("127.0.0.1", 0), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def certificates(folder: Path, name: str = "IP:127.0.0.1") -> Path:
    """The folder, with an authority `ca.pem` and `server.pem`: what it signed for this name, and the key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make certificates with")

    def openssl(command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)

    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    (folder / "name").write_text(f"subjectAltName={name}\n")
    openssl(f"req -x509 {key} -keyout ca.key -out ca.pem -subj /CN=ours -days 2")
    openssl(f"req {key} -keyout server.key -out server.csr -subj /CN=server")
    signed = "-CA ca.pem -CAkey ca.key -CAcreateserial -extfile name -days 2"
    openssl(f"x509 -req -in server.csr -out server.crt {signed}")
    parts = [(folder / f"server.{part}").read_text() for part in ("key", "crt")]
    (folder / "server.pem").write_text("".join(parts))
    return folder


def server_tls(certificates: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem")
    return context


def nobody_listens() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def nobody_accepts() -> Iterator[str]:
    """With its queue full, the kernel leaves further connections unanswered."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}"
