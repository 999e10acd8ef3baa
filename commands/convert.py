"""`ghostvis convert`: a training checkpoint becomes a directory that SGLang, vLLM and transformers load."""

import re
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghostvis_cli import address_space, endings, sizes
from ghostvis_cli.cli import options, output
from ghostvis_cli.cli.options import option
from ghostvis_cli.errors import EngineError, UsageError, installed
from ghostvis_cli.version import SCHEMA_VERSION

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.locate import Checkpoint
    from ghostvis_cli.convert.plan import ConvertSettings, Plan
    from ghostvis_cli.profile import Profile

app = typer.Typer(rich_markup_mode=None)
EXAMPLES = """Examples:

  ghostvis convert --source sft --model-tag d32 --out d32-hf

  ghostvis convert model_000650.pt --out vlm-hf --layout inline --dtype float32

  ghostvis convert --source demo --dry-run
"""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", re.IGNORECASE)


@app.command(epilog=EXAMPLES)
@options.takes(
    option(Path, "--out -o DIR", "The directory to make."),
    option(
        str,
        "--dtype TYPE",
        "Of the written weights: bfloat16, float16 or float32.",
        name="weights_dtype",
        default="bfloat16",
    ),
    option(str, "--max-shard-size SIZE", "Most bytes in a file of weights.", default="5GB"),
    option(bool, "--force", "Replace DIR, if an earlier convert made it."),
    option(
        bool,
        "--verify/--no-verify",
        "Compare answers with the checkpoint's before anything is replaced.",
        default=True,
    ),
    option(
        bool,
        "--verify-by-layer",
        "Verify in little memory, as is done by itself where both models don't fit.",
        name="by_layer",
    ),
    option(bool, "--dry-run", "Write nothing: list the tensors and their sizes."),
    options.MODEL,
    options.SCRIPTED,
)
def convert(
    ctx: typer.Context,
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[CHECKPOINT]", help="As --checkpoint-path.")
    ] = None,
    *,
    out: Path | None,
    verify: bool,
    by_layer: bool,
    dry_run: bool,
    checkpoint_path: str | None,
    json: bool,
) -> None:
    """Convert a training checkpoint for SGLang, vLLM and transformers."""
    options.guarded(ctx)  # before torch is imported, which takes seconds
    address_space.require_for_torch()
    from ghostvis_cli.convert.plan import make_plan

    if checkpoint is not None and checkpoint_path is not None:
        raise UsageError("the checkpoint is named twice", hint="leave out --checkpoint-path")
    if out is None and not dry_run:
        raise UsageError("where to?", hint="--out DIR, or --dry-run")
    resolved = options.resolve_profile(ctx, ())
    settings = _settings(ctx.params, resolved.profile)
    if by_layer and not verify:
        raise UsageError("--verify-by-layer and --no-verify contradict each other", hint="leave one out")
    plan = make_plan(_chosen(resolved.profile), settings)
    output.notices(plan.notices)
    if dry_run or out is None:
        _show_plan(plan, json=json)
        return
    if verify:
        plan = _prepared_to_verify(plan)
    certificate = endings.run(_run(plan, out))
    output.notice(_summary(certificate))
    if json:
        output.record({"schema_version": SCHEMA_VERSION, "path": str(out), "parity": certificate})
    else:
        output.answer(f"{out}\n")


def _chosen(profile: "Profile") -> "Checkpoint":
    """The checkpoint to convert. The demo model only where it was asked for."""
    from ghostvis_cli.checkpoint.choose import DEMO_SOURCE, choose_checkpoint, is_chosen

    checkpoint, notices = choose_checkpoint(profile.model, report=output.notice)
    if checkpoint.source == DEMO_SOURCE and not is_chosen(profile.model):
        raise UsageError(
            "no checkpoint was named and there is no base directory",
            hint="ghostvis convert CHECKPOINT --out DIR; --source demo is the built-in one",
        )
    output.notices(notices)
    return checkpoint


def _settings(typed: dict[str, Any], profile: "Profile") -> "ConvertSettings":
    from ghostvis_cli.convert.plan import ConvertSettings

    if (dtype := typed["weights_dtype"]) not in ("bfloat16", "float16", "float32"):
        raise UsageError(f"no dtype named {dtype!r}", hint="--dtype bfloat16, float16 or float32")
    return ConvertSettings(
        dtype=dtype,
        layout=None if profile.model.layout == "auto" else profile.model.layout,
        max_shard_bytes=parse_size(typed["max_shard_size"]),
        **{name: typed[name] for name in ("force", "verify", "by_layer")},
    )


def parse_size(text: str) -> int:
    """ "5GB", "500 MB", "1.5GiB" -> bytes."""
    match = SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--max-shard-size {text!r} is not a size", hint="--max-shard-size 5GB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2].upper())))


def _prepared_to_verify(plan: "Plan") -> "Plan":
    """Refuse now what would fail after minutes of writing."""
    from importlib.util import find_spec

    from ghostvis_cli.convert.memory import fitted
    from ghostvis_cli.machine import read_memory

    if find_spec("transformers") is None:
        raise EngineError(
            "verification needs transformers, which is not installed",
            hint="pip install 'ghostvis-cli[convert]', or --no-verify",
        )
    memory = read_memory()
    plan, told = fitted(plan, memory.available_bytes if memory else inf)
    if told:
        output.notice(told)
    return plan


def _summary(certificate: dict[str, Any]) -> str:
    verification = certificate["verification"]
    made = f"{certificate['architecture']}, {sizes.shown(certificate['weights_bytes'])} as {certificate['dtype']}"
    if verification["skipped"]:
        return f"{made}; not verified"
    figures = {check["name"]: check["value"] for check in verification["checks"]}
    greedy = "greedy tokens not checked"
    if verification["mode"] == "whole":
        matched = sum(case["greedy_match"] for case in verification["cases"])
        asked = sum(case["greedy_tokens"] for case in verification["cases"])
        greedy = f"{matched} of {asked} greedy tokens"
    return (
        f"{made}; verified: max |logit difference| {figures['max |logit difference|']:.2g}, "
        f"top-1 agreement {figures['top-1 agreement']:.1%}, {greedy}"
    )


async def _run(plan: "Plan", out: Path) -> dict[str, Any]:
    """Convert in a thread, so that progress can be told and a signal ends it."""
    from ghostvis_cli.convert import run
    from ghostvis_cli.threads import in_daemon_thread

    progress = run.Progress(plan.weights_bytes)
    try:
        with installed("convert", "convert"):
            async with output.progress(progress.line):
                return await in_daemon_thread(partial(run.run, plan, out, progress), "ghostvis-convert")
    finally:
        progress.cancelled.set()


def _show_plan(plan: "Plan", *, json: bool) -> None:
    from ghostvis_cli.convert.shards import ITEMSIZE

    size = ITEMSIZE[plan.settings.dtype]
    rows = [
        (shard.name, target, ", ".join(target.sources) or "-", target.numel * size)
        for shard in plan.shards
        for target in shard.targets
    ]
    if json:
        tensors = [
            {
                "file": file,
                "name": target.name,
                "shape": list(target.shape),
                "change": target.change,
                "sources": list(target.sources),
                "bytes": nbytes,
            }
            for file, target, _, nbytes in rows
        ]
        output.record(
            {
                "schema_version": SCHEMA_VERSION,
                "architecture": plan.architecture,
                "dtype": plan.settings.dtype,
                "layout": plan.layout,
                "bytes": plan.weights_bytes,
                "tensors": tensors,
            }
        )
        return
    headers = ("TENSOR", "SHAPE", "CHANGE", "FROM", "SIZE")
    output.table(
        headers,
        [
            (target.name, "x".join(map(str, target.shape)), target.change, names, sizes.shown(nbytes))
            for _, target, names, nbytes in rows
        ],
    )
    output.notice(
        f"{plan.architecture}: {len(rows)} tensors in {len(plan.shards)} files, "
        f"{sizes.shown(plan.weights_bytes)} as {plan.settings.dtype}"
    )
