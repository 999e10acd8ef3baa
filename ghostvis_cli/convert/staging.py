"""A directory that appears whole or not at all: made under another name beside its place, synced, then renamed.

Killed at any moment, the place holds what it held before or all of what is new. What a killed run leaves beside it
is cleared away by the next one for the same place.
"""

import ctypes
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from ghostvis_cli.checkpoint.formats import CERTIFICATE as CERTIFICATE
from ghostvis_cli.errors import GhostvisError, OutputError, UsageError

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
_AT_FDCWD = -100


def refuse_to_overwrite(place: Path, *, force: bool) -> None:
    """UsageError where something lies at `place` that must stay. --force replaces what `convert` made, no more."""
    if not os.path.lexists(place):
        return
    if not force:
        raise UsageError(f"{place} exists", hint="--force replaces it, or choose another --out")
    if not is_ours(place):
        raise UsageError(
            f"{place} is not a directory that ghostvis convert made, so --force does not replace it",
            hint="choose another --out, or remove it yourself",
        )


def is_ours(place: Path) -> bool:
    """An empty directory, or one with our certificate in it."""
    if not place.is_dir():
        return False
    if not any(place.iterdir()):
        return True
    try:
        certificate = json.loads((place / CERTIFICATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(certificate, dict) and str(certificate.get("made_by")).startswith("ghostvis convert")


@contextmanager
def staged(place: Path, needed_bytes: int) -> Iterator[Path]:
    """An empty directory beside `place`, on the same disk; gone at the end unless it was renamed away."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(place)
        free = shutil.disk_usage(place.parent).free
        if free < needed_bytes:
            raise OutputError(
                f"{place.parent} has {free / 1e9:.1f} GB free, and {needed_bytes / 1e9:.1f} GB are needed",
                hint="choose another --out, or a smaller --dtype",
            )
        directory = Path(tempfile.mkdtemp(prefix=_prefix(place), dir=place.parent))
        directory.chmod(0o777 & ~_umask())
        lock = _locked(directory)
    except OSError as error:
        raise _failed(place, error) from error
    try:
        yield directory
    except OSError as error:
        if error.errno is None:  # a library's own, not the system's
            raise
        raise _failed(place, error) from error
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(directory, ignore_errors=True)


def publish(directory: Path, place: Path) -> None:
    """Sync the files of `directory` and give it the name `place`; what had that name before is removed."""
    for file in directory.iterdir():
        _sync(file)
    _sync(directory)
    if not place.exists():
        directory.rename(place)
        _sync(place.parent)
        return
    if not _exchange(directory, place):
        aside = _aside(place)
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)  # a kill right here is repaired by the next run
        directory.rename(place)
        directory = aside
    _sync(place.parent)
    shutil.rmtree(directory, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names at once; False where the system or the disk can't."""
    library = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    try:
        if sys.platform == "darwin":
            return bool(library.renamex_np(first, second, _EXCHANGE) == 0)
        return bool(library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _EXCHANGE) == 0)
    except AttributeError:
        return False


def _clear_leftovers(place: Path) -> None:
    aside = _aside(place)
    if aside.exists():
        if place.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(place)
    for directory in place.parent.glob(f"{escape(_prefix(place))}*"):
        lock = _locked(directory)
        if lock is not None:  # else a run is writing it
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)


def _locked(directory: Path) -> int | None:
    """Hold a directory until the descriptor is closed, or the process ends; None where another one does."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _prefix(place: Path) -> str:
    return f".{place.name}.converting-"


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.replaced")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some systems sync no directories
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _failed(place: Path, error: OSError) -> GhostvisError:
    return OutputError(f"{place} can't be written: {error.strerror or error}")
