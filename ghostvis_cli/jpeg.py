"""A JPEG without its end marker, which is complete if nothing that could follow would change a pixel.

Downloads and cameras leave off the last bytes. libjpeg alone can't tell such a file from half an image.
"""

import re
from collections.abc import Iterator
from io import BytesIO
from random import Random

END = b"\xff\xd9"
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers
SCAN, END_CODE = 0xDA, 0xD9
AFTER_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # not a stuffed byte, a restart or filling
COEFFICIENTS = 64
LEAST_FILLING = 64  # bytes; disks and downloads are filled up by the block


def with_end(data: bytes) -> bytes | None:
    """The file with its end marker back; None where part of the image is missing."""
    kept = _without_filling(data)
    if _is_whole(kept):
        return kept + END
    # A few zeros may be the image's own. They are where it ends with the last of them, and not before.
    own = 0 < len(data) - len(kept) < LEAST_FILLING and _is_whole(data) and not _is_whole(data[:-1])
    return data + END if own else None


def _is_whole(data: bytes) -> bool:
    """Whether the pixels are the same, whatever might have followed."""
    from PIL import Image

    seen = None
    for more in _continuations() if _has_all_scans(data) else ():
        with Image.open(BytesIO(data + more + END), formats=("JPEG",)) as image:
            pixels = image.tobytes()
        if seen is not None and pixels != seen:
            return False
        seen = pixels
    return seen is not None


def is_filled_up(data: bytes) -> bool:
    """Whether the file ends in zeros, which libjpeg decodes as pixels without an error."""
    return data.endswith(b"\0") and END_CODE not in (marker for marker, _ in _segments(data))


def _without_filling(data: bytes) -> bytes:
    """The file without trailing zeros of a preallocation, and without half a marker."""
    kept = data.rstrip(b"\0")
    if not kept.endswith(b"\xff"):
        return kept
    return kept + b"\0" if len(kept) < len(data) else kept.rstrip(b"\xff")


def _continuations() -> Iterator[bytes]:
    """Bytes that could have followed: none, ones, noise, and noise behind restart markers."""
    random = Random(0)
    noise = [bytes(random.randrange(255) for _ in range(64)) for _ in range(8)]
    yield b""
    yield b"\xff\0" * 64
    yield noise[0]
    for first in (0, 4):  # libjpeg waits behind a marker that is one or two too high: one of these is not
        yield b"".join(b"\xff%c" % (0xD0 + (first + n) % 8) + each for n, each in enumerate(noise))


def _has_all_scans(data: bytes) -> bool:
    """Whether every component's coefficients came, to their last bit; a file can be cut between two scans."""
    missing: dict[int, set[int]] = {}
    try:
        for marker, body in _segments(data):
            if marker in FRAMES:
                missing = {body[6 + 3 * n]: set(range(COEFFICIENTS)) for n in range(body[5])}
            elif marker == SCAN:
                count = body[0]
                first, last, precision = body[1 + 2 * count : 4 + 2 * count]
                for n in range(count if precision & 15 == 0 else 0):
                    missing[body[1 + 2 * n]] -= set(range(first, last + 1))
    except (IndexError, KeyError, ValueError):
        return False
    return bool(missing) and not any(missing.values())


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers and their bodies, up to the end or where none follows."""
    place = 2
    while place + 1 < len(data):
        marker, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place] == marker == 0xFF:
            place += 1
            continue
        yield marker, data[place + 4 : place + 2 + size]
        if data[place] != 0xFF or marker == END_CODE:
            return
        place += 2 + size
        if marker == SCAN:
            found = AFTER_SCAN.search(data, place)
            place = found.start() if found else len(data)
