"""The page's server: who may come in, what a browser may do with what it gets, start and end."""

import asyncio
import os
import re
import secrets
from base64 import b64decode
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ghostvis_cli import endings, scratch
from ghostvis_cli.chat.commands import attach
from ghostvis_cli.chat.conversation import Conversation
from ghostvis_cli.errors import EngineError, ExitCode
from ghostvis_cli.serve.api_errors import ApiError
from ghostvis_cli.serve.door import Door, hostname
from ghostvis_cli.serve.listen import base_url, bind
from ghostvis_cli.serve.settings import ServerSettings
from ghostvis_cli.serve.stopping import stop_signals
from ghostvis_cli.serve.wire import Config, Server
from ghostvis_cli.web.desk import Desk, line_of
from ghostvis_cli.web.view import View

# Gradio reads these when it is imported.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SSR_MODE": "False"}
WAY_IN = "open the address that ghostvis printed; with a key, the key is the password\n"
ENDING_S = 1.0  # what open connections get to end by themselves
MOST_BYTES = 2**30  # of uploads, those in the folder and those on their way
FULL = "no room for another image: send those that are here, or start ghostvis chat --web again\n"


async def serve(
    chat: Conversation,
    settings: ServerSettings,
    images: Sequence[str],
    *,
    on_ready: Callable[[str, str], None],
) -> int:
    """Until SIGTERM or SIGINT; the exit code.

    `on_ready` gets the page's address once the model is there, and one that lets in a single browser.
    """
    stop = asyncio.Event()
    with bind(settings) as listener, scratch.folder() as place, stop_signals(stop, endings.undo_all):
        os.environ |= {**QUIET, "GRADIO_TEMP_DIR": str(place)}
        async with chat:
            desk, stopping = Desk(chat), asyncio.create_task(stop.wait())
            beginning = asyncio.create_task(_begin(desk, images))
            await asyncio.wait((beginning, stopping), return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                beginning.cancel()
                return ExitCode.OK
            beginning.result()
            from ghostvis_cli.web.page import opened

            async with opened(desk, View(desk, place)) as app:
                gate = Gate(app, settings, place, listener.getsockname()[1])
                server = Server(Config(gate, settings))
                serving = asyncio.create_task(server.serve(sockets=[listener]))
                address = base_url(settings, listener)
                on_ready(address + gate.query(gate.token), address + gate.query(gate.once))
                try:
                    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    server.should_exit = True
                    await desk.stop()
                    await asyncio.wait((serving,), timeout=ENDING_S)
                    for each in tuple(server.server_state.connections):  # half an upload, a page that listens
                        each.transport.abort()
                    await asyncio.wait((serving,), timeout=ENDING_S)
                    serving.cancel()
    return ExitCode.OK


async def _begin(desk: Desk, images: Sequence[str]) -> None:
    """A server that is not there may come back; what else is wrong is said before there is a page."""
    await attach(desk.chat, list(images), desk)
    try:
        await desk.chat.connect()
    except EngineError as error:
        if desk.chat.profile.engine.chosen_kind != "remote":
            raise
        desk.note(line_of(error))


# All that the page asks for; Gradio has some sixty more, proxies and recorders among them.
ROUTES = re.compile(
    r"/|/config|/export/\w+|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/.+"
    r"|/gradio_api/(upload|upload_progress|queue/join|queue/data|run/predict|cancel|reset|startup-events|info|app_id"
    r"|heartbeat/\w+|file=(?P<file>.+))"
)
# Scripts are Gradio's own files and what its page begins with: nothing that a message could bring along.
POLICY = (
    "default-src 'self'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)


class Gate:
    """Before Gradio: the door of `serve`, a token or the key, and only the routes that the page needs."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, place: Path, port: int) -> None:
        self.app, self.place, self.coming = app, place, 0
        self.door = Door(settings.api_key is None, settings.host)
        self.token = settings.api_key or secrets.token_urlsafe(24)
        self.once = secrets.token_urlsafe(24)  # for a browser's command line, which others can read
        self.challenge = (
            {"www-authenticate": 'Basic realm="ghostvis", charset="UTF-8"'} if settings.api_key else {}
        )
        # Cookies know no ports: two pages on one machine would take turns in logging out.
        self.cookie, self.ticket = f"ghostvis-{port}", sha256(self.token.encode()).hexdigest()

    def query(self, token: str) -> str:
        """What an address ends with: nothing where browsers ask for the key."""
        return "" if self.challenge else f"/?token={token}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        try:
            self.door.check(request.headers)
            _require_own_page(request.headers)
        except ApiError as error:
            await PlainTextResponse(f"{error.code}: {WAY_IN}", error.status)(scope, receive, send)
            return
        if not self._is_known(request):
            await self._greeting(request)(scope, receive, send)
        elif not self._is_needed(request.url.path):
            await PlainTextResponse("there is nothing here", 404)(scope, receive, send)
        elif request.url.path == "/gradio_api/upload":
            await self._take(request, scope, receive, send)
        else:
            await self._pass(scope, receive, send)

    async def _take(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        size = int(request.headers.get("content-length", MOST_BYTES + 1))
        if self.coming + size + sum(map(_size, self.place.rglob("*"))) > MOST_BYTES:
            await PlainTextResponse(FULL, 413)(scope, receive, send)
            return
        self.coming += size
        try:
            await self._pass(scope, receive, send)
        finally:
            self.coming -= size

    def _is_needed(self, path: str) -> bool:
        found = ROUTES.fullmatch(path)
        return found is not None and (not found["file"] or Path(found["file"]).is_relative_to(self.place))

    def _is_known(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            with suppress(ValueError):
                given = b64decode(given).decode().partition(":")[2]
        return _same(request.cookies.get(self.cookie, ""), self.ticket) or _same(given, self.token)

    def _greeting(self, request: Request) -> Response:
        """To somebody whose request has no proof: the cookie for the token in the address, else a refusal."""
        given = request.query_params.get("token", "")
        if _same(given, self.once):
            self.once = secrets.token_urlsafe(24)
        elif not _same(given, self.token):
            return PlainTextResponse(WAY_IN, 401, self.challenge)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(self.cookie, self.ticket, httponly=True, samesite="lax")
        return answer

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Gradio's answer with our headers; in its page, scripts get the nonce that lets them run."""
        nonce = secrets.token_urlsafe(16)
        policy = POLICY.format(nonce=nonce)
        is_page = scope["path"] == "/"
        started: Message = {}
        if is_page:  # compressed it could not be changed
            plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
            scope = {**scope, "headers": plain}

        async def ours(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]
                headers.update({"content-security-policy": policy, "referrer-policy": "no-referrer"})
                # Browsers would look up the names in links that a model wrote, before anybody follows one.
                headers.update({"x-content-type-options": "nosniff", "x-dns-prefetch-control": "off"})
                if is_page:
                    started = message
                    return
            elif is_page:
                body = message["body"].replace(b"<script", f'<script nonce="{nonce}"'.encode())
                MutableHeaders(scope=started)["content-length"] = str(len(body))
                message = {**message, "body": body}
                await send(started)
            await send(message)

        with suppress(ClientDisconnect):  # in the middle of an upload
            await self.app(scope, receive, ours)


def _require_own_page(headers: Headers) -> None:
    """The browser adds the key by itself, also to what pages of others ask for."""
    origin, host = headers.get("origin"), headers.get("host", "")
    foreign = origin is not None and hostname(origin) != hostname(f"//{host}")
    if foreign or headers.get("sec-fetch-site") == "cross-site":
        raise ApiError(403, "pages of other origins are not let in", code="forbidden_origin")


def _size(path: Path) -> int:
    with suppress(OSError):  # it went meanwhile
        return path.stat().st_size
    return 0


def _same(given: str, known: str) -> bool:
    return secrets.compare_digest(given.encode(), known.encode())
