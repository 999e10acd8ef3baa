"""Many small httpx2 pools behind one client, for a thousand answers open at once.

A pool of httpx2 looks at each of its connections whenever a request begins or ends; so no pool gets many.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable

import httpx2

REQUESTS = 8  # at once in one pool


class PooledTransport(httpx2.AsyncBaseTransport):
    """`make` gives a transport for up to `REQUESTS` requests; beyond `most_connections` they wait."""

    def __init__(self, make: Callable[[], httpx2.AsyncBaseTransport], most_connections: int | None) -> None:
        self._make = make
        self._pools = [_Pool(make())]
        self._places = asyncio.Semaphore(most_connections or sys.maxsize)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await self._places.acquire()
        pool = self._enter()
        try:
            response = await pool.transport.handle_async_request(request)
            assert isinstance(response.stream, httpx2.AsyncByteStream)
        except BaseException:
            self._leave(pool)
            raise
        response.stream = _Body(response.stream, lambda: self._leave(pool))
        return response

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.transport.aclose()

    def _enter(self) -> "_Pool":
        # The first with room, so that the last pools have no more connections than a crowd of its size needs.
        pool = next((pool for pool in self._pools if pool.open < REQUESTS), None)
        if pool is None:
            pool = _Pool(self._make())
            self._pools.append(pool)
        pool.open += 1
        return pool

    def _leave(self, pool: "_Pool") -> None:
        pool.open -= 1
        self._places.release()


class _Pool:
    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self.transport, self.open = transport, 0


class _Body(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, leave: Callable[[], None]) -> None:
        self._stream, self._leave, self._closed = stream, leave, False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._stream)

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                await self._stream.aclose()
            finally:
                self._leave()
