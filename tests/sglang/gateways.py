"""The real gateway in front of real servers, told what deploy/ and docs/scaling.md tell it."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.engines.serving import eventually
from tests.sglang.servers import Server, free_port

SMG = Path(sys.executable).with_name("smg")
READY_S = 60.0
FLAGS = ("--policy", "consistent_hashing", "--disable-tokenizer-autoload",
         "--health-check-interval-secs", "5", "--max-buffered-request-bytes", "67108864")  # fmt: skip


@contextmanager
def gateway(servers: Sequence[Server]) -> Iterator[Server]:
    """A gateway that has found all of them ready."""
    with tempfile.TemporaryDirectory(prefix="gateway-") as place:
        log = Path(place) / "log"
        port, metrics_port = free_port(), free_port()
        command = [sys.executable, str(SMG), "launch", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
        command += ["--worker-urls", *(server.url for server in servers), *FLAGS]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        found = Server(f"http://127.0.0.1:{port}", log, process)
        try:
            eventually(lambda: healthy(found) == len(servers), within_s=READY_S)
            yield found
        finally:
            process.kill()  # asked to end, it waits five seconds even when there is nothing to wait for
            process.wait()


def healthy(gateway: Server) -> int:
    """How many servers it sends requests to."""
    assert gateway.process.poll() is None, gateway.log.read_text(errors="replace")
    try:
        answer = gateway.send("/readiness", wait_s=5)
    except OSError:
        return 0
    return int(answer.json.get("healthy_workers", 0))
