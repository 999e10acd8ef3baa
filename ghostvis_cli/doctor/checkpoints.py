"""The base directory, each checkpoint in it, and the one that would run. Headers are read, never weights."""

import os
from collections.abc import Iterator
from pathlib import Path

from ghostvis_cli.checkpoint import load, locate
from ghostvis_cli.checkpoint.choose import base_dir_of, choose_checkpoint, is_base_chosen
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.doctor.converted import chosen_directory
from ghostvis_cli.doctor.finding import Finding, Status, from_error
from ghostvis_cli.errors import EngineError, ModelError
from ghostvis_cli.machine import GIB, read_memory
from ghostvis_cli.profile import EngineSettings, ModelSettings, Resolved

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def checkpoints(resolved: Resolved | None) -> Iterator[Finding]:
    """Everything found, then the chosen one where this process would run it."""
    profile = resolved.profile if resolved else None
    model = profile.model if profile else ModelSettings()
    base, asked = base_dir_of(model), is_base_chosen(model)
    runs_here = profile is not None and profile.engine.chosen_kind != "remote"
    state = _base(base, asked=asked)
    if runs_here or asked or state.status == "ok":  # a client of a server need not have one
        yield state
    chosen = None
    is_local = profile is not None and profile.engine.chosen_kind == "local"
    # SGLang takes a converted directory as it is: what `converted` finds of it is all there is.
    if profile is not None and runs_here and (is_local or chosen_directory(resolved) is None):
        try:
            chosen, notices = choose_checkpoint(profile.model, online=False)
        except (EngineError, ModelError) as error:
            yield from_error("checkpoints", "chosen", error)
        else:
            for line in notices:
                yield Finding("checkpoints", "chosen", "note", line)
            yield from _chosen(chosen, profile.engine)
    yield from _found(base, besides=chosen)


def _base(base: Path, *, asked: bool) -> Finding:
    status: Status = "warning"
    try:
        if not base.exists():
            status, message = "warning" if asked else "note", f"{base} does not exist"
        elif base.is_dir() and os.access(base, os.R_OK | os.X_OK):
            return Finding("checkpoints", "base dir", "ok", str(base))
        else:
            message = f"{base} is no directory that can be read"
    except OSError as error:
        message = f"{base} can't be reached: {error.strerror}"
    fix = "--base-dir DIR or NANOCHAT_BASE_DIR, where training wrote"
    return Finding("checkpoints", "base dir", status, message, fix)


# --- all


def _found(base: Path, besides: Checkpoint | None) -> Iterator[Finding]:
    for source in locate.SOURCE_DIRS:
        try:
            tags = locate.tags(base, source)
        except (ModelError, OSError) as error:
            yield Finding("checkpoints", source, "warning", str(error), f"ls -l {base}")
            continue
        for tag, directory in tags.items():
            steps: list[int | None] = [*locate.steps(directory)]
            for step in steps or [None]:
                yield from _unusable(base, source, tag, step, besides)
        if tags:
            count = sum(len(locate.steps(directory)) for directory in tags.values())
            shown = f"{count} checkpoints, tags: {', '.join(tags)}"
            yield Finding("checkpoints", source, "ok", shown)


def _unusable(
    base: Path, source: str, tag: str, step: int | None, besides: Checkpoint | None
) -> Iterator[Finding]:
    """Why this one can't be used. A folder of shards has no step: `find` says how to join them."""
    try:
        checkpoint = locate.find(base, source, tag, step)
        if besides is None or checkpoint.path != besides.path:
            load.verify(checkpoint)
    except ModelError as error:
        yield from_error("checkpoints", source, error, "warning")


# --- the chosen one


def _chosen(checkpoint: Checkpoint, engine: EngineSettings) -> Iterator[Finding]:
    try:
        classified, tokenizer = load.verify(checkpoint)
    except ModelError as error:
        yield from_error("checkpoints", "chosen", error)
        return
    config = classified.config
    vision = f", {config.vision.num_tokens} tokens an image" if config.vision else ""
    context = f"trained on {config.decoder.sequence_len} tokens"
    shown = f"{checkpoint.path}: {classified.kind}, {context}{vision}"
    yield Finding("checkpoints", "chosen", "ok", shown)
    for line in classified.notices:
        yield Finding("checkpoints", "chosen", "note", line)
    yield Finding("checkpoints", "tokenizer", "ok", f"{tokenizer.vocab_size} ids, fits the model")
    yield from _fits(classified.parameters, engine)


def _fits(parameters: int, engine: EngineSettings) -> Iterator[Finding]:
    """Compare the weights with main memory. A GPU's memory is checked by the engine."""
    memory = read_memory()
    if memory is None or not _on_cpu(engine):
        return
    size = parameters * BYTES.get(engine.dtype, 4)  # auto is float32 on a CPU
    shown = f"the weights take {_size(size)}, {memory.available_bytes / GIB:.1f} GiB are available"
    if size <= memory.available_bytes:
        yield Finding("memory", "model", "ok", shown)
    else:
        status: Status = "error" if size > memory.total_bytes else "warning"
        fix = "--dtype bfloat16, or another machine with --base-url URL"
        yield Finding("memory", "model", status, shown, fix)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:.1f} MiB"


def _on_cpu(engine: EngineSettings) -> bool:
    if engine.device != "auto":
        return engine.device == "cpu"
    try:
        import torch
    except (ImportError, OSError):
        return True
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())
