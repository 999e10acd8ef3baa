"""A server without a model, in a process of its own, whose tokens come at times known beforehand.

Token k of an answer is written `first_s + k * gap_s` after its request has arrived, or at the end of a stall.
Raw asyncio protocol, bytes made in advance: it shall never be what limits a measurement.
"""

import asyncio
import gc
import json
import multiprocessing
import selectors
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CARD = {"object": "list", "data": [{"id": "synthetic", "object": "model", "owned_by": "nobody"}]}
PROMPT_TOKENS = 100
TIE_S = (
    1e-7  # between the chunks of an answer that a stall made due at once: timers of one time have no order
)
MOST_PRECISE = 500  # connections up to which select() serves: it waits for microseconds, epoll for whole ms


@dataclass(frozen=True)
class Times:
    """Of an answer. `stall`: nothing is written from its start to its end, in seconds after the first request."""

    first_s: float = 0.05
    gap_s: float = 0.01
    tokens_per_chunk: int = 1
    stall: tuple[float, float] | None = None


def event(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def chunk(tokens: int) -> bytes:
    """As `ghostvis serve` and vLLM write it: text, and the ids behind it."""
    choice = {
        "index": 0,
        "delta": {"content": "w " * tokens},
        "finish_reason": None,
        "token_ids": [7] * tokens,
    }
    return event({"id": "x", "object": "chat.completion.chunk", "model": "synthetic", "choices": [choice]})


def ending(tokens: int) -> bytes:
    usage = {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": PROMPT_TOKENS + tokens,
    }
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    return event(last) + event({"choices": [], "usage": usage}) + event("[DONE]") + b"0\r\n\r\n"


class Answering(asyncio.Protocol):
    """One connection: requests one after the other, each answered on schedule."""

    started_s: float | None = None  # of the first request, for all connections

    def __init__(self, times: Times) -> None:
        self._times, self._buffer = times, b""
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        arrived_s = self._loop.time()
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET"):
            self._buffer = rest
            self._page(json.dumps(CARD).encode(), b"200 OK" if b"/v1/models" in head else b"404 Not Found")
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        asked = json.loads(rest[:length])
        self._answer(asked.get("max_tokens") or asked["max_completion_tokens"], arrived_s)

    def _page(self, body: bytes, status: bytes) -> None:
        self._transport.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))

    def _answer(self, tokens: int, arrived_s: float) -> None:
        if Answering.started_s is None:
            Answering.started_s = arrived_s
        size = self._times.tokens_per_chunk
        for first in range(0, tokens, size):
            count = min(size, tokens - first)
            content = (b"" if first else HEAD) + chunk(count)
            if first + count == tokens:
                content += ending(tokens)
            due_s = self._after_stall(arrived_s + self._times.first_s + first * self._times.gap_s)
            self._loop.call_at(due_s + first * TIE_S, self._write, content)

    def _after_stall(self, due_s: float) -> float:
        if self._times.stall is None or Answering.started_s is None:
            return due_s
        begin_s, end_s = (Answering.started_s + each for each in self._times.stall)
        return end_s if begin_s <= due_s < end_s else due_s

    def _write(self, content: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(content)


@contextmanager
def serving(times: Times, connections: int = 1) -> Iterator[str]:
    """The address of a server that lives as long as the context and expects so many connections."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve, args=(times, connections, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(times: Times, connections: int, tell: Connection) -> None:
    gc.disable()
    precise = connections <= MOST_PRECISE
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector() if precise else selectors.DefaultSelector())
    loop.run_until_complete(_main(times, tell))


async def _main(times: Times, tell: Connection) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Answering(times), "127.0.0.1", 0, backlog=4096)
    tell.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()
