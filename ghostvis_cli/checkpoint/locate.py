"""Which file a source, tag and step mean, and what else is there. Reads directories only, never a checkpoint."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ghostvis_cli.checkpoint.formats import CONFIG, foreign_directory, is_hf, made_of
from ghostvis_cli.checkpoint.generations import NONE_SET, Constants
from ghostvis_cli.errors import ModelError, one_line
from ghostvis_cli.paths import expanded, home

# The name the training code writes comes first; the second is the one its README uses.
SOURCE_DIRS: dict[str, tuple[str, ...]] = {
    "base": ("base_checkpoints",),
    "mid": ("mid_checkpoints",),
    "sft": ("chatsft_checkpoints", "sft_checkpoints"),
    "rl": ("chatrl_checkpoints", "rl_checkpoints"),
}
MODEL_FILE = re.compile(r"^model_(\d+)\.pt$")
DEPTH_TAG = re.compile(r"^d(\d+)")
BASE_VARIABLE = "NANOCHAT_BASE_DIR"
TOKENIZER = Path("tokenizer", "tokenizer.pkl")
EXPERIMENTS, EXPERIMENTS_VARIABLE = "experiments", "NANOCHAT_EXPERIMENTS_DIR"
EXPERIMENT_VARIABLE = "NANOCHAT_EXPERIMENT"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk. `source` and `tag` are None where the path does not tell them."""

    path: Path
    source: str | None = None
    tag: str | None = None
    step: int | None = None
    base_dir: Path | None = None  # where else its tokenizer may be
    tokenizer: Path | None = None  # the one to take, wherever it is
    constants: Constants = NONE_SET  # set by the user instead of what the model's generation says
    hf: bool = False  # `path` is a directory in Hugging Face's format

    @property
    def size_bytes(self) -> int:
        """Of its weights. OSError where they are not there."""
        files = self.path.glob("*.safetensors") if self.hf else [self.path]
        return sum(path.stat().st_size for path in files)

    @property
    def meta_path(self) -> Path:
        if self.hf:
            return self.path / CONFIG
        return self.path.with_name(re.sub(r"^model", "meta", self.path.stem) + ".json")

    @property
    def tokenizer_path(self) -> Path:
        """Beside the weights where a download is flat, else where training put it. May not exist.

        Links are not followed: a download cache keeps the weights elsewhere than the directory that shows them.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        if self.hf:
            return self.path / "tokenizer.json"
        directory = self.path.absolute().parent
        candidates = [directory / TOKENIZER.name, directory / TOKENIZER]
        candidates += [parent / TOKENIZER for parent in directory.parents[:2]]
        candidates += [parent / TOKENIZER.name for parent in directory.parents[:1]]
        if self.base_dir is not None:
            candidates.append(self.base_dir / TOKENIZER)
        return next((found for found in candidates if found.exists()), candidates[-1 if self.base_dir else 3])


def metas_of_base(path: Path) -> list[Path]:
    """The meta files of the base run that a later stage's checkpoint descends from, where they lie beside it."""
    stage = path.absolute().parent
    places = (stage.parent.parent / SOURCE_DIRS["base"][0] / stage.name, stage.parent / "base")
    return sorted(meta for place in places for meta in place.glob("meta_*.json"))


def default_base_dir() -> Path:
    """`NANOCHAT_BASE_DIR`, else ~/.cache/nanochat, else (no home at all) ./.cache/nanochat."""
    if chosen := os.environ.get(BASE_VARIABLE):
        return expanded(chosen)
    return (home() or Path()) / ".cache" / "nanochat"


def steps(directory: Path) -> dict[int, Path]:
    """Step -> model file, ascending. Compared as numbers: upstream compares them as strings."""
    named = [(int(m[1]), path) for path in _entries(directory) if (m := MODEL_FILE.match(path.name))]
    return dict(sorted((step, path) for step, path in named if not path.is_dir()))


def tags(base_dir: Path, source: str) -> dict[str, Path]:
    """Tag -> directory that holds at least one checkpoint, the tag upstream would choose first."""
    found: dict[str, Path] = {}
    places = [(path.name, path) for name in SOURCE_DIRS[source] for path in _entries(base_dir / name)]
    places += [(path.name, path / source) for path in _entries(_experiment(base_dir))]
    for tag, path in places:
        with suppress(OSError, ModelError):  # a directory that may not be entered has nothing for us
            if path.is_dir() and _adds(path, found.get(tag)):
                found[tag] = path
    return dict(sorted(found.items(), key=_tag_rank, reverse=True))


def _adds(directory: Path, known: Path | None) -> bool:
    """Whether it holds more than the tag's directory under the other spelling: nothing, shards, checkpoints."""
    if known is None:
        return bool(steps(directory)) or _deepspeed(directory)
    return bool(steps(directory)) and not steps(known)


def _experiment(base_dir: Path) -> Path:
    """Where nanochat of July 2026 keeps `<tag>/<source>/`, of the experiment that its environment names."""
    experiments = os.environ.get(EXPERIMENTS_VARIABLE) or base_dir / EXPERIMENTS
    return Path(experiments, os.environ.get(EXPERIMENT_VARIABLE) or "default")


def _tag_rank(item: tuple[str, Path]) -> tuple[int, bool, float]:
    """Largest depth first, `d32` before `d32-old`; tags without a depth last, the newest of them first."""
    tag, path = item
    depth = DEPTH_TAG.match(tag)
    return (int(depth[1]) if depth else -1, bool(depth and depth[0] == tag), path.stat().st_mtime)


def scan(base_dir: Path) -> Iterator[Checkpoint]:
    """Every checkpoint under the base directory: by source, tag as chosen by default, newest step first."""
    for source in SOURCE_DIRS:
        for tag, directory in tags(base_dir, source).items():
            for step, path in reversed(steps(directory).items()):
                yield Checkpoint(path, source, tag, step)


def scan_loose(base_dir: Path) -> Iterator[Checkpoint]:
    """What belongs to no source: flat folders and Hugging Face's directories, at `base_dir` or right below it."""
    known = {*(name for names in SOURCE_DIRS.values() for name in names), EXPERIMENTS}
    below = [path for path in _entries(base_dir) if path.name not in known]
    for folder in (base_dir, *sorted(below)):
        with suppress(OSError, ModelError):  # a directory that may not be entered has nothing for us
            if by_step := steps(folder):
                yield from (Checkpoint(by_step[step], step=step) for step in reversed(by_step))
            elif is_hf(folder):
                yield _of_hf(folder, None)


def find(base_dir: Path, source: str, tag: str | None = None, step: int | None = None) -> Checkpoint:
    """The checkpoint of that tag and step. ModelError lists what there is instead."""
    if source not in SOURCE_DIRS:
        raise ModelError(f"no source named {source!r}", hint=f"one of {', '.join(SOURCE_DIRS)}")
    available = tags(base_dir, source)
    if not available:
        gone = "" if base_dir.exists() else ", which does not exist"
        raise ModelError(f"no {source} checkpoint under {base_dir}{gone}", hint=_what_is_there(base_dir))
    if tag is None:  # shards alone can't be loaded, and must not stand in the way of what can
        tag = next((tag for tag in available if steps(available[tag])), next(iter(available)))
    elif tag not in available:
        raise ModelError(
            f"no {source} checkpoint tagged {tag!r} under {base_dir}",
            hint=f"{source} has: {', '.join(available)}",
        )
    directory = available[tag]
    _refuse_deepspeed(directory)
    step, path = _at(directory, steps(directory), step)
    return Checkpoint(path, source, tag, step, base_dir)


def _at(directory: Path, by_step: dict[int, Path], step: int | None) -> tuple[int, Path]:
    """The step, by default the newest, and its file."""
    chosen = max(by_step) if step is None else step
    if chosen not in by_step:
        raise ModelError(f"no step {chosen} in {directory}", hint=f"it has: {', '.join(map(str, by_step))}")
    return chosen, by_step[chosen]


def from_path(path: Path, step: int | None = None, base_dir: Path | None = None) -> Checkpoint:
    """A model_*.pt, a directory that holds some (the newest step unless one is named), or one of Hugging Face's."""
    path = expanded(path)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist", hint="ghostvis models  lists the checkpoints found"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ModelError(f"{path} can't be read: {one_line(error)}") from error
    if stat.S_ISDIR(kind):
        _refuse_deepspeed(path)
        by_step = steps(path)
        if not by_step and is_hf(path):
            return _of_hf(path, step)
        if not by_step:
            raise foreign_directory(path)
        _, path = _at(path, by_step, step)
    elif step is not None:
        raise ModelError(f"{path} is a file, so --step {step} means nothing", hint="leave out --step")
    return replace(_describe(path), base_dir=base_dir)


def _of_hf(path: Path, step: int | None) -> Checkpoint:
    """With source, tag and step of the checkpoint that it was made of, where it says so."""
    source, tag, made_at = (made_of(path).get(name) for name in ("source", "tag", "step"))
    made_at = made_at if type(made_at) is int else None
    if step not in (None, made_at):
        raise ModelError(f"{path} holds one model, so --step {step} means nothing", hint="leave out --step")
    source, tag = (value if isinstance(value, str) else None for value in (source, tag))
    return Checkpoint(path, source, tag, made_at, hf=True)


def _describe(path: Path) -> Checkpoint:
    """Source and tag as far as the place of the file tells them."""
    where = path.resolve()
    by_dir = {name: source for source, names in SOURCE_DIRS.items() for name in names}
    stage, above = where.parent.name, where.parent.parent.name
    source, tag = by_dir.get(above), stage
    elsewhere = os.environ.get(EXPERIMENTS_VARIABLE)
    in_experiment = EXPERIMENTS in where.parts or (
        elsewhere and where.is_relative_to(Path(elsewhere).resolve())
    )
    if in_experiment and stage in SOURCE_DIRS:
        source, tag = stage, above
    number = MODEL_FILE.match(path.name)
    return Checkpoint(path, source, tag if source else None, int(number[1]) if number else None)


def _deepspeed(directory: Path) -> bool:
    shards = ("mp_rank_*", "zero_pp_rank_*", "*/mp_rank_*", "*/zero_pp_rank_*")
    return any(next(directory.glob(pattern), None) is not None for pattern in shards)


def _refuse_deepspeed(directory: Path) -> None:
    if _deepspeed(directory) and not steps(directory):
        raise ModelError(
            f"{directory} is a DeepSpeed ZeRO checkpoint, which is split over ranks",
            hint=f"python {directory}/zero_to_fp32.py {directory} {directory}/model_000000.pt",
        )


def _what_is_there(base_dir: Path) -> str:
    found = [
        f"--source {source} --model-tag {tag}" for source in SOURCE_DIRS for tag in tags(base_dir, source)
    ]
    if found:
        return "there is: " + "; ".join(found)
    chosen = _experiment(base_dir)
    others = sorted(path.name for path in _entries(chosen.parent) if path != chosen and path.is_dir())
    if others:
        return "another experiment: " + " or ".join(f"{EXPERIMENT_VARIABLE}={name}" for name in others)
    return (
        f"choose another place with --base-dir DIR or {BASE_VARIABLE}, a file with --checkpoint-path,"
        " or the built-in model with --source demo"
    )


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory} can't be read: {one_line(error)}") from error
