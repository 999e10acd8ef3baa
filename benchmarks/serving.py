"""What talking to a server costs, and what being one costs.

    python -m benchmarks.serving [--repeats 7]

Client: CPU time of this process per streamed token, of the remote engine and of a bare httpx2 loop (aiter_lines,
json.loads, the text of the delta) that reads the same stream. A scripted server in a process of its own sends
events as `ghostvis serve` does, each in a write of its own: as fast as they go, at a pace (every event wakes the
client), and to 256 streams that it answers only once all of them are there. Target: at most 1.5x the bare loop.

Server: requests/s of `ghostvis serve --engine local --source demo`, a process of its own, asked by 32 workers over
32 connections, and of the same engine in a process without a server, asked by 32 tasks. Greedy; the prompts of a
round are the same for both and new to their caches; both decode each request's image. Target: at least 0.85x.

The two of a pair take turns in one run and swap places from pair to pair; what is reported is the pair's ratio.
"""

import asyncio
import functools
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.report import Spread, machine, parser_of
from ghostvis_cli import demo
from ghostvis_cli.engines.base import Engine, GenerateRequest, Sampling, complete
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
from ghostvis_cli.images import EncodedImage, load_image
from ghostvis_cli.prompt import Message

CPU_TARGET, RATE_TARGET = 1.5, 0.85
WORDS = (" a", " red", " circle", " above", " the", " é", " 形", ' "quoted"')
HEAD = {"id": "chatcmpl-0123456789abcdef0123456789abcdef", "created": 1_700_000_000, "model": "demo"}
WORKERS = 32
SERVE = (sys.executable, "-c", "from ghostvis_cli.cli.app import main; main()", "serve")


# The client


@dataclass(frozen=True)
class Load:
    """`streams` at once, each of `tokens` events, `pause_s` apart; none begins before all are there."""

    name: str
    streams: int
    tokens: int
    pause_s: float

    @property
    def total(self) -> int:
        return self.streams * self.tokens


LOADS = (
    Load("1 stream, as fast as it goes", 1, 8192, 0.0),
    Load("8 streams, a token every 5 ms", 8, 256, 0.005),
    Load("256 streams, a token every 100 ms", 256, 24, 0.1),
)


def event(choice: dict[str, object]) -> bytes:
    shown = {**HEAD, "object": "chat.completion.chunk", "choices": [{"index": 0, **choice}], "usage": None}
    return b"data: " + json.dumps(shown, separators=(",", ":")).encode() + b"\n\n"


def events(tokens: int) -> list[bytes]:
    """An answer as `ghostvis serve` sends it to the remote engine."""
    sent = [
        event({"delta": {"content": WORDS[n % 8]}, "finish_reason": None, "logprobs": None, "token_ids": [n]})
        for n in range(tokens)
    ]
    counts = {"prompt_tokens": 9, "completion_tokens": tokens, "prompt_tokens_details": {"image_tokens": 0}}
    last = event({"delta": {}, "finish_reason": "stop", "logprobs": None})
    usage = json.dumps({**HEAD, "choices": [], "usage": counts}).encode()
    return [*sent, last, b"data: " + usage + b"\n\n", b"data: [DONE]\n\n"]


def text_of(tokens: int) -> str:
    return "".join(WORDS[n % 8] for n in range(tokens))


class Script:
    """Answers every POST with the events of its load, once as many requests are here as the load has streams."""

    def __init__(self, load: Load) -> None:
        self.load, self.here, self.all_here = load, 0, asyncio.Event()
        self.chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in events(load.tokens)]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                await self._together()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
                writer.write(b"transfer-encoding: chunked\r\n\r\n")
                for chunk in self.chunks:
                    writer.write(chunk)
                    await writer.drain()
                    await asyncio.sleep(self.load.pause_s)
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, OSError):
            writer.close()

    async def _together(self) -> None:
        self.here += 1
        waited_for = self.all_here
        if self.here == self.load.streams:
            waited_for.set()
            self.here, self.all_here = 0, asyncio.Event()
        await waited_for.wait()


def serve_script(load: Load, port: Pipe) -> None:
    async def serve() -> None:
        server = await asyncio.start_server(Script(load).serve, "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


@contextmanager
def scripted(load: Load) -> Iterator[str]:
    """The address of a server of this load, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve_script, args=(load, theirs), daemon=True
    )
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


Reader = Callable[[str, Load], Coroutine[Any, Any, list[str]]]


async def bare(url: str, load: Load) -> list[str]:
    """The texts of all streams, read in the fewest lines that httpx2 allows."""
    body = {"model": "demo", "stream": True, "messages": [{"role": "user", "content": "What is it?"}]}

    async def read(client: httpx2.AsyncClient) -> str:
        pieces = []
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    choices = json.loads(line[6:])["choices"]
                    pieces += [choice["delta"].get("content", "") for choice in choices]
        return "".join(pieces)

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        return await asyncio.gather(*(read(client) for _ in range(load.streams)))


async def ours(url: str, load: Load) -> list[str]:
    """The texts of all streams, read by the remote engine."""
    request = GenerateRequest((Message.of("user", "What is it?"),), sampling=Sampling(temperature=0))
    async with RemoteEngine(RemoteSettings(url, model="demo")) as engine:
        done = await asyncio.gather(*(complete(engine, request) for _ in range(load.streams)))
    assert all(len(one.token_ids) == load.tokens for one in done)
    return [one.text for one in done]


def cpu_us(reader: Reader, url: str, load: Load) -> float:
    """Microseconds of this process's CPU time per token."""
    before = time.process_time()
    texts = asyncio.run(reader(url, load))
    spent = time.process_time() - before
    assert texts == [text_of(load.tokens)] * load.streams, "a stream was not read to its end"
    return 1e6 * spent / load.total


def measure_client(load: Load, repeats: int) -> None:
    with scripted(load) as url:
        costs = pairs(lambda: cpu_us(ours, url, load), lambda: cpu_us(bare, url, load), repeats)
    ratio = Spread.of([mine / theirs for mine, theirs in costs])
    mine, theirs = (Spread.of(column) for column in zip(*costs, strict=True))
    missed = "" if ratio.median <= CPU_TARGET else ", MISSED"
    print(f"{load.name}: CPU per token {mine.show(1, ' us')}, bare httpx2 {theirs.show(1, ' us')};", end=" ")
    print(f"ratio {ratio.show()}, target <= {CPU_TARGET}{missed}", flush=True)


# The server


@dataclass(frozen=True)
class Question:
    """What is asked in one round: `requests` prompts that no other round has, greedy, about images or not."""

    name: str
    requests: int
    lengths: Sequence[int] | None = None  # tokens of an answer, by turns; None: to where the model stops
    images: tuple[str, ...] = ()

    def asked(self, round_: int, load: Callable[[str], EncodedImage]) -> Iterator[GenerateRequest]:
        for number in range(self.requests):
            images = [load(self.images[number % len(self.images)])] if self.images else []
            message = Message.of("user", f"{ASKED[number % len(ASKED)]} {round_} {number}", images)
            length = self.lengths[number % len(self.lengths)] if self.lengths else 64
            sampling = Sampling(max_tokens=length, temperature=0, ignore_eos=self.lengths is not None)
            yield GenerateRequest((message,), sampling=sampling)


ASKED = ("What is in this picture?", "How many shapes are there?", "What is on the left?", "Is it red?")
IMAGES = ("three-shapes.jpg", "red-circle.png", "two-circles-striped.png", "cross-and-diamond.jpg")
QUESTIONS = (
    Question("questions about images", 128, None, IMAGES),
    Question("text, 16 to 79 tokens", 128, range(16, 80)),
)


def image(name: str) -> EncodedImage:
    return load_image(Path(demo.__file__).with_name(name))


async def rate(engine: Engine, left: Iterator[GenerateRequest]) -> float:
    """Requests/s with as many in flight as there are workers."""
    done = 0

    async def work() -> None:
        nonlocal done
        for request in left:
            await complete(engine, request)
            done += 1

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(WORKERS)))
    return done / (time.perf_counter() - started)


class InProcess:
    """The local engine in a process of its own, without a server."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def rate(self, question: Question, round_: int) -> float:
        return self.pool.submit(in_process_rate, question, round_).result()


_runner: asyncio.Runner | None = None
_engine: Engine | None = None


def in_process_rate(question: Question, round_: int) -> float:
    """One loop and one engine for all rounds, as in a server."""
    global _runner, _engine
    from ghostvis_cli.engines.factory import make_engine
    from ghostvis_cli.profile import EngineSettings, ModelSettings, Profile

    if _runner is None:
        _runner = asyncio.Runner()
        profile = Profile(model=ModelSettings(source="demo"), engine=EngineSettings(kind="local"))
        _engine = _runner.run(make_engine(profile))
    assert _engine is not None
    return _runner.run(rate(_engine, question.asked(round_, image)))


@contextmanager
def served() -> Iterator[str]:
    """The address of a `ghostvis serve` that is ready."""
    command = [*SERVE, "--engine", "local", "--source", "demo", "--port", "0", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        while httpx2.get(f"{url}/readyz", trust_env=False).status_code != 200:
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


async def served_rate(url: str, question: Question, round_: int) -> float:
    requests = list(question.asked(round_, functools.cache(image)))  # the server decodes them, not we
    async with await RemoteEngine.connect(RemoteSettings(url)) as engine:
        return await rate(engine, iter(requests))


def measure_server(repeats: int) -> None:
    inside = InProcess()
    with served() as url:
        for question in QUESTIONS:
            over, direct = iter(range(1000, 2000)), iter(range(1000, 2000))  # each round the same to both
            both = pairs(
                lambda: asyncio.run(served_rate(url, question, next(over))),  # noqa: B023
                lambda: inside.rate(question, next(direct)),  # noqa: B023
                repeats,
            )
            ratio = Spread.of([a / b for a, b in both])
            over_http, in_process = (Spread.of(column) for column in zip(*both, strict=True))
            missed = "" if ratio.median >= RATE_TARGET else ", MISSED"
            print(f"{question.name}, {WORKERS} at once: {over_http.show(1, '/s')} over HTTP,", end=" ")
            print(f"{in_process.show(1, '/s')} in process; ratio {ratio.show()},", end=" ")
            print(f"target >= {RATE_TARGET}{missed}", flush=True)
    inside.pool.shutdown()


def pairs(one: Callable[[], float], other: Callable[[], float], repeats: int) -> list[tuple[float, float]]:
    """Both measured by turns, whichever was second going first the next time. The first pair is a warm-up."""
    found = []
    for turn in range(repeats + 1):
        first, second = (one, other) if turn % 2 else (other, one)
        a, b = first(), second()
        found.append((a, b) if turn % 2 else (b, a))
    return found[1:]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    print(machine(), flush=True)
    for load in LOADS:
        measure_client(load, repeats)
    measure_server(repeats)


if __name__ == "__main__":
    main()
