"""Clients of a chat server that are processes of their own: one alone is slower than SGLang on a GPU.

Each draws and encodes its share of the images before anything is timed, and keeps its share of the requests in
flight on connections of its own. They speak HTTP by hand, because what a client library does for a request takes
longer than the server does.

`python -m benchmarks.clients` is one of them: commands come as lines of JSON on stdin, answers go to stdout.
"""

import asyncio
import base64
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any
from urllib.parse import urlsplit

from ghostvis_cli.bench.workload import QUESTIONS, WORDS

WARM_UP = -1  # the number of a run that is not counted
QUESTION_WORDS = 32


@dataclass(frozen=True)
class Load:
    """`requests` of a run, `in_flight` at once. Without questions it is text of so many words."""

    seed: int
    requests: int
    in_flight: int
    questions: int = 0
    size: tuple[int, int] = (512, 384)
    words: int = 128
    output: int = 16
    temperature: float = 0.7

    def asked(self, run: int) -> list[tuple[int, str]]:
        """(image, text) of every request of a run, in order; the same for whoever asks."""
        random = Random(f"{self.seed}:{run}")
        images = [number // self.questions for number in range(self.requests)] if self.questions else []
        random.shuffle(images)
        return [(image, self._text(random)) for image in images or [0] * self.requests]

    def _text(self, random: Random) -> str:
        if self.questions:
            return " ".join([*random.choices(WORDS, k=QUESTION_WORDS - 6), random.choice(QUESTIONS)])
        return " ".join(random.choices(WORDS, k=self.words))

    def image(self, run: int, number: int) -> str:
        from ghostvis_cli.bench.images import draw

        content = draw(Random(f"{self.seed}:{run}:{number}"), *self.size, "jpeg")
        return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


@dataclass
class Result:
    """Of one run: seconds to the first piece and to the end of every answer; how busy the busiest client was."""

    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    begun_s: float = float("inf")
    ended_s: float = 0.0
    busy: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.whole_s) / (self.ended_s - self.begun_s) if self.whole_s else 0.0

    @property
    def first_ms(self) -> float:
        return 1000 * statistics.median(self.first_s) if self.first_s else 0.0

    @property
    def whole_ms(self) -> float:
        return 1000 * statistics.median(self.whole_s) if self.whole_s else 0.0

    def add(self, other: "Result") -> None:
        self.first_s += other.first_s
        self.whole_s += other.whole_s
        for what, times in other.failed.items():
            self.failed[what] = self.failed.get(what, 0) + times
        self.begun_s, self.ended_s = min(self.begun_s, other.begun_s), max(self.ended_s, other.ended_s)
        self.busy = max(self.busy, other.busy)


# --- from outside


class Clients:
    def __init__(self, processes: list["subprocess.Popen[str]"]) -> None:
        self._processes = processes

    def prepare(self, load: Load, runs: int) -> None:
        """Draw and encode what the warm-up and so many runs send."""
        self._all("prepare", load=asdict(load), runs=[WARM_UP, *range(runs)])

    def run(self, url: str, run: int) -> Result:
        whole = Result()
        for answer in self._all("run", url=url, run=run):
            whole.add(Result(**answer))
        return whole

    def _all(self, do: str, **command: Any) -> list[Any]:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in self._processes if process.stdout]


@contextmanager
def clients(count: int) -> Iterator[Clients]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.clients", str(number), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        yield Clients(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


# --- inside


class Client:
    """The `number`-th of `count`: of everything it takes each `count`-th."""

    def __init__(self, number: int, count: int) -> None:
        self._number, self._count = number, count
        self._load: Load
        self._bodies: dict[int, list[bytes]] = {}

    def answer(self, command: dict[str, Any]) -> Any:
        if command["do"] == "prepare":
            given = command["load"]
            self._load = Load(**given | {"size": tuple(given["size"])})
            self._bodies = {run: self._encoded(run) for run in command["runs"]}
            return len(self._bodies)
        return asdict(asyncio.run(self._run(command["url"], command["run"])))

    def _encoded(self, run: int) -> list[bytes]:
        """The bodies of this client's requests. A warm-up is one request for each place in flight."""
        load, drawn = self._load, dict[int, str]()
        asked = load.asked(run)[: load.in_flight if run == WARM_UP else None]
        bodies = []
        for image, text in asked[self._number :: self._count]:
            content: list[Any] = [{"type": "text", "text": text}]
            if load.questions:
                drawn[image] = drawn.get(image) or load.image(run, image)
                content.insert(0, {"type": "image_url", "image_url": {"url": drawn[image]}})
            bodies.append(json.dumps(self._body(content)).encode())
        return bodies

    def _body(self, content: list[Any]) -> dict[str, Any]:
        sampling = {
            "temperature": self._load.temperature,
            "max_tokens": self._load.output,
            "ignore_eos": True,
        }
        return {
            "model": "any",
            "stream": True,
            **sampling,
            "messages": [{"role": "user", "content": content}],
        }

    async def _run(self, url: str, run: int) -> Result:
        result, bodies = Result(begun_s=time.monotonic()), iter(self._bodies[run])
        spent_s = time.process_time()
        places = range(self._number, self._load.in_flight, self._count)
        await asyncio.gather(*(connection(url, bodies, result) for _ in places))
        result.ended_s = time.monotonic()
        result.busy = (time.process_time() - spent_s) / (result.ended_s - result.begun_s)
        return result


async def connection(url: str, bodies: Iterator[bytes], result: Result) -> None:
    """Requests one after the other on a connection that stays open, until there are none left."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    reader = writer = None
    for body in bodies:
        if writer is None:
            reader, writer = await asyncio.open_connection(host, port, limit=2**20)
        assert reader is not None
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        begun_s = time.monotonic()
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        try:
            status = await reader.readline()
            if b" 200 " not in status:
                raise ConnectionError(status.decode().strip())
            await reader.readuntil(b"data: ")
            first_s = time.monotonic()
            whole = await reader.readuntil(b"0\r\n\r\n")  # the last chunk
            if b"[DONE]" not in whole:
                raise ConnectionError("an answer without its end")
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            what = f"{type(error).__name__}: {error}"[:200]
            result.failed[what] = result.failed.get(what, 0) + 1
            writer.close()
            reader = writer = None
            continue
        result.first_s.append(first_s - begun_s)
        result.whole_s.append(time.monotonic() - begun_s)
    if writer is not None:
        writer.close()


def main() -> None:
    client = Client(int(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(client.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
