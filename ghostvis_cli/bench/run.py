"""Load on an engine, and a record of every request. Closed loop: so many in flight. Open loop: on a schedule.

Nothing is repeated, nothing waits for the server but what the load says, and the client watches itself: how late
its event loop runs and how busy it is. Knows engines only by their protocol.
"""

import asyncio
import gc
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from random import Random
from typing import TypeVar

from ghostvis_cli import processor_use
from ghostvis_cli.bench import metrics
from ghostvis_cli.bench.arrivals import schedule
from ghostvis_cli.bench.machine import Gpu
from ghostvis_cli.bench.schema import Load, Record, Run
from ghostvis_cli.bench.steady import fixed_work
from ghostvis_cli.bench.timed import now, timed
from ghostvis_cli.bench.workload import Item, Workload
from ghostvis_cli.engines.base import Engine, GenerateRequest
from ghostvis_cli.errors import EngineError, GhostvisError

T = TypeVar("T")

LAG_PERIOD_S = 0.005
TICK_S = 0.001  # epoll's: it waits for whole milliseconds
# A server that died answers thousands of requests a second with a refusal, for as long as --duration says.
GIVE_UP = 1_000
# Beyond these, figures say more about the client than about the server.
BUSY_SHARE = 0.9
LOOP_LATE_S = 0.02
SENT_LATE_S, SENT_LATE_OF_TTFT = 0.005, 0.1


@dataclass(frozen=True)
class Plan:
    """Each load point is measured `repeats` times on every engine, the engines in turn."""

    loads: tuple[Load, ...] = (Load(concurrency=1),)
    repeats: int = 1
    duration_s: float | None = None  # None: until every row of the run was asked
    seed: int = 42
    slo: Mapping[str, float] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return len(self.loads) * self.repeats


@dataclass
class Target:
    """An engine under a name, and the images that were sent to it."""

    name: str
    engine: Engine
    gpu_is_here: bool = True
    seen: set[str] = field(default_factory=set)
    lost: int = 0  # requests in a row that found no engine
    port: int | None = None  # of a server on this machine

    @property
    def in_process(self) -> bool:
        return self.engine.info.kind in ("local", "sglang")


@dataclass
class Progress:
    """How far the measurement is, for the progress line."""

    what: str = ""
    total: int | None = None
    done: int = 0
    failed: int = 0
    tokens: int = 0
    started_s: float = 0.0

    def begin(self, what: str, total: int | None) -> None:
        self.what, self.total, self.started_s = what, total, now()
        self.done = self.failed = self.tokens = 0

    def line(self) -> str:
        """ "local · concurrency=4 · 2/3 · 312/1,000 · 2 failed · 29.2 requests/s · 812 tokens/s"."""
        seconds = max(now() - self.started_s, 1e-9)
        parts = [self.what, f"{self.done:,}" + ("" if self.total is None else f"/{self.total:,}")]
        parts += [f"{self.failed:,} failed"] if self.failed else []
        parts += [f"{self.done / seconds:.1f} requests/s", f"{self.tokens / seconds:.0f} tokens/s"]
        return " · ".join(parts)


async def measure(
    targets: Sequence[Target],
    workload: Workload,
    plan: Plan,
    progress: Progress,
    runs: list[Run] | None = None,
) -> list[Run]:
    """Every run of the plan. Engines take turns within a repeat, each repeat beginning with another.

    Each is appended to `runs` as it ends, so that what was measured outlives what cuts the rest short.
    """
    runs = [] if runs is None else runs
    for point, load in enumerate(plan.loads):
        for target in targets:
            progress.begin(f"{target.name} · {load.name} · warm-up", len(workload.warm_up))
            await warm_up(target, workload.warm_up, load, progress)
        for repeat in range(plan.repeats):
            number = point * plan.repeats + repeat
            turn = repeat % len(targets)
            for target in (*targets[turn:], *targets[:turn]):
                items = workload.rounds[number]
                if not target.in_process:
                    workload.gallery.encode(url for item in items for url in item.sources)
                total = len(items) if plan.duration_s is None else None
                progress.begin(f"{target.name} · {load.name} · {repeat + 1}/{plan.repeats}", total)
                await run_once(target, items, load, plan, repeat, progress, runs)
    return runs


async def warm_up(target: Target, items: Sequence[Item], load: Load, progress: Progress) -> None:
    """Requests that are not measured, as many in flight. Raises the first error where none succeeded."""
    if not items:
        return
    client = Client(target, progress)
    at_once = min(load.concurrency or len(items), len(items))
    failures: list[GhostvisError] = []
    await client.closed(items, Load(concurrency=at_once), None, failures)
    if len(failures) == len(items):
        raise failures[0]


async def run_once(
    target: Target,
    items: Sequence[Item],
    load: Load,
    plan: Plan,
    repeat: int,
    progress: Progress,
    runs: list[Run],
) -> None:
    """Append one run; where it is cancelled, of the requests that had ended by then, if any."""
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    client, lag, gpu = Client(target, progress), LoopWatch(), Gpu(target.gpu_is_here)
    server = processor_use.Watch(target.port) if target.port is not None else None
    work_s = fixed_work()
    whole = False
    try:
        with _no_garbage_collection(), gpu:
            async with lag:
                if load.request_rate is None:
                    await client.closed(items, load, plan.duration_s)
                else:
                    offsets = schedule(load, Random(f"{plan.seed}:{repeat}:arrivals"))
                    await client.open(items, load, offsets, plan.duration_s)
        whole = True
    finally:
        if records := client.records:
            uses = server.uses() if server is not None else []
            around = lag.figures() | gpu.figures() | {"fixed_work": (work_s + fixed_work()) / 2}
            figures = metrics.figures(records, plan.slo) | around
            runs.append(
                Run(
                    engine=target.name,
                    load=load,
                    repeat=repeat,
                    started_at=started_at,
                    duration_s=metrics.duration(records),
                    figures=figures,
                    failures=metrics.failures(records),
                    records=tuple(records),
                    notes=(
                        *_first_failures(records, target.name, load),
                        *_doubts(figures, load, target, records, len(items)),
                        *_full_cores(uses, load, target),
                    ),
                    cut_short=not whole,
                )
            )


class Client:
    """All requests of one run. Times in records are relative to its beginning."""

    def __init__(self, target: Target, progress: Progress) -> None:
        self._target, self._progress = target, progress
        self._start_s = now()
        self._gone: EngineError | None = None
        self.records: list[Record] = []

    async def closed(
        self,
        items: Sequence[Item],
        load: Load,
        duration_s: float | None,
        failures: list[GhostvisError] | None = None,
    ) -> None:
        """`load.concurrency` requests in flight; the next is sent when one ends."""
        concurrency = load.concurrency or 1
        ready = _ready(items, again=duration_s is not None)
        self._start_s = now()
        waiting = ready if duration_s is None else _until(self._start_s + duration_s, ready)

        async def work(after_s: float) -> None:
            if after_s:
                await asyncio.sleep(after_s)
            for item, request in waiting:
                await self._ask(item, request, now(), failures)
                self._check_alive()

        async with together() as tasks:
            for n in range(concurrency):
                tasks.create_task(work(load.ramp_up_s * n / concurrency))

    async def open(
        self, items: Sequence[Item], load: Load, offsets: Iterable[float], duration_s: float | None
    ) -> None:
        """Send requests at their scheduled times, whether or not earlier ones have ended."""
        places = asyncio.Semaphore(load.concurrency) if load.concurrency else None
        ready = _ready(items, again=duration_s is not None)
        self._start_s = now()
        async with together() as tasks:
            for (item, request), offset in zip(ready, offsets, strict=False):
                if duration_s is not None and offset >= duration_s:
                    break
                self._check_alive()
                due_s = self._start_s + offset
                await _sleep_until(due_s)
                tasks.create_task(self._ask_in_turn(item, request, due_s, places))

    def _check_alive(self) -> None:
        if self._gone is not None:
            raise self._gone

    async def _ask_in_turn(
        self, item: Item, request: GenerateRequest, due_s: float, places: asyncio.Semaphore | None
    ) -> None:
        async with places or nullcontext():
            await self._ask(item, request, due_s)

    async def _ask(
        self, item: Item, request: GenerateRequest, due_s: float, failures: list[GhostvisError] | None = None
    ) -> None:
        images = item.images
        seen = sum(image in self._target.seen for image in images)
        self._target.seen.update(images)
        record, error = await timed(self._target.engine, request, due_s, self._start_s)
        self.records.append(replace(record, id=item.id, images=len(images), images_seen=seen))
        if error is not None and failures is not None:
            failures.append(error)
        self._target.lost = self._target.lost + 1 if isinstance(error, EngineError) else 0
        if isinstance(error, EngineError) and self._target.lost >= GIVE_UP:
            self._gone = error
        self._progress.done += 1
        self._progress.failed += error is not None
        self._progress.tokens += record.completion_tokens or 0


async def _sleep_until(due_s: float) -> None:
    """Sleep until a time. epoll wakes up to a tick late, so the last tick is spent yielding to other tasks."""
    if (wait_s := due_s - now()) <= 0:
        return
    awake_s = TICK_S if wait_s > 2 * TICK_S else 0.0  # at shorter gaps nothing but waiting would be done
    await asyncio.sleep(wait_s - awake_s)
    while awake_s and now() < due_s:  # noqa: ASYNC110 (an Event would need the timer that is late)
        await asyncio.sleep(0)


def _ready(items: Sequence[Item], *, again: bool) -> Iterator[tuple[Item, GenerateRequest]]:
    """Rows with their requests, made now; `again`: then over and over, each made anew as it comes.

    None is kept: what an engine in this process decodes of an image stays with its request.
    """
    made = deque((item, item.request()) for item in items)

    def each() -> Iterator[tuple[Item, GenerateRequest]]:
        while made:
            yield made.popleft()
        while again and items:
            yield from ((item, item.request()) for item in items)

    return each()


def _until(end_s: float, ready: Iterator[T]) -> Iterator[T]:
    for each in ready:
        if now() >= end_s:
            return
        yield each


@asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """Run requests at once. An exception that is no GhostvisError is a bug: it ends all of them and is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


# --- the client itself


class LoopWatch:
    """How late the event loop runs what is due, and the share of time it is busy."""

    def __init__(self) -> None:
        self.late_s: list[float] = []
        self._wall_s = self._cpu_s = 0.0

    async def __aenter__(self) -> "LoopWatch":
        self._wall_s, self._cpu_s = now(), time.thread_time()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        self._wall_s, self._cpu_s = now() - self._wall_s, time.thread_time() - self._cpu_s

    async def _watch(self) -> None:
        while True:
            before = now()
            await asyncio.sleep(LAG_PERIOD_S)
            self.late_s.append(now() - before - LAG_PERIOD_S)

    def figures(self) -> metrics.Figures:
        busy = self._cpu_s / self._wall_s if self._wall_s > 0 else None
        return {"loop_lag_p99": metrics.spread(self.late_s)["p99"], "loop_busy": busy}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage after the run, not in it: a collection stops the event loop."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        gc.collect()


def _first_failures(records: Sequence[Record], name: str, load: Load) -> Iterator[str]:
    """One message for each kind of failure."""
    told: set[str] = set()
    for record in records:
        if record.error is not None and record.error not in told:
            told.add(record.error)
            yield f"{name} at {load.name}: request {record.id} failed: {record.error_message or record.error}"


def _doubts(
    figures: metrics.Figures, load: Load, target: Target, records: Sequence[Record], rows: int
) -> Iterator[str]:
    """What a reader must know before believing this run."""
    hidden = sum(record.hidden_tokens for record in records)
    if len(records) > rows:
        again = f"the {rows} rows of a run were asked more than once"  # how often differs from run to run
        yield f"{target.name} at {load.name}: {again}, and a cache may know them"
    if hidden:
        unsent = f"{hidden:,} reasoning tokens were never sent"
        yield f"{target.name} at {load.name}: {unsent}, so ttft holds the time that they took"
    late, busy = figures["loop_lag_p99"] or 0.0, figures["loop_busy"] or 0.0
    sent_late, ttft = figures["send_lag_p99"] or 0.0, figures["ttft_p50"] or 0.0
    on_schedule = load.request_rate is None or load.concurrency is not None
    signs = [f"its event loop was busy {busy:.0%} of the time"] if busy > BUSY_SHARE else []
    signs += [f"it ran {1000 * late:.0f} ms late at p99"] if late > LOOP_LATE_S else []
    if not on_schedule and sent_late > max(SENT_LATE_S, SENT_LATE_OF_TTFT * ttft):
        signs.append(f"it sent requests {1000 * sent_late:.0f} ms late at p99")
    if signs:
        cause = "the engine shares this process" if target.in_process else "the client was the bottleneck"
        yield f"{target.name} at {load.name}: {cause.upper()}: {', '.join(signs)}"


def _full_cores(uses: Sequence[processor_use.Use], load: Load, target: Target) -> Iterator[str]:
    if found := processor_use.limit(uses):
        yield f"{target.name} at {load.name}: {found.message}; what helps: {found.fix}"
