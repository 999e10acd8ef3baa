"""What would run: a server reached and asked who it is, or a model loaded here; then the round trips."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from ghostvis_cli.addresses import is_this_machine, route
from ghostvis_cli.checkpoint import hub
from ghostvis_cli.checkpoint.choose import choose_checkpoint
from ghostvis_cli.doctor import settings
from ghostvis_cli.doctor.finding import Finding, from_error
from ghostvis_cli.doctor.trips import Trips
from ghostvis_cli.errors import GhostvisError

if TYPE_CHECKING:
    from ghostvis_cli.engines.remote import RemoteEngine
    from ghostvis_cli.profile import EngineSettings, Profile

PROBE_S = 10.0
LOOK_S = 0.5
NAMES = {"sglang": "SGLang", "ghostvis": "ghostvis serve", "vllm": "vLLM"}
REPORT = "start the server with --enable-cache-report"


async def local(profile: "Profile", request_s: float) -> AsyncGenerator[Finding, None]:
    """A model loaded by this process, with the local engine or SGLang."""
    from ghostvis_cli.engines.factory import make_engine

    started_s = time.perf_counter()
    try:
        if hub.reference(profile.model) is not None:
            choose_checkpoint(profile.model, online=False)  # a diagnosis downloads nothing
        engine = await make_engine(profile)
    except GhostvisError as error:
        yield from_error("model", "load", error)
        return
    async with engine:
        info, took_s = engine.info, time.perf_counter() - started_s
        loaded = f"{info.model} on {info.device}, {info.dtype}, in {took_s:.1f} s"
        yield Finding("model", "load", "ok", loaded)
        if info.device.startswith("cuda") and profile.engine.max_batch is None and info.max_batch:
            message = f"{info.max_batch} sequences in one step, for the memory that is free"
            yield Finding("model", "batch", "ok", f"{message}; engine.max_batch sets it")
        for line in info.notices:
            yield Finding("model", "notice", "note", line)
        fix = "--set engine.prefix_cache_mb=512" if profile.engine.prefix_cache_mb == 0 else None
        trips = Trips(engine, profile.images, request_s, info.image_tokens > 0, reuse_fix=fix)
        async for finding in trips.run():
            yield finding


async def remote(profile: "Profile", request_s: float, *, run: bool) -> AsyncGenerator[Finding, None]:
    """The way to the server, the server, the model on it; round trips where `run`."""
    from ghostvis_cli.engines.factory import make_engine

    key = settings.key(profile.engine)
    for finding in [*_way(profile.engine), key]:
        yield finding
    if key.status == "error":
        return
    try:
        engine = cast("RemoteEngine", await make_engine(_impatient(profile, request_s)))
    except GhostvisError as error:
        yield from_error("server", "connection", error)
        return
    async with engine:
        for finding in _identity(engine):
            yield finding
        async for finding in _processor(engine.settings.base_url):
            yield finding
        sees = await _takes_images(engine)
        if run:
            fix = REPORT if engine.server.kind == "sglang" else None
            async for finding in Trips(engine, profile.images, request_s, sees, report_fix=fix).run():
                yield finding
        for line in engine.info.notices:
            yield Finding("server", "notice", "note", line)


def _impatient(profile: "Profile", request_s: float) -> "Profile":
    """The run's profile with a short timeout and no retries."""
    timeout_s = min(profile.engine.timeout_s, request_s)
    return replace(profile, engine=replace(profile.engine, timeout_s=timeout_s, retries=0))


def _way(engine: "EngineSettings") -> Iterator[Finding]:
    if engine.base_url is None:
        return  # the factory says so
    url, proxy = urlsplit(engine.base_url), route(engine.base_url)
    if proxy is None:
        yield Finding("server", "route", "ok", f"{engine.base_url}, directly")
    else:
        fix = f"export NO_PROXY={url.hostname}, if it should be reached directly"
        yield Finding("server", "route", "note", f"{engine.base_url}, through the proxy {proxy}", fix)
    if url.scheme == "http" and not is_this_machine(url.hostname or ""):
        message = "plain http: key, texts and images can be read on the way"
        yield Finding("server", "tls", "warning", message, "https, or ssh -L 30000:localhost:30000 HOST")


def _identity(engine: "RemoteEngine") -> Iterator[Finding]:
    wanted, server, info = engine.settings, engine.server, engine.info
    if wanted.base_url.startswith("https:"):
        more = f" and {wanted.ca_file}" if wanted.ca_file else ""
        yield Finding("server", "tls", "ok", f"https, verified with the system's certificates{more}")
    name = NAMES.get(server.kind, "a server with OpenAI's routes")
    name += f" {server.version}" if server.version else ""
    yield Finding("server", "identity", "ok", name)
    if server.kind == "openai":
        names = "top_k, min_p, repetition_penalty and ignore_eos"
        yield Finding("server", "sampling", "note", f"{names} are not sent: they are no fields of OpenAI's")
    yield Finding("server", "model", "ok", info.model)
    if info.context_tokens is None:
        yield Finding("server", "context", "note", "the server does not tell its context length")
    else:
        yield Finding("server", "context", "ok", f"{info.context_tokens} tokens")
    if server.cache_report is False:
        yield Finding("server", "cache", "warning", "cached tokens are not reported", REPORT)
    elif server.cache_report:
        yield Finding("server", "cache", "ok", "cached tokens are reported")


async def _processor(url: str) -> AsyncGenerator[Finding, None]:
    """Whether the server, if it runs on this machine, is held up by a process that fills a core just now."""
    from ghostvis_cli import processor_use

    port = processor_use.local_port(url)
    watch = processor_use.Watch(port) if port is not None else None
    if watch is None or not watch.sees:
        return
    await asyncio.sleep(LOOK_S)
    # A scheduler may look for work without a pause.
    uses = [use for use in watch.uses() if use.role not in (processor_use.SCHEDULER, processor_use.OTHER)]
    if found := processor_use.limit(uses):
        yield Finding("server", "processor", "warning", found.message, found.fix)
    else:
        busiest = max((use.busiest for use in uses), default=0.0)
        yield Finding("server", "processor", "ok", f"its busiest thread has {busiest:.0%} of a core")


async def _takes_images(engine: "RemoteEngine") -> bool | None:
    """What the server says of its model: `ghostvis serve` on its card, SGLang in /model_info, others nowhere."""
    from ghostvis_cli.engines.connection import Connection, now

    if engine.server.kind == "ghostvis":
        return engine.info.image_tokens > 0
    if engine.server.kind == "sglang":
        connection = Connection(engine.settings)
        try:
            with suppress(GhostvisError, ValueError, AttributeError):  # not there, no JSON, no object
                about = json.loads(await connection.get("/model_info", now() + PROBE_S))
                known = about.get("has_image_understanding")
                return known if isinstance(known, bool) else None
        finally:
            await connection.aclose()
    return None
