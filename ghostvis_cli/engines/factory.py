"""Profile -> engine. Imports exactly one engine module, the one the profile asks for."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeAlias

from ghostvis_cli import demo
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.generations import Constants
from ghostvis_cli.engines.base import Engine
from ghostvis_cli.errors import EngineError, UsageError
from ghostvis_cli.paths import expanded

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.locate import Checkpoint
    from ghostvis_cli.engines.local import LocalEngine
    from ghostvis_cli.profile import ModelSettings, Profile

Report: TypeAlias = Callable[[str], None]
DEMO_SOURCE = "demo"  # beside sft, mid, rl, base: the built-in model


def _choose(model: "ModelSettings") -> "tuple[Checkpoint, list[str]]":
    """A path, else source, tag and step, else the newest sft, else (nothing chosen or found) the demo."""
    base_dir = expanded(model.base_dir) if model.base_dir else locate.default_base_dir()
    if model.checkpoint_path is not None:
        return locate.from_path(expanded(model.checkpoint_path), model.step, base_dir), []
    if model.source == DEMO_SOURCE:
        return locate.find(demo.BASE_DIR, "sft", model.model_tag, model.step), []
    chosen = any(v is not None for v in (model.base_dir, model.source, model.model_tag, model.step))
    if chosen or locate.tags(base_dir, "sft"):
        return locate.find(base_dir, model.source or "sft", model.model_tag, model.step), []
    others = [source for source in locate.SOURCE_DIRS if locate.tags(base_dir, source)]
    hint = f"; there is --source {others[-1]}" if others else ""
    return locate.find(demo.BASE_DIR, "sft", demo.MODEL_TAG), [
        f"no sft checkpoint in {base_dir}: the built-in demo model answers{hint}"
    ]


def choose_checkpoint(model: "ModelSettings") -> "tuple[Checkpoint, list[str]]":
    """The checkpoint meant, with the tokenizer meant and the constants that were set, and what to tell the user."""
    checkpoint, notices = _choose(model)
    if model.tokenizer_path is not None:
        checkpoint = replace(checkpoint, tokenizer=expanded(model.tokenizer_path))
    return replace(checkpoint, constants=constants(model)), notices


def constants(model: "ModelSettings") -> Constants:
    """Of a model's mathematics, those that were set."""
    return Constants(**{each.name: getattr(model, each.name) for each in fields(Constants)})


async def make_engine(
    profile: "Profile",
    *,
    report: Report | None = None,
    detail: Report | None = None,
    crowd: bool = False,
) -> Engine:
    """The engine a profile describes, loaded or connected.

    report takes lines for the user while that takes long (else they are among the engine's notices); detail takes
    the log of whatever it starts. crowd: a server will be asked for thousands of answers at once.
    """
    kind = profile.engine.chosen_kind
    if kind == "local":
        return await _local(profile)
    if kind == "remote":
        return await _remote(profile, crowd=crowd)
    from ghostvis_cli.engines.sglang import SGLangEngine

    return await SGLangEngine.start(profile, report=report, detail=detail)


async def _local(profile: "Profile") -> "LocalEngine":
    settings = profile.engine
    if settings.tensor_parallel_size > 1:
        raise UsageError("the local engine runs on one device", hint="--tensor-parallel-size 1")
    checkpoint, notices = choose_checkpoint(profile.model)
    try:
        from ghostvis_cli.engines.local import LocalEngine, LocalSettings
    except ModuleNotFoundError as error:
        raise EngineError(
            f"the local engine needs {error.name}, which is not installed",
            hint="pip install 'ghostvis-cli[local]'",
        ) from error
    layout = None if profile.model.layout == "auto" else profile.model.layout
    local = LocalSettings(
        device=settings.device,
        dtype=settings.dtype,
        layout=layout,
        max_batch=settings.max_batch,
        prefill_tokens=settings.prefill_tokens,
        prefix_cache_mb=settings.prefix_cache_mb,
        compile=settings.compile,
        threads=settings.threads,
    )
    engine = await LocalEngine.load(checkpoint, local)
    engine.info = replace(engine.info, notices=(*notices, *engine.info.notices))
    return engine


async def _remote(profile: "Profile", *, crowd: bool) -> Engine:
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
            crowd=crowd,
        )
    )
