"""Server-sent events: bytes in any pieces -> the data of each event.

Lines are split as bytes: no byte of a multi-byte UTF-8 character is a line end, so a piece may end anywhere. Only
the field `data` is kept; the others are for browsers that reconnect.
"""

import re

LARGEST_EVENT_BYTES = 1 << 24  # an endless line must not fill the memory
_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class SSEParser:
    """Parses a stream piece by piece. An event cut off by the stream's end is dropped, as half may be missing."""

    def __init__(self, limit_bytes: int = LARGEST_EVENT_BYTES) -> None:
        self._limit = limit_bytes
        self._line: list[bytes] = []  # pieces of an incomplete line
        self._data: list[str] = []  # data lines of an incomplete event
        self._size = 0  # bytes since the last event, roughly
        self._first_line = True
        self._after_cr = False

    def feed(self, piece: bytes) -> list[str]:
        """The events that this piece completes. ValueError for one above the limit."""
        if not piece:
            return []
        if self._after_cr:  # the CR already ended a line; its LF may follow in this piece
            piece = piece.removeprefix(b"\n")
        self._after_cr = piece.endswith(b"\r")
        *ended, rest = _LINE_END.split(piece)
        events = []
        for line in ended:
            if self._line:
                line = b"".join([*self._line, line])
                self._line.clear()
            event = self._take(line)
            if event is not None:
                events.append(event)
        if rest:
            self._line.append(rest)
        self._size += len(piece)
        if self._size > self._limit:
            raise ValueError(f"an event of more than {self._limit} bytes")
        return events

    def _take(self, line: bytes) -> str | None:
        """Take in one whole line; an empty one completes the event."""
        if self._first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._first_line = False
        if not line:
            self._size = 0
            event = "\n".join(self._data) if self._data else None
            self._data.clear()
            return event
        name, _, value = line.partition(b":")  # a comment has an empty name
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode("utf-8", errors="replace"))
        return None
