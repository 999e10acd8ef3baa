"""Real SGLang servers, each in a process group of its own, and requests to them as they stand on the wire."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ghostvis_cli.serve import listen
from ghostvis_cli.serve.settings import ServerSettings

START_S = 240.0  # 20 s on a calm machine, nearly all of it imports
ANSWER_S = 120.0
STOP_S = 20.0
SHOWN_LINES = 40
FLAGS = ("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "16384", "--max-running-requests", "16",
         "--enable-cache-report", "--enable-metrics", "--sleep-on-idle")  # fmt: skip

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # on a busy machine, models this small are many times slower on two
}


class NotStartedError(Exception):
    """The server ended, or was not ready in time. The text is the end of its log."""


@dataclass(frozen=True)
class Answer:
    status: int
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """One that is ready. `log` has everything it wrote."""

    url: str
    log: Path
    process: "subprocess.Popen[bytes]" = field(repr=False)

    def send(self, path: str, body: Any = None, *, wait_s: float = ANSWER_S) -> Answer:
        """A POST of `body` as JSON, or a GET without one; whatever the status, it is an answer."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"content-type": "application/json"})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                request, timeout=wait_s
            ) as response:
                return Answer(response.status, response.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode())

    def generate(self, prompt: str | Sequence[int], *images: str, tokens: int = 1, **fields: Any) -> Answer:
        """SGLang's own route, greedy: a text, or ids as they are."""
        asked = {"text": prompt} if isinstance(prompt, str) else {"input_ids": list(prompt)}
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        sampling |= fields.pop("sampling", {})
        body = {**asked, "sampling_params": sampling, **fields}
        return self.send("/generate", body | ({"image_data": list(images)} if images else {}))

    def chat(self, messages: list[dict[str, Any]], tokens: int = 16, **fields: Any) -> Answer:
        body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": tokens, **fields}
        return self.send("/v1/chat/completions", body)

    def forget(self) -> None:
        """Empty the prefix cache; refused while anything runs, so it is asked to wait."""
        assert self.send("/flush_cache?timeout=30", {}).status == 200

    def metric(self, name: str) -> float:
        """A gauge, or a counter summed over its labels."""
        lines = [
            line for line in self.send("/metrics").body.splitlines() if line.startswith(f"sglang:{name}{{")
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def alive(self) -> bool:
        return self.process.poll() is None and self.send("/health").status == 200


@contextmanager
def serving(directory: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """A server that is ready. NotStartedError where it ended first."""
    with serving_at(free_port(), sys.executable, directory, *flags, **environment) as server:
        yield server


@contextmanager
def serving_at(port: int, python: str, directory: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """The same on this port, with the Python of an environment that has SGLang."""
    with tempfile.TemporaryDirectory(prefix="sglang-") as place:
        log = Path(place) / "log"
        command = [python, "-m", "sglang.launch_server", "--model-path", str(directory), *FLAGS]
        command += ["--host", "127.0.0.1", "--port", str(port), *flags]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ | ENVIRONMENT | environment,
                start_new_session=True,
            )
        server = Server(f"http://127.0.0.1:{port}", log, process)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            _stop(process)


def free_port() -> int:
    """One that no connection is given as its own end while the server starts."""
    return listen.free_port(ServerSettings(port=0))


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with suppress(OSError):
            if server.send("/ready", wait_s=5).status == 200:
                return
        time.sleep(0.2)
    lines = server.log.read_text(errors="replace").splitlines()
    raise NotStartedError("\n".join(line[:500] for line in lines[-SHOWN_LINES:]))


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """The parent alone is asked first: a group that ends at once takes five seconds to find out why."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def data_url(image: Image.Image, form: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, form, **options)
    return of_bytes(file.getvalue(), form.lower())


def of_bytes(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: str | dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation of one turn: texts, and parts that are ready."""
    return [
        {"role": "user", "content": [text_part(part) if isinstance(part, str) else part for part in parts]}
    ]
