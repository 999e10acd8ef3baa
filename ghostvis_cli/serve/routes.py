"""OpenAI's routes over any engine: reads, runs and answers requests. Binds no port, loads no weights."""

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ghostvis_cli.engines.base import GrammarError
from ghostvis_cli.errors import ContextLengthError, InputError
from ghostvis_cli.openai.answers import Answer, Call, answer_for
from ghostvis_cli.openai.describe import DESCRIPTION
from ghostvis_cli.openai.schema import Kind
from ghostvis_cli.serve.admission import Bodies, ClientGoneError, ConcurrencyLimit, interleaved, unless_gone
from ghostvis_cli.serve.api_errors import ApiError, as_api_error, no_route, stopping, too_long
from ghostvis_cli.serve.door import Door, without_slash
from ghostvis_cli.serve.metrics import Metrics, RequestMetrics
from ghostvis_cli.serve.requests import RequestReader
from ghostvis_cli.serve.settings import Served, ServerSettings

T = TypeVar("T")
log = logging.getLogger("ghostvis.serve")

OPEN_PATHS = ("/healthz", "/readyz", "/health")  # for probes, which carry no key
OTHER_APIS = ("/v1/responses", "/v1/messages")
# What a model's card says beyond OpenAI's fields, by the names of EngineInfo.
ABOUT = ("image_tokens", "image_pixels", "layout", "trained_tokens", "dtype", "device", "source", "tag", "step",
         "kv_token_bytes")  # fmt: skip
NO_ANSWER = 499  # as nginx logs a client that left before it had an answer
READER_THREADS = 4  # images decoded at once; more would cost only memory
# Of all streams together. Above it, a stream's tokens that come close together share an event: each write makes
# the engine's thread wait for the interpreter, which with many streams would slow them all.
WRITES_PER_S = 500
LONGEST_PAUSE_S = 0.05  # between two events of a stream


class ServerState:
    """What the routes share. `served` is None until the model has been loaded and warmed up."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.served: Served | None = None
        self.draining = False
        self.limit = ConcurrencyLimit(settings.max_waiting)
        self.bodies = Bodies(settings.max_body_bytes)  # all together as much as one may have
        self.metrics = Metrics()
        self.threads = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="ghostvis-reader")

    def open(self, served: Served) -> None:
        self.metrics.model = served.name(self.settings)
        self.served = served

    @property
    def status(self) -> str:
        return "draining" if self.draining else "ready" if self.served else "loading"

    def ready(self) -> Served:
        if self.draining:
            raise stopping()
        if self.served is None:
            raise ApiError(503, "the model is still being loaded", code="model_loading", retry_after_s=5)
        return self.served

    async def in_thread(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *args)


def create_app(state: ServerState) -> Starlette:
    """The whole HTTP surface. Errors of any route leave through `RequestMiddleware`, in OpenAI's shape."""
    views = _Views(state)
    return Starlette(
        routes=[
            Route("/healthz", views.healthz),
            Route("/readyz", views.readyz),
            Route("/health", views.readyz),
            Route("/metrics", views.metrics),
            Route("/v1/models", views.models),
            Route("/v1/models/{model:path}", views.model),
            Route("/v1/chat/completions", Generation(state, "chat"), methods=["POST"]),
            Route("/v1/completions", Generation(state, "text"), methods=["POST"]),
            Route("/tokenize", views.tokenize, methods=["POST"]),
            Route("/openapi.json", views.description),
            *(Route(path, views.elsewhere, methods=["GET", "POST"]) for path in OTHER_APIS),
        ],
        middleware=[Middleware(RequestMiddleware, state=state)],
        exception_handlers={HTTPException: _no_such_route},
    )


class RequestMiddleware:
    """Around every request: its id, the key, one line in the log, and errors turned into answers."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app, self.state = app, state
        self.door = Door.of(state.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope = without_slash(scope)
        headers = Headers(scope=scope)
        cors = self.door.cors(headers)
        request_id = scope["request_id"] = _request_id(headers)
        started_s, status = time.perf_counter(), NO_ANSWER

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({"x-request-id": request_id, **cors})
            await send(message)

        try:
            answer = self._check(scope, headers) or self.app
            await answer(scope, receive, send_with_id)
        except ClientGoneError:
            pass
        except Exception as error:
            if status != NO_ANSWER:
                raise
            refusal = as_api_error(error, request_id)
            response = JSONResponse(refusal.body(), refusal.status, refusal.headers())
            await response(scope, receive, send_with_id)
        finally:
            self._log(scope, status, started_s, request_id)

    def _check(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        """ApiError for a request that is not allowed. Returns the answer to a preflight, which carries no key."""
        if scope["path"] not in OPEN_PATHS:
            self.door.check(headers)
        if (allowed := self.door.preflight(scope["method"], headers)) is not None:
            return Response(status_code=204, headers=allowed)
        if scope["path"] not in OPEN_PATHS:
            self._check_key(headers)
        return None

    def _check_key(self, headers: Headers) -> None:
        key = self.state.settings.api_key
        if key is not None and not _has_key(headers, key):
            message = "a valid API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")

    def _log(self, scope: Scope, status: int, started_s: float, request_id: str) -> None:
        self.state.metrics.responses.labels(str(status)).inc()
        path = scope["raw_path"].decode("ascii", "replace")[:100]  # %-quoted, so that it stays on one line
        level = logging.DEBUG if scope["path"] in (*OPEN_PATHS, "/metrics") else logging.INFO
        elapsed_s = time.perf_counter() - started_s
        log.log(level, "%s %s %d %.3fs id=%s", scope["method"], path, status, elapsed_s, request_id)


class _Views:
    """The routes that generate nothing."""

    def __init__(self, state: ServerState) -> None:
        self.state = state

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        status = self.state.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.state.metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def description(self, request: Request) -> Response:
        return JSONResponse(DESCRIPTION)

    async def elsewhere(self, request: Request) -> Response:
        hint = "litellm's proxy translates it: litellm --model openai/NAME --api_base URL"
        raise ApiError(501, f"{request.url.path} is not served; {hint}", code="not_supported")

    async def models(self, request: Request) -> Response:
        card = self._card(self.state.ready())
        # Aliases as SGLang lists adapters, so that clients that look for the one model find it.
        others = [{**card, "id": name, "parent": card["id"]} for name in self.state.settings.aliases]
        return JSONResponse({"object": "list", "data": [card, *others]})

    async def model(self, request: Request) -> Response:
        card = self._card(self.state.ready())
        if request.path_params["model"] not in (card["id"], *self.state.settings.aliases):
            raise ApiError(404, f"this server has {card['id']}", param="model", code="model_not_found")
        return JSONResponse(card)

    async def tokenize(self, request: Request) -> Response:
        served = self.state.ready()
        if served.vocabulary is None:
            raise ApiError(501, "this server's engine does not expose its tokenizer", code="not_supported")
        with self.state.limit.admit():
            reader = RequestReader(self.state.settings, served)
            prompt = await _read(self.state, request.headers, request.receive, reader.read_tokenize)
            ids = await self.state.in_thread(served.vocabulary.encode, prompt)
        return JSONResponse(
            {"tokens": ids, "count": len(ids), "max_model_len": served.engine.info.context_tokens}
        )

    def _card(self, served: Served) -> dict[str, Any]:
        info = served.engine.info
        return {
            "id": served.name(self.state.settings),
            "object": "model",
            "created": 0,
            "owned_by": "ghostvis",
            "max_model_len": info.context_tokens,
            "ghostvis": {name: getattr(info, name) for name in ABOUT},
        }


class Generation:
    """/v1/chat/completions or /v1/completions, an ASGI application."""

    def __init__(self, state: ServerState, kind: Kind) -> None:
        self.state, self.kind = state, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        served = self.state.ready()
        stream = EventStream(send)
        try:
            with self.state.limit.admit():
                reader = RequestReader(self.state.settings, served)
                call = await _read(self.state, Headers(scope=scope), receive, partial(reader.read, self.kind))
                answer = answer_for(call, reader.model, served.vocabulary)
                await self._run(served, call, answer, receive, stream)
        except Exception as error:
            if not stream.begun or isinstance(error, ClientGoneError):
                raise
            await stream.fail(as_api_error(error, scope["request_id"]))
            return
        if not call.stream:
            await JSONResponse(answer.whole())(scope, receive, send)

    async def _run(
        self, served: Served, call: Call, answer: Answer, receive: Receive, stream: "EventStream"
    ) -> None:
        with self.state.metrics.request(streaming=call.stream) as watched:
            work = self._generate(served, call, answer, watched, stream)
            try:
                await unless_gone(receive, work)
            except (ClientGoneError, asyncio.CancelledError):
                watched.aborted()
                raise
            watched.finished(answer.totals())

    async def _generate(
        self, served: Served, call: Call, answer: Answer, watched: RequestMetrics, stream: "EventStream"
    ) -> None:
        """Nothing is sent before the first chunk, so that a refusal by the engine still gets its status."""
        chunks = interleaved(served.engine, call.requests, watched.saw, self._pause_s)
        async with aclosing(chunks) as groups:
            try:
                async for group in groups:
                    if not call.stream:
                        answer.add(group)
                    elif events := answer.events(group):
                        await stream.send(*events)
            except ContextLengthError as error:
                raise too_long(error.message, call.asks) from error
            except GrammarError as error:
                field = "regex" if call.requests[0].sampling.regex is not None else "response_format"
                raise ApiError(400, error.message, param=field) from error
            except InputError as error:
                raise ApiError(400, error.message, param=call.asks) from error
        if call.stream:
            await stream.end(*([answer.usage_event()] if call.include_usage else []))

    def _pause_s(self) -> float:
        return min(LONGEST_PAUSE_S, len(self.state.limit.inside) / WRITES_PER_S)


class EventStream:
    """Server-sent events. ASCII only: some clients split lines at Unicode's line separators too."""

    HEADERS = (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would collect the events otherwise
    )

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.ended = False

    async def send(self, *events: dict[str, Any]) -> None:
        """Send all the events in one write."""
        if not self.begun:
            self.begun = True
            headers = list(self.HEADERS)
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._write(*map(_compact, events), more=True)

    async def fail(self, error: ApiError) -> None:
        """The last event of an answer that was cut short, without [DONE]. Nothing if it was complete already."""
        if not self.ended:
            await self._write(_compact(error.body()), more=False)

    async def end(self, *events: dict[str, Any]) -> None:
        await self._write(*map(_compact, events), "[DONE]", more=False)

    async def _write(self, *contents: str, more: bool) -> None:
        self.ended = not more
        body = "".join(f"data: {content}\n\n" for content in contents).encode("ascii")
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _compact(body: dict[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))


async def _read(state: ServerState, headers: Headers, receive: Receive, read: Callable[[bytearray], T]) -> T:
    """What `read` makes of the body, which is freed then.

    Other content types are refused: a web page can send them without a preflight.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "the content type must be application/json")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "a body that is compressed is not read here; leave Content-Encoding out")
    settings = state.settings
    with state.bodies.one() as body:
        await body.receive(headers, receive, settings.max_body_bytes, settings.body_pause_s)
        return await state.in_thread(read, body.content)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = no_route(error.status_code, (error.headers or {}).get("Allow"))
    return JSONResponse(refusal.body(), error.status_code, error.headers)


def _has_key(headers: Headers, key: str) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), key.encode())


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.:+/=-]{1,128}", given, re.ASCII) else uuid4().hex
