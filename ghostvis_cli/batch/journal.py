"""The output file of a batch: records appended under a lock, on disk before they count, repaired after a crash.

One line a row. What a killed run leaves is whole lines and at most one torn one, the last, which is cut off. Lines
are only ever taken out by writing a new file and renaming it, so that no moment has a file with less in it.
"""

import fcntl
import json
import os
import shlex
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ghostvis_cli import files
from ghostvis_cli.batch.manifest import Manifest, differences, plain_settings
from ghostvis_cli.batch.rows import RunSettings
from ghostvis_cli.errors import LockedError, OutputError, UsageError
from ghostvis_cli.paths import expanded

ELSEWHERE = "--output OTHER.jsonl"
APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


@dataclass
class Progress:
    """Where a run stands. A row is `wanted` (1) until its record is on disk; an EngineError leaves it so."""

    wanted: bytearray
    finished: int = 0
    failed: int = 0
    failure_code: int | None = None  # of the first row that failed
    repaired: int = 0  # bytes of a torn line that were cut off
    dropped: int = 0  # records of failed rows taken out, to be run again

    @classmethod
    def fresh(cls, rows: int) -> "Progress":
        return cls(bytearray(b"\1") * rows)

    @property
    def recorded(self) -> int:
        return self.finished + self.failed

    def count(self, index: int, code: int | None) -> None:
        """A row's record is on disk; `code` is its error's."""
        self.wanted[index] = 0
        if code is None:
            self.finished += 1
            return
        self.failed += 1
        self.failure_code = self.failure_code or code


@dataclass(frozen=True)
class _Entry:
    """What a line of the output says about a row. `code` is that of an error."""

    line: int
    index: int
    row_hash: str
    code: int | None


class Journal:
    """An output file that this process alone appends to."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._in_use = threading.Lock()  # `append` runs in a thread that outlives the task that wanted it

    @classmethod
    def open(cls, path: Path) -> Self:
        """Make or open it, and lock it until `close` or the end of the process, however that comes."""
        path = expanded(path).resolve()  # a link stays a link when the file it names is replaced
        if path.exists() and not path.is_file():
            raise UsageError(
                f"--output {path} is not a regular file", hint="without --output, results go to stdout"
            )
        files.sweep(path.parent)
        try:
            return cls(path, _locked(path))
        except BlockingIOError as error:
            raise LockedError(f"another run is writing {path}") from error
        except OSError as error:
            raise OutputError(f"{path} can't be written: {error.strerror}") from error

    @property
    def manifest_path(self) -> Path:
        return self.path.with_name(self.path.name + ".manifest.json")

    def check(self, settings: RunSettings, manifest: Manifest | None = None) -> None:
        """UsageError where the file holds something other than results of this run. Without the model, early."""
        if not self._size:
            return
        was = Manifest.read(self.manifest_path)
        if was is None:
            missing = f"there is no {self.manifest_path.name} beside it"
            raise UsageError(
                f"{self.path} is not empty, and {missing}: not a batch to go on with", hint=ELSEWHERE
            )
        found = list(differences(was.settings, plain_settings(settings)))
        found += differences(was.model, manifest.model, "model.") if manifest else []
        if found:
            message = f"{self.path} holds results of a different run: {'; '.join(found)}"
            raise UsageError(message, hint=f"{ELSEWHERE}, or remove the file to begin again")

    def resume(self, rows: int, row_hash: Callable[[int], str], *, retry_errors: bool) -> Progress:
        """What is done already. Cuts off a torn line, takes out failures that are to run again."""
        progress = Progress.fresh(rows)
        superseded: list[int] = []
        strangers: list[_Entry] = []
        for entry in self._entries(progress):
            current = entry.index < rows and entry.row_hash == row_hash(entry.index)
            if entry.code is not None and (retry_errors or not current):
                superseded.append(entry.line)
            elif not current:
                strangers.append(entry)
            elif not progress.wanted[entry.index]:
                raise UsageError(f"{self.path}, line {entry.line}: its row is there twice", hint="remove one")
            else:
                progress.count(entry.index, entry.code)
        if strangers:
            raise UsageError(_about_strangers(self.path, strangers), hint=ELSEWHERE)
        if superseded:
            self._rewrite_without(frozenset(superseded))
            progress.dropped = len(superseded)
        return progress

    def begin(self, manifest: Manifest) -> None:
        """Before the first record: say what the records will depend on."""
        if not self._size:
            manifest.write(self.manifest_path)

    def append(self, lines: Sequence[bytes]) -> None:
        """Returns once the lines are on disk. OutputError leaves the file as it was before."""
        content = b"".join(lines)
        with self._in_use:
            try:
                write_all(self._descriptor, content)
                os.fsync(self._descriptor)
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)
                message = f"{self.path} can't be written: {error.strerror}; what it held is unharmed"
                raise OutputError(message, hint=f"df -h {shlex.quote(str(self.path.parent))}") from error
            self._size += len(content)

    def close(self) -> None:
        """Unlock, and remove a file that nothing was written to."""
        with self._in_use:
            if not self._size:
                with suppress(OSError):
                    self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = -1

    def _entries(self, progress: Progress) -> Iterator[_Entry]:
        """Every record. A torn last line is cut off first; a broken line elsewhere is an error."""
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                entry = _read(number, line)
                if entry is None and file.read(1):
                    message = f"{self.path}, line {number}: no record of a batch"
                    raise UsageError(
                        message, hint=f"remove that line, and its row runs again; or {ELSEWHERE}"
                    )
                if entry is None:
                    break
                whole += len(line)
                yield entry
        if whole < self._size:
            os.ftruncate(self._descriptor, whole)
            os.fsync(self._descriptor)
            progress.repaired, self._size = self._size - whole, whole

    def _rewrite_without(self, lines: Collection[int]) -> None:
        try:
            # Locked before it has the name: there is no moment at which another run could take it.
            with files.replacing(self.path) as new, self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if number not in lines:
                        write_all(new, line)
                descriptor = os.dup(new)
        except OSError as error:
            raise files.cannot_write(self.path, error) from error
        os.close(self._descriptor)
        self._descriptor, self._size = descriptor, os.fstat(descriptor).st_size


def _locked(path: Path) -> int:
    """A descriptor with a lock on the file that has this name now, not on one that was just replaced."""
    while True:
        descriptor = os.open(path, APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _read(number: int, line: bytes) -> _Entry | None:
    """None for what is no record. A line without its end is torn, even where what is there is valid JSON."""
    try:
        record: Any = json.loads(line) if line.endswith(b"\n") else None
        error = record.get("error")
        entry = _Entry(number, record["index"], record["row_hash"], error["code"] if error else None)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    return entry if type(entry.index) is int and entry.index >= 0 else None


def _about_strangers(path: Path, strangers: Sequence[_Entry]) -> str:
    return (
        f"{path} holds {len(strangers)} results of rows that are not in the input, or changed since; "
        f"the first is on line {strangers[0].line}"
    )
