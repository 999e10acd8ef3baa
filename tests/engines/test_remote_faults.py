"""`ghostvis generate` against servers that fail: the documented code, one line, in bounded time and memory.

Real processes and real sockets. What each failure is called in detail is in test_remote.py and test_connection.py.
"""

import asyncio
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.commands.processes import PAGES, PATIENCE_S, run
from tests.engines.scripted import HELLO, Reply, Serve, ending, lines, refusal, usage, words
from tests.limits import limit
from tests.sites import nobody_accepts, nobody_listens, server_tls

MOST_MEMORY_BYTES = 256 << 20  # of data; an answer takes a process that is well under 100 MB
QUICKLY_S = 30.0  # a start on a busy machine included
HTML = {"Content-Type": "text/html"}
JSON = {"Content-Type": "application/json"}


class Gigabyte:
    """A body of 1 GiB in pieces of 64 KiB."""

    def __init__(self, begin: bytes = b"", piece: bytes = b"x" * 65_536) -> None:
        self.begin, self.piece = begin, piece

    def __iter__(self) -> Iterator[bytes]:
        yield self.begin or self.piece
        for _ in range((1 << 30) // len(self.piece)):
            yield self.piece


def gigabyte(*args: bytes, **options: Any) -> Reply:
    return Reply(Gigabyte(*args), **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Fault:
    """What the server says to a request, or to the question for its models, and what the command makes of it."""

    code: int
    says: str
    reply: Reply = field(default_factory=Reply)
    models: Any = field(default_factory=lambda: PAGES["/v1/models"])
    timeout_s: float = PATIENCE_S


TOKEN = lines(*words("a"))
LONG_TOKEN = lines(*words("x" * 60_000))
FAULTS = {
    "reset in the middle": Fault(5, "in the middle of the answer", Reply((TOKEN,), end="reset")),
    "closed in the middle": Fault(5, "in the middle of the answer", Reply((TOKEN,))),
    "reset before the token counts": Fault(
        5, "in the middle of the answer", Reply((lines(*words("a"), ending()),), end="reset", pause_s=0.1)
    ),
    "reset at once": Fault(5, "gave no answer", Reply(silent=True, end="reset")),
    "stalled": Fault(5, "has sent no data for", Reply((TOKEN,), end="hang"), timeout_s=0.5),
    "silent": Fault(5, "has not answered", Reply(silent=True), timeout_s=0.5),
    "slow": Fault(5, "was given 2 s", Reply((TOKEN,) * 1000, pause_s=0.05), timeout_s=2),
    "401": Fault(6, "with 401: no", refusal(401, {"error": "no"})),
    "401 for the models": Fault(6, "with 401: no", models=refusal(401, {"error": "no"})),
    "404": Fault(6, "with 404: no", refusal(404, {"error": "no"})),
    "404 for the models": Fault(6, "/v1/models with 404", models=refusal(404, {"error": "no"})),
    "413": Fault(6, "with 413: no", refusal(413, {"error": "no"})),
    "429": Fault(6, "with 429: no", refusal(429, {"error": "no"})),
    "500": Fault(6, "with 500: no", refusal(500, {"error": "no"})),
    "503": Fault(5, "with 503: no", refusal(503, {"error": "no"})),
    "a page": Fault(6, "text/html, no stream: <html>", Reply((b"<html>log in</html>",), headers=HTML)),
    "a page for the models": Fault(5, "no list of models", models=Reply((b"<html>",), headers=HTML)),
    "half an event": Fault(6, "unknown shape", Reply((lines('{"choices": [{"de'),))),
    "half a list of models": Fault(5, "no list of models", models=Reply((b'{"data": [',), headers=JSON)),
    "JSON in place of a stream": Fault(6, "application/json, no stream", Reply((b"{}",), headers=JSON)),
    "a stream called plain text": Fault(
        6, "text/plain, no stream", Reply((HELLO,), headers={"Content-Type": "text/plain"})
    ),
    "1 GB for the models": Fault(5, "no list of models", models=gigabyte(headers=JSON)),
    "1 GB of a list of models": Fault(5, "no list of models", models=gigabyte(b'{"data": ["', headers=JSON)),
    "1 GB of refusal": Fault(6, "with 500: xxx", gigabyte(status=500)),
    "1 GB of JSON in place of a stream": Fault(6, "no stream: xxx", gigabyte(headers=JSON)),
    "1 GB in one line": Fault(6, "an event of more than", gigabyte(b"data: ")),
    "1 GB in one event": Fault(
        6, "an event of more than", gigabyte(TOKEN, b"data: " + b"x" * 65_000 + b"\n")
    ),
    "1 GB of tokens": Fault(6, "sent far more than was asked for", gigabyte(LONG_TOKEN, LONG_TOKEN)),
    "1 GB of nothing": Fault(5, "was given 2 s", gigabyte(TOKEN, b": ping\n\n" * 8192), timeout_s=2),
    "a stream whose end never comes": Fault(
        5, "was given 2 s", Reply((lines(*words("a"), ending()),), end="hang"), timeout_s=2
    ),
}


async def generate(url: str, *options: str) -> tuple[int, str]:
    """The exit code, and what stood on stderr; stdout may hold the beginning of an answer."""
    args = ["generate", "--base-url", url, "--set", "engine.retries=0", "hi"]
    little, started_s = limit(resource.RLIMIT_DATA, MOST_MEMORY_BYTES), time.monotonic()
    done = await asyncio.to_thread(run, *args, *options, preexec_fn=little)
    assert time.monotonic() - started_s < QUICKLY_S
    return done.returncode, done.stderr.decode()


def is_one_error(said: str) -> bool:
    error, *hint = said.splitlines()
    return (
        error.startswith("ghostvis: error: ")
        and len(error) < 800
        and len(hint) <= 1
        and all(line.startswith("hint: ") for line in hint)
    )


@pytest.mark.parametrize("name", FAULTS)
async def test_a_server_that_fails_gives_the_documented_code_and_one_line(name: str, serve: Serve) -> None:
    fault = FAULTS[name]
    server = await serve(fault.reply, pages={"/v1/models": fault.models})
    code, said = await generate(server.url, "--set", f"engine.timeout_s={fault.timeout_s}")
    assert (code, is_one_error(said)) == (fault.code, True), said
    assert fault.says in said


async def test_a_server_that_is_not_there_is_code_5() -> None:
    code, said = await generate(nobody_listens())
    assert (code, is_one_error(said), "Connection refused" in said) == (5, True, True)


async def test_a_port_that_takes_no_connection_is_code_5() -> None:
    with nobody_accepts() as url:
        code, said = await generate(url, "--set", "engine.connect_timeout_s=0.2")
    assert (code, is_one_error(said), "no connection within" in said) == (5, True, True)


async def test_an_unknown_certificate_is_code_5(serve: Serve, certificates: Path) -> None:
    server = await serve(tls=server_tls(certificates))
    code, said = await generate(server.url)
    assert (code, is_one_error(said), "CERTIFICATE_VERIFY_FAILED" in said) == (5, True, True)


async def test_an_answer_is_whole_with_its_token_counts_however_the_connection_ends(serve: Serve) -> None:
    whole = (lines(*words("a"), ending(), usage()),)
    server = await serve(Reply(whole, end="reset", pause_s=0.1), pages=PAGES)
    assert (await generate(server.url))[0] == 0


async def test_a_slow_server_that_ends_in_time_is_answered(serve: Serve) -> None:
    pieces = tuple(lines(piece) for piece in [*words("slow", "ly"), ending(), "[DONE]"])
    server = await serve(Reply(pieces, pause_s=0.1), pages=PAGES)
    assert (await generate(server.url))[0] == 0
