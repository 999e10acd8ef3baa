"""Comparisons as a table, Markdown, JSON, and the text of Go's benchmarks, which `benchstat` reads."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ghostvis_cli.bench.compare import HEADLINES, Comparison, Finding, Side
from ghostvis_cli.bench.schema import metric
from ghostvis_cli.bench.units import percent, shown

HEADERS = ("METRIC", "A", "B", "CHANGE", "99 % INTERVAL", "VERDICT")


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """One row a finding, under HEADERS; the load stands behind the metric where there are several."""
    several = len({finding.load for finding in comparison.findings}) > 1
    return [_row(finding, several) for finding in comparison.findings]


def _row(finding: Finding, several: bool) -> tuple[str, ...]:
    name = f"{finding.metric} @ {finding.load}" if several else finding.metric
    a, b = shown(finding.metric, finding.a), shown(finding.metric, finding.b)
    change = finding.change
    interval = (
        f"{_change(finding, change.low)} to {_change(finding, change.high)}" if change.known else "unknown"
    )
    return name, a, b, _change(finding, change.estimate), interval, finding.verdict


def _change(finding: Finding, value: float) -> str:
    if finding.relative:
        return percent(value)
    return f"{'+' if value >= 0 else '-'}{shown(finding.metric, abs(value))}"


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table for each comparison, as a pull request shows it; verdicts that matter in bold."""
    lines: list[str] = []
    for comparison in comparisons:
        a, b = (_escaped(side.name) for side in (comparison.a, comparison.b))
        lines += [f"**{b}** against **{a}**", "", "| metric | A | B | change | 99 % interval | verdict |"]
        lines += ["|---|--:|--:|--:|--:|---|"]
        for *cells, verdict in rows(comparison):
            told = f"**{verdict}**" if verdict in ("better", "worse") else verdict
            lines.append("| " + " | ".join([_escaped(cell) for cell in cells] + [told]) + " |")
        lines += ["", *(f"- {_escaped(note)}" for note in comparison.notes), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _escaped(text: str) -> str:
    """Text on one line: a second line would end the row or the list."""
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", " ".join(text.split()))


def record(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Comparisons as --json prints them."""
    return [
        {
            "a": comparison.a.name,
            "b": comparison.b.name,
            "findings": [_plain(finding) for finding in comparison.findings],
            "notes": list(comparison.notes),
        }
        for comparison in comparisons
    ]


def _plain(finding: Finding) -> dict[str, Any]:
    """A finding as JSON, where infinite ends of intervals are null."""
    change: dict[str, Any] = asdict(finding.change)
    if not finding.change.known:
        change |= {"low": None, "high": None}
    return {**asdict(finding), "change": change, "better": metric(finding.metric).better}


# --- Go's benchmark text


def benchfmt(sides: Sequence[Side]) -> str:
    """One line for each repeat. `benchstat -col run FILE` puts the sides next to each other."""
    units = dict.fromkeys(
        name for side in sides for runs in side.runs.values() for run in runs for name in _named(run.figures)
    )
    lines = [f"Unit {_unit(name)} better={metric(name).better}" for name in units]
    for side in sides:
        manifest = side.report.manifest
        lines += [
            "",
            "pkg: ghostvis",
            f"cpu: {manifest.machine.get('cpu', 'unknown')}",
            f"engine: {side.card.kind}",
            f"workload: {side.report.workload.kind}",
            f"run: {side.name}",
            *_benchmarks(side),
        ]
    return "\n".join(lines) + "\n"


def _benchmarks(side: Side) -> Iterator[str]:
    kind = re.sub(r"\W", "", side.report.workload.kind.title())
    for load, runs in side.runs.items():
        for run in runs:
            asked = int(run.figures.get("requests") or 0) or 1  # benchstat refuses 0 iterations
            values = " ".join(f"{run.figures[name]:.9g} {_unit(name)}" for name in _named(run.figures))
            yield f"Benchmark{kind}/{load.name} {asked} {values}"


def _named(figures: Any) -> list[str]:
    wanted = [name for name in HEADLINES if metric(name).better != "neither"]
    return [name for name in wanted if figures.get(name) is not None]


def _unit(name: str) -> str:
    """benchstat itself scales units that end in sec, B or /s."""
    base = name.removesuffix("_per_s").replace("_", "-")
    match metric(name).unit:
        case "s":
            return f"{base}-sec"
        case "B":
            return f"{base.removesuffix('-bytes')}-B"
        case "1/s":
            return f"{base}/s"
    return base
