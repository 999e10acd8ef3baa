"""--log-file: stderr for this process, and a copy of each of its lines, with the time, at the end of a file."""

import io
import os
import re
import time
from pathlib import Path
from typing import TextIO

from ghostvis_cli.errors import UsageError

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Log(io.TextIOBase):
    """Writes to stderr what is written to it. Each whole line also goes to the file, in one write, without colours.

    One write a line, at the end of the file wherever that is by then: runs may share a log and logrotate may
    truncate it.
    """

    def __init__(self, path: Path, stderr: TextIO | None) -> None:
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UsageError(f"--log-file {path} can't be opened: {error.strerror}") from error
        self._stderr = stderr
        self._begun = ""
        self._started_s = time.monotonic()

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self.line(line)
        if self._stderr is not None:
            self._stderr.write(text)
        return len(text)

    def line(self, text: str) -> None:
        """A line for the file alone. A full disk loses the log, not the run."""
        shown = ESCAPE.sub("", text.rstrip("\r").rsplit("\r", 1)[-1])  # of a line drawn anew, what it came to
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            self._file.write(f"{stamp} {os.getpid()} {shown}\n".encode(errors="backslashreplace"))
        except OSError:
            return

    def end(self, code: int) -> None:
        if self._begun:
            self.line(self._begun)
        self.line(f"ended: code {code} after {time.monotonic() - self._started_s:.1f} s")

    def flush(self) -> None:
        if self._stderr is not None:
            self._stderr.flush()

    def isatty(self) -> bool:
        return self._stderr is not None and self._stderr.isatty()

    def fileno(self) -> int:
        if self._stderr is None:
            raise io.UnsupportedOperation("stderr is closed")
        return self._stderr.fileno()

    def writable(self) -> bool:
        return True
