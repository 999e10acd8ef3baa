"""Bytes that come in -> text and lines: the one reader of prompts, rows, scripts, profiles and keys.

UTF-8 with or without a byte order mark, UTF-16 and UTF-32 by theirs. A line ends with LF, CRLF or CR alone.
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

from ghostvis_cli.errors import InputError

PIECE_BYTES = 1 << 16
# UTF-32's marks stand first: one of them begins as UTF-16's does.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
# Two letters of UTF-16, or one of UTF-32, in either order of bytes.
UNMARKED = re.compile(rb"[^\0]\0[^\0]\0|\0[^\0]\0[^\0]|[^\0]\0\0\0|\0\0\0[^\0]")
LINE_END = re.compile(rb"\r\n|\r|\n")


def decode(content: bytes, name: str) -> str:
    """The text without its byte order mark. InputError says what it is in place of text."""
    encoding, mark = _encoding(content, name)
    try:
        return content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise _undecodable(name, encoding, error, len(mark)) from error


def lines(pieces: Iterable[bytes], name: str, longest: int) -> Iterator[bytes | None]:
    """Each line in UTF-8 (as far as it was), without its end; None for one of more bytes than `longest`.

    The pieces may end anywhere. A line is given out as soon as its end is there.
    """
    held: list[bytes] = []
    size, after_cr = 0, False
    for piece in filter(None, _as_utf8(pieces, name)):
        if after_cr:  # that CR ended a line already; its LF may come only now
            piece = piece.removeprefix(b"\n")
        after_cr = piece.endswith(b"\r")
        *ended, rest = LINE_END.split(piece)
        for line in ended:
            size += len(line)
            yield b"".join([*held, line]) if size <= longest else None
            held.clear()
            size = 0
        size += len(rest)
        if size <= longest:
            held.append(rest)
        else:
            held.clear()
    if size:
        yield b"".join(held) if size <= longest else None


def pieces_of(file: BinaryIO) -> Iterator[bytes]:
    """What a file holds from here on, or a pipe gives as it comes."""
    read = getattr(file, "read1", file.read)
    while piece := read(PIECE_BYTES):
        yield piece


def _as_utf8(pieces: Iterable[bytes], name: str) -> Iterator[bytes]:
    """UTF-8 is not converted, so that faults are told with their line."""
    pieces, start = iter(pieces), b""
    for piece in pieces:
        start += piece
        if not any(mark.startswith(start) for mark, _ in MARKS):
            break
    encoding, mark = _encoding(start, name)
    pieces = chain([start[len(mark) :]], pieces)
    if encoding == "utf-8":
        yield from pieces
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for piece in pieces:
            yield decoder.decode(piece).encode()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _undecodable(name, encoding, error) from error


def _encoding(start: bytes, name: str) -> tuple[str, bytes]:
    """How the text is encoded, and the byte order mark that says so."""
    for mark, encoding in MARKS:
        if start.startswith(mark):
            return encoding, mark
    if UNMARKED.match(start):
        raise InputError(
            f"{name} is not UTF-8 text: it seems to be UTF-16 or UTF-32 without a byte order mark",
            hint="iconv -f UTF-16LE -t UTF-8 FILE > FILE.utf8",
        )
    return "utf-8", b""


def _undecodable(
    name: str, encoding: str, error: UnicodeDecodeError, mark_bytes: int | None = None
) -> InputError:
    place = "" if mark_bytes is None else f" at byte {mark_bytes + error.start}"
    return InputError(f"{name} is not {encoding[:6].rstrip('-').upper()} text: {error.reason}{place}")


def well_formed(text: object, name: str) -> None:
    """InputError unless it is text that has bytes; the half surrogates of undecodable arguments have none."""
    if not isinstance(text, str):
        raise InputError(f"{name} is a {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid Unicode at character {error.start}") from None
