"""Whether `ghostvis bench` measures right: its figures against a server whose every token comes at a known time.

    python -m benchmarks.bench_accuracy

The target: every latency within 2 ms or 1 % of its closed form, whichever is more; an open loop at 500 requests a
second with 1,000 in flight sent within 5 ms of its schedule at p99; a server that stalls for 2 s shown in p99.
The greatest of all values (max) is left out: one preempted moment decides it. Half a minute. Wants two cores for
itself; on a busy machine it measures the neighbours, unless it goes before them: chrt -f 20 python -m ...
"""

import asyncio
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import machine
from benchmarks.synthetic import PROMPT_TOKENS, Times, serving
from ghostvis_cli.bench import metrics
from ghostvis_cli.bench.lengths import Length
from ghostvis_cli.bench.run import Plan, Progress, Target, measure
from ghostvis_cli.bench.schema import LATENCIES, Load, Record, Run
from ghostvis_cli.bench.workload import Spec, drawn
from ghostvis_cli.engines.base import Sampling
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings

OFF_S, OFF_SHARE = 0.002, 0.01
LAG_S = 0.005
OPEN_FILES = 4096


@dataclass(frozen=True)
class Case:
    """A load on a server of known times; tokens of an answer are drawn from `output`."""

    name: str
    times: Times
    load: Load
    requests: int
    output: Length
    connections: int = 100
    warm_up: int = 8


CASES = (
    Case("one token a chunk", Times(0.05, 0.01), Load(4), 80, Length("fixed", 16)),
    Case("four tokens a chunk", Times(0.2, 0.005, 4), Load(8), 80, Length("fixed", 64)),
    Case("answers of 2 to 40 tokens", Times(0.03, 0.004), Load(8), 240, Length("uniform", 2, 40)),
    Case("50 requests a second", Times(0.1, 0.01), Load(None, 50, "poisson"), 300, Length("fixed", 16)),
)
CROWD = Case(
    "500 a second, 1,000 in flight",
    Times(1.93, 0.01),
    Load(None, 500, "constant"),
    5000,
    Length("fixed", 8),
    connections=2000,
)
STALL = Case(
    "a server that stalls for 2 s",
    Times(0.05, 0.01, stall=(2.0, 4.0)),  # from the first request, so none may come before the run
    Load(None, 100, "constant"),
    800,
    Length("fixed", 8),
    connections=400,
    warm_up=0,
)


def main() -> int:
    _allow_open_files()
    print(f"{machine()}; load average {os.getloadavg()[0]:.1f}")
    missed = sum(_latencies(case) for case in CASES)
    missed += _crowd(CROWD)
    missed += _stall(STALL)
    print("all within their targets" if not missed else f"{missed} figures missed their targets")
    return int(bool(missed))


def _latencies(case: Case) -> int:
    """How many figures are off; each printed."""
    run = _measured(case)
    expected = metrics.figures([_known(record, case.times) for record in run.records])
    worst, off = _compare(case, run, expected)
    rates = [name for name in expected if name.endswith("_per_s") and expected[name]]
    share = max(abs((run.figures[name] or 0) / (expected[name] or 1) - 1) for name in rates)
    print(f"{case.name}: furthest latency {worst}; furthest rate {share:.2%} off")
    for line in off:
        print(f"  missed: {line}")
    return len(off) + (share > OFF_SHARE)


def _compare(case: Case, run: Run, expected: metrics.Figures) -> tuple[str, list[str]]:
    """The latency furthest off in words, and those that are beyond the tolerance."""
    worst, off = (-1.0, ""), []
    for name, known in expected.items():
        metric, _, statistic = name.rpartition("_")
        if known is None or metric not in LATENCIES or metric == "send_lag" or statistic == "max":
            continue
        found = run.figures[name] or 0.0
        difference = abs(found - known)
        words = f"{name} {1000 * found:.2f} ms for {1000 * known:.2f} ms"
        worst = max(worst, (difference / max(OFF_S, OFF_SHARE * known), words))
        if difference > max(OFF_S, OFF_SHARE * known):
            off.append(words)
    return worst[1], off


def _crowd(case: Case) -> int:
    run = _measured(case)
    lag = run.figures["send_lag_p99"] or 0.0
    in_flight = _most_at_once(run.records)
    latest, busy = run.figures["send_lag_max"] or 0.0, run.figures["loop_busy"] or 0.0
    speed, failed = run.figures["output_tokens_per_s"] or 0.0, run.figures["failed"] or 0.0
    print(
        f"{case.name}: sent {1000 * lag:.2f} ms late at p99, {1000 * latest:.1f} at most; {in_flight:,} in flight;"
        f" {speed:.0f} tokens/s; loop busy {busy:.0%}; failed {failed:.0f}"
    )
    return (lag > LAG_S) + bool(failed) + (in_flight < 990)


def _stall(case: Case) -> int:
    """The schedule says what p99 must be: whoever came during the stall waited for its end."""
    run = _measured(case)
    expected = metrics.figures([_known(record, case.times) for record in run.records])
    p99, known, p50 = (
        each or 0.0 for each in (run.figures["ttft_p99"], expected["ttft_p99"], run.figures["ttft_p50"])
    )
    print(f"{case.name}: TTFT p99 {p99:.3f} s for {known:.3f} s, p50 {p50:.3f} s")
    return int(abs(p99 - known) > max(OFF_S, OFF_SHARE * known))


def _known(record: Record, times: Times) -> Record:
    """The record as the server's schedule has it, had neither network nor client taken any time.

    Closed loops keep the measured starts: a start depends on the ends before it.
    """
    first_s, gap_s, size = times.first_s, times.gap_s, times.tokens_per_chunk
    tokens = record.completion_tokens or 0
    assert record.error is None and record.prompt_tokens == PROMPT_TOKENS, record.error_message
    starts = range(0, tokens, size)
    chunks = tuple(_after(times, record.scheduled_s + first_s + start * gap_s) for start in starts)
    return Record(
        id=record.id,
        scheduled_s=record.scheduled_s,
        sent_s=record.scheduled_s,
        first_token_s=chunks[0],
        finished_s=chunks[-1],
        chunk_s=chunks,
        chunk_tokens=tuple(min(size, tokens - start) for start in starts),
        prompt_tokens=record.prompt_tokens,
        completion_tokens=tokens,
    )


def _after(times: Times, due_s: float) -> float:
    if times.stall is not None and times.stall[0] <= due_s < times.stall[1]:
        return times.stall[1]
    return due_s


def _most_at_once(records: Sequence[Record]) -> int:
    steps = sorted(
        [(record.sent_s, 1) for record in records] + [(record.finished_s, -1) for record in records]
    )
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most


def _measured(case: Case) -> Run:
    with serving(case.times, case.connections) as url:
        return asyncio.run(_run(case, url))


async def _run(case: Case, url: str) -> Run:
    spec = Spec(num_prompts=case.requests, prompt_len=Length("fixed", 64), output_len=case.output)
    sampling = Sampling(max_tokens=case.output.longest, temperature=0.0)
    workload = drawn(spec, sampling, rounds=1, warm_up=case.warm_up)
    async with await RemoteEngine.connect(RemoteSettings(url, retries=0, many_connections=True)) as engine:
        (run,) = await measure(
            [Target("synthetic", engine, gpu_is_here=False)], workload, Plan((case.load,)), Progress()
        )
    for note in run.notes:
        print(f"  {note}")
    return run


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


if __name__ == "__main__":
    sys.exit(main())
