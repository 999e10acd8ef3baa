"""A report as lines for a terminal, and as CSV."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ghostvis_cli.bench import metrics, ratios, schema
from ghostvis_cli.bench.schema import LATENCIES, SCALARS, STATISTICS, EngineCard, Report, Run, Summary
from ghostvis_cli.bench.stats import median
from ghostvis_cli.bench.units import NOT_REPORTED, digits, percent, seconds, shown
from ghostvis_cli.errors import InputError

BLOCKS = "▁▂▃▄▅▆▇█"
# In the table of rates, in this order. The other figures are counts, told in a sentence.
RATES = (
    "requests_per_s", "output_tokens_per_s", "input_tokens_per_s", "image_tokens_per_s", "goodput_per_s",
    "goodput_share", "cache_hit_rate", "mean_concurrency", "peak_memory_bytes", "mean_power_w",
)  # fmt: skip


def lines(report: Report) -> Iterator[str]:
    """Everything a person wants to know at once, without colours."""
    cards = {card.name: card for card in report.engines}
    for number, summary in enumerate(report.summaries):
        if number:
            yield ""
        runs = [run for run in report.runs if (run.engine, run.load) == (summary.engine, summary.load)]
        yield from _summary(cards[summary.engine], summary, runs)
    if "prefix" in report.extra:
        yield from prefix_lines(prefix_section(report))
    answered = [each for each in report.summaries if (found := each.figures.get("requests")) and found.value]
    yield from map(metrics.reuse, answered)
    yield from filter(None, map(metrics.reasoning, answered))
    yield from ratios.lines(ratios.ratios(report.runs))
    for note in report.notes:
        yield f"note: {note}"


def _summary(card: EngineCard, summary: Summary, runs: Sequence[Run]) -> Iterator[str]:
    repeats = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
    yield f"{card.name} at {summary.load.name}: {repeats}, {_requests(runs)}"
    found = [(base, cells) for base, cells in latencies(summary) if base != "send_lag"]
    if rows := [(f"  {base}: {LATENCIES[base].title}", *cells) for base, cells in found]:
        yield from _aligned([("", *STATISTICS), *rows])
    yield from _aligned([
        (f"  {SCALARS[name].title}", value, between, _course(name, runs))
        for name, value, between in rates(summary)
    ])  # fmt: skip


def _requests(runs: Sequence[Run]) -> str:
    done = sum(int(run.figures.get("requests") or 0) for run in runs)
    failures: dict[str, int] = {}
    for run in runs:
        for kind, count in run.failures.items():
            failures[kind] = failures.get(kind, 0) + count
    failed = "".join(f", {count:,} failed ({kind})" for kind, count in failures.items())
    return f"{done:,} requests answered{failed}"


def latencies(summary: Summary) -> Iterator[tuple[str, list[str]]]:
    """Each latency that was measured, and its STATISTICS in words."""
    for base in LATENCIES:
        found = [summary.figures.get(f"{base}_{statistic}") for statistic in STATISTICS]
        if any(found):
            yield base, [NOT_REPORTED if each is None else seconds(each.value) for each in found]


def rates(summary: Summary) -> Iterator[tuple[str, str, str]]:
    """Each of RATES that is known and not 0: its name, its value and its interval in words, "" where unknown."""
    for name in RATES:
        figure = summary.figures.get(name)
        if figure is not None and figure.value:
            known = figure.low is not None and figure.high is not None
            between = f"{shown(name, figure.low)} to {shown(name, figure.high)}" if known else ""
            yield name, shown(name, figure.value), between


def _course(name: str, runs: Sequence[Run]) -> str:
    """A figure from run to run."""
    values = [value for run in runs if (value := run.figures.get(name)) is not None]
    return sparkline(values) if len(runs) > 1 else ""


def sparkline(values: Sequence[float]) -> str:
    """A block per value, from the least to the greatest; flat where all are equal."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in values)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    if not rows:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join(cells).rstrip()


# --- bench prefix


def prefix_section(report: Report) -> Mapping[str, Any]:
    """The proof in a report that may come from anywhere. InputError where there is none."""
    from ghostvis_cli.bench import prefix

    section = report.extra["prefix"]
    proof: prefix.Proof = schema.build(prefix.Proof, section, "report.extra.prefix")
    if not proof.pairs:
        raise InputError("report.extra.prefix has no pairs")
    flushed = sum(pair.flushed_s is not None for pair in proof.pairs)
    if flushed not in (0, len(proof.pairs)) or min(pair.cold_s for pair in proof.pairs) <= 0:
        raise InputError("report.extra.prefix.pairs lack times")
    return prefix.as_extra(proof, section.get("settings"))


def prefix_lines(proof: Mapping[str, Any]) -> Iterator[str]:
    """The proof as schema.Report.extra keeps it."""
    pairs = proof["pairs"]
    kinds = ["cold", "warm"] + (["flushed"] if pairs[0]["flushed_s"] is not None else [])
    yield f"{len(pairs)} pairs, one request at a time"
    times = [seconds(median([pair[f"{kind}_s"] for pair in pairs])) for kind in kinds]
    cached = [_cached([pair[f"{kind}_cached"] for pair in pairs]) for kind in kinds]
    yield from _aligned([
        ("", *kinds), ("  time to first token, median", *times), ("  cached tokens, median", *cached)
    ])  # fmt: skip
    saved, saved_s = proof["saved"], proof["saved_s"]
    yield (
        f"  saved: {percent(saved['estimate']).lstrip('+')} of the time,"
        f" {seconds(saved_s['estimate'])} ({seconds(saved_s['low'])} to {seconds(saved_s['high'])}, 95 %)"
        f"   {sparkline([1 - p['warm_s'] / p['cold_s'] for p in pairs])}"
    )
    if proof["rounds"]:
        yield from _aligned([*_round_rows(proof["rounds"])])


def _cached(counts: Sequence[int | None]) -> str:
    known = [count for count in counts if count is not None]
    return digits(median(known)) if len(known) == len(counts) else NOT_REPORTED


def _round_rows(rounds: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    head = f"{rounds[0]['questions']} questions, one image"
    yield head, "vision tokens asked for", "computed", "ratio", "KV memory asked for", "computed"
    for each in rounds:
        yield f"  {each['name']}", *round_cells(each)


def round_cells(each: Mapping[str, Any]) -> tuple[str, ...]:
    """Of one round of questions: vision tokens asked for and computed, their ratio, keys and values of both."""
    tokens = [NOT_REPORTED if each[key] is None else digits(each[key]) for key in ("asked", "computed")]
    ratio = NOT_REPORTED if each["ratio"] is None else f"{each['ratio']:.1f}x"
    sizes = (each["kv_asked_bytes"], each["kv_computed_bytes"])
    memory = ["not known" if size is None else shown("peak_memory_bytes", size) for size in sizes]
    return (*tokens, ratio, *memory)


# --- CSV


def csv_text(report: Report) -> str:
    """One row for each run; an empty cell is "not reported"."""
    if "prefix" in report.extra and not report.runs:
        return _csv(prefix_section(report)["pairs"])
    names = list(dict.fromkeys(name for run in report.runs for name in run.figures))
    return _csv(
        [
            {"engine": run.engine, "load": run.load.name, "repeat": run.repeat, "started_at": run.started_at}
            | {name: run.figures.get(name) for name in names}
            for run in report.runs
        ]
    )


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
