"""`ghostvis serve`: an OpenAI-compatible server for one model."""

import asyncio
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from ghostvis_cli.addresses import is_host
from ghostvis_cli.cli import options, output
from ghostvis_cli.cli.options import option
from ghostvis_cli.errors import UsageError, installed
from ghostvis_cli.serve.settings import Served, ServerSettings, SGLangSettings
from ghostvis_cli.version import SCHEMA_VERSION

if TYPE_CHECKING:
    from ghostvis_cli.profile import Profile, Resolved
    from ghostvis_cli.sglang.probe import About

app = typer.Typer(rich_markup_mode=None)
DEFAULT = ServerSettings
SGLANG_DEFAULT = SGLangSettings
WITH_SGLANG = "--engine sglang"
MIB = 2**20
EXAMPLES = """Examples:

  ghostvis serve --source sft --model-tag d32

  ghostvis serve --engine sglang --tensor-parallel-size 2 --restart on-failure -- --chunked-prefill-size 2048

  ghostvis serve --engine local --source sft --model-tag d32 --port 0

  GHOSTVIS_API_KEY=... ghostvis serve --host 0.0.0.0

SGLang serves where it can be used, else the local engine. The address is the first line on stdout, once requests
are answered.
"""


@app.command(epilog=EXAMPLES)
@options.takes(
    option(
        str, "--host ADDRESS", f"Address to listen on ({DEFAULT.host}); beyond this machine only with a key."
    ),
    option(int, "--port N", f"Port; 0 takes a free one ({DEFAULT.port}).", min=0, max=65535),
    option(str, "--api-key-env NAME", "Variable that holds the key (GHOSTVIS_API_KEY)."),
    option(
        list[str], "--served-model-name NAME", "The model's name in the API (its tag). Repeatable: aliases."
    ),
    option(list[str], "--allow-image-host HOST", "Fetch images from this host too. Repeatable."),
    option(
        list[str],
        "--cors-origin ORIGIN",
        "Let web pages of this origin in besides this machine's, as https://a.example. Repeatable.",
    ),
    option(
        list[str],
        "--allowed-host NAME",
        "Answer requests for this host name too; without a key only this machine's. Repeatable.",
    ),
    option(
        float,
        "--max-body-mb MIB",
        f"Largest body, MiB ({DEFAULT.max_body_bytes // MIB}).",
        min=0.001,
        max=1_000_000,
    ),
    option(
        int, "--max-waiting N", f"Requests taken in at once; more get 429 ({DEFAULT.max_waiting}).", min=1
    ),
    option(
        float,
        "--drain-timeout SECONDS",
        f"Seconds that requests may take to finish ({DEFAULT.drain_timeout_s:g}).",
        name="drain_timeout_s",
        min=0,
    ),
    option(
        float,
        "--ready-timeout SECONDS",
        f"Seconds until SGLang must be ready ({SGLANG_DEFAULT.ready_timeout_s:g}).",
        name="ready_timeout_s",
        min=1,
    ),
    option(str, "--restart WHEN", "on-failure: start SGLang again when it ends by itself; no (the default)."),
    options.MODEL,
    options.IMAGES_BACKGROUND,
    options.SERVED_SAMPLING,
    options.ENGINE,
    options.GPUS,
    options.SGLANG,
    options.PROFILE,
    options.JSON,
    options.LOG_FILE,
)
def serve(
    ctx: typer.Context,
    sglang_options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- SGLANG OPTIONS]", help="Passed to SGLang as they are.")
    ] = None,
    *,
    json: bool,
) -> None:
    """Serve a model over OpenAI's routes. Sampling options are the defaults of requests that name none."""
    resolved, typed = options.resolve_profile(ctx, ()), ctx.params
    kind = _kind(resolved.profile)
    options.heed(resolved, ("local server",) if kind == "local" else ("sglang server",))
    if typed["log_file"] is not None:
        output.log_to(Path(typed["log_file"]), ctx.command_path)
    settings = _settings(resolved, typed)
    for_sglang = {"ready_timeout_s": typed["ready_timeout_s"], "restart": typed["restart"]}
    for_sglang |= {"options": tuple(sglang_options or ())}
    of_sglang = {name: value for name, value in for_sglang.items() if value}
    if kind == "local":
        if of_sglang:
            raise UsageError(
                "--ready-timeout, --restart and options after -- are for SGLang", hint=WITH_SGLANG
            )
        _log_to_stderr(typed["quiet"], typed["verbose"])
        raise typer.Exit(asyncio.run(_serve(resolved.profile, settings, json=json)))
    for name, flag in (("max_body_mb", "--max-body-mb"), ("max_waiting", "--max-waiting")):
        if typed[name] is not None:
            raise UsageError(f"{flag} is for the local engine", hint="-- --max-queued-requests N, or a proxy")
    raise typer.Exit(_serve_sglang(resolved.profile, settings, SGLangSettings(**of_sglang), json=json))


def _settings(resolved: "Resolved", typed: dict[str, Any]) -> ServerSettings:
    """The server's settings: what was typed over the defaults, and what the profile says."""
    profile = resolved.profile
    given = {name: typed[name] for name in ("host", "port", "max_waiting", "drain_timeout_s")}
    if typed["max_body_mb"] is not None:
        given["max_body_bytes"] = int(typed["max_body_mb"] * MIB)
    name, *aliases = typed["served_model_name"] or (None,)
    return ServerSettings(
        **{name: value for name, value in given.items() if value is not None},
        served_model_name=name,
        aliases=tuple(aliases),
        api_key=_api_key(profile, typed["api_key_env"]),
        allowed_image_hosts=_hosts("--allow-image-host", typed["allow_image_host"]),
        allowed_hosts=_hosts("--allowed-host", typed["allowed_host"]),
        cors_origins=tuple(map(_origin, typed["cors_origin"] or ())),
        image_limits=profile.images,
        sampling=profile.sampling,
        max_tokens=profile.sampling.max_tokens if resolved.chose("sampling.max_tokens") else None,
    )


def _kind(profile: "Profile") -> Literal["local", "sglang"]:
    """What serves: the engine that was asked for, else SGLang where it can be used. Tells which."""
    from ghostvis_cli.sglang import runtime

    engine = profile.engine
    match engine.kind if engine.base_url is None or engine.kind != "auto" else "remote":
        case "remote":
            raise UsageError("serve runs a model itself, and the engine is remote", hint="--engine local")
        case "local":
            return "local"
        case "sglang":
            version = runtime.require(device=engine.device)
        case _:
            if reason := runtime.why_not(device=engine.device):
                output.notice(f"serving with the local engine: {reason}")
                return "local"
            version = runtime.require(device=engine.device)
    output.notice(f"serving with SGLang {version}")
    return "sglang"


def _api_key(profile: "Profile", variable: str | None) -> str | None:
    from ghostvis_cli.profile import read_api_key

    engine = profile.engine
    if variable is not None:
        engine = replace(engine, api_key_env=variable, api_key_file=None)
    return read_api_key(engine)


def _hosts(option: str, names: list[str] | None) -> tuple[str, ...]:
    """Host names as they are compared. One that no request can have is refused, since it would never match."""
    for name in names or ():
        if not is_host(name):
            raise UsageError(f"{option} {name!r} is not a host's name", hint=f"{option} box.example")
    return tuple(name.removeprefix("[").removesuffix("]").rstrip(".").lower() for name in names or ())


def _origin(text: str) -> str:
    from ghostvis_cli.serve.settings import origin_of

    try:
        return origin_of(text)
    except ValueError as error:
        message = f"--cors-origin {text!r} is not an origin"
        raise UsageError(message, hint="--cors-origin https://app.example:8443") from error


def _log_to_stderr(quiet: bool, verbose: bool) -> None:
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(
        stream=sys.stderr, level=max(level, logging.WARNING), format="%(asctime)s %(message)s"
    )
    logging.getLogger("ghostvis").setLevel(level)


def _announce(url: str, model: str, context_tokens: int | None, *, engine: str, json: bool) -> None:
    """Print the line on stdout that says, for every engine, that requests are answered now."""
    if not json:
        output.answer(f"{url}\n")
        return
    record = {"url": url, "port": urlsplit(url).port, "pid": os.getpid(), "engine": engine}
    record |= {"model": model, "context_tokens": context_tokens}
    output.record({"schema_version": SCHEMA_VERSION, **record})


async def _serve(profile: "Profile", settings: ServerSettings, *, json: bool) -> int:
    with installed("the server", "local,serve"):
        from ghostvis_cli.serve import local_server
    from ghostvis_cli.engines.factory import make_engine

    started_s = time.perf_counter()

    async def load() -> Served:
        engine = await make_engine(profile, report=output.notice)
        return Served(engine, engine.tokenizer)

    def on_bound(url: str) -> None:
        output.notice(f"{url} is taken; loading the model")

    def on_ready(url: str, served: Served) -> None:
        info = served.engine.info
        output.notices(info.notices)
        loaded_s = time.perf_counter() - started_s
        output.notice(f"ready after {loaded_s:.1f} s: {served.name(settings)} on {info.device}, {info.dtype}")
        _announce(url, served.name(settings), info.context_tokens, engine="local", json=json)

    return await local_server.serve(settings, load, on_bound=on_bound, on_ready=on_ready)


def _serve_sglang(profile: "Profile", settings: ServerSettings, sglang: SGLangSettings, *, json: bool) -> int:
    """Check port, plug-in and directory in this order, the cheapest first."""
    from ghostvis_cli.convert import cache
    from ghostvis_cli.convert.directory import tag
    from ghostvis_cli.serve.listen import free_port
    from ghostvis_cli.sglang import runtime, server
    from ghostvis_cli.sglang.log import is_notable, shortened
    from ghostvis_cli.sglang.plugin import check

    settings = replace(settings, port=free_port(settings))
    check()
    dtype = runtime.weights_dtype(profile)
    directory = cache.for_model(profile.model, dtype, report=output.notice)
    name = settings.served_model_name or tag(directory)
    admin_key = os.environ.get(server.ADMIN_VARIABLE) or None
    launch = server.Launch(profile, directory, name, settings, sglang, admin_key)
    started_s = time.perf_counter()

    def on_ready(url: str, about: "About") -> None:
        took_s = time.perf_counter() - started_s
        context = f"context {about.context_tokens} tokens, " if about.context_tokens else ""
        output.notice(f"ready after {took_s:.1f} s: {about.model} at {url}, {context}{dtype}")
        _announce(url, about.model, about.context_tokens, engine="sglang", json=json)

    def on_line(line: str) -> None:
        output.child_line(line if output.verbose() else shortened(line), notable=is_notable(line))

    return asyncio.run(server.serve(launch, on_line=on_line, on_ready=on_ready, on_notice=output.notice))
