"""--fail-if: conditions on what a comparison found. A check that cannot be judged is an error, never a pass."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ghostvis_cli.bench import stats
from ghostvis_cli.bench.compare import Comparison, Finding, known_metric
from ghostvis_cli.bench.units import percent
from ghostvis_cli.errors import InputError, UsageError

CONDITION = re.compile(r"\s*(?P<metric>\w+)\s*(?P<side>[<>])\s*(?P<percent>[+-]?\d{1,9}(\.\d+)?)\s*%\s*")


@dataclass(frozen=True)
class Condition:
    """`ttft_p95>+5%`: met where a change has evidence and its estimate lies beyond the limit."""

    text: str
    metric: str
    above: bool
    limit: float  # a share: 0.05 is 5 %

    def met_by(self, finding: Finding) -> bool:
        return finding.change.excludes(0) and self._beyond(finding.change.estimate)

    def possible_in(self, finding: Finding) -> bool:
        """Whether the interval leaves room for it."""
        return self._beyond(finding.change.high if self.above else finding.change.low)

    def _beyond(self, change: float) -> bool:
        return change > self.limit if self.above else change < self.limit


def condition(text: str) -> Condition:
    """A condition of --fail-if from its text, such as "ttft_p95>+5%". UsageError where it is none."""
    found = CONDITION.fullmatch(text)
    if found is None:
        raise UsageError(f"--fail-if {text!r} is not of the form METRIC>+N%", hint="--fail-if 'ttft_p95>+5%'")
    name = known_metric(found["metric"])
    return Condition(text, name, found["side"] == ">", float(found["percent"]) / 100)


def judged(check: Condition, comparisons: Sequence[Comparison]) -> list[str]:
    """One line for each way in which the condition is met. InputError where nothing can be said of it."""
    met = []
    for comparison in comparisons:
        findings = comparison.named(check.metric)
        if not findings:
            raise InputError(f"--fail-if {check.text}: {check.metric} is not reported on both sides")
        for finding in findings:
            _judgeable(check, finding)
            if check.met_by(finding):
                met.append(
                    f"{check.metric} at {finding.load}, {comparison.b.name}: {percent(finding.change.estimate)}"
                )
    return met


def _judgeable(check: Condition, finding: Finding) -> None:
    """Refuse a check that can never fail."""
    if finding.verdict == "too few repeats":
        raise InputError(
            f"--fail-if {check.text} can't be judged by {finding.repeats} repeats",
            hint=f"measure with --repeat {stats.repeats_needed()} or more",
        )
    if not finding.relative:
        raise InputError(f"--fail-if {check.text}: {check.metric} is 0 somewhere, and has no percentage")
