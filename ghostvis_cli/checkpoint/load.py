"""A checkpoint on disk -> a model and its tokenizer, ready to run. Weights only: nothing in a file is executed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostvis_cli.checkpoint import directory, generations
from ghostvis_cli.checkpoint.formats import instead
from ghostvis_cli.checkpoint.header import read_header, unwrap
from ghostvis_cli.checkpoint.keys import Classified, Part, classify, clean_names
from ghostvis_cli.checkpoint.locate import Checkpoint, metas_of_base
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.errors import ModelError, limit_reached, one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ghostvis_cli.model.ghostvis import GhostVis

MESSAGE_LIMIT = 1000  # characters: key names and values in it are the file's
META_LIMIT_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, its tokenizer and the checkpoint that both are of."""

    model: "GhostVis"
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    notices: tuple[str, ...]  # what the user should know about the file, a line each


def read_meta(checkpoint: Checkpoint) -> dict[str, Any]:
    """The JSON beside the weights. It must be there: some of what it says is in no tensor."""
    return _read(checkpoint.meta_path)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > META_LIMIT_BYTES:
            raise ModelError(f"{path} is larger than any meta file")
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} is missing: the number of heads, the trained length and windows are in no tensor",
            hint=f"""copy it there, or write {{"model_config": {{"n_head": N, "sequence_len": N}}}} to {path}, """
            """and "window_pattern" where it had one""",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        unreadable = ModelError(f"{path} can't be read: {error}")
        raise limit_reached(error) or instead(path, "{", "[") or unreadable from error
    if not isinstance(meta, dict):
        raise ModelError(f"{path} is not a JSON object")
    return meta


def inspect(checkpoint: Checkpoint) -> Classified:
    """What the checkpoint is, from its header and meta alone: no torch, no weights read."""
    try:
        if checkpoint.hf:
            return directory.classify(checkpoint)
        header, meta = read_header(checkpoint.path), read_meta(checkpoint)
        base = None if generations.dated(meta) else _meta_of_base(checkpoint)
        return classify(clean_names(header), meta, checkpoint.constants, base)
    except ModelError as error:
        raise _named(checkpoint.path, error) from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # malformed in an unchecked way
        raise ModelError(f"{checkpoint.path} makes no sense: {one_line(error)}") from error


def _meta_of_base(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The meta file of the base run that a later stage's checkpoint descends from, where it lies beside it."""
    try:
        found = metas_of_base(checkpoint.path)
        return _read(found[-1]) if found else None
    except (ModelError, OSError):
        return None  # it would only date the model


def verify(checkpoint: Checkpoint) -> tuple[Classified, Tokenizer]:
    """Header, meta and tokenizer, and that they belong together; ModelError where one is not usable."""
    classified = inspect(checkpoint)
    tokenizer = Tokenizer.load(checkpoint.tokenizer_path)
    rows = classified.config.decoder.vocab_size
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"the tokenizer {checkpoint.tokenizer_path} has {tokenizer.vocab_size} ids, "
            f"{checkpoint.path} has {rows} rows: they do not belong together",
            hint="put the training run's own tokenizer.pkl beside the model file",
        )
    return classified, tokenizer


def load_model(
    checkpoint: Checkpoint, *, device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None
) -> LoadedModel:
    """Read weights onto `device` as `dtype` (float32 by default); every value is checked to be finite."""
    import torch

    from ghostvis_cli.model.ghostvis import GhostVis

    classified, tokenizer = verify(checkpoint)
    tensors = directory.tensors(checkpoint) if checkpoint.hf else open_tensors(checkpoint.path)
    with torch.device("meta"):
        model = GhostVis(classified.config)
    expected = model.state_dict()
    try:
        state = {
            name: assemble(
                name, tensors, part, expected[name].shape, torch.device(device), dtype or torch.float32
            )
            for name, part in classified.parts.items()
        }
    except ModelError as error:
        raise _named(checkpoint.path, error) from None
    model.load_state_dict(state, strict=True, assign=True)
    model.to(device)  # the rotary tables, which are in no file
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, checkpoint, tuple(classified.notices))


def open_tensors(path: Path) -> "dict[str, Tensor]":
    """The file's tensors by clean name, mapped and not read yet. Only data is unpickled, no code is run."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can fail in any way at all
        damaged = ModelError(f"{path} is damaged or not safe to load: {one_line(error)}")
        raise limit_reached(error) or damaged from error
    try:
        return clean_names(unwrap(content, torch.Tensor))
    except ModelError as error:
        raise _named(path, error) from None


def assemble(
    name: str,
    tensors: "Mapping[str, Tensor]",
    part: Part,
    shape: "torch.Size",
    device: "torch.device",
    dtype: "torch.dtype",
) -> "Tensor":
    """One of our parameters from the file's tensors: cut, cast, moved, joined, and checked to be finite."""
    import torch

    dtype = torch.float32 if part.exact else dtype
    stored = [tensors[key] for key in part.keys]
    pieces = [each[: part.rows].to(device=device, dtype=dtype) for each in stored]
    for key, piece in zip(part.keys, pieces, strict=True):
        if not bool(torch.isfinite(piece).all()):
            raise ModelError(f"{key} holds values that are not finite", hint="use an earlier step")
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    assert whole.numel() == shape.numel(), f"classify let {name} pass with another shape"
    # A tensor that is still the mapped file would die with it, and its pages with another process's write.
    mapped = whole.data_ptr() == stored[0].data_ptr()
    return whole.reshape(shape).clone() if mapped else whole.reshape(shape)


def _named(path: Path, error: ModelError) -> ModelError:
    message = error.message if len(error.message) <= MESSAGE_LIMIT else f"{error.message[:MESSAGE_LIMIT]} ..."
    named = message.startswith(str(path))
    return ModelError(message if named else f"{path}: {message}", hint=error.hint)
