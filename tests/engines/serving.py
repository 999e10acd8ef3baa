"""A local server in a thread, engines to put behind it, and requests to send to it."""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import openai

from ghostvis_cli.engines.base import Chunk, GenerateRequest, TokenLogprob
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.errors import RequestError
from ghostvis_cli.serve.local_server import serve
from ghostvis_cli.serve.settings import Served, ServerSettings
from tests.pictures import data_url, png

USER = [{"role": "user", "content": "one two three"}]
PATIENCE_S = 10.0


class Letters:
    """A vocabulary of single bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, id_: int, /) -> bytes:
        return bytes([id_])


class Recorder(FakeEngine):
    """Keeps the requests it was given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.requests: list[GenerateRequest] = []

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        return super().generate(request)


class WithLogprobs(FakeEngine):
    """Every token is the letter "a", and "é" in two bytes was its alternative."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        async for chunk in super().generate(request):
            entries = tuple(
                TokenLogprob(97, -0.5, ((97, -0.5), (0xC3, float("-inf")))) for _ in chunk.token_ids
            )
            yield replace(chunk, logprobs=entries)


class BreaksLater(FakeEngine):
    """Fails after its second chunk."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        number = 0
        async for chunk in super().generate(request):
            number += 1
            if number == 3:
                raise RequestError("the model gave up")
            yield chunk


def client(url: str, key: str = "none") -> Any:  # what our servers add is in none of the library's types
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)


class Running:
    """A server in a thread, as `ghostvis serve` runs it but for the signals."""

    def __init__(self, settings: ServerSettings, load: Callable[[], Any]) -> None:
        self.url = ""
        self.bound, self.ready = threading.Event(), threading.Event()
        self.outcome: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(settings, load))
        self._thread.start()

    def _run(self, settings: ServerSettings, load: Callable[[], Any]) -> None:
        async def main() -> int:
            task = asyncio.current_task()
            assert task is not None
            self.loop, self.task = asyncio.get_running_loop(), task
            return await serve(settings, load, on_bound=self._on_bound, on_ready=lambda *_: self.ready.set())

        try:
            self.outcome.set_result(asyncio.run(main()))
        except BaseException as error:
            self.outcome.set_exception(error)
        finally:
            self.bound.set()
            self.ready.set()

    def _on_bound(self, url: str) -> None:
        self.url = url
        self.bound.set()

    def stop(self) -> None:
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.task.cancel)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def client(self, key: str = "none") -> Any:
        return client(self.url, key)

    def create(self, **fields: Any) -> Any:
        """What the official client gives for a request about USER."""
        return self.client().chat.completions.create(**{"model": "fake", "messages": USER, **fields})

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=PATIENCE_S)

    def send(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = self.connect()
        content = body if isinstance(body, bytes | None) else json.dumps(body)
        kind = {"content-type": "application/json"} if content is not None else {}
        connection.request(method, path, content, kind | {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        answer = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        connection.close()
        return answer

    def chat(self, **fields: Any) -> tuple[int, dict[str, Any]]:
        status, _, body = self.send("POST", "/v1/chat/completions", {"messages": USER, **fields})
        return status, json.loads(body)


@contextmanager
def running(
    engine: Any = None, *, vocabulary: Any = None, load: Callable[[], Any] | None = None, **settings: Any
) -> Iterator[Running]:
    engine = engine or FakeEngine()

    async def loaded() -> Served:
        return Served(engine, vocabulary)

    server = Running(ServerSettings(**{"port": 0, **settings}), load or loaded)
    try:
        assert (server.ready if load is None else server.bound).wait(PATIENCE_S)
        yield server
    finally:
        server.stop()


def eventually(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def image_url_of(size: tuple[int, int] = (8, 8)) -> str:
    return data_url(png(size=size))


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]
