"""Which checkpoint a run means: the one that was chosen, else the newest sft one, else the built-in demo model."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ghostvis_cli import demo
from ghostvis_cli.checkpoint import hub, locate
from ghostvis_cli.checkpoint.generations import Constants
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.paths import expanded

if TYPE_CHECKING:
    from ghostvis_cli.model.config import GhostVisConfig, Layout
    from ghostvis_cli.profile import ModelSettings

DEMO_SOURCE = "demo"  # beside sft, mid, rl, base: the built-in model


def choose_checkpoint(
    model: "ModelSettings", *, report: Callable[[str], None] | None = None, online: bool = True
) -> tuple[Checkpoint, list[str]]:
    """The chosen checkpoint with its tokenizer and the constants that were set, and lines for the user.

    One of a hub is fetched first, and `report` takes lines meanwhile; that may take long, so not on an event loop.
    Where not `online`, it must be in the cache.
    """
    if (named := hub.reference(model)) is not None:
        notices: list[str] = []
        chosen = (model.source, model.model_tag, model.step)
        checkpoint = hub.fetch(named, *chosen, report or notices.append, online=online)
    else:
        checkpoint, notices = _choose(model)
    if checkpoint.path.resolve().is_relative_to(demo.BASE_DIR.resolve()):
        checkpoint = replace(checkpoint, source=DEMO_SOURCE)
    if model.tokenizer_path is not None:
        checkpoint = replace(checkpoint, tokenizer=expanded(model.tokenizer_path))
    return replace(checkpoint, constants=constants(model)), notices


def constants(model: "ModelSettings") -> Constants:
    """The constants of the model's mathematics that were set."""
    return Constants(**{each.name: getattr(model, each.name) for each in fields(Constants)})


def choose_layout(config: "GhostVisConfig", wanted: "Layout | None") -> tuple["Layout | None", list[str]]:
    """What was asked for, else what the file records, else the published trainer's; None for a text model."""
    if config.vision is None:
        return None, []
    if chosen := wanted or config.layout:
        return chosen, []
    return "prepend_slots", [
        "the checkpoint does not record its layout: taking prepend_slots, as the published trainer (--layout)"
    ]


def _choose(model: "ModelSettings") -> tuple[Checkpoint, list[str]]:
    base_dir = base_dir_of(model)
    if model.checkpoint_path is not None:
        return locate.from_path(expanded(model.checkpoint_path), model.step, base_dir), []
    if model.source == DEMO_SOURCE:
        return locate.find(demo.BASE_DIR, "sft", model.model_tag, model.step), []
    if not is_chosen(model) and not _is_there(base_dir):
        missing = f"there is no base directory {base_dir}: the built-in demo model answers"
        return locate.find(demo.BASE_DIR, "sft", demo.MODEL_TAG), [missing]
    found = locate.find(base_dir, model.source or "sft", model.model_tag, model.step)
    return found, [] if model.model_tag else _passed_over(found, base_dir)


def is_chosen(model: "ModelSettings") -> bool:
    """Whether a model was chosen in any way. Then no other may be used instead."""
    names = ("hf", "checkpoint_path", "source", "model_tag", "step", "tokenizer_path")
    return is_base_chosen(model) or any(getattr(model, name) is not None for name in names)


def is_base_chosen(model: "ModelSettings") -> bool:
    """Whether a base directory was named, by a setting or by the environment."""
    return model.base_dir is not None or bool(os.environ.get(locate.BASE_VARIABLE))


def base_dir_of(model: "ModelSettings") -> Path:
    """The directory to look for checkpoints in: the chosen one, else where nanochat writes."""
    return expanded(model.base_dir) if model.base_dir else locate.default_base_dir()


def _is_there(base_dir: Path) -> bool:
    """Whether it exists. A dangling link and a disk that does not answer do, so that an error follows."""
    try:
        base_dir.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def _passed_over(found: Checkpoint, base_dir: Path) -> list[str]:
    """A notice of tags that upstream would choose and that hold nothing that can be loaded."""
    assert found.source is not None, "it was found under a source"
    told = []
    for tag, directory in locate.tags(base_dir, found.source).items():
        if tag == found.tag:
            break
        told.append(f"{directory} holds DeepSpeed shards only and is passed over: {found.tag} is taken")
    return told
