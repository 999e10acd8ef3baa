"""The input file: read once as a whole before anything runs, then again row by row as rows are wanted.

Holds 32 bytes a row. Lines that cannot be used are reported together, and nothing runs while there is one.
"""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from ghostvis_cli.batch.rows import Row, RunSettings, read_row
from ghostvis_cli.encoding import lines, pieces_of
from ghostvis_cli.errors import InputError
from ghostvis_cli.paths import expanded
from ghostvis_cli.profile.values import shown

LONGEST_LINE_BYTES = 64 * 2**20  # an image of 32 MiB, the default limit, is 43 MiB as a data: URL
FAULTS_LISTED = 10
DIGEST_BYTES = 32


@dataclass
class RowFile:
    """A file of rows, checked. Paths of images are relative to `directory`."""

    name: str
    directory: Path
    settings: RunSettings
    _file: BinaryIO
    _digests: bytearray = field(default_factory=bytearray, repr=False)

    @classmethod
    def open(cls, path: str, settings: RunSettings) -> "RowFile":
        """Open and check a file, or stdin for `-`. InputError lists the lines that can't be used."""
        name, file = ("stdin", _stdin()) if path == "-" else (path, _opened(expanded(path)))
        # What a shell's <(...) or /dev/stdin names lies nowhere: its images are found from where it was typed.
        directory = Path() if path == "-" or _is_stream(expanded(path)) else expanded(path).parent
        source = cls(name, directory, settings, _seekable(file))
        try:
            source._check()
        except BaseException:
            source.close()
            raise
        return source

    def __len__(self) -> int:
        return len(self._digests) // DIGEST_BYTES

    def digest(self, index: int) -> bytes:
        return bytes(self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])

    def rows(self, wanted: bytes | bytearray) -> Iterator[Row]:
        """The rows whose byte in `wanted` is not 0, in order."""
        for index, (number, line) in zip(range(len(self)), self._lines(), strict=False):
            if not wanted[index]:
                continue
            row = self._again(line, index, number)
            if row is None:
                raise InputError(f"{self.name} was changed while it was read, at line {number}")
            yield row

    def is_file(self, path: Path) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._file.fileno()), path.stat())
        return False

    def close(self) -> None:
        self._file.close()

    def _check(self) -> None:
        listed: list[str] = []
        count = faults = 0
        seen: dict[str, int] = {}  # "7" and 7 are one id: many readers of the output will not tell them apart
        for count, (number, line) in enumerate(self._lines(), start=1):
            try:
                row = read_row(self._whole(line), count - 1, number, self.settings)
                if first := seen.get(str(row.id)):
                    raise InputError(f"the id {shown(str(row.id))} is that of line {first} too")
                seen[str(row.id)] = number
                self._digests += row.digest
            except InputError as error:
                faults += 1
                if faults <= FAULTS_LISTED:
                    listed.append(f"  line {number}: {error.message}")
        if faults > FAULTS_LISTED:
            listed.append(f"  and {faults - FAULTS_LISTED} more")
        if faults:
            raise InputError("\n".join([_headline(self.name, faults, count), *listed]))
        if not count:
            raise InputError(f"{self.name} holds no rows", hint='{"id": "1", "prompt": "Hello"} on each line')

    def _again(self, line: bytes | None, index: int, number: int) -> Row | None:
        """The row as it was when the file was checked; None where it is another one now."""
        with suppress(InputError):
            row = read_row(self._whole(line), index, number, self.settings)
            if row.digest == self.digest(index):
                return row
        return None

    @staticmethod
    def _whole(line: bytes | None) -> bytes:
        if line is None:
            raise InputError(
                f"longer than {LONGEST_LINE_BYTES // 2**20} MiB; give images as paths, not as data: URLs"
            )
        return line

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Number and content of every line that holds something; None for one that is too long."""
        self._file.seek(0)
        for number, line in enumerate(lines(pieces_of(self._file), self.name, LONGEST_LINE_BYTES), start=1):
            if line is None or line.strip():
                yield number, line


def _is_stream(path: Path) -> bool:
    return str(path.absolute()).startswith(("/dev/", "/proc/"))


def _headline(name: str, faults: int, count: int) -> str:
    which = "the only row" if count == 1 else f"{faults} of {count} rows"
    return f"{name}: {which} can't be used, so none was run"


def _stdin() -> BinaryIO:
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("stdin is closed, so --input - has nothing to read")
    if sys.stdin.isatty():
        raise InputError("stdin is a terminal, not rows", hint="ghostvis generate --input rows.jsonl")
    return cast(BinaryIO, sys.stdin.buffer)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error


def _seekable(file: BinaryIO) -> BinaryIO:
    """The file itself, or a copy on disk of what a pipe holds: rows are read twice."""
    with suppress(OSError, AttributeError):  # a test's stdin has no descriptor
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
    copy = cast(BinaryIO, tempfile.TemporaryFile(prefix="ghostvis-rows-"))  # noqa: SIM115
    try:
        shutil.copyfileobj(file, copy)
    except OSError as error:
        copy.close()
        raise InputError(f"the rows can't be read to their end: {error.strerror}") from error
    return copy
