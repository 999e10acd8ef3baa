"""Real checkpoints converted for real: what the tests of this folder load and compare."""

from pathlib import Path

from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.convert import run


def converted(checkpoint: Checkpoint, place: Path, **settings: object) -> Path:
    """The directory `place`, in float32 unless told otherwise: comparisons then see the mapping and no rounding."""
    plan = run.plan(checkpoint, run.ConvertSettings(**({"dtype": "float32"} | settings)))
    run.run(plan, place, run.Progress(plan.weights_bytes))
    return place
