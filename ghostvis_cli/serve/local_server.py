"""The server's life: bind, load behind a port that already answers, serve, drain, leave."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ghostvis_cli.engines.base import GenerateRequest, Sampling, complete
from ghostvis_cli.errors import ExitCode
from ghostvis_cli.serve.listen import base_url, bind
from ghostvis_cli.serve.routes import ServerState, create_app
from ghostvis_cli.serve.settings import Served, ServerSettings
from ghostvis_cli.serve.stopping import stop_signals
from ghostvis_cli.serve.wire import Config, Server

log = logging.getLogger("ghostvis.serve")

CUT_S = 5.0  # for requests to send their last event after the drain


async def serve(
    settings: ServerSettings,
    load_engine: Callable[[], Awaitable[Served]],
    *,
    on_bound: Callable[[str], None],
    on_ready: Callable[[str, Served], None],
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code.

    `on_bound` gets the base URL once the port is bound, `on_ready` URL and model once a token has been generated.
    `load_engine` must not block the loop: meanwhile /healthz answers, and all else says 503. What it raises ends
    the server. The first signal drains; a second one ends the process at once, with 128 plus its number.
    Cancelling drains too.
    """
    listener = bind(settings)
    state = ServerState(settings)
    server = Server(Config(create_app(state), settings))
    stop = asyncio.Event()
    with listener, stop_signals(stop):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        loading = asyncio.create_task(_open(load_engine))
        stopping = asyncio.create_task(stop.wait())
        try:
            url = base_url(settings, listener)
            on_bound(url)
            await asyncio.wait((loading, stopping, serving), return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and not stop.is_set():
                state.open(loading.result())
                on_ready(url, loading.result())
                await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _drain(server, state, serving)
            stopping.cancel()
            await _close(loading)
    if not serving.cancelled():
        serving.result()  # raises what ended it, if that was not us
    return ExitCode.OK


async def _open(load_engine: Callable[[], Awaitable[Served]]) -> Served:
    """Load, then generate one token, so that what is built on first use is there before the first request."""
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


async def _drain(server: Server, state: ServerState, serving: asyncio.Task[None]) -> None:
    """Accept nothing more, let requests finish within the time allowed, cut the rest short."""
    state.draining = True
    server.should_exit = True
    if state.limit.inside:
        log.info("stopping; %d requests may still finish", len(state.limit.inside))
    done, _ = await asyncio.wait((serving,), timeout=state.settings.drain_timeout_s)
    if not done:
        log.warning(
            "%d requests cut short after %g s", len(state.limit.inside), state.settings.drain_timeout_s
        )
        state.limit.close()
        done, _ = await asyncio.wait((serving,), timeout=CUT_S)
    if not done:  # a client that does not read
        serving.cancel()
        await asyncio.wait((serving,))
    state.threads.shutdown(wait=False, cancel_futures=True)
