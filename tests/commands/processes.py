"""Real `ghostvis` processes for the tests, and a server in a thread for them to talk to."""

import asyncio
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engines.scripted import CARD, Reply, ScriptedServer, ending, lines, usage, words

GHOSTVIS = str(Path(sys.executable).with_name("ghostvis"))
PATIENCE_S = 60.0  # how long a busy machine may take; what a test promises about time it measures itself
PAGES = {"/v1/models": {"object": "list", "data": [CARD]}}


def saying(*pieces: str, **reply: Any) -> Reply:
    """An answer in these pieces, whole."""
    return Reply((*(lines(word) for word in words(*pieces)), lines(ending(), usage(), "[DONE]")), **reply)


def hanging(*pieces: str) -> Reply:
    """An answer that begins with these pieces and never ends."""
    return Reply(tuple(lines(word) for word in words(*pieces)), end="hang")


@contextmanager
def scripted(
    *replies: Reply, pages: dict[str, Any] = PAGES, tls: ssl.SSLContext | None = None
) -> Iterator[ScriptedServer]:
    """An OpenAI-compatible server that says what `replies` say, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = ScriptedServer(*replies, pages=pages)
    asyncio.run_coroutine_threadsafe(server.start(tls=tls), loop).result()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(server: ScriptedServer) -> None:
    await server.stop()
    answers = asyncio.all_tasks() - {asyncio.current_task()}
    for answer in answers:
        answer.cancel()
    await asyncio.gather(*answers, return_exceptions=True)


def at(server: ScriptedServer) -> list[str]:
    """The options that send a command to `server`, and make it give up at the first refusal."""
    return ["--base-url", server.url, "--set", "engine.retries=0"]


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment, `ghostvis` first on the path, with these changes; None takes one out."""
    kept = os.environ | {"PATH": f"{Path(GHOSTVIS).parent}:{os.environ['PATH']}"}
    return {name: value for name, value in {**kept, **changes}.items() if value is not None}


def run(*args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """`ghostvis ARGS` to its end, with nothing on stdin and no terminal anywhere."""
    return _to_the_end([GHOSTVIS, *args], **options)


def bash(script: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return _to_the_end(["bash", "-c", script], **options)


def _to_the_end(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    usual: dict[str, Any] = {"stdin": subprocess.DEVNULL, "env": environment(), "start_new_session": True}
    options = usual | options
    if "input" in options:
        del options["stdin"]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE_S, **options)


class Running:
    """`ghostvis ARGS` under way, in a session of its own: as from cron, and with no children outside it."""

    def __init__(self, *args: str, **options: Any) -> None:
        usual: dict[str, Any] = {"stdin": subprocess.DEVNULL, "env": environment(), "start_new_session": True}
        pipe = subprocess.PIPE
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [GHOSTVIS, *args], stdout=pipe, stderr=pipe, **(usual | options)
        )

    def read(self, text: str) -> str:
        """Wait for this text on stdout; what came until its end."""
        assert self.process.stdout is not None
        found = b""
        while not found.endswith(text.encode()):
            piece = os.read(self.process.stdout.fileno(), 1)
            assert piece, f"stdout ended after {found!r}: {self.process.communicate()[1].decode()}"
            found += piece
        return found.decode()

    def line(self) -> str:
        """The next line on stdout, without its end."""
        return self.read("\n").rstrip("\n")

    def write(self, text: str) -> None:
        """On stdin, which is a pipe then."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def send(self, number: signal.Signals) -> "Ended":
        """The signal, and how the process ended after it."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> "Ended":
        started_s = time.monotonic()
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return Ended(self.process, out.decode(), err.decode(), time.monotonic() - started_s)


class Ended:
    def __init__(self, process: "subprocess.Popen[bytes]", out: str, err: str, took_s: float) -> None:
        self.code, self.out, self.err, self.took_s = process.returncode, out, err, took_s
        self._session = process.pid

    @property
    def left_processes(self) -> bool:
        try:
            os.killpg(self._session, 0)
        except ProcessLookupError:
            return False
        return True


@contextmanager
def running(*args: str, **options: Any) -> Iterator[Running]:
    started = Running(*args, **options)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


def until(condition: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s, "it did not happen"
        time.sleep(0.01)
