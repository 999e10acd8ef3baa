"""Messages between an engine and its process: a JSON object, and the pictures that belong to it as they are.

Both ends are ours; still nothing that comes in can run code. A frame is the sizes of its two parts, the JSON, the
pictures one after another, their sizes under `pictures` in the JSON.
"""

import json
import socket
import struct
from asyncio import IncompleteReadError, StreamReader
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SIZES = struct.Struct("!IQ")  # bytes of JSON, bytes of pictures
_PICTURES = "pictures"


@dataclass(frozen=True)
class Frame:
    message: dict[str, Any]
    pictures: tuple[bytes, ...] = ()


def packed(message: dict[str, Any], pictures: Sequence[bytes] = ()) -> bytes:
    """Bytes of a frame."""
    if pictures:
        message = message | {_PICTURES: [len(picture) for picture in pictures]}
    text = json.dumps(message, separators=(",", ":")).encode()
    return b"".join((_SIZES.pack(len(text), sum(map(len, pictures))), text, *pictures))


async def read(reader: StreamReader) -> Frame | None:
    """The next frame; None where the other end has gone."""
    try:
        text_bytes, picture_bytes = _SIZES.unpack(await reader.readexactly(_SIZES.size))
        text = await reader.readexactly(text_bytes)
        pictures = await reader.readexactly(picture_bytes) if picture_bytes else b""
    except (IncompleteReadError, ConnectionError):
        return None
    return _frame(text, pictures)


def read_waiting(channel: socket.socket) -> Frame | None:
    """As `read`, where no event loop runs yet."""
    with channel.makefile("rb", buffering=0) as file:
        head = _exactly(file, _SIZES.size)
        if head is None:
            return None
        text_bytes, picture_bytes = _SIZES.unpack(head)
        text, pictures = _exactly(file, text_bytes), _exactly(file, picture_bytes)
    return None if text is None or pictures is None else _frame(text, pictures)


def _exactly(file: Any, size: int) -> bytes | None:
    found = b""
    while len(found) < size:
        piece = file.read(size - len(found))
        if not piece:
            return None
        found += piece
    return found


def _frame(text: bytes, pictures: bytes) -> Frame:
    message = json.loads(text)
    cut, at = [], 0
    for size in message.pop(_PICTURES, ()):
        cut.append(pictures[at : at + size])
        at += size
    return Frame(message, tuple(cut))
