"""A connection to one HTTP server: its client, retries, and error messages.

Knows addresses, proxies, certificates and event streams; nothing of models, messages or tokens.
"""

import asyncio
import json
import os
import random
import re
import resource
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2

from ghostvis_cli.addresses import proxy_of, root_of, route
from ghostvis_cli.engines.http1 import DirectTransport
from ghostvis_cli.engines.sse import SSEParser
from ghostvis_cli.errors import EngineError, GhostvisError, RequestError, UsageError
from ghostvis_cli.version import __version__

DONE = "[DONE]"  # the event that ends a stream
RETRY_S = 0.2  # before the first repeat, doubled for each further one
DRAIN_S = 0.1  # for the end of the body after [DONE]; with it the connection can be used again
KEEPALIVE_S = 2.0  # uvicorn closes idle connections after 5 s: don't use one that may be closing
KEEPALIVE_MOST = 100  # through a proxy: httpx2 checks every idle one at each request
REFUSAL_BYTES, REFUSAL_CHARS, REFUSAL_S = 65_536, 500, 5.0  # limits of what is read and shown of a refusal
BODY_BYTES = 1 << 22
NO_HEADERS: Mapping[str, str] = {}
SPARE_FILES = 64  # file descriptors left to the rest of the process


@dataclass(frozen=True)
class RemoteSettings:
    """Where the server is and how long to wait. `ca_file` is trusted besides the system's certificates.

    `many_connections` is for thousands of open answers, for which httpx2's pool is too slow (see `http1`).
    """

    base_url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    connect_timeout_s: float = 5.0
    timeout_s: float = 600.0  # for one request, from start to last byte
    retries: int = 3
    many_connections: bool = False

    def __post_init__(self) -> None:
        root_of(self.base_url)
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key):
            raise UsageError("the API key holds a space or a character that no header may carry")


class RefusedError(RequestError):
    """The server answered with a status that is not 200."""

    def __init__(self, message: str, status: int, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class BrokenOffError(EngineError):
    """The connection ended before the answer did."""

    def __init__(self, where: str) -> None:
        message = f"{where} closed the connection in the middle of the answer"
        super().__init__(message, hint="read the server's log: it may have died")


class _TemporaryError(Exception):
    """The server did not accept the request, and a retry may succeed."""

    def __init__(self, failure: GhostvisError, after_s: float = 0.0) -> None:
        super().__init__(failure.message)
        self.failure, self.after_s = failure, after_s


class Connection:
    """A pool of connections to one server at `root`, its address without /v1. Messages call it `where`."""

    def __init__(self, settings: RemoteSettings) -> None:
        self.settings = settings
        self.root = root_of(settings.base_url)
        self.proxy = route(self.root)
        self.where = self.root if self.proxy is None else f"{self.root} (through the proxy {self.proxy})"
        self._client: httpx2.AsyncClient | None = None
        self._closed = False

    async def get(self, path: str, deadline: float) -> bytes:
        return await self.body(await self.open("GET", path, b"", deadline), path, deadline)

    async def text(self, response: httpx2.Response, path: str, deadline: float) -> str:
        return (await self.body(response, path, deadline)).decode("utf-8", errors="replace")

    async def body(self, response: httpx2.Response, path: str, deadline: float) -> bytes:
        """The whole body, up to BODY_BYTES. Closes the response."""
        started, body = now(), bytearray()
        try:
            await _read_into(body, response, BODY_BYTES, deadline)
        except TimeoutError as error:
            raise self._too_slow(f"has not finished its answer to {path}", started) from error
        except httpx2.TransportError as error:
            raise self._silent(path, error) from error
        finally:
            await response.aclose()
        return bytes(body)

    async def open(
        self, method: str, path: str, content: bytes, deadline: float, headers: Mapping[str, str] = NO_HEADERS
    ) -> httpx2.Response:
        """A response with status 200, its body unread. Retries only requests that the server did not accept.

        `deadline` is a time of the running loop's clock. Else RefusedError or EngineError.
        """
        attempt = 0
        while True:
            try:
                return await self._try(method, path, content, deadline, headers)
            except _TemporaryError as temporary:
                # Jitter, so that many requests refused together don't return together.
                wait_s = temporary.after_s + RETRY_S * 2**attempt * random.uniform(0.5, 1)
                if attempt == self.settings.retries or now() + wait_s >= deadline:
                    raise temporary.failure from temporary.__cause__
            await asyncio.sleep(wait_s)
            attempt += 1

    async def events(self, response: httpx2.Response, deadline: float) -> AsyncGenerator[str, None]:
        """The data of each event, up to and including [DONE], or to a well-formed end without it."""
        parser, heard, done = SSEParser(), now(), False
        async with aclosing(response.aiter_bytes()) as pieces:
            while True:
                try:
                    # Not around the whole loop: the caller's own time must not count.
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(pieces, None)
                    events = [] if done or piece is None else parser.feed(piece)
                except TimeoutError as error:
                    if done:
                        return
                    raise self._too_slow(
                        f"was given {self.settings.timeout_s:g} s, and has sent no data", heard
                    ) from error
                except ValueError as error:
                    raise RequestError(f"{self.where} sent {error}") from error
                except httpx2.TransportError as error:
                    if done:
                        return
                    raise BrokenOffError(self.where) from error
                if piece is None:
                    return
                heard = now()
                for event in events:
                    if not done:
                        yield event
                    done = done or event == DONE
                if done:
                    deadline = min(deadline, now() + DRAIN_S)

    async def words(self, response: httpx2.Response) -> str:
        """The message in a refusal's body. Closes the response."""
        body = bytearray()
        try:
            with suppress(TimeoutError, httpx2.TransportError):
                await _read_into(body, response, REFUSAL_BYTES, now() + REFUSAL_S)
        finally:
            await response.aclose()
        text = body.decode("utf-8", errors="replace")
        with suppress(ValueError, RecursionError):
            text = said(json.loads(text))
        return self.plain(response.headers.get("location") or text or response.reason_phrase)

    def plain(self, text: str) -> str:
        """The server's text for a message: one line of bounded length, without control characters or our key."""
        if self.settings.api_key is not None:
            text = text.replace(self.settings.api_key, "***")
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line if len(line) <= REFUSAL_CHARS else f"{line[: REFUSAL_CHARS - 1]}…"

    async def aclose(self) -> None:
        self._closed = True
        if self._client is not None:
            await self._client.aclose()

    async def _try(
        self, method: str, path: str, content: bytes, deadline: float, headers: Mapping[str, str]
    ) -> httpx2.Response:
        client, started = self._http(), now()
        kind = {"Content-Type": "application/json"} if content else {}
        request = client.build_request(method, self.root + path, content=content, headers={**kind, **headers})
        try:
            async with asyncio.timeout_at(deadline):
                response = await client.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise self._unreachable(error) from error
        except TimeoutError as error:
            raise self._too_slow(f"has not answered {path}", started) from error
        except httpx2.TransportError as error:
            raise self._silent(path, error) from error
        if response.status_code == 200:
            return response
        failure = self._refusal(response.status_code, path, await self.words(response))
        if response.status_code in (429, 503):
            raise _TemporaryError(failure, _retry_after_s(response.headers.get("retry-after", "")))
        raise failure

    def _http(self) -> httpx2.AsyncClient:
        """The HTTP client, made on first use, inside the loop that uses it."""
        if self._closed:
            raise RequestError("the engine is closed")
        if self._client is None:
            key, proxy, certificates = self.settings.api_key, proxy_of(self.root), self._certificates()
            direct = None
            if self.settings.many_connections and proxy is None:
                direct = DirectTransport(
                    certificates=certificates, most_connections=_most_connections(), keepalive_s=KEEPALIVE_S
                )
            try:
                self._client = httpx2.AsyncClient(
                    headers={
                        "User-Agent": f"ghostvis/{__version__}",
                        "Accept-Encoding": "identity",  # compression would delay tokens
                        **({} if key is None else {"Authorization": f"Bearer {key}"}),
                    },
                    verify=certificates,
                    proxy=proxy,
                    transport=direct,
                    trust_env=False,  # `addresses` chooses the proxy
                    timeout=httpx2.Timeout(None, connect=self.settings.connect_timeout_s),
                    limits=httpx2.Limits(
                        max_connections=_most_connections(),
                        max_keepalive_connections=KEEPALIVE_MOST,
                        keepalive_expiry=KEEPALIVE_S,
                    ),
                )
            except (ImportError, ValueError) as error:  # SOCKS without its package, or an unknown proxy
                host = urlsplit(self.root).hostname
                raise EngineError(
                    f"can't go through the proxy {self.proxy}",
                    hint=f"pip install 'httpx2[socks]' for SOCKS, or export NO_PROXY={host}",
                ) from error
        return self._client

    def _certificates(self) -> ssl.SSLContext:
        if not self.root.startswith("https:"):
            # Plain HTTP needs no certificates, and reading them takes 50 ms.
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context, ca_file = httpx2.create_ssl_context(), self.settings.ca_file
        if ca_file is not None:
            try:
                context.load_verify_locations(ca_file)
            except OSError as error:  # ssl.SSLError is one
                raise UsageError(f"no certificates can be read from {ca_file}: {_reason(error)}") from error
        return context

    def _refusal(self, status: int, path: str, words: str) -> GhostvisError:
        message = f"{self.where} answered {path} with {status}: {words}"
        match status:
            case 401 | 403:
                hint = "export GHOSTVIS_API_KEY=..., or name another variable with engine.api_key_env"
            case 404:
                hint = f"curl {self.root}/v1/models"
            case 413:
                hint = "send fewer or smaller images"
            case 429:
                hint = "ask for less at once: --concurrency 1"
            case 503:
                return EngineError(message, hint="wait until the server has its model, or read its log")
            case _:
                return RefusedError(message, status)
        return RefusedError(message, status, hint=hint)

    def _unreachable(self, error: httpx2.TransportError) -> Exception:
        reason = _reason(error)
        hint = "start a server with: ghostvis serve; or correct engine.base_url"
        if isinstance(error, httpx2.ConnectTimeout):
            reason = f"no connection within {self.settings.connect_timeout_s:g} s"
            hint = "--set engine.connect_timeout_s=30"
        if self.proxy is not None:
            hint = f"export NO_PROXY={urlsplit(self.root).hostname}, if the server is to be reached directly"
        message = f"can't reach {self.where}: {reason}"
        if "CERTIFICATE" in str(error):  # a retry would get the same certificate
            return EngineError(message, hint="--set engine.ca_file=/path/to/ca.pem")
        return _TemporaryError(EngineError(message, hint=hint))

    def _silent(self, path: str, error: httpx2.TransportError) -> EngineError:
        hint = "read the server's log; is it http:// or https://?"
        return EngineError(f"{self.where} gave no answer to {path}: {self.plain(_reason(error))}", hint=hint)

    def _too_slow(self, what: str, since: float) -> EngineError:
        hint = f"read the server's log, or --set engine.timeout_s={2 * self.settings.timeout_s:g}"
        return EngineError(f"{self.where} {what} for {now() - since:.1f} s", hint=hint)


def now() -> float:
    """Seconds on the running event loop's clock, as deadlines use it."""
    return asyncio.get_running_loop().time()


def said(body: Any) -> str:
    """The message in an error: SGLang's flat form, OpenAI's nested one, FastAPI's `detail`, or the whole body."""
    while isinstance(body, dict):
        inner = body.get("error") or body.get("message") or body.get("detail")
        if inner is None:
            break
        body = inner
    return body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)


async def _read_into(body: bytearray, response: httpx2.Response, limit: int, deadline: float) -> None:
    async with asyncio.timeout_at(deadline), aclosing(response.aiter_bytes()) as pieces:
        async for piece in pieces:
            body += piece[: limit - len(body)]
            if len(body) == limit:
                return


def _retry_after_s(header: str) -> float:
    """Seconds in a Retry-After header, in either of its forms."""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", header):
        return float(header)
    with suppress(ValueError):
        at = parsedate_to_datetime(header)
        return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    return 0.0


def _reason(error: BaseException) -> str:
    """The system's own message, from the innermost of wrapped errors."""
    text = str(error) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError | socket.gaierror):
            text = cause.strerror or text
        elif isinstance(cause, OSError) and cause.errno:
            text = os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    return text


def _most_connections() -> int | None:
    """How many connections the process may open. Further requests wait for one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else max(8, soft - SPARE_FILES)
