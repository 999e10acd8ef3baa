"""A directory that appears whole or not at all: made under another name beside its place, synced, then renamed.

Killed at any moment, the place holds what it held before or all of what is new. What a killed run leaves beside it
is cleared away by the next one for a place beside it.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TypeAlias

from ghostvis_cli import files, scratch, sizes
from ghostvis_cli.convert.directory import certificate_of, foreign_names, is_ours
from ghostvis_cli.endings import held_up, undone
from ghostvis_cli.errors import GhostvisError, OutputError, UsageError, printable

UNFINISHED = ".converting-"  # in the name of a directory that is being made
NAMED = 5  # names in one message
Identity: TypeAlias = tuple[int, int]  # device and inode


def replaceable(place: Path, *, force: bool) -> Identity | None:
    """What lies at `place` and may be replaced; None where nothing does. UsageError where it must stay.

    --force replaces what `convert` made, and no directory that holds other files too.
    """
    if not os.path.lexists(place):
        return None
    if not force:
        raise UsageError(f"{place} exists", hint="--force replaces it, or choose another --out")
    try:
        ours, others = is_ours(place), foreign_names(place)
    except OSError as error:
        raise _failed(place, error) from error
    if not ours:
        raise UsageError(
            f"{place} is not a directory that ghostvis convert made, so --force does not replace it",
            hint="choose another --out, or remove it yourself",
        )
    if others:
        raise _not_ours(place, others)
    return _identity(place)


def _not_ours(place: Path, names: Sequence[str]) -> UsageError:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    shown = ", ".join(map(printable, names[:NAMED]))
    return UsageError(
        f"{place} holds what ghostvis convert did not make, and --force would remove it: {shown}{more}",
        hint=f"move it away: mv {quote(printable(str(place / names[0])))} ELSEWHERE, or choose another --out",
    )


def _identity(place: Path) -> Identity:
    found = place.lstat()
    return found.st_dev, found.st_ino


@contextmanager
def staged(place: Path, needed_bytes: int) -> Iterator[Path]:
    """An empty directory beside `place`, on the same disk; gone at the end unless it was renamed away."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(place)
        directory, lock = _made(place)
    except OSError as error:
        raise _failed(place, error) from error
    try:
        _check_room(place, needed_bytes)
        with undone(partial(_discard, directory)):
            yield directory
    except OSError as error:
        if error.errno is None:  # a library's own, not the system's
            raise
        raise _failed(place, error) from error
    finally:
        with suppress(FileNotFoundError):  # renamed away
            if os.path.samestat(os.fstat(lock), directory.lstat()):
                shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _check_room(place: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(place.parent).free
    if free < needed_bytes:
        raise OutputError(
            f"{place.parent} has {sizes.shown(free)} free, and {sizes.shown(needed_bytes)} are needed",
            hint="choose another --out, or a smaller --dtype",
        )


def _made(place: Path) -> tuple[Path, int]:
    """A new directory and a descriptor that keeps other runs from clearing it away."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_prefix(place), dir=place.parent))
        with suppress(FileNotFoundError):  # another run took it for a leftover before it was locked
            directory.chmod(0o777 & ~_umask())
            lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
            if files.lock(lock) and directory.exists():
                return directory, lock
            os.close(lock)


def _discard(directory: Path) -> None:
    """Remove a directory that another thread may still write to, renamed first as a leftover is named."""
    gone = directory.with_name(f"{directory.name}-gone")
    with suppress(OSError):
        directory.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def publish(directory: Path, place: Path, replaced: Identity | None) -> None:
    """Sync the files of `directory` and give it the name `place`.

    `replaced` is what `replaceable` found there before the work began; anything else is refused and stays.
    """
    for file in directory.iterdir():
        _sync(file)
    _sync(directory)
    try:
        with held_up():  # `directory` may be what was there before
            if replaced is None or not os.path.lexists(place):
                files.rename_new(directory, place)
            else:
                _replace(directory, place, replaced)
    except FileExistsError as error:
        raise UsageError(
            f"{place} was made by somebody else during the conversion, and stays as it is",
            hint="choose another --out, or move it away and convert again",
        ) from error
    files.sync_directory(place.parent)


def _replace(directory: Path, place: Path, replaced: Identity) -> None:
    """Checked again after the rename, since files can't be added under the old name any more."""
    _refuse_changed(place, place, replaced)
    if files.exchange(directory, place):
        old = directory
    else:  # two renames; a kill between them is repaired by the next run
        old = _aside(place)
        place.rename(old)
    try:
        _refuse_changed(old, place, replaced)
    except (UsageError, OSError):
        if old != directory or not files.exchange(directory, place):
            files.rename_new(old, place)
        raise
    if old != directory:
        files.rename_new(directory, place)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_changed(found: Path, place: Path, replaced: Identity) -> None:
    if _identity(found) != replaced:
        raise FileExistsError
    if others := foreign_names(found):
        raise _not_ours(place, others)


def _clear_leftovers(place: Path) -> None:
    aside = _aside(place)
    if aside.exists():
        if not os.path.lexists(place):
            files.rename_new(aside, place)
        elif not foreign_names(aside):
            shutil.rmtree(aside, ignore_errors=True)
    clear_unfinished(place.parent)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed conversions left in the folder, whatever their target was."""
    for directory in folder.glob(f".*{UNFINISHED}*"):
        lock = scratch.locked(directory)
        if lock is None:  # a run is writing it
            continue
        # Killed in _replace, it is the previous directory, which may hold files of the user's.
        if not (certificate_of(directory) and foreign_names(directory)):
            shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _prefix(place: Path) -> str:
    return f".{place.name}{UNFINISHED}"


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
