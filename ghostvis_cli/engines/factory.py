"""Profile -> engine. Imports exactly one engine module, the one the profile asks for."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ghostvis_cli import address_space
from ghostvis_cli.checkpoint.choose import choose_checkpoint
from ghostvis_cli.engines.base import Engine
from ghostvis_cli.errors import UsageError, installed
from ghostvis_cli.threads import in_daemon_thread

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.locate import Checkpoint
    from ghostvis_cli.engines.local import LocalEngine
    from ghostvis_cli.profile import Profile

T = TypeVar("T")


async def make_engine(
    profile: "Profile",
    *,
    report: Callable[[str], None] | None = None,
    detail: Callable[[str], None] | None = None,
    many_connections: bool = False,
) -> Engine:
    """The engine of a profile, loaded or connected.

    report   receives lines for the user meanwhile; without it they become the engine's notices
    detail   receives the log of a process that is started
    many_connections   thousands of answers will be open at once
    """
    kind = profile.engine.chosen_kind
    if kind == "local":
        return await _local(profile, report)
    if kind == "remote":
        return await _remote(profile, many_connections=many_connections)
    from ghostvis_cli.sglang.engine import SGLangEngine

    return await SGLangEngine.start(profile, report=report, detail=detail)


async def _local(profile: "Profile", report: Callable[[str], None] | None) -> "LocalEngine":
    # In threads, so that the loop can be stopped while a model is fetched, torch imported and weights read.
    checkpoint, notices = await in_daemon_thread(
        partial(choose_checkpoint, profile.model, report=report), "ghostvis-choose"
    )
    engine = await in_daemon_thread(lambda: _open_local(checkpoint, profile), "ghostvis-load")
    engine.info = replace(engine.info, notices=(*notices, *engine.info.notices))
    return engine


def _open_local(checkpoint: "Checkpoint", profile: "Profile") -> "LocalEngine":
    address_space.require_for_torch()
    with installed("the local engine", "local"):
        from ghostvis_cli.engines.local import LocalEngine, LocalSettings
    layout = None if profile.model.layout == "auto" else profile.model.layout
    return LocalEngine.open(checkpoint, _settings(LocalSettings, profile, layout=layout))


async def _remote(profile: "Profile", *, many_connections: bool) -> Engine:
    from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
    from ghostvis_cli.profile import read_api_key

    settings = profile.engine
    if settings.base_url is None:
        raise UsageError("a remote engine needs an address", hint="--base-url http://localhost:30000")
    others = {"api_key": read_api_key(settings), "many_connections": many_connections}
    return await RemoteEngine.connect(_settings(RemoteSettings, profile, **others))


def _settings(kind: type[T], profile: "Profile", **others: Any) -> T:
    """An engine's settings: fields of the same names in the profile's, and others."""
    same = [each.name for each in fields(kind) if each.name not in others]  # type: ignore[arg-type]
    return kind(**{name: getattr(profile.engine, name) for name in same}, **others)
