"""Options that several commands share, and how what was typed becomes a profile.

An option that was not typed leaves its key to environment and profile. The defaults themselves live in the
dataclasses of profile/settings.py and engines/base.py.
"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghostvis_cli.cli import guard, output
from ghostvis_cli.engines.base import Sampling
from ghostvis_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ghostvis_cli.profile import Resolved
    from ghostvis_cli.profile.readers import Reader

LONGEST_TIMEOUT_S = 1e8  # three years; the system's timer takes no infinity
_DEFAULT = Sampling()


def _default(name: str) -> str:
    return f"default {getattr(_DEFAULT, name)}"


# --- which model

Source = Annotated[
    str | None,
    typer.Option("--source", metavar="SOURCE", help="Checkpoint source: sft, mid, rl, base, or demo."),
]
ModelTag = Annotated[
    str | None,
    typer.Option("--model-tag", "-g", metavar="TAG", help="Tag, such as d32 (default: the largest)."),
]
Step = Annotated[
    int | None, typer.Option("--step", metavar="N", min=0, help="Training step (default: the newest).")
]
CheckpointPath = Annotated[
    str | None,
    typer.Option(
        "--checkpoint-path",
        metavar="PATH",
        help="A model_*.pt file, or a directory: of some, or in Hugging Face's format.",
    ),
]
BaseDir = Annotated[
    str | None,
    typer.Option(
        "--base-dir",
        metavar="DIR",
        help="Where training wrote (default: NANOCHAT_BASE_DIR, else ~/.cache/nanochat).",
    ),
]
LayoutOption = Annotated[
    str | None,
    typer.Option(
        "--layout",
        metavar="LAYOUT",
        help="Where image rows go: auto, inline, prepend, prepend_slots, prepend_literal.",
    ),
]

ImagesBackground = Annotated[
    str | None,
    typer.Option(
        "--images-background",
        metavar="COLOUR",
        help="What shows where an image is transparent: white (default), black, grey, #rrggbb.",
    ),
]

# --- how to run it

Profile = Annotated[
    str | None,
    typer.Option("--profile", "-p", metavar="NAME", help="Named settings; see ghostvis profile list."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any profile key, e.g. sampling.top_k=20."),
]
BaseUrl = Annotated[
    str | None, typer.Option("--base-url", metavar="URL", help="A running OpenAI-compatible server to use.")
]
EngineKind = Annotated[
    str | None, typer.Option("--engine", metavar="KIND", help="auto, local, sglang or remote.")
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="TYPE", help="auto, float32, bfloat16 or float16.")
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel-size", metavar="N", min=1, help="Devices to spread the model over (SGLang)."
    ),
]
GpuMemory = Annotated[
    float | None,
    typer.Option("--gpu-memory-utilization", metavar="X", help="Share of GPU memory to take (SGLang)."),
]

DataParallel = Annotated[
    int | None,
    typer.Option("--data-parallel-size", metavar="N", min=1, help="Copies of the model (SGLang)."),
]
ContextLength = Annotated[
    int | None,
    typer.Option("--context-length", metavar="N", help="Longest prompt and answer together (SGLang)."),
]
SchedulePolicy = Annotated[
    str | None,
    typer.Option(
        "--schedule-policy",
        metavar="NAME",
        help="lpm (shared prefixes first), fcfs, random, dfs-weight, lof (SGLang).",
    ),
]
AttentionBackend = Annotated[
    str | None,
    typer.Option("--attention-backend", metavar="NAME", help="fa3, flashinfer, triton... (SGLang)."),
]

# --- how to choose tokens

MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", metavar="N", help=f"Most tokens in an answer ({_default('max_tokens')})."),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", "-t", metavar="X", help=f"0 takes the likeliest ({_default('temperature')})."
    ),
]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="X", help=f"Nucleus mass ({_default('top_p')}).")
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", "-k", metavar="N", help=f"Likeliest tokens kept; 0: all ({_default('top_k')})."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", metavar="X", help=f"Least share of the likeliest ({_default('min_p')})."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", metavar="X", help=f"Above 1 discourages ({_default('repetition_penalty')})."
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same answer.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End the answer before this text. Repeatable."),
]
System = Annotated[
    str | None,
    typer.Option("--system", "-s", metavar="TEXT", help="Instructions put before the first message."),
]

# --- how to talk

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More on stderr; tracebacks with errors.")]
Color = Annotated[str, typer.Option("--color", metavar="WHEN", help="auto, always or never.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

# --- how to be run by others: shells, cron, systemd

Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout", metavar="SECONDS", help="End after this long, loading included, with code 124."
    ),
]
Lock = Annotated[
    str | None,
    typer.Option(
        "--lock",
        metavar="FILE|auto",
        help="Refuse with code 10 while another run holds FILE; auto: this command line.",
    ),
]
LogFile = Annotated[
    str | None,
    typer.Option("--log-file", metavar="FILE", help="Append stderr to FILE too, each line with the time."),
]

KEYS = {
    "source": "model.source",
    "model_tag": "model.model_tag",
    "step": "model.step",
    "checkpoint_path": "model.checkpoint_path",
    "checkpoint": "model.checkpoint_path",  # convert's argument
    "base_dir": "model.base_dir",
    "layout": "model.layout",
    "images_background": "images.background",
    "engine": "engine.kind",
    "base_url": "engine.base_url",
    "device": "engine.device",
    "dtype": "engine.dtype",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "data_parallel_size": "engine.data_parallel_size",
    "context_length": "engine.context_length",
    "schedule_policy": "engine.schedule_policy",
    "attention_backend": "engine.attention_backend",
    "max_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "min_p": "sampling.min_p",
    "repetition_penalty": "sampling.repetition_penalty",
    "seed": "sampling.seed",
    "stop": "sampling.stop",
    "logprobs": "sampling.logprobs",
    "ignore_eos": "sampling.ignore_eos",
    "system": "system",
}


def was_typed(ctx: typer.Context, name: str) -> bool:
    """By where the value is from. The value can't tell: an option that may be repeated is () if it was not."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def flags(ctx: typer.Context) -> dict[str, Any]:
    """The settings that were typed as options of their own, by their keys."""
    return {KEYS[name]: value for name, value in ctx.params.items() if name in KEYS and was_typed(ctx, name)}


def resolve_profile(
    ctx: typer.Context, readers: "Iterable[Reader] | None" = None, *, several: bool = False
) -> "Resolved":
    """The profile of this call: what was typed over the environment over the chosen profile over defaults.

    What its engine does not read is refused, or told of where a profile says it. A command that knows only later
    what runs the model, or runs none, gives () for the readers and calls `heed` itself.
    """
    from ghostvis_cli.profile import resolve

    chosen, sets = ctx.params.get("profile"), ctx.params.get("sets") or ()
    resolved = resolve(chosen, flags=flags(ctx), sets=sets, several=several)
    for line in resolved.notices:
        output.notice(line)
    for file in resolved.files:
        output.detail(f"profile read from {file}")
    heed(resolved, (resolved.profile.engine.chosen_kind,) if readers is None else readers)
    return resolved


def heed(resolved: "Resolved", readers: "Iterable[Reader]", *, option: str = "--engine") -> None:
    """Refuse or tell of the settings that none of these reads."""
    from ghostvis_cli.profile.readers import heeded

    if readers := tuple(readers):
        for line in heeded(resolved, readers, option=option).notices[len(resolved.notices) :]:
            output.notice(line)


def talk(quiet: bool, verbose: bool, color: str) -> None:
    """Set how this run speaks, before anything is said."""
    if color not in ("auto", "always", "never"):
        raise typer.BadParameter("--color is auto, always or never")
    output.configure(quiet=quiet, verbose=verbose, color=color)  # type: ignore[arg-type]


def guarded(ctx: typer.Context) -> None:
    """Put --timeout, --lock and --log-file into effect, until the command's context closes."""
    timeout_s = ctx.params.get("timeout")
    if timeout_s is not None and not 0 < timeout_s < LONGEST_TIMEOUT_S:
        raise UsageError("--timeout is a number of seconds above 0")
    guard.start(ctx, timeout_s=timeout_s, lock=ctx.params.get("lock"), log_file=ctx.params.get("log_file"))
