"""An HTTP/1.1 transport for httpx2, straight on asyncio: for `bench`, with thousands of answers open at once.

httpx2's own transport checks every connection whenever a request begins or ends, so a thousand of them cost more
than the answers. Here that is one step, whatever their number; many small pools of httpx2 needed two thirds more
processor time and missed the schedule on a busy machine. Direct connections only: proxies, HTTP/2 and other event
loops stay with httpx2.
"""

import asyncio
import re
import ssl
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx2

HEAD_BYTES, LINE_BYTES = 1 << 17, 1 << 12  # longest head of an answer, and longest line with a chunk's size
PAUSE_BYTES = 1 << 20  # of a body not yet read: above it, reading from the server pauses
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: ([^\r\n]*))?")
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")


class DirectTransport(httpx2.AsyncBaseTransport):
    """Connections are reused for `keepalive_s` after an answer's end, the newest first."""

    def __init__(
        self, *, certificates: ssl.SSLContext, most_connections: int | None, keepalive_s: float
    ) -> None:
        self._certificates, self._keepalive_s = certificates, keepalive_s
        self._places = asyncio.Semaphore(most_connections) if most_connections else None
        self._idle: deque[tuple[float, _Connection]] = deque()
        self._busy: set[_Connection] = set()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if self._places is not None:
            await self._places.acquire()
        connection: _Connection | None = None
        try:
            connection = self._take_idle() or await self._connect(request)
            self._busy.add(connection)
            connection.send(_as_bytes(request), without_body=request.method == "HEAD")
            head = await connection.head()
        except BaseException:
            self._give_back(connection, whole=False)
            raise
        return httpx2.Response(
            head.status,
            headers=head.headers,
            stream=_Body(self, connection),
            extensions={"reason_phrase": head.reason},
        )

    async def aclose(self) -> None:
        for _, connection in self._idle:
            connection.close()
        for connection in list(self._busy):
            connection.close()
        self._idle.clear()

    def _take_idle(self) -> "_Connection | None":
        oldest_s = asyncio.get_running_loop().time() - self._keepalive_s
        while self._idle:
            since_s, connection = self._idle.pop()
            if since_s >= oldest_s and connection.usable:
                return connection
            connection.close()
        return None

    def _give_back(self, connection: "_Connection | None", *, whole: bool) -> None:
        if connection is not None:
            self._busy.discard(connection)
            if whole and connection.usable:
                self._idle.append((asyncio.get_running_loop().time(), connection))
            else:
                connection.close()
        if self._places is not None:
            self._places.release()

    async def _connect(self, request: httpx2.Request) -> "_Connection":
        loop, url = asyncio.get_running_loop(), request.url
        secure = url.scheme == "https"
        limit_s = request.extensions.get("timeout", {}).get("connect")
        try:
            async with asyncio.timeout(limit_s):
                _, connection = await loop.create_connection(
                    _Connection,
                    url.host,
                    url.port or (443 if secure else 80),
                    ssl=self._certificates if secure else None,
                )
        except TimeoutError as error:
            raise httpx2.ConnectTimeout(str(error), request=request) from error
        except OSError as error:  # ssl.SSLError is one
            raise httpx2.ConnectError(str(error), request=request) from error
        return connection


class _Body(httpx2.AsyncByteStream):
    def __init__(self, transport: DirectTransport, connection: "_Connection") -> None:
        self._transport, self._connection, self._closed = transport, connection, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while piece := await self._connection.piece():
            yield piece

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._transport._give_back(self._connection, whole=self._connection.whole)


@dataclass(frozen=True)
class _Head:
    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]


class _Connection(asyncio.Protocol):
    """One connection, for one request at a time. `piece` returns what has arrived of a body, b"" at its end."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._lost = False
        self._expect(without_body=False)
        self.whole = True  # no request is open

    def _expect(self, *, without_body: bool) -> None:
        self._buffer = bytearray()
        self._read = self._read_head
        self._head: _Head | None = None
        self._without_body = without_body
        self._left = 0  # bytes to come of this chunk, or of a body of known length
        self._pieces: list[bytes] = []
        self._held = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: httpx2.TransportError | None = None
        self._paused = False
        self._keep = True
        self.whole = False

    @property
    def usable(self) -> bool:
        """True if another request can be sent: the last answer is complete, and nothing followed it."""
        return self.whole and self._keep and not self._lost and not self._buffer and self._error is None

    def send(self, content: bytes, *, without_body: bool) -> None:
        assert self._transport is not None
        self._expect(without_body=without_body)
        self._transport.write(content)

    async def head(self) -> _Head:
        while self._head is None:
            await self._more()
        return self._head

    async def piece(self) -> bytes:
        while not self._pieces:
            if self.whole:
                return b""
            await self._more()
        content = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._held = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return content

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()  # close() would wait for a server that stopped reading

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # From the socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            while self._buffer and not self.whole and self._read():
                pass
        except httpx2.RemoteProtocolError as error:
            self._fail(error)
            self.close()
        if self._held > PAUSE_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        return None  # close our side too

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        if self._read == self._read_to_close and error is None:
            self.whole = True
        elif not self.whole:
            if error is not None:
                self._fail(httpx2.ReadError(str(error)), error)
            else:
                what = "sent no answer" if self._head is None else "broke the answer off"
                self._fail(httpx2.RemoteProtocolError(f"the server closed the connection and {what}"))
        self._wake()

    def _fail(self, error: httpx2.TransportError, cause: Exception | None = None) -> None:
        if self._error is None:
            error.__cause__ = cause
            self._error = error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # Parsing. Each method reads one element and returns whether it was complete.

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_BYTES:
                raise httpx2.RemoteProtocolError("a head without an end")
            return False
        first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        found = STATUS_LINE.fullmatch(first)
        if found is None:
            raise httpx2.RemoteProtocolError(f"no HTTP/1.1: {first[:80]!r}")
        if found[2].startswith(b"1"):  # an interim response; the final one follows
            return True
        headers = []
        for line in lines:
            header = HEADER.fullmatch(line)
            if header is None:
                raise httpx2.RemoteProtocolError(f"no header: {line[:80]!r}")
            headers.append((header[1], header[2]))
        self._head = _Head(int(found[2]), found[3] or b"", headers)
        self._frame({name.lower(): value.lower() for name, value in headers}, newer=found[1] == b"1")
        return True

    def _frame(self, headers: dict[bytes, bytes], *, newer: bool) -> None:
        """Find out from the headers how the body ends."""
        assert self._head is not None
        connection = headers.get(b"connection", b"")
        self._keep = b"close" not in connection if newer else b"keep-alive" in connection
        length = headers.get(b"content-length")
        if self._without_body or self._head.status in (204, 304):
            self.whole = True
        elif b"transfer-encoding" in headers:
            if headers[b"transfer-encoding"] != b"chunked":
                raise httpx2.RemoteProtocolError("a transfer encoding other than chunked")
            self._read = self._read_size
        elif length is None:
            self._keep = False
            self._read = self._read_to_close
        elif re.fullmatch(rb"\d{1,18}", length):
            self._left = int(length)
            self.whole = self._left == 0
            self._read = self._read_length
        else:
            raise httpx2.RemoteProtocolError(f"no length: {length[:80]!r}")

    def _read_size(self) -> bool:
        line = self._line()
        if line is None:
            return False
        found = CHUNK_SIZE.fullmatch(line)
        if found is None:
            raise httpx2.RemoteProtocolError(f"no chunk size: {line[:80]!r}")
        self._left = int(found[1], 16)
        self._read = self._read_chunk if self._left else self._read_trailer
        return True

    def _read_chunk(self) -> bool:
        self._take()
        if not self._left:
            self._read = self._read_chunk_end
        return True

    def _read_chunk_end(self) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._buffer[:2] != b"\r\n":
            raise httpx2.RemoteProtocolError("a chunk longer than its size")
        del self._buffer[:2]
        self._read = self._read_size
        return True

    def _read_trailer(self) -> bool:
        line = self._line()
        if line == b"":
            self.whole = True
        return line is not None

    def _read_length(self) -> bool:
        self._take()
        self.whole = self._left == 0
        return True

    def _read_to_close(self) -> bool:
        self._left = len(self._buffer)
        self._take()
        return True

    def _take(self) -> None:
        """Take up to `_left` bytes of the buffer as body."""
        piece = bytes(self._buffer[: self._left])
        del self._buffer[: len(piece)]
        self._left -= len(piece)
        self._held += len(piece)
        self._pieces.append(piece)

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > LINE_BYTES:
                raise httpx2.RemoteProtocolError("a line without an end")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line


def _as_bytes(request: httpx2.Request) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in request.headers.raw]
    return b"\r\n".join([*lines, b"", request.content])
