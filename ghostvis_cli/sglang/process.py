"""The process that SGLang runs in, from outside: start it, send requests, and end it with all its children."""

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Any, Self

from ghostvis_cli import errors
from ghostvis_cli.errors import EngineError, GhostvisError
from ghostvis_cli.sglang import channel
from ghostvis_cli.sglang.child import Child
from ghostvis_cli.sglang.log import SGLangLog, shortened

if TYPE_CHECKING:
    from ghostvis_cli.profile import ModelSettings

WORKER = "ghostvis_cli.sglang.worker"
Reply = dict[str, Any]


class Process:
    """One SGLang. Many requests may run at once, all on the loop that started it."""

    def __init__(self, child: Child, log: SGLangLog, report: Callable[[str], None]) -> None:
        self._child, self._log, self._report = child, log, report
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._listener: asyncio.Task[None] | None = None
        self._requests: dict[int, Request] = {}
        self._numbers = count(1)
        self._closed = False
        self._failure: GhostvisError | None = None

    @classmethod
    async def start(
        cls,
        environment: Mapping[str, str],
        report: Callable[[str], None],
        detail: Callable[[str], None] | None,
    ) -> Self:
        log = SGLangLog()

        def on_line(line: str) -> None:
            shown = log.feed(line)
            if detail is not None:
                detail(shortened(shown))

        ours, theirs = socket.socketpair()
        with theirs:
            # -P: a file sglang.py in the current directory is not SGLang.
            argv = [sys.executable, "-P", "-m", WORKER, str(theirs.fileno())]
            env = os.environ | environment | {"PYTHONUNBUFFERED": "1"}
            child = await Child.start(argv, env, on_line, pass_fds=(theirs.fileno(),))
        process = cls(child, log, report)
        process._reader, process._writer = await asyncio.open_connection(sock=ours)
        return process

    async def convert(self, model: "ModelSettings", dtype: str) -> str:
        """The converted directory, made if there is none yet."""
        await self._send({"model": asdict(model), "dtype": dtype})
        return str(await self._awaited("directory"))

    async def load(self, arguments: Mapping[str, Any], deadline_s: float) -> int:
        """Start SGLang and wait until it is ready. Returns how many positions a prompt and its answer may take."""
        await self._send({"arguments": dict(arguments)})
        try:
            context = int(await asyncio.wait_for(self._awaited("context"), deadline_s))
        except TimeoutError:
            raise EngineError(
                f"SGLang was not ready after {deadline_s:g} s", hint="-v shows what it was doing"
            ) from None
        self._child.note_shared_memory()
        self._listener = asyncio.create_task(self._listen())
        return context

    @contextmanager
    def request(self) -> "Iterator[Request]":
        """A request; leaving the context before its end aborts it."""
        self.check()
        number = next(self._numbers)
        request = self._requests[number] = Request(number, self._send)
        try:
            yield request
        finally:
            del self._requests[number]
            if not request.ended:
                self._write({"do": "abort", "id": number})

    @property
    def pid(self) -> int:
        """The leader of the group of all of SGLang's processes."""
        return self._child.pid

    def check(self) -> None:
        """Raise the error that ended the process, if it has ended."""
        if self._closed:
            raise EngineError("the engine is closed")
        if self._failure is not None:
            raise _again(self._failure)

    async def aclose(self) -> None:
        """End all processes by SIGKILL, as SGLang itself does. Open requests fail."""
        self._closed = True
        self._give_up(EngineError("the engine was closed"))
        self._writer.close()
        await self._ended()

    # Inside

    async def _awaited(self, key: str) -> Any:
        """Wait for the message with this key, and pass on notices meanwhile."""
        while (frame := await channel.read(self._reader)) is not None:
            if "notice" in frame.message:
                self._report(frame.message["notice"])
            elif "error" in frame.message:
                raise _error(frame.message["error"])
            else:
                return frame.message[key]
        raise await self._ended()

    async def _listen(self) -> None:
        while (frame := await channel.read(self._reader)) is not None:
            request = self._requests.get(frame.message["id"])
            if request is not None:
                request.replies.put_nowait(frame.message)
        if not self._closed:
            self._failure = await self._ended()
            self._give_up(self._failure)

    async def _ended(self) -> GhostvisError:
        """The error that ended it, once all its processes are gone."""
        code = await self._child.end()
        return self._log.failure(code)

    def _give_up(self, reason: GhostvisError) -> None:
        for request in self._requests.values():
            request.replies.put_nowait(reason)

    async def _send(self, message: dict[str, Any], images: Sequence[bytes] = ()) -> None:
        self._write(message, images)
        with suppress(ConnectionError):  # whoever reads the replies notices its end
            await self._writer.drain()

    def _write(self, message: dict[str, Any], images: Sequence[bytes] = ()) -> None:
        if not self._writer.is_closing():
            self._writer.write(channel.packed(message, images))


class Request:
    """One request and its replies; the last one has an `end`."""

    def __init__(self, number: int, send: Callable[..., Any]) -> None:
        self.number, self._send = number, send
        self.replies: asyncio.Queue[Reply | GhostvisError] = asyncio.Queue()
        self.ended = False

    async def ask(self, do: str, images: Sequence[bytes] = (), **message: Any) -> None:
        await self._send({"do": do, "id": self.number, **message}, images)

    async def reply(self) -> Reply:
        """The next reply. Raises the error that the request ended with."""
        reply = await self.replies.get()
        if isinstance(reply, GhostvisError):
            self.ended = True
            raise _again(reply)
        self.ended = bool(reply.get("end"))
        if "error" in reply:
            self.ended = True
            raise _error(reply["error"])
        return reply


def _error(told: Mapping[str, Any]) -> GhostvisError:
    """The error that the worker's `failure` described."""
    kind: type[GhostvisError] = getattr(errors, told["kind"])
    return kind(told["message"], hint=told["hint"])


def _again(error: GhostvisError) -> GhostvisError:
    """A copy of an error: many tasks raise it, and each adds its own traceback."""
    return type(error)(error.message, hint=error.hint)
