"""Profile -> engine. Imports exactly one engine module, the one the profile asks for."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ghostvis_cli import address_space
from ghostvis_cli.checkpoint.choose import choose_checkpoint
from ghostvis_cli.engines.base import Engine
from ghostvis_cli.errors import UsageError, installed
from ghostvis_cli.threads import in_daemon_thread

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.locate import Checkpoint
    from ghostvis_cli.engines.local import LocalEngine
    from ghostvis_cli.profile import Profile


async def make_engine(
    profile: "Profile",
    *,
    report: Callable[[str], None] | None = None,
    detail: Callable[[str], None] | None = None,
    many_connections: bool = False,
) -> Engine:
    """The engine a profile describes, loaded or connected.

    report takes lines for the user while that takes long (else they are among the engine's notices); detail takes
    the log of whatever it starts. many_connections: a server will be asked for thousands of answers at once.
    """
    kind = profile.engine.chosen_kind
    if kind == "local":
        return await _local(profile, report)
    if kind == "remote":
        return await _remote(profile, many_connections=many_connections)
    from ghostvis_cli.sglang.engine import SGLangEngine

    return await SGLangEngine.start(profile, report=report, detail=detail)


async def _local(profile: "Profile", report: Callable[[str], None] | None) -> "LocalEngine":
    # In threads: while a model is fetched, torch imported and weights are read, the loop can be stopped.
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
    settings = profile.engine
    layout = None if profile.model.layout == "auto" else profile.model.layout
    local = LocalSettings(
        device=settings.device,
        dtype=settings.dtype,
        layout=layout,
        max_batch=settings.max_batch,
        prefill_tokens=settings.prefill_tokens,
        prefix_cache_mb=settings.prefix_cache_mb,
        graphs=settings.graphs,
        compile=settings.compile,
        threads=settings.threads,
    )
    return LocalEngine.open(checkpoint, local)


async def _remote(profile: "Profile", *, many_connections: bool) -> Engine:
    from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
    from ghostvis_cli.profile import read_api_key

    settings = profile.engine
    if settings.base_url is None:
        raise UsageError("a remote engine needs an address", hint="--base-url http://localhost:30000")
    return await RemoteEngine.connect(
        RemoteSettings(
            base_url=settings.base_url,
            model=settings.model,
            api_key=read_api_key(settings),
            ca_file=settings.ca_file,
            connect_timeout_s=settings.connect_timeout_s,
            timeout_s=settings.timeout_s,
            retries=settings.retries,
            many_connections=many_connections,
        )
    )
