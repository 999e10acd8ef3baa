"""Real checkpoints converted for real: what the tests of this folder load and compare."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ghostvis_cli import demo
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.convert import run
from ghostvis_cli.convert.plan import ConvertSettings, make_plan

DEMO = locate.find(demo.BASE_DIR, "sft", demo.MODEL_TAG)


def converted(checkpoint: Checkpoint, place: Path, **settings: Any) -> Path:
    """The directory `place`, in float32 unless told otherwise: comparisons then see the mapping and no rounding."""
    plan = make_plan(checkpoint, ConvertSettings(**{"dtype": "float32", "verify": False, **settings}))
    run.run(plan, place, run.Progress(plan.weights_bytes))
    return place


def changed(
    original: Checkpoint, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Checkpoint:
    """A copy of a checkpoint with other tensors in it."""
    folder.mkdir()
    for path in (original.path, original.meta_path, original.tokenizer_path):
        shutil.copy(path, folder / path.name)
    copy = locate.from_path(folder)
    state = torch.load(copy.path, weights_only=True)
    change(state)
    torch.save(state, copy.path)
    return copy


def damaged(place: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The converted directory `place`, with other tensors in it from now on."""
    state = load_file(place / "model.safetensors")
    change(state)
    save_file(state, place / "model.safetensors", {"format": "pt"})
    return place
