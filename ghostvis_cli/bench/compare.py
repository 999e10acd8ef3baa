"""Two reports -> a verdict per metric: better, worse, or no evidence. Decides; rendering is compare_text's.

Compares B with A. Reports of different workloads are refused: their figures can't be compared.
A verdict needs an interval that leaves out "no change"; see stats.py for where intervals come from, and
benchmarks/bench_verdicts.py for how often they are wrong. Two runs made one after the other also differ by what
became of the machine in between, which no number of repeats can show: each interval is wider by as much as a fixed
piece of work varied (steady.py). Engines of one interleaved run need no such allowance.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

from ghostvis_cli.addresses import is_here
from ghostvis_cli.bench import stats
from ghostvis_cli.bench.schema import METRICS, EngineCard, Load, Report, Run, metric
from ghostvis_cli.bench.stats import Interval
from ghostvis_cli.errors import InputError, UsageError

Verdict = Literal["better", "worse", "changed", "no evidence", "too few repeats"]
# What a table shows unless asked for more: one or two figures for each thing a person feels or pays for.
HEADLINES = (
    "requests_per_s", "output_tokens_per_s", "image_tokens_per_s", "goodput_per_s", "failed",
    "ttft_p50", "ttft_p95", "ttft_p99", "tpot_p50", "tpot_p95", "itl_token_p50", "itl_token_p99",
    "e2e_p50", "e2e_p95", "e2e_p99", "cache_hit_rate", "peak_memory_bytes",
)  # fmt: skip
# Engines of one interleaved run are compared repeat by repeat: what slows the machine slows both. It takes eight
# to reach 99 %. Runs made apart are not paired: one slow repeat would outweigh nine good ones.
LEAST_PAIRS = 8
UNSTEADY = 0.05
STEADIER = 3  # times the machine's spread over a metric's, from which on the metric is not the machine's
# Of these metrics a change of 10 % should be detectable; where it is not, a note says what would make it so.
FIRST_LOOKED_AT, WORTH_TELLING = ("requests_per_s", "e2e_p50"), 0.10


@dataclass(frozen=True)
class Side:
    """One engine of one report."""

    name: str
    report: Report
    card: EngineCard

    @cached_property
    def runs(self) -> dict[Load, list[Run]]:
        found: dict[Load, list[Run]] = {}
        for run in sorted(self.report.runs, key=lambda run: run.repeat):
            if run.engine == self.card.name:
                found.setdefault(run.load, []).append(run)
        return found

    def values(self, load: Load, name: str) -> dict[int, float]:
        """The figure of each repeat that reports it."""
        found = {run.repeat: run.figures.get(name) for run in self.runs.get(load, ())}
        return {repeat: value for repeat, value in found.items() if value is not None}


@dataclass(frozen=True)
class Finding:
    """One metric at one load. `change` is b / a - 1 where `relative`, else b - a; a and b are medians."""

    metric: str
    load: str
    a: float
    b: float
    change: Interval
    relative: bool
    verdict: Verdict
    repeats: int
    paired: bool
    drift: float  # the allowance for the machine that is part of the interval, as a share


@dataclass(frozen=True)
class Comparison:
    """Two sides, what was found of each metric, and notes for people."""

    a: Side
    b: Side
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def named(self, name: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.metric == name]


def sides(reports: Mapping[str, Report]) -> list[Side]:
    """Every engine of every report, in order. Names stay as short as they can be told apart."""
    found = []
    for name, report in reports.items():
        for card in report.engines:
            short = card.name if len(reports) == 1 else name
            several = len(reports) > 1 and len(report.engines) > 1
            found.append(Side(f"{name}:{card.name}" if several else short, report, card))
    return found


def pairings(found: Sequence[Side]) -> list[tuple[Side, Side]]:
    """What is compared with what: the same engine of the first report and each other one; in one report, the
    first engine and each other one."""
    base = [side for side in found if side.report is found[0].report]
    others = [side for side in found if side.report is not found[0].report]
    if not others:
        pairs = [(base[0], side) for side in base[1:]]
    elif len(base) == 1 and len({id(side.report) for side in others}) == len(others):
        pairs = [(base[0], side) for side in others]
    else:
        pairs = [(a, b) for a in base for b in others if a.card.name == b.card.name]
    if not pairs:
        names = ", ".join(side.name for side in found)
        raise UsageError(f"nothing to compare among {names}", hint="ghostvis bench compare A.json B.json")
    return pairs


def compare(a: Side, b: Side, *, metrics: Sequence[str] = (), force: bool = False) -> Comparison:
    """What changed from a to b. InputError names every way in which they are not the same work."""
    unlike = differences(a, b)
    if unlike and not force:
        listed = "\n".join(unlike)
        raise InputError(f"{a.name} and {b.name} did not measure the same thing:\n{listed}", hint="--force")
    loads = _loads(a, b)
    findings = [
        finding
        for first, second in loads
        for name in metrics or HEADLINES
        if (finding := _finding(a, b, first, second, name)) is not None
    ]
    if not findings:
        raise InputError(f"{a.name} and {b.name} report no figure in common", hint="--metric NAME")
    return Comparison(a, b, tuple(findings), tuple(_notes(a, b, unlike, findings)))


def known_metric(name: str) -> str:
    """The name itself. UsageError with the nearest one for a name that no figure has."""
    if name not in METRICS:
        near = get_close_matches(name, METRICS, n=1)
        raise UsageError(f"no metric named {name!r}", hint=near[0] if near else "docs/bench.md lists them")
    return name


# --- the same work?


def differences(a: Side, b: Side) -> list[str]:
    """Every way in which two sides were asked to do different things, one line each."""
    found = [*_workload(a.report, b.report)]
    if set(a.runs) != set(b.runs):
        found.append(_against("load", _names(a), _names(b)))
    if a.report is not b.report:  # engines of one run were chosen by hand to be compared
        if a.card.model_hash and b.card.model_hash:
            if a.card.model_hash != b.card.model_hash:
                found.append(_against("model", a.card.model, b.card.model) + " (other weights)")
        elif a.card.model != b.card.model:
            found.append(_against("model", a.card.model, b.card.model))
    if a.report.slo != b.report.slo:
        found.append(_against("slo", dict(a.report.slo), dict(b.report.slo)))
    return found


def _workload(a: Report, b: Report) -> Iterator[str]:
    one, two = a.workload, b.workload
    before = []
    for name in ("kind", "seed", "rows", "images"):
        before += _differing(f"workload.{name}", getattr(one, name), getattr(two, name))
    for part in ("settings", "sampling"):
        left, right = getattr(one, part), getattr(two, part)
        for key in sorted({*left, *right}):
            before += _differing(f"workload.{part}.{key}", left.get(key), right.get(key))
    yield from before
    # Drawn from one seed with the same settings, the first repeats are the same however many follow.
    drawn = one.kind != "file" and _repeats(a) != _repeats(b)
    if not before and one.sha256 != two.sha256 and not drawn:
        yield "workload: the rows differ"


def _differing(name: str, a: object, b: object) -> list[str]:
    return [] if a == b else [_against(name, a, b)]


def _against(name: str, a: object, b: object) -> str:
    return f"{name}: {a} against {b}"


def _repeats(report: Report) -> int:
    return len({run.repeat for run in report.runs})


def _names(side: Side) -> str:
    return ", ".join(load.name for load in side.runs) or "none"


def _loads(a: Side, b: Side) -> list[tuple[Load, Load]]:
    common = [(load, load) for load in a.runs if load in b.runs]
    if not common and len(a.runs) == len(b.runs) == 1:
        return [(next(iter(a.runs)), next(iter(b.runs)))]  # forced
    return common


# --- one metric


def _finding(a: Side, b: Side, first: Load, second: Load, name: str) -> Finding | None:
    """What is found of one metric; None where a side lacks it or it is 0 on both."""
    left, right = a.values(first, name), b.values(second, name)
    if not left or not right or not any((*left.values(), *right.values())):
        return None
    pairs = sorted(left.keys() & right.keys())
    interleaved = a.report is b.report and first == second
    paired = interleaved and len(pairs) >= LEAST_PAIRS
    one, two = ([side[n] for n in (pairs if paired else side)] for side in (left, right))
    relative = min(*one, *two) > 0
    on_machine = relative and not interleaved and _depends_on_machine(name)
    drift = _drift(a, b, first, second, max(_spread(one), _spread(two))) if on_machine else 0.0
    change = _relative(one, two, paired, drift) if relative else _absolute(one, two, paired)
    label = first.name if first == second else f"{first.name} -> {second.name}"
    verdict = _verdict(name, change, min(len(one), len(two)))
    middle = stats.median(one), stats.median(two)
    return Finding(
        name, label, *middle, change, relative, verdict, min(len(one), len(two)), paired, math.expm1(drift)
    )


def _relative(a: Sequence[float], b: Sequence[float], paired: bool, drift: float) -> Interval:
    """b / a - 1, the interval wider by `drift` of its logarithm."""
    found = stats.paired_ratio(a, b) if paired else stats.ratio(a, b)
    low, high = found.low * math.exp(-drift), found.high * math.exp(drift)
    return Interval(found.estimate - 1, low - 1, high - 1, found.confidence)


def _absolute(a: Sequence[float], b: Sequence[float], paired: bool) -> Interval:
    if paired:
        return stats.paired_shift([y - x for x, y in zip(a, b, strict=True)])
    return stats.shift(a, b)


# --- the machine's part


def _depends_on_machine(name: str) -> bool:
    """Whether a metric depends on the machine's speed: times and rates do, tokens, shares and memory do not."""
    return metric(name).unit in ("s", "1/s")


def _drift(a: Side, b: Side, first: Load, second: Load, most: float) -> float:
    """How much the machine's own speed varied, as a logarithm: within a report, and from one to the other.

    No more of it than can have reached the metric, which itself varied by `most`: an engine on a device of its own
    keeps its pace whatever becomes of the client's processor. A short piece of work also varies where a long run
    does not, so only a metric that is several times steadier is taken for such. 0 where the engine's processor is
    not the client's: of that one, nothing is known.
    """
    if not (_is_here(a.card) and _is_here(b.card)):
        return 0.0
    one, two = (
        [each for each in side.values(load, "fixed_work").values() if each > 0]
        for side, load in ((a, first), (b, second))
    )
    if not one or not two:
        return 0.0
    within, between = max(_spread(one), _spread(two)), abs(math.log(stats.median(two) / stats.median(one)))
    reached = min(1.0, STEADIER * most / within) if within else 1.0
    return min(within, most) + reached * between


def _spread(values: Sequence[float]) -> float:
    """The standard deviation of the values' logarithms."""
    return stats.deviation([math.log(value) for value in values])


def _is_here(card: EngineCard) -> bool:
    """Whether the engine runs on the processor that the client measures."""
    if card.kind == "remote":
        return card.address is not None and is_here(card.address)
    return card.device.startswith("cpu")


def _verdict(name: str, change: Interval, repeats: int) -> Verdict:
    if repeats < stats.repeats_needed():
        return "too few repeats"
    if not change.excludes(0):
        return "no evidence"
    better = metric(name).better
    if better == "neither":
        return "changed"
    return "better" if (change.estimate > 0) == (better == "higher") else "worse"


# --- what a reader must know


def _notes(a: Side, b: Side, unlike: Sequence[str], findings: Sequence[Finding]) -> Iterator[str]:
    for side in (a, b):
        if side.report.cut_short is not None:
            yield f"{side.name} was cut short ({side.report.cut_short})"
    for line in unlike:
        yield f"forced, although not the same thing was measured: {line}"
    few = min(finding.repeats for finding in findings)
    needed = stats.repeats_needed()
    if few < needed:
        few_repeats = "1 repeat" if few == 1 else f"{few} repeats"
        yield f"{few_repeats} can't tell a change from chance: measure with --repeat {needed} or more"
    drift = max(finding.drift for finding in findings)
    if drift > UNSTEADY:
        yield (
            f"the machine's own speed varied by {drift:.0%}, and smaller changes can't be told from that: measure"
            " both in one interleaved run (bench --engines, --against), or on a calmer machine"
        )
    yield from _too_wide(findings, interleaved=a.report is b.report)
    for side in (a, b):
        failed = sum(sum(run.failures.values()) for runs in side.runs.values() for run in runs)
        if failed:
            yield f"{side.name}: {failed} requests failed, and the times are those of the others"
    for name, one, two in _circumstances(a, b):
        if one != two:
            yield f"not the same {name}: {one} against {two}"


def _too_wide(findings: Sequence[Finding], interleaved: bool) -> Iterator[str]:
    """How large a change these runs can't tell, and what could: intervals shrink with the root of the repeats."""
    unknown = [each for each in findings if each.metric in FIRST_LOOKED_AT and each.verdict == "no evidence"]
    widest, wanted = max(unknown, key=_reach, default=None), math.log1p(WORTH_TELLING)
    if widest is None or _reach(widest) <= wanted:
        return
    by_chance = _reach(widest) - math.log1p(widest.drift)  # the machine's part stays as it is
    repeats = max(10 * math.ceil(widest.repeats * (by_chance / wanted) ** 2 / 10), widest.repeats)
    how = "with --repeat" if interleaved else "in one interleaved run (bench --engines, --against)"
    enough = f"some {repeats} repeats of each, {how}"
    if repeats > stats.MOST_REPEATS:
        enough = "longer runs (--num-prompts) or a calmer machine"
    yield (
        f"these runs can't tell changes of {widest.metric} below {100 * math.expm1(_reach(widest)):.0f} %:"
        f" for {100 * WORTH_TELLING:.0f} %, {enough}"
    )


def _reach(finding: Finding) -> float:
    """Half the width of a known interval, as a logarithm; 0 where the change is no share, or all there was."""
    if not (finding.relative and finding.change.known and finding.change.low > -1):
        return 0.0
    return (math.log1p(finding.change.high) - math.log1p(finding.change.low)) / 2


def _circumstances(a: Side, b: Side) -> Iterator[tuple[str, Any, Any]]:
    """(name, a, b) of the two set-ups: what differs may be what is compared, or an accident."""
    for name in ("kind", "device", "dtype", "layout", "server"):
        yield name, getattr(a.card, name), getattr(b.card, name)
    for part in ("machine", "versions"):
        left, right = getattr(a.report.manifest, part), getattr(b.report.manifest, part)
        for key in sorted({*left, *right}):
            yield key, left.get(key), right.get(key)
