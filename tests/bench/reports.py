"""Reports as runs leave them, with figures of one's choice."""

from collections.abc import Mapping, Sequence
from typing import Any

from ghostvis_cli.bench.metrics import summarise
from ghostvis_cli.bench.schema import EngineCard, Load, Manifest, Record, Report, Run, WorkloadSummary

ONE = Load(concurrency=1)
CARD = EngineCard("local", "local", "demo", "cpu", "float32", image_tokens=64)
WORK = WorkloadSummary("text", 42, 8, "abc", settings={"prompt_len": 128}, sampling={"max_tokens": 16})
Figures = Mapping[str, float | None]


def report(
    repeats: Sequence[Figures] | Mapping[Load, Sequence[Figures]],
    *,
    card: EngineCard = CARD,
    work: WorkloadSummary = WORK,
    records: Sequence[Record] = (),
    failures: Mapping[str, int] = {},
    **more: Any,
) -> Report:
    """A report of one engine: a run for each dictionary of figures, at one load or at several."""
    loads = repeats if isinstance(repeats, Mapping) else {ONE: repeats}
    runs = tuple(
        Run(card.name, load, n, "2026-01-01T00:00:00+00:00", 1.0, figures, failures, tuple(records))
        for load, found in loads.items()
        for n, figures in enumerate(found)
    )
    manifest = Manifest("ghostvis bench", "2026-01-01T00:00:00+00:00", "", 42, {"python": "3"}, {"cpu": "a"})
    return Report(manifest, work, (card,), runs, summarise(runs), **more)


def around(value: float, name: str, spread: float = 0.01, repeats: int = 12) -> list[dict[str, float | None]]:
    """Repeats of one figure, evenly spread around a value."""
    steps = [n / (repeats - 1) * 2 - 1 for n in range(repeats)]
    return [{name: value * (1 + spread * step)} for step in steps]


def record(number: int, *, ttft_s: float = 0.05, tokens: int = 8, error: str | None = None) -> Record:
    sent_s = number * 0.1
    return Record(
        id=str(number),
        scheduled_s=sent_s,
        sent_s=sent_s,
        first_token_s=None if error else sent_s + ttft_s,
        finished_s=sent_s + ttft_s + 0.01 * tokens,
        prompt_tokens=100,
        completion_tokens=tokens,
        error=error,
    )
