"""What a command may read besides its arguments: stdin, where it holds something, and text files."""

import os
import stat
import sys
from pathlib import Path

from ghostvis_cli.encoding import decode
from ghostvis_cli.errors import InputError

TEXT_LIMIT_BYTES = 16 * 1024**2


def piped() -> bool:
    """Whether stdin is a pipe or a file. A terminal, /dev/null (cron) and a closed stdin are not."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_stdin() -> str:
    """All of stdin as text, without its last line break."""
    if sys.stdin is None:
        raise InputError("stdin is closed, so - has nothing to read")
    stream = getattr(sys.stdin, "buffer", None)
    try:
        content = stream.read(TEXT_LIMIT_BYTES + 1) if stream is not None else sys.stdin.read().encode()
    except OSError as error:
        raise InputError(f"stdin can't be read: {error.strerror}") from error
    return _text(content, "stdin")


def read_text(path: Path) -> str:
    """A text file, without its last line break."""
    try:
        with Path(os.path.expanduser(path)).open("rb") as file:  # noqa: PTH111 - the other raises without a home
            return _text(file.read(TEXT_LIMIT_BYTES + 1), str(path))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error


def _text(content: bytes, name: str) -> str:
    if len(content) > TEXT_LIMIT_BYTES:
        raise InputError(f"{name} holds more than {TEXT_LIMIT_BYTES // 1024**2} MiB of text")
    text = decode(content, name).removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise InputError(f"{name} is empty")
    return text
