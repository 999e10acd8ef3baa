"""Records of requests -> figures, and figures of repeats -> estimates. Pure; docs/bench.md has every formula.

Latencies count from the time a request was scheduled for. Where the client kept to its schedule that is when it
was sent; where it did not, the wait before sending counts too.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from ghostvis_cli.bench.schema import LARGEST, LATENCIES, STATISTICS, Estimate, Record, Run, Summary
from ghostvis_cli.bench.stats import bootstrap_interval, mean, percentile_of_ordered
from ghostvis_cli.errors import UsageError

Figures = dict[str, float | None]
OBJECTIVES = ("ttft", "tpot", "e2e")
UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def figures(records: Sequence[Record], slo: Mapping[str, float] | None = None) -> Figures:
    """Every figure of one run that its records decide. A run without a success has no latencies."""
    done = [record for record in records if record.error is None]
    samples = {
        "ttft": [value for record in done if (value := ttft(record)) is not None],
        "tpot": [value for record in done if (value := tpot(record)) is not None],
        "itl_token": [gap for record in done for gap in token_gaps(record)],
        "itl_chunk": [gap for record in done for gap in chunk_gaps(record)],
        "e2e": [e2e(record) for record in done],
        "send_lag": [record.sent_s - record.scheduled_s for record in records],
    }
    found: Figures = {}
    for name in LATENCIES:
        found |= {f"{name}_{statistic}": value for statistic, value in spread(samples[name]).items()}
    duration_s = duration(records)
    totals = _totals(done)
    found |= {"duration": duration_s, "failed": float(len(records) - len(done)), **totals}
    if duration_s > 0:
        found |= _rates(totals, duration_s)
        found["mean_concurrency"] = math.fsum(samples["e2e"]) / duration_s
    return found | _goodput(records, slo or {}, duration_s)


# --- one request


def ttft(record: Record) -> float | None:
    return None if record.first_token_s is None else record.first_token_s - record.scheduled_s


def e2e(record: Record) -> float:
    return record.finished_s - record.scheduled_s


def tpot(record: Record) -> float | None:
    """Mean time of a token after the first. Servers may hide a last token's text, so it counts to the end."""
    sent = (record.completion_tokens or 0) - record.hidden_tokens
    if record.first_token_s is None or sent < 2:
        return None
    return (record.finished_s - record.first_token_s) / (sent - 1)


def chunk_gaps(record: Record) -> Iterator[float]:
    for before, after in pairwise(record.chunk_s):
        yield after - before


def token_gaps(record: Record) -> Iterator[float]:
    """Seconds between tokens; a chunk of k gives k equal gaps. Empty where tokens per chunk are not known."""
    counts, sent = record.chunk_tokens, (record.completion_tokens or 0) - record.hidden_tokens
    if not any(counts) and len(record.chunk_s) == sent:
        counts = (1,) * len(record.chunk_s)
    elif sum(counts) != sent:
        return
    for gap, tokens in zip(chunk_gaps(record), counts[1:], strict=True):
        yield from (gap / tokens for _ in range(tokens))


# --- one run


def duration(records: Sequence[Record]) -> float:
    """From the first request's time to the last one's end, failures included."""
    if not records:
        return 0.0
    return max(record.finished_s for record in records) - min(record.scheduled_s for record in records)


def spread(values: Sequence[float]) -> Figures:
    """mean, sd (of these values, divided by n), percentiles (linear between neighbours), max."""
    if not values:
        return dict.fromkeys(STATISTICS)
    ordered = sorted(values)
    middle = mean(ordered)
    found: Figures = {
        "mean": middle,
        "sd": math.sqrt(math.fsum((value - middle) ** 2 for value in ordered) / len(ordered)),
        "max": ordered[-1],
    }
    return found | {f"p{q}": percentile_of_ordered(ordered, q) for q in (50, 90, 95, 99)}


def failures(records: Sequence[Record]) -> dict[str, int]:
    return dict(Counter(record.error for record in records if record.error is not None).most_common())


def _totals(done: Sequence[Record]) -> Figures:
    inputs = _sum([record.prompt_tokens for record in done])
    cached = _sum([record.cached_tokens for record in done])
    return {
        "requests": float(len(done)),
        "input_tokens": inputs,
        "output_tokens": _sum([record.completion_tokens for record in done]),
        "reasoning_tokens": _sum([record.reasoning_tokens for record in done]),
        "image_tokens": float(sum(record.image_tokens for record in done)),
        "image_tokens_computed": image_tokens_computed(done),
        "cached_tokens": cached,
        "cache_hit_rate": cached / inputs if inputs and cached is not None else None,
    }


def _sum(counts: Sequence[int | None]) -> float | None:
    """The sum; None where a value was not reported."""
    known = [count for count in counts if count is not None]
    return float(sum(known)) if len(known) == len(counts) else None


def image_tokens_computed(done: Sequence[Record]) -> float | None:
    """Vision tokens that the cache did not hold; None where cached tokens are not reported.

    A prefix cache counts all that stands before an image too; what is cached beyond is taken for images.
    """
    seeing = [record for record in done if record.image_tokens]
    if any(record.cached_tokens is None for record in seeing):
        return None
    before = _cached_before_images(seeing)
    saved = sum(min(max((record.cached_tokens or 0) - before, 0), record.image_tokens) for record in seeing)
    return float(sum(record.image_tokens for record in seeing) - saved)


def _cached_before_images(seeing: Sequence[Record]) -> int:
    """Tokens of text before an image that the cache held, as the requests show that computed their images.

    These are as many as had new images only, those of whom the least was cached: they need not be the ones sent
    first, since of two that ask about a new image together either may be computed. The middle one counts.
    """
    cached = sorted(record.cached_tokens or 0 for record in seeing)
    computing = cached[: sum(not record.images_seen for record in seeing)]
    return computing[(len(computing) - 1) // 2] if computing else 0


def _rates(totals: Figures, duration_s: float) -> Figures:
    def rate(name: str) -> float | None:
        total = totals[name]
        return None if total is None else total / duration_s

    inputs, outputs = rate("input_tokens"), rate("output_tokens")
    return {
        "requests_per_s": rate("requests"),
        "input_tokens_per_s": inputs,
        "output_tokens_per_s": outputs,
        "total_tokens_per_s": None if inputs is None or outputs is None else inputs + outputs,
        "image_tokens_per_s": rate("image_tokens"),
    }


# --- objectives


def parse_slo(text: str) -> dict[str, float]:
    """`ttft=200ms,tpot=20ms` -> seconds by metric."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+\.?\d*|\.\d+)\s*(s|ms|us)\s*", part)
        limit_s = float(match[2]) * UNITS_S[match[3]] if match else 0.0
        if match is None or match[1] not in OBJECTIVES or not 0 < limit_s < LARGEST:
            raise UsageError(
                f"--slo {part!r} is no objective: {', '.join(OBJECTIVES)} take a time such as 200ms",
                hint="--slo ttft=200ms,tpot=20ms",
            )
        found[match[1]] = limit_s
    return found


def within(record: Record, slo: Mapping[str, float]) -> bool:
    """Whether the request succeeded and met every objective. Without a second token there is no TPOT to miss."""
    if record.error is not None:
        return False
    values = {"ttft": ttft(record), "tpot": tpot(record), "e2e": e2e(record)}
    return all((value := values[name]) is None or value <= limit for name, limit in slo.items())


def _goodput(records: Sequence[Record], slo: Mapping[str, float], duration_s: float) -> Figures:
    if not slo or not records:
        return {}
    good = sum(within(record, slo) for record in records)
    return {
        "goodput_per_s": good / duration_s if duration_s > 0 else None,
        "goodput_share": good / len(records),
    }


# --- repeats


def summarise(runs: Sequence[Run]) -> tuple[Summary, ...]:
    """One summary for each engine at each load point, in the order they were first measured."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.engine, run.load.name), []).append(run)
    return tuple(_summary(group) for group in groups.values())


def _summary(group: Sequence[Run]) -> Summary:
    names = dict.fromkeys(name for run in group for name in run.figures)
    figures_ = {name: estimate([run.figures.get(name) for run in group]) for name in names}
    return Summary(group[0].engine, group[0].load, figures_)


def reuse(summary: Summary) -> str:
    """What caches saved, in a line: "1,280 image tokens asked for, 256 computed; 41 % of the input was cached"."""

    def mean_of(name: str) -> float | None:
        found = summary.figures.get(name)
        return None if found is None else found.value

    asked, computed, hits = map(mean_of, ("image_tokens", "image_tokens_computed", "cache_hit_rate"))
    parts = []
    if asked:
        known = "computed: not reported" if computed is None else f"{computed:,.0f} computed"
        parts.append(f"{asked:,.0f} image tokens asked for, {known}")
    parts.append("cached tokens: not reported" if hits is None else f"{hits:.1%} of the input was cached")
    return f"{summary.engine} at {summary.load.name}: {'; '.join(parts)}"


def reasoning(summary: Summary) -> str | None:
    """How much of the output was thought: "96 of 120 output tokens were reasoning". None where there was none."""
    thought, output = summary.figures.get("reasoning_tokens"), summary.figures.get("output_tokens")
    if "reasoning_tokens" not in summary.figures or (thought and not thought.value):
        return None
    share = "some" if thought is None else f"{thought.value:,.0f}"
    total = "the" if output is None else f"{output.value:,.0f}"
    return f"{summary.engine} at {summary.load.name}: {share} of {total} output tokens were reasoning"


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean over repeats with a 95 % bootstrap interval. None where a repeat has no value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    if len(known) == 1:
        return Estimate(known[0], None, None, 1)
    interval = bootstrap_interval(known, mean)
    return Estimate(interval.estimate, interval.low, interval.high, len(known))
