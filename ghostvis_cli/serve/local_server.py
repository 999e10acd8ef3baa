"""The server's life: bind, load behind a port that already answers, serve, drain, leave."""

import asyncio
import errno
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TypeVar

import uvicorn

from ghostvis_cli.engines.base import GenerateRequest, Sampling, complete
from ghostvis_cli.errors import EngineError, ExitCode, UsageError
from ghostvis_cli.serve.routes import ServerState, create_app
from ghostvis_cli.serve.settings import KEY_HINT, Served, ServerSettings

T = TypeVar("T")
log = logging.getLogger("ghostvis.serve")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CUT_S = 5.0  # what requests get to say their last word once the drain is over
KEEP_ALIVE_S = 30  # longer than clients keep idle connections (httpx: 5 s), so that the client closes first


async def serve(
    settings: ServerSettings,
    load_engine: Callable[[], Awaitable[Served]],
    *,
    on_bound: Callable[[str], None],
    on_ready: Callable[[Served], None],
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code.

    `on_bound` gets the base URL as soon as the port is ours, `on_ready` the model once it has generated a
    token. `load_engine` must not block the loop: /healthz answers meanwhile, the rest says 503. What it
    raises ends the server. The first signal drains; a second one ends the process at once, with 128 plus its
    number. Cancelling drains too.
    """
    listener = bind(settings)
    state = ServerState(settings)
    server = _Server(_uvicorn_config(state))
    stop = asyncio.Event()
    with listener, _stop_signals(stop):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        loading = asyncio.create_task(_open(load_engine))
        stopping = asyncio.create_task(stop.wait())
        try:
            on_bound(base_url(settings, listener))
            await asyncio.wait((loading, stopping, serving), return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and not stop.is_set():
                state.open(loading.result())
                on_ready(loading.result())
                await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _drain(server, state, serving)
            stopping.cancel()
            await _close(loading)
    if not serving.cancelled():
        serving.result()  # raises what ended it, if that was not us
    return ExitCode.OK


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """The result of blocking `work`. It holds up nobody who leaves meanwhile, as asyncio's threads do."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(outcome: Callable[[], None]) -> None:
        if not future.done():
            outcome()

    def run() -> None:
        try:
            outcome = partial(future.set_result, work())
        except BaseException as error:
            outcome = partial(future.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name="ghostvis-load", daemon=True).start()
    return await future


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers, which would end the process by the signal after the drain."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(state: ServerState) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(state),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        headers=[("server", "ghostvis")],
        timeout_keep_alive=KEEP_ALIVE_S,
    )


async def _open(load_engine: Callable[[], Awaitable[Served]]) -> Served:
    """Load, then generate one token: what is built on first use is built before anyone waits for it."""
    served = await load_engine()
    try:
        warm_up = GenerateRequest(prompt="Hello", sampling=Sampling(max_tokens=1, temperature=0))
        await complete(served.engine, warm_up)
    except BaseException:
        await served.engine.aclose()
        raise
    return served


async def _close(loading: asyncio.Task[Served]) -> None:
    loading.cancel()
    await asyncio.wait((loading,))
    if not loading.cancelled() and loading.exception() is None:
        await loading.result().engine.aclose()


async def _drain(server: _Server, state: ServerState, serving: asyncio.Task[None]) -> None:
    """Take in nothing more, let what runs finish within the time allowed, cut the rest short."""
    state.draining = True
    server.should_exit = True
    if state.gate.inside:
        log.info("stopping; %d requests may still finish", len(state.gate.inside))
    done, _ = await asyncio.wait((serving,), timeout=state.settings.drain_timeout_s)
    if not done:
        log.warning(
            "%d requests cut short after %g s", len(state.gate.inside), state.settings.drain_timeout_s
        )
        state.gate.close()
        done, _ = await asyncio.wait((serving,), timeout=CUT_S)
    if not done:  # a client that does not read
        serving.cancel()
        await asyncio.wait((serving,))
    state.threads.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _stop_signals(stop: asyncio.Event) -> Iterator[None]:
    """The first signal sets `stop`. Only the main thread can have handlers; elsewhere this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    seen: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if seen:
            # Not by an exception or the default action: threads may hang in native code, and process 1 of a
            # container is immune to a signal's default action.
            os._exit(128 + number)
        seen.append(number)
        loop.call_soon_threadsafe(stop.set)

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def bind(settings: ServerSettings) -> socket.socket:
    """A listening socket, before anything costly starts. Beyond this machine only with a key."""
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"the host {host!r} can't be resolved", hint="--host 127.0.0.1") from error
    if settings.api_key is None and not all(_is_loopback(str(entry[4][0])) for entry in found):
        raise UsageError(
            f"{host or 'every interface'} can be reached from other machines, and there is no API key",
            hint=KEY_HINT,
        )
    # localhost can be both ::1 and 127.0.0.1: take what most clients try.
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise _not_bound(host, port, error) from error
    return listener


def base_url(settings: ServerSettings, listener: socket.socket) -> str:
    host = settings.host or "0.0.0.0"
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _not_bound(host: str, port: int, error: OSError) -> EngineError:
    if error.errno == errno.EADDRINUSE:
        return EngineError(f"port {port} is taken{_port_holder(port)}", hint="--port 0 takes a free one")
    hint = "--port 30000" if error.errno == errno.EACCES else "--host 127.0.0.1"
    return EngineError(f"can't listen on {host} port {port}: {error.strerror or error}", hint=hint)


def _port_holder(port: int) -> str:
    """ " by process 123 (python3)" where /proc tells, which it does for one's own processes; else nothing."""
    with suppress(OSError, ValueError, IndexError):
        rows = [
            line.split()
            for table in ("tcp", "tcp6")
            if (path := Path("/proc/net", table)).exists()
            for line in path.read_text().splitlines()[1:]
        ]
        # Columns: 1 address:port in hexadecimal, 3 state (0A listens), 9 inode of the socket.
        listening = {
            f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port
        }
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if any(str(fd.readlink()) in listening for fd in (process / "fd").iterdir()):
                    return f" by process {process.name} ({(process / 'comm').read_text().strip()})"
    return ""
