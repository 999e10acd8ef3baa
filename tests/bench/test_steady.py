"""The machine's own speed, as each run records it."""

from ghostvis_cli.bench.run import Plan
from ghostvis_cli.bench.schema import Load
from tests.bench.virtual import TimedEngine, measured, workload


def test_every_run_tells_how_fast_the_machine_was() -> None:
    runs = measured(Plan((Load(1),), repeats=3), workload(2, rounds=3), TimedEngine())
    assert all((run.figures["fixed_work"] or 0) > 0 for run in runs)
