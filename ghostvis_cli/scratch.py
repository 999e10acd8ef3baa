"""Temporary folders that go however the process ends: at the end of the block, on the way out, or by the next run.

A folder is locked as long as its process lives, so that the next run can tell what a killed one left.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ghostvis_cli.endings import undone

PREFIX = "ghostvis-scratch-"
OURS = re.compile(rf"{PREFIX}\w{{8}}")


@contextmanager
def folder() -> Iterator[Path]:
    """A new one, this user's alone. OSError where there is no place for it."""
    sweep()
    place, lock = _made()
    try:
        with undone(partial(discard, place)):
            yield place
    finally:
        discard(place)
        os.close(lock)


def _made() -> tuple[Path, int]:
    while True:
        place = Path(tempfile.mkdtemp(prefix=PREFIX))
        if (lock := locked(place)) is not None and place.exists():
            return place, lock  # else another process removed it before it was locked


def sweep() -> None:
    """Remove folders of this user whose processes are gone."""
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if OURS.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                _discard_if_left(Path(entry.path))


def _discard_if_left(place: Path) -> None:
    if place.stat().st_uid != os.geteuid() or (lock := locked(place)) is None:
        return
    discard(place)
    os.close(lock)


def locked(place: Path) -> int | None:
    """Hold a folder until the descriptor is closed, or the process ends; None where another process does."""
    with suppress(OSError):
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            os.close(descriptor)
    return None


def discard(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
