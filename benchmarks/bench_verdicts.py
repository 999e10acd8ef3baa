"""How often `bench compare` is wrong: false alarms on runs of the same thing, and a planted slow-down of 10 %.

    python -m benchmarks.bench_verdicts [--trials 1000]          # drawn noise, seconds
    python -m benchmarks.bench_verdicts --record noise.json      # real runs of the demo model, minutes; --steady
    python -m benchmarks.bench_verdicts --noise noise.json       # both kinds

A false alarm is a comparison in which any metric of the table is called better or worse. A slow-down is found
when requests/s and end-to-end p50 are both called worse, and nothing is called better.

Drawn noise: each repeat has a factor of its own that all its metrics share (log-normal), each metric one more, and
one repeat of twenty is 30 % slower. "calm" is a machine of one's own, "busy" drifts from repeat to repeat.
Real noise: the demo model, run again and again, alternately as itself and with every chunk a tenth later, counted
from its request; with --steady, a server whose tokens come at known times in the model's place. "apart" takes one
run's repeats before the other's; "interleaved" takes turns, as `bench --engines` does.
"""

import asyncio
import json
import math
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Self

from benchmarks.report import machine, parser_of
from ghostvis_cli.bench.compare import HEADLINES, Comparison, compare, sides
from ghostvis_cli.bench.schema import (
    EngineCard,
    Load,
    Manifest,
    Report,
    Run,
    WorkloadSummary,
    metric,
)
from ghostvis_cli.bench.stats import REPEATS
from ghostvis_cli.engines.base import Chunk, Engine, EngineInfo, GenerateRequest

PLANTED = 0.10
TARGET = 0.95
LOAD = Load(concurrency=1)  # of several in flight, those that are not held up would gain what one loses
PROMPTS, TOKENS = 10, 32  # of a real run: about half a second
SLICE = 12
FIGURES = [name for name in HEADLINES if name not in ("image_tokens_per_s", "goodput_per_s", "failed")]
Figures = dict[str, float | None]


# --- reports of runs that were not made for one


def report(sides_: dict[str, Sequence[Figures]]) -> Report:
    """One report, an engine for each name, a run for each dictionary of figures."""
    engines = tuple(EngineCard(name, "local", "demo", "cpu", "float32") for name in sides_)
    runs = tuple(
        Run(name, LOAD, repeat, "", 1.0, figures)
        for name, repeats in sides_.items()
        for repeat, figures in enumerate(repeats)
    )
    manifest = Manifest("benchmarks.bench_verdicts", "", "", 0, {}, {})
    return Report(manifest, WorkloadSummary("text", 0, 8, ""), engines, runs, ())


def apart(a: Sequence[Figures], b: Sequence[Figures]) -> Comparison:
    return compare(*sides({"a": report({"local": a}), "b": report({"local": b})}))


def interleaved(a: Sequence[Figures], b: Sequence[Figures]) -> Comparison:
    return compare(*sides({"both": report({"a": a, "b": b})}))


def alarmed(found: Comparison) -> bool:
    return any(each.verdict in ("better", "worse") for each in found.findings)


def found_slower(found: Comparison) -> bool:
    verdicts = {each.metric: each.verdict for each in found.findings}
    wanted = verdicts["requests_per_s"] == verdicts["e2e_p50"] == "worse"
    return wanted and "better" not in verdicts.values()


def slowed(figures: Figures, share: float = PLANTED) -> Figures:
    """The same repeat where everything took longer by a share. The machine's fixed work did not."""
    factor = {"s": 1 + share, "1/s": 1 / (1 + share)}
    return {
        name: value if value is None or name == "fixed_work" else value * factor.get(metric(name).unit, 1.0)
        for name, value in figures.items()
    }


# --- drawn noise


def drawn(random: Random, repeats: int, shared: float, own: float, drift: float) -> list[Figures]:
    """Repeats whose metrics vary together by `shared`, each by `own`; `drift` walks from repeat to repeat."""
    level, runs = random.gauss(0, drift), []
    for _ in range(repeats):
        level = 0.9 * level + random.gauss(0, drift * math.sqrt(1 - 0.81))
        hit = 0.26 if random.random() < 0.05 else 0.0
        common = level + random.gauss(0, shared) + hit
        figures: Figures = {"fixed_work": 0.01 * math.exp(level + random.gauss(0, 0.005))}
        for name in FIGURES:
            slow = common + random.gauss(0, own)
            kind = metric(name)
            if kind.unit not in ("s", "1/s"):
                figures[name] = 0.5
            else:
                figures[name] = math.exp(slow if kind.better == "lower" else -slow)
        runs.append(figures)
    return runs


KINDS = {"calm": (0.02, 0.01, 0.005), "less calm": (0.03, 0.01, 0.005), "busy": (0.03, 0.02, 0.20)}


def drawn_rates(trials: int, repeats: int, kind: str) -> tuple[float, float]:
    """Shares of trials with a false alarm, and in which the planted slow-down was found."""
    random = Random(f"{kind}:{repeats}")
    alarms = hits = 0
    for _ in range(trials):
        a, b = drawn(random, repeats, *KINDS[kind]), drawn(random, repeats, *KINDS[kind])
        alarms += alarmed(apart(a, b))
        hits += found_slower(apart(a, [slowed(each) for each in b]))
    return alarms / trials, hits / trials


# --- real noise


class Slowed:
    """An engine each of whose chunks comes later by a share of the time since its request.

    Chunks are taken as they come: waiting between them would hide behind what the engine does meanwhile.
    """

    def __init__(self, engine: Engine, share: float) -> None:
        self.engine, self.share = engine, share

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        arrivals: asyncio.Queue[tuple[float, Chunk] | None] = asyncio.Queue()

        async def read() -> None:
            try:
                async with aclosing(self.engine.generate(request)) as stream:
                    async for chunk in stream:
                        arrivals.put_nowait((loop.time() - started_s, chunk))
            finally:
                arrivals.put_nowait(None)

        reading = asyncio.create_task(read())
        try:
            while (arrival := await arrivals.get()) is not None:
                after_s, chunk = arrival
                await asyncio.sleep(started_s + (1 + self.share) * after_s - loop.time())
                yield chunk
            await reading
        finally:
            reading.cancel()

    async def aclose(self) -> None:
        await self.engine.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


@asynccontextmanager
async def an_engine(steady: bool) -> AsyncGenerator[Engine, None]:
    """The demo model in this process, or a server of known times, as steady as a device of its own."""
    from benchmarks.synthetic import Times, serving
    from ghostvis_cli.engines.factory import make_engine
    from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
    from ghostvis_cli.profile import resolve

    if steady:
        with serving(Times(0.02, 0.003)) as url:
            async with await RemoteEngine.connect(
                RemoteSettings(url, retries=0, many_connections=True)
            ) as engine:
                yield engine
    else:
        # No prefix cache: the three share an engine, and are asked the same.
        flags = {"model.source": "demo", "engine.kind": "local", "engine.prefix_cache_mb": 0}
        async with await make_engine(resolve(None, flags=flags).profile) as engine:
            yield engine


async def record(repeats: int, steady: bool, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    """`repeats` rounds of one engine, each as itself twice and slowed once, in changing order.

    What there is so far is kept every SLICE rounds: on a busy machine this takes an hour.
    """
    from ghostvis_cli.bench.lengths import Length
    from ghostvis_cli.bench.run import Plan, Progress, Target, measure
    from ghostvis_cli.bench.workload import Spec
    from ghostvis_cli.bench.workload import drawn as workload_of
    from ghostvis_cli.engines.base import Sampling

    spec = Spec(num_prompts=PROMPTS, prompt_len=Length("fixed", 40), output_len=Length("fixed", TOKENS))
    greedy = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    work = workload_of(spec, greedy, rounds=repeats, warm_up=8)
    async with an_engine(steady) as engine:
        names: dict[str, Any] = {"a": engine, "b": engine, "slow": Slowed(engine, PLANTED)}
        targets = [Target(name, each) for name, each in names.items()]
        found: list[dict[str, Any]] = []
        for start in range(0, repeats, SLICE):
            part = replace(work, rounds=work.rounds[start : start + SLICE])
            runs = await measure(targets, part, Plan((LOAD,), len(part.rounds)), Progress())
            found += [{"engine": run.engine, "figures": run.figures} for run in runs]
            keep(found)


def real_rates(runs: Sequence[dict[str, Any]], repeats: int) -> dict[str, tuple[float, float, int]]:
    """Shares of false alarms and of finds, and how many trials, for runs apart and interleaved."""
    by_name: dict[str, list[Figures]] = {"a": [], "b": [], "slow": []}
    for run in runs:
        by_name[run["engine"]].append(run["figures"])
    a, b, slow = by_name.values()
    count = len(a)
    kinds: dict[str, tuple[Callable[..., Comparison], int, int]] = {
        "apart": (apart, repeats, 2 * repeats),
        "interleaved": (interleaved, 0, repeats),
    }
    rates = {}
    for name, (way, later, needed) in kinds.items():
        # Trials overlap where there are too few runs for a hundred that do not.
        starts = range(0, count - needed + 1, max(1, min(needed, (count - needed) // 100)))
        alarms = sum(alarmed(way(a[s : s + repeats], b[s + later : s + later + repeats])) for s in starts)
        hits = sum(
            found_slower(way(a[s : s + repeats], slow[s + later : s + later + repeats])) for s in starts
        )
        rates[name] = alarms / len(starts), hits / len(starts), len(starts)
    return rates


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--repeats", type=int, nargs="*", default=[5, REPEATS])
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=400, help="of --record")
    parser.add_argument("--steady", action="store_true", help="--record a server of known times")
    parser.add_argument("--noise", type=Path, metavar="FILE")
    options = parser.parse_args()
    print(machine())
    if options.record:

        def keep(runs: list[dict[str, Any]]) -> None:
            options.record.write_text(json.dumps(runs))

        asyncio.run(record(options.rounds, options.steady, keep))
        return 0
    missed = []
    for repeats in options.repeats:
        for kind in KINDS:
            alarms, hits = drawn_rates(options.trials, repeats, kind)
            print(f"drawn, {kind}, {repeats} repeats: {alarms:.1%} false alarms, {hits:.1%} found")
            if repeats == REPEATS and (1 - alarms < TARGET or (kind == "calm" and hits < TARGET)):
                missed.append(f"drawn, {kind}")
    if options.noise:
        runs = json.loads(options.noise.read_text())
        for repeats in options.repeats:
            for name, (alarms, hits, trials) in real_rates(runs, repeats).items():
                print(
                    f"real, {name}, {repeats} repeats, {trials} trials: {alarms:.1%} false alarms, {hits:.1%} found"
                )
    for line in missed:
        print(f"missed: {line}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
