"""A real HTTP server on a loopback socket that says exactly what a test wants it to say, byte for byte."""

import asyncio
import json
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ghostvis_cli.engines.base import Completion, GenerateRequest, Sampling, Server, complete
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
from ghostvis_cli.images import EncodedImage
from ghostvis_cli.prompt import Message

KEY = "sk-very-secret-0123456789"
QUICK = Sampling(max_tokens=5, temperature=0.0, top_p=1.0, top_k=0)
SSE = {"Content-Type": "text/event-stream"}
CARD = {"id": "ghost", "object": "model", "owned_by": "somebody", "max_model_len": 2048}


def words(*pieces: str) -> list[dict[str, Any]]:
    return [
        {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
    ]


def ending(reason: Any = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def usage(**details: Any) -> dict[str, Any]:
    counts: dict[str, Any] = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    return {"choices": [], "usage": counts | details}


def lines(*events: Any, end: str = "\n") -> bytes:
    """Events as they stand on the wire."""
    texts = [event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events]
    return "".join(f"data: {text}{end}{end}" for text in texts).encode()


HELLO = lines(*words("Hel", "lo"), ending(), usage(), "[DONE]")


@dataclass(frozen=True)
class Reply:
    """Chunks of a body, and how it ends: as HTTP says, by a reset, or not at all."""

    chunks: tuple[bytes, ...] = (HELLO,)
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: dict(SSE))
    end: Literal["whole", "reset", "hang"] = "whole"
    pause_s: float = 0.0
    silent: bool = False  # not even a status line


def refusal(status: int, body: Any, **headers: str) -> Reply:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply((text,), status, {"Content-Type": "application/json", **headers})


@dataclass
class Seen:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class ScriptedServer:
    """Answers each POST with the next reply, the last one for ever; each GET with the page of its path."""

    def __init__(self, *replies: Reply, pages: dict[str, Any] | None = None, crowd: int = 1) -> None:
        self.crowd = crowd
        self.replies, self.pages = list(replies) or [Reply()], pages or {}
        self.seen: list[Seen] = []
        self.times: list[float] = []
        self.connections = self.open_now = self.most_open = 0
        self.asked = asyncio.Event()  # a crowd of requests is here; before it, none is answered
        self.empty = asyncio.Event()  # the last connection is closed
        self.left = asyncio.Event()  # a client went away in the middle of an answer

    async def start(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, backlog=2048, ssl=tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.socket_number = self._server.sockets[0].fileno()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        self._server.close()

    @property
    def posts(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.method == "POST"]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            while (seen := await self._request(reader)) is not None:
                self.seen.append(seen)
                self.times.append(time.monotonic())
                if len(self.seen) >= self.crowd:
                    self.asked.set()
                await self.asked.wait()
                await self._answer(self._reply_to(seen), reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            self.left.set()
        except asyncio.CancelledError:  # the test is over
            pass
        finally:
            self.open_now -= 1
            if not self.open_now:
                self.empty.set()
            writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> Seen | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None  # a connection closed between requests
        first, *rest = head.decode().split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest if line)}
        return Seen(method, target, headers, await reader.readexactly(int(headers.get("content-length", 0))))

    def _reply_to(self, seen: Seen) -> Reply:
        if seen.method == "GET":
            page = self.pages.get(seen.target, refusal(404, {"detail": "Not Found"}))
            return page if isinstance(page, Reply) else refusal(200, page)
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    async def _answer(self, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not reply.silent:
            head = "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items())
            writer.write(f"HTTP/1.1 {reply.status} Said\r\n{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for chunk in reply.chunks:
                writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                await writer.drain()
                if reply.pause_s:
                    await asyncio.sleep(reply.pause_s)
        if reply.end == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            raise ConnectionResetError
        if reply.end == "hang" or reply.silent:
            await reader.read()
            raise ConnectionResetError
        writer.write(b"0\r\n\r\n")
        await writer.drain()


Serve = Callable[..., Awaitable[ScriptedServer]]


def engine_for(server: ScriptedServer, kind: str = "openai", **settings: Any) -> RemoteEngine:
    """An engine that knows its server already, and waits for it as long as a busy machine takes."""
    patient = {"model": "ghost", "retries": 0, "connect_timeout_s": 60.0}
    engine = RemoteEngine(RemoteSettings(server.url, **{**patient, **settings}))
    engine.server = Server(kind)  # type: ignore[arg-type]
    return engine


def ask(text: str = "hi", *images: EncodedImage, **sampling: Any) -> GenerateRequest:
    return GenerateRequest((Message.of("user", text, images),), sampling=replace(QUICK, **sampling))


async def answer_to(
    reply: Reply | bytes, serve: Serve, request: GenerateRequest | None = None, **settings: Any
) -> Completion:
    server = await serve(reply if isinstance(reply, Reply) else Reply((reply,)))
    async with engine_for(server, **settings) as engine:
        return await complete(engine, request or ask())


async def connected(server: ScriptedServer, suffix: str = "", **settings: Any) -> RemoteEngine:
    return await RemoteEngine.connect(RemoteSettings(server.url + suffix, **{"retries": 0, **settings}))
