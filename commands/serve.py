"""`ghostvis serve`: an OpenAI-compatible server for one model."""

import asyncio
import logging
import os
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from ghostvis_cli.cli import options, output
from ghostvis_cli.errors import EngineError, UsageError
from ghostvis_cli.serve.settings import Served, ServerSettings

if TYPE_CHECKING:
    from ghostvis_cli.profile import Profile

app = typer.Typer(rich_markup_mode=None)
DEFAULT = ServerSettings
MIB = 2**20
EXAMPLES = """Examples:

  ghostvis serve --engine local

  ghostvis serve --engine local --source sft --model-tag d32 --port 0

  GHOSTVIS_API_KEY=... ghostvis serve --engine local --host 0.0.0.0

The address is the first line on stdout. /readyz says 200 once the model is loaded and warm.
"""


@app.command(epilog=EXAMPLES)
def serve(
    ctx: typer.Context,
    host: Annotated[
        str | None,
        typer.Option(
            "--host", help=f"Address to listen on ({DEFAULT.host}); beyond this machine only with a key."
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help=f"Port; 0 takes a free one ({DEFAULT.port})."),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option("--api-key-env", metavar="NAME", help="Variable that holds the key (GHOSTVIS_API_KEY)."),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option("--served-model-name", help="The model's name in the API (default: its tag)."),
    ] = None,
    allow_image_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-image-host", metavar="HOST", help="Fetch pictures from this host too. Repeatable."
        ),
    ] = None,
    max_body_mb: Annotated[
        float | None,
        typer.Option(
            "--max-body-mb",
            min=0.001,
            max=1_000_000,
            help=f"Largest body, MiB ({DEFAULT.max_body_bytes // MIB}).",
        ),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(
            "--max-waiting", min=1, help=f"Requests taken in at once; more get 429 ({DEFAULT.max_waiting})."
        ),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            "--drain-timeout",
            min=0,
            help=f"Seconds that requests may take to finish ({DEFAULT.drain_timeout_s:g}).",
        ),
    ] = None,
    source: options.Source = None,
    model_tag: options.ModelTag = None,
    step: options.Step = None,
    checkpoint_path: options.CheckpointPath = None,
    base_dir: options.BaseDir = None,
    layout: options.LayoutOption = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    engine: options.EngineKind = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    tensor_parallel_size: options.TensorParallel = None,
    gpu_memory_utilization: options.GpuMemory = None,
    profile: options.Profile = None,
    sets: options.Set = None,
    json: options.JsonFlag = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Serve a model over OpenAI's routes. Sampling options are the defaults of requests that name none."""
    options.talk(quiet, verbose, color)
    chosen = options.resolve_profile(ctx).profile
    _check_engine(chosen)
    _log_to_stderr(quiet, verbose)
    typed = {
        "host": host,
        "port": port,
        "served_model_name": served_model_name,
        "max_body_bytes": None if max_body_mb is None else int(max_body_mb * MIB),
        "max_waiting": max_waiting,
        "drain_timeout_s": drain_timeout,
    }
    settings = ServerSettings(
        **{name: value for name, value in typed.items() if value is not None},  # type: ignore[arg-type]
        api_key=_api_key(chosen, api_key_env),
        allowed_image_hosts=tuple(allow_image_host or ()),
        image_limits=chosen.images,
        sampling=chosen.sampling,
    )
    raise typer.Exit(asyncio.run(_serve(chosen, settings, json=json)))


def _check_engine(profile: "Profile") -> None:
    match profile.engine.chosen_kind:
        case "remote":
            raise UsageError("serve runs a model itself, and the engine is remote", hint="--engine local")
        case "sglang":
            raise EngineError("this version can't start SGLang", hint="--engine local")


def _api_key(profile: "Profile", variable: str | None) -> str | None:
    from ghostvis_cli.profile import read_api_key

    engine = profile.engine
    if variable is not None:
        engine = replace(engine, api_key_env=variable, api_key_file=None)
    return read_api_key(engine)


def _log_to_stderr(quiet: bool, verbose: bool) -> None:
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(
        stream=sys.stderr, level=max(level, logging.WARNING), format="%(asctime)s %(message)s"
    )
    logging.getLogger("ghostvis").setLevel(level)


async def _serve(profile: "Profile", settings: ServerSettings, *, json: bool) -> int:
    try:
        from ghostvis_cli.serve import local_server
    except ModuleNotFoundError as error:
        message = f"the server needs {error.name}, which is not installed"
        raise EngineError(message, hint="pip install 'ghostvis-cli[local,serve]'") from error
    from ghostvis_cli.engines.factory import make_engine

    started_s = time.perf_counter()

    async def load() -> Served:
        # The engine belongs to no loop, so another one may make it; importing torch blocks for seconds.
        engine: Any = await local_server.in_daemon_thread(lambda: asyncio.run(make_engine(profile)))
        return Served(engine, getattr(engine, "tokenizer", None))

    def on_bound(url: str) -> None:
        if json:
            record = {"url": url, "port": urlsplit(url).port, "pid": os.getpid()}
            output.record({"schema_version": output.SCHEMA_VERSION, **record})
        else:
            output.answer(f"{url}\n")

    def on_ready(served: Served) -> None:
        info = served.engine.info
        for line in info.notices:
            output.notice(line)
        loaded_s = time.perf_counter() - started_s
        output.notice(f"ready after {loaded_s:.1f} s: {served.name(settings)} on {info.device}, {info.dtype}")

    return await local_server.serve(settings, load, on_bound=on_bound, on_ready=on_ready)
