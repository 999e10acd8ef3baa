"""Limits of one server: bodies and their pace, requests at once; and how a request is cut short."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from ghostvis_cli.engines.base import Chunk, Engine, GenerateRequest
from ghostvis_cli.serve.api_errors import ApiError, stopping

T = TypeVar("T")
LEAST_BYTES_PER_S = 4096  # the slowest pace of an upload
SMALL_BYTES = 2**16  # of each body, without waiting: a question need not queue behind images


class ClientGoneError(Exception):
    """The connection was closed before the answer was complete."""


class ConcurrencyLimit:
    """Counts the requests being served, and can end them all."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside: set[asyncio.Task[Any]] = set()
        self.closed = False

    @contextmanager
    def admit(self) -> Iterator[None]:
        if len(self.inside) >= self.limit:
            message = f"{self.limit} requests are waiting, no more are taken in"
            raise ApiError(429, message, code="too_many_requests", retry_after_s=1)
        task = asyncio.current_task()
        assert task is not None
        self.inside.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.closed:
                raise
            raise stopping() from None
        finally:
            self.inside.discard(task)

    def close(self) -> None:
        """Cut short every request: each fails with an ApiError."""
        self.closed = True
        for task in self.inside:
            task.cancel()


class Bodies:
    """The bodies being received or read. Their sum is bounded: above the bound all but the oldest wait."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._bodies: dict[Body, None] = {}  # in the order they came
        self._changed = asyncio.Event()

    @contextmanager
    def one(self) -> Iterator["Body"]:
        body = Body(self)
        self._bodies[body] = None
        try:
            yield body
        finally:
            del self._bodies[body]
            self.held -= len(body.content)
            self._changed.set()

    async def room(self, body: "Body") -> None:
        """Wait until `body` may grow. The oldest always may, so there is no deadlock."""
        if len(body.content) < SMALL_BYTES:
            return
        while self.held > self.limit and next(iter(self._bodies)) is not body:
            self._changed.clear()
            await self._changed.wait()


class Body:
    """One body while it arrives."""

    def __init__(self, bodies: Bodies) -> None:
        self.content = bytearray()
        self._bodies = bodies

    async def receive(self, headers: Headers, receive: Receive, limit: int, pause_s: float) -> None:
        """The whole body. Counted on arrival, since a chunked one declares no length; too slow a one is refused.

        A fast beginning earns no more than one pause, or a large body could block the others for hours.
        """
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        loop, left_s, more = asyncio.get_running_loop(), pause_s, True
        while more:
            await self._bodies.room(self)
            asked_s = loop.time()
            message = await _within(receive, left_s)
            piece = message.get("body", b"")
            left_s = min(pause_s, left_s - (loop.time() - asked_s) + len(piece) / LEAST_BYTES_PER_S)
            self._add(piece, limit)
            more = message.get("more_body", False)

    def _add(self, piece: bytes, limit: int) -> None:
        self.content += piece
        self._bodies.held += len(piece)
        if len(self.content) > limit:
            raise _too_large(limit)


async def _within(receive: Receive, patience_s: float) -> Message:
    try:
        message = await asyncio.wait_for(receive(), patience_s)
    except TimeoutError:
        raise ApiError(408, "the body comes too slowly") from None
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    return message


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client leaves first, `work` is cancelled and ClientGoneError raised."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        await _end(working, watching)


async def interleaved(
    engine: Engine,
    requests: Sequence[GenerateRequest],
    saw: Callable[[int, Chunk], None],
    pause_s: Callable[[], float],
) -> AsyncGenerator[list[tuple[int, Chunk]], None]:
    """(choice, chunk) of all requests, grouped: at most one group in `pause_s`.

    The very first chunk and the last of each choice do not wait. `saw` is called with each on arrival. Closing
    this aborts the requests that still run.
    """
    loop, wake = asyncio.get_running_loop(), asyncio.Event()
    group: list[tuple[int, Chunk]] = []
    due = loop.time()
    timer: asyncio.TimerHandle | None = None

    async def follow(index: int, request: GenerateRequest) -> None:
        nonlocal timer
        async with aclosing(engine.generate(request)) as chunks:
            async for chunk in chunks:
                saw(index, chunk)
                group.append((index, chunk))
                if chunk.finish_reason is not None or loop.time() >= due:
                    wake.set()
                elif timer is None:
                    timer = loop.call_at(due, wake.set)

    tasks = [asyncio.create_task(follow(index, request)) for index, request in enumerate(requests)]
    for task in tasks:
        task.add_done_callback(lambda _: wake.set())
    try:
        running = True
        while running:
            await wake.wait()
            wake.clear()
            if timer is not None:
                timer.cancel()
                timer = None
            ended = [task for task in tasks if task.done()]
            running = len(ended) < len(tasks)
            if group:
                ready, group = group, []
                due = loop.time() + pause_s()
                yield ready
            for task in ended:
                task.result()  # raises what ended it
    finally:
        if timer is not None:
            timer.cancel()
        await _end(*tasks)


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
