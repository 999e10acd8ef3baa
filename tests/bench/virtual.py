"""An event loop whose clock jumps to the next timer, and an engine with known times: measurements without noise."""

import asyncio
import selectors
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar
from unittest.mock import patch

from ghostvis_cli.bench import run as bench_run
from ghostvis_cli.bench.lengths import Length
from ghostvis_cli.bench.run import Plan, Progress, Target, measure
from ghostvis_cli.bench.schema import Run
from ghostvis_cli.bench.workload import Spec, Workload, drawn
from ghostvis_cli.engines.base import Chunk, EngineInfo, GenerateRequest, Sampling, Usage

T = TypeVar("T")


class _Jumping(selectors.SelectSelector):
    """Waits for nothing: where no socket is ready, time passes at once."""

    clock_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            self.clock_s += timeout or 0.0
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.clock_s


def run(work: Coroutine[Any, Any, T]) -> T:
    """With timers that are exact, and a clock that stands still while anybody stays awake."""
    with patch.object(bench_run, "TICK_S", 0.0), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


@dataclass
class TimedEngine:
    """Token k comes `first_s + k * gap_s` after the request; with a stall, nothing comes until its end.

    `failing` says of a prompt which error it meets, if any. Keeps what it was sent and when.
    """

    first_s: float = 0.05
    gap_s: float = 0.01
    tokens_per_chunk: int = 1
    stall: tuple[float, float] | None = None
    failing: Callable[[GenerateRequest], BaseException | None] = lambda request: None
    counts_tokens: bool = True
    names_ids: bool = True
    tokenizer: None = None
    server: None = None
    thinks: int = 0  # of the first tokens, so many are reasoning
    hides: int = 0  # reasoning tokens that are counted and not sent
    running: int = 0
    most_running: int = 0
    sent: list[tuple[float, GenerateRequest]] = field(default_factory=list)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("fake", "timed", "none", "none", context_tokens=None)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        loop = asyncio.get_running_loop()
        arrived_s = loop.time()
        self.sent.append((arrived_s, request))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            tokens = request.sampling.max_tokens
            for start in range(0, tokens, self.tokens_per_chunk):
                await self._until(arrived_s + self.first_s + start * self.gap_s)
                if (error := self.failing(request)) is not None:
                    raise error
                count = min(self.tokens_per_chunk, tokens - start)
                ids = (1,) * count if self.names_ids else ()
                thinking = start < self.thinks
                yield Chunk("", ids, reasoning="t") if thinking else Chunk("w" * count, ids)
            ids = () if self.names_ids else (1,) * tokens
            usage = Usage(7, tokens + self.hides) if self.counts_tokens else Usage(0, 0)
            yield Chunk("", ids, finish_reason="length", usage=usage, reasoning_tokens=self.hides or None)
        finally:
            self.running -= 1

    async def _until(self, due_s: float) -> None:
        if self.stall is not None and self.stall[0] <= due_s < self.stall[1]:
            due_s = self.stall[1]
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        loop.call_at(due_s, done.set_result, None)
        await done

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None: ...


def workload(
    requests: int, tokens: str = "16", *, rounds: int = 1, warm_up: int = 0, **spec: Any
) -> Workload:
    drawing = Spec(num_prompts=requests, output_len=Length.parse(tokens, "--output-len"), **spec)
    return drawn(drawing, Sampling(temperature=0.0), rounds=rounds, warm_up=warm_up)


def measured(plan: Plan, work: Workload, *engines: TimedEngine) -> list[Run]:
    """Every run, in the order they were made; engines are called a, b, c."""

    async def all_runs() -> list[Run]:
        targets = [
            Target(name, engine, gpu_is_here=False) for name, engine in zip("abc", engines, strict=False)
        ]
        return await measure(targets, work, plan, Progress())

    return run(all_runs())
