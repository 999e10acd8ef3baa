"""Messages between an engine and its process: a JSON object and its images as raw bytes.

No pickle: nothing received can run code. A frame is the sizes of its two parts, the JSON, then the images one after
another; their sizes are under `images` in the JSON.
"""

import json
import socket
import struct
from asyncio import IncompleteReadError, StreamReader
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SIZES = struct.Struct("!IQ")  # bytes of JSON, bytes of images
_IMAGES = "images"


@dataclass(frozen=True)
class Frame:
    message: dict[str, Any]
    images: tuple[bytes, ...] = ()


def packed(message: dict[str, Any], images: Sequence[bytes] = ()) -> bytes:
    """A message as the bytes of a frame."""
    if images:
        message = message | {_IMAGES: [len(image) for image in images]}
    text = json.dumps(message, separators=(",", ":")).encode()
    return b"".join((_SIZES.pack(len(text), sum(map(len, images))), text, *images))


async def read(reader: StreamReader) -> Frame | None:
    """The next frame; None where the other end has gone."""
    try:
        text_bytes, image_bytes = _SIZES.unpack(await reader.readexactly(_SIZES.size))
        text = await reader.readexactly(text_bytes)
        images = await reader.readexactly(image_bytes) if image_bytes else b""
    except (IncompleteReadError, ConnectionError):
        return None
    return _frame(text, images)


def read_waiting(channel: socket.socket) -> Frame | None:
    """As `read`, where no event loop runs yet."""
    with channel.makefile("rb", buffering=0) as file:
        head = _exactly(file, _SIZES.size)
        if head is None:
            return None
        text_bytes, image_bytes = _SIZES.unpack(head)
        text, images = _exactly(file, text_bytes), _exactly(file, image_bytes)
    return None if text is None or images is None else _frame(text, images)


def _exactly(file: Any, size: int) -> bytes | None:
    found = b""
    while len(found) < size:
        piece = file.read(size - len(found))
        if not piece:
            return None
        found += piece
    return found


def _frame(text: bytes, images: bytes) -> Frame:
    message = json.loads(text)
    cut, at = [], 0
    for size in message.pop(_IMAGES, ()):
        cut.append(images[at : at + size])
        at += size
    return Frame(message, tuple(cut))
