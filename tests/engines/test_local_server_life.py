"""The local server from the bound port to the last signal."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress

import pytest

from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.errors import (
    EngineError,
    GhostvisError,
    MemoryLimitError,
    ModelError,
    RequestError,
    UsageError,
)
from ghostvis_cli.serve.settings import Served, ServerSettings
from tests.engines.serving import PATIENCE_S, USER, eventually, running


def test_the_port_answers_before_the_model_is_loaded() -> None:
    loaded = threading.Event()

    async def load() -> Served:
        await asyncio.to_thread(loaded.wait, PATIENCE_S)
        return Served(FakeEngine())

    with running(load=load) as server:
        assert server.send("GET", "/healthz")[0] == 200
        assert json.loads(server.send("GET", "/readyz")[2]) == {"status": "loading"}
        status, headers, body = server.send("POST", "/v1/chat/completions", {"messages": USER})
        assert (status, headers["retry-after"]) == (503, "5")
        assert json.loads(body)["error"]["code"] == "model_loading"
        loaded.set()
        assert server.ready.wait(PATIENCE_S)
        assert server.send("GET", "/readyz")[0] == 200
        assert server.chat()[0] == 200


def test_a_load_or_a_warm_up_that_fails_ends_the_server() -> None:
    async def load() -> Served:
        raise ModelError("the checkpoint is damaged")

    async def load_broken() -> Served:
        return Served(FakeEngine(failure=MemoryLimitError("does not fit")))

    for loader, message in ((load, "damaged"), (load_broken, "does not fit")):
        with running(load=loader) as server, pytest.raises(GhostvisError, match=message):
            server.outcome.result(PATIENCE_S)


def test_stopping_closes_the_engine() -> None:
    engine = FakeEngine()
    with running(engine):
        pass
    assert isinstance(engine.failure, RequestError)


def test_a_taken_port_is_found_at_once_and_its_holder_named() -> None:
    async def never() -> Served:
        raise AssertionError("the model must not be loaded")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running(load=never, port=port) as server, pytest.raises(EngineError) as error:
            server.outcome.result(PATIENCE_S)
    assert f"port {port} is taken by process {os.getpid()} (" in error.value.message
    assert error.value.hint == "--port 0 takes a free one"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_nothing_beyond_this_machine_without_a_key(host: str) -> None:
    with (
        running(load=FakeEngine, host=host) as server,
        pytest.raises(UsageError, match="no API key") as error,
    ):
        server.outcome.result(PATIENCE_S)
    assert "GHOSTVIS_API_KEY" in (error.value.hint or "")


def test_with_a_key_every_interface_may_be_bound() -> None:
    with running(host="0.0.0.0", api_key="k") as server:
        assert server.url.startswith("http://0.0.0.0:")
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert server.client("k").models.list().data


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in (
        {"port": 70000},
        {"api_key": " "},
        {"max_waiting": 0},
        {"drain_timeout_s": float("nan")},
        {"body_pause_s": -1},
    ):
        with pytest.raises(UsageError):
            ServerSettings(**wrong)
    with running(load=FakeEngine, host="no such host") as server, pytest.raises(UsageError, match="resolved"):
        server.outcome.result(PATIENCE_S)


# --- signals, in a process of its own

PROCESS = """
import asyncio, logging, sys
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.serve.local_server import serve
from ghostvis_cli.serve.settings import Served, ServerSettings

async def load():
    if sys.argv[2] == "loading":
        await asyncio.sleep(60)
    return Served(FakeEngine(delay_s=0.05))

def ready(url, served):
    tell("ready")
    try:
        while sys.argv[2] == "full":
            files.append(open("/dev/null"))
    except OSError:
        pass

files = []

def tell(what):
    sys.stdout.write(what + "\\n")
    sys.stdout.flush()

settings = ServerSettings(port=0, drain_timeout_s=float(sys.argv[1]))
if len(sys.argv) > 3:
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]), int(sys.argv[3])))
    logging.basicConfig(level="INFO")
sys.exit(asyncio.run(serve(settings, load, on_bound=tell, on_ready=ready)))
"""


class Process:
    """A server process, with a stream of `words` words running in it where asked for."""

    def __init__(
        self, drain_timeout_s: float, words: int = 0, mode: str = "ready", files: int | None = None
    ) -> None:
        command = [sys.executable, "-c", PROCESS, str(drain_timeout_s), mode]
        command += [] if files is None else [str(files)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip()
        if mode != "loading":
            assert self.process.stdout.readline() == "ready\n"
        self.connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE_S)
        if words:
            body = {"messages": [{"role": "user", "content": "w " * words}], "stream": True}
            headers = {"content-type": "application/json"}
            self.connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            self.response = self.connection.getresponse()
            assert self.response.readline().startswith(b"data: ")

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exc: object) -> None:
        self.connection.close()
        self.process.kill()
        self.process.communicate()

    def refuses_new_ones(self) -> bool:
        try:
            socket.create_connection((self.connection.host, self.connection.port), timeout=1).close()
        except ConnectionRefusedError:
            return True
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_what_runs_finish(number: int) -> None:
    with Process(10, words=20) as server:
        server.process.send_signal(number)
        eventually(server.refuses_new_ones)
        assert server.response.read().endswith(b"data: [DONE]\n\n")
        assert server.process.wait(PATIENCE_S) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""


def test_a_drain_that_takes_too_long_tells_the_client_and_still_ends_well() -> None:
    with Process(0.2, words=90) as server:
        server.process.send_signal(signal.SIGTERM)
        last = server.response.read().rstrip().rsplit(b"\n\n", 1)[-1]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
        assert server.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_process_at_once(number: int, code: int) -> None:
    with Process(30, words=90) as server:
        server.process.send_signal(signal.SIGTERM)
        eventually(server.refuses_new_ones)
        server.process.send_signal(number)
        assert server.process.wait(PATIENCE_S) == code


def test_signals_that_come_together_are_one() -> None:
    """As from `timeout`, which signals a process and then its group."""
    with Process(10, words=20) as server:
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            server.process.send_signal(number)
        assert server.response.read().endswith(b"data: [DONE]\n\n")
        assert server.process.wait(PATIENCE_S) == 0


def test_a_signal_during_the_load_ends_the_process() -> None:
    with Process(10, mode="loading") as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0


def test_connections_that_cannot_be_taken_in_are_a_line_in_the_log() -> None:
    with Process(1, mode="full", files=100) as server, ExitStack() as crowd:
        here = (server.connection.host, server.connection.port)
        for _ in range(100):
            crowd.enter_context(socket.create_connection(here, timeout=PATIENCE_S))
        assert server.process.stderr is not None
        assert server.process.stderr.readline().endswith("can't be taken in for now: Too many open files\n")
        server.process.kill()
        rest = server.process.stderr.read()
    assert "Traceback" not in rest
    assert len(rest.splitlines()) < 5


@pytest.mark.parametrize("files", [300, 40])
def test_half_requests_lock_nobody_out_and_fill_no_log(files: int) -> None:
    """More of them than the process may open; 40 are fewer than it keeps free for other things otherwise."""
    with Process(1, files=files) as server, ExitStack() as crowd:
        here = (server.connection.host, server.connection.port)
        for _ in range(400):
            half = crowd.enter_context(socket.create_connection(here, timeout=PATIENCE_S))
            with suppress(OSError):  # it may be closed already
                half.sendall(b"POST /v1")
        server.connection.request("GET", "/healthz")
        assert server.connection.getresponse().status == 200
        server.process.send_signal(signal.SIGTERM)
        _, err = server.process.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in err
        assert len(err.splitlines()) < 20
