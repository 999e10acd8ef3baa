"""Where a server listens: binding its port, finding a free one, and naming the process that holds a taken one."""

import errno
import random
import socket
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ghostvis_cli.addresses import is_loopback
from ghostvis_cli.errors import EngineError, UsageError
from ghostvis_cli.processor_use import PROC, listeners
from ghostvis_cli.serve.settings import ServerSettings

QUIET_PORTS, TRIES = (20_000, 32_000), 20  # Linux gives connections 32768 and up, others 49152 and up


def bind(settings: ServerSettings) -> socket.socket:
    """A listening socket, before anything costly starts. Beyond this machine only with a key."""
    host, port = settings.host, settings.port
    found = _resolved(settings)
    if settings.api_key is None and not is_loopback_only(settings):
        raise UsageError(
            f"{host or 'every interface'} can be reached from other machines, and there is no API key",
            hint=settings.key_hint,
        )
    # localhost can be both ::1 and 127.0.0.1: take the one that most clients try.
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


def is_loopback_only(settings: ServerSettings) -> bool:
    """Whether the server's address is reachable from this machine alone."""
    return all(is_loopback(str(entry[4][0])) for entry in _resolved(settings))


def _resolved(settings: ServerSettings) -> list[Any]:
    try:
        return socket.getaddrinfo(
            settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        message = f"the host {settings.host!r} can't be resolved"
        raise UsageError(message, hint="--host 127.0.0.1") from error


def free_port(settings: ServerSettings) -> int:
    """A port that is free now, for a server that binds it itself, perhaps half a minute later.

    For port 0, one that the system does not give to outgoing connections, which could take it meanwhile.
    """
    for _ in range(TRIES if settings.port == 0 else 0):
        with suppress(EngineError):
            return free_port(replace(settings, port=random.randrange(*QUIET_PORTS)))
    with bind(settings) as listener:
        return int(listener.getsockname()[1])


def base_url(settings: ServerSettings, listener: socket.socket) -> str:
    """The address for clients, with the port that was bound."""
    return url_of(settings.host, listener.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """The address that clients type; an IPv6 host gets brackets."""
    host = host or "0.0.0.0"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _not_bound(host: str, port: int, error: OSError) -> EngineError:
    if error.errno == errno.EADDRINUSE:
        return EngineError(f"port {port} is taken{_port_holder(port)}", hint="--port 0 takes a free one")
    hint = "--port 30000" if error.errno == errno.EACCES else "--host 127.0.0.1"
    return EngineError(f"can't listen on {host} port {port}: {error.strerror or error}", hint=hint)


def _port_holder(port: int) -> str:
    """ " by process 123 (python3)" where /proc tells, which it does for one's own processes; else nothing."""
    for pid in listeners(port):
        with suppress(OSError):
            return f" by process {pid} ({(PROC / str(pid) / 'comm').read_text().strip()})"
    return ""
