"""SHA-256 of files, remembered: a file is read again only where its size, times or place say that it may differ."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path

from ghostvis_cli import files, sizes

NOTABLE_BYTES = 2 * 10**9  # seconds to read
# A file changed so recently may change again without a new time: it is not remembered yet.
SETTLED_NS = 2 * 10**9
MOST_KNOWN = 10_000


class KnownHashes:
    """Hashes in a file that every run may rewrite: the last one wins, and lost entries are computed again."""

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        self._known: dict[str, list[int | str]] = {}
        with suppress(OSError, ValueError, AttributeError):
            self._known = dict(json.loads(path.read_text(encoding="utf-8")).items())

    def of(self, path: Path) -> str:
        """The file's SHA-256, read unless it is known. OSError where it can't be read."""
        path = path.resolve()
        stat = path.stat()
        found = self._known.get(str(path))
        if found is not None and found[:-1] == _marks(stat):
            return str(found[-1])
        if stat.st_size > NOTABLE_BYTES:
            self._report(
                f"reading {path} ({sizes.shown(stat.st_size)}) to see whether it was converted before"
            )
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        self._remember(path, stat, digest)
        return digest

    def note(self, path: Path, digest: str) -> None:
        """Remember the hash of a file that was hashed while it was written."""
        path = path.resolve()
        self._remember(path, path.stat(), digest, just_written=True)

    def save(self) -> None:
        """Write the file of hashes. A directory that can't be written is no error: it only costs time."""
        newest = dict(list(self._known.items())[-MOST_KNOWN:])
        with suppress(OSError):
            files.write(self._path, json.dumps(newest).encode(), mode=0o600)

    def _remember(self, path: Path, stat: os.stat_result, digest: str, *, just_written: bool = False) -> None:
        self._known.pop(str(path), None)  # to the end, where the newest are
        if just_written or time.time_ns() - stat.st_mtime_ns > SETTLED_NS:
            self._known[str(path)] = [*_marks(stat), digest]


def _marks(stat: os.stat_result) -> list[int | str]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]
