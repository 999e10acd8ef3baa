"""uvicorn's HTTP server, with deadlines, a bounded number of connections and fewer lines in the log."""

import asyncio
import errno
import logging
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ghostvis_cli.serve.settings import ServerSettings

log = logging.getLogger("ghostvis.serve")

KEEP_ALIVE_S = 30  # longer than clients keep idle connections (httpx: 5 s), so that the client closes first
SPARE_FILES, MOST_CONNECTIONS = 128, 10_000
QUEUE = 2048  # connections that the system keeps until they are accepted
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
QUIET_S = 1.0  # between two lines about connections that could not be accepted


class Config(uvicorn.Config):
    """Uvicorn's configuration, and ours for `Protocol`."""

    def __init__(self, app: Any, settings: ServerSettings) -> None:
        super().__init__(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            headers=[("server", "ghostvis")],
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=max(1, spare_files() // 16),  # accepted in one go, before any of them is served
        )
        self.head_timeout_s = settings.head_timeout_s


class Protocol(H11Protocol):
    """One connection. Until a request's head is complete it may be closed: at its deadline, or to make room."""

    config: Config
    connections: set["Protocol"]  # type: ignore[assignment]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._begun = True
        self._wait(self.config.head_timeout_s)
        if len(self.connections) > most_connections():
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self._deadline is not None and not self._begun:
            self._begun = True
            self._wait(self.config.head_timeout_s)
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Start the deadline of the next head. Leftover bytes, as of a refused body, don't extend it."""
        self._begun = self.conn.their_state is not h11.DONE
        self._wait(KEEP_ALIVE_S)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        """Never, and without uvicorn's advice to install a library: the request is answered as any other."""
        return False

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed request. What the application still sends for it is dropped."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        self.transport.abort()  # close() would wait for a client that does not read

    def _make_room(self) -> None:
        """Close the waiting connection with the nearest deadline. This one waits too, so there is always one."""
        waiting = [(each._deadline.when(), id(each), each) for each in self.connections if each._deadline]
        _, _, next_up = min(waiting)
        next_up._stop_waiting()
        next_up._give_up()


class Server(uvicorn.Server):
    """Uvicorn without its signal handlers, which would end the process by the signal after the drain."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_Handler())
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)


class _Handler:
    """Handles the loop's errors: connections that can't be accepted come in thousands, each with a traceback."""

    def __init__(self) -> None:
        self._said_s = float("-inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in EXHAUSTED:
            loop.default_exception_handler(context)
        elif loop.time() - self._said_s >= QUIET_S:
            self._said_s = loop.time()
            log.warning("connections can't be taken in for now: %s", error.strerror)


def most_connections() -> int:
    """As many as there are file descriptors, less those that the process needs otherwise."""
    return min(_files() - spare_files(), MOST_CONNECTIONS)


def spare_files() -> int:
    return min(SPARE_FILES, _files() // 2)


def _files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2 * MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else soft
