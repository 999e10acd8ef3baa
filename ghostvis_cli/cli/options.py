"""Options that several commands share, and how what was typed becomes a profile.

An option that was not typed leaves its key to environment and profile. The defaults themselves live in the
dataclasses of profile/settings.py and engines/base.py.
"""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghostvis_cli.cli import guard, output
from ghostvis_cli.errors import UsageError
from ghostvis_cli.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ghostvis_cli.profile import Resolved
    from ghostvis_cli.profile.readers import Reader

LONGEST_TIMEOUT_S = 1e8  # three years; the system's timer takes no infinity
_DEFAULT = Sampling()


def _option(kind: Any, *flags: str, name: str = "", default: Any = None, **about: Any) -> Parameter:
    """An option, named after its first flag. One that was not typed is None, or False."""
    default = False if kind is bool else default
    kind = kind if default is not None else kind | None
    name = name or flags[0].removeprefix("--").replace("-", "_")
    annotated = Annotated[kind, typer.Option(*flags, **about)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotated)


def _default(name: str) -> str:
    return f"default {getattr(_DEFAULT, name)}"


# --- which model

BASE_DIR = _option(
    str,
    "--base-dir",
    metavar="DIR",
    help="Where training wrote (default: NANOCHAT_BASE_DIR, else ~/.cache/nanochat).",
)
HF = _option(str, "--hf", metavar="OWNER/NAME", help="A model of a hub: OWNER/NAME[@REVISION][:PATH].")
MODEL = (
    _option(str, "--source", metavar="SOURCE", help="Checkpoint source: sft, mid, rl, base, or demo."),
    _option(str, "--model-tag", "-g", metavar="TAG", help="Tag, such as d32 (default: the largest)."),
    _option(int, "--step", metavar="N", min=0, help="Training step (default: the newest)."),
    _option(
        str,
        "--checkpoint-path",
        metavar="PATH",
        help="A model_*.pt file, or a directory: of some, or in Hugging Face's format.",
    ),
    HF,
    BASE_DIR,
    _option(
        str,
        "--layout",
        metavar="LAYOUT",
        help="Where image rows go: auto, inline, prepend, prepend_slots, prepend_literal.",
    ),
)
IMAGES_BACKGROUND = _option(
    str,
    "--images-background",
    metavar="COLOUR",
    help="What shows where an image is transparent: white (default), black, grey, #rrggbb.",
)

# --- how to run it

PROFILE = (
    _option(str, "--profile", "-p", metavar="NAME", help="Named settings; see ghostvis profile list."),
    _option(
        list[str], "--set", name="sets", metavar="KEY=VALUE", help="Any profile key, e.g. sampling.top_k=20."
    ),
)
BASE_URL = _option(str, "--base-url", metavar="URL", help="A running OpenAI-compatible server to use.")
ENGINE = (
    _option(str, "--engine", metavar="KIND", help="auto, local, sglang or remote."),
    _option(str, "--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps."),
    _option(str, "--dtype", metavar="TYPE", help="auto, float32, bfloat16 or float16."),
)
ANY_ENGINE = (*ENGINE, BASE_URL)
GPUS = (
    _option(
        int, "--tensor-parallel-size", metavar="N", min=1, help="Devices to spread the model over (SGLang)."
    ),
    _option(float, "--gpu-memory-utilization", metavar="X", help="Share of GPU memory to take (SGLang)."),
)
SGLANG = (
    _option(int, "--data-parallel-size", metavar="N", min=1, help="Copies of the model (SGLang)."),
    _option(int, "--context-length", metavar="N", help="Longest prompt and answer together (SGLang)."),
    _option(
        str,
        "--schedule-policy",
        metavar="NAME",
        help="lpm (shared prefixes first), fcfs, random, dfs-weight, lof (SGLang).",
    ),
    _option(str, "--attention-backend", metavar="NAME", help="fa3, flashinfer, triton... (SGLang)."),
)

# --- how to choose tokens

SERVED_SAMPLING = (
    _option(int, "--max-tokens", metavar="N", help=f"Most tokens in an answer ({_default('max_tokens')})."),
    _option(
        float, "--temperature", "-t", metavar="X", help=f"0 takes the likeliest ({_default('temperature')})."
    ),
    _option(float, "--top-p", metavar="X", help=f"Nucleus mass ({_default('top_p')})."),
    _option(int, "--top-k", "-k", metavar="N", help=f"Likeliest tokens kept; 0: all ({_default('top_k')})."),
)
SAMPLING = (
    *SERVED_SAMPLING,
    _option(float, "--min-p", metavar="X", help=f"Least share of the likeliest ({_default('min_p')})."),
    _option(
        float,
        "--repetition-penalty",
        metavar="X",
        help=f"Above 1 discourages ({_default('repetition_penalty')}).",
    ),
    _option(int, "--seed", metavar="N", help="The same seed gives the same answer."),
    _option(list[str], "--stop", metavar="TEXT", help="End the answer before this text. Repeatable."),
)
SYSTEM = _option(str, "--system", "-s", metavar="TEXT", help="Instructions put before the first message.")

# --- how to talk

JSON = _option(bool, "--json", help="One JSON object on stdout.")
TALK = (
    _option(bool, "--quiet", "-q", help="Only errors on stderr."),
    _option(bool, "--verbose", "-v", help="More on stderr; tracebacks with errors."),
    _option(str, "--color", metavar="WHEN", help="auto, always or never.", default="auto"),
)

# --- how to be run by others: shells, cron, systemd

LOG_FILE = _option(
    str, "--log-file", metavar="FILE", help="Append stderr to FILE too, each line with the time."
)
GUARD = (
    _option(
        float, "--timeout", metavar="SECONDS", help="End after this long, loading included, with code 124."
    ),
    _option(
        str,
        "--lock",
        metavar="FILE|auto",
        help="Refuse with code 10 while another run holds FILE; auto: this command line.",
    ),
    LOG_FILE,
)

# What programs that run others want of a command.
SCRIPTED = (*PROFILE, JSON, *GUARD)

KEYS = {
    **{option.name: f"model.{option.name}" for option in MODEL},
    **{option.name: f"engine.{option.name}" for option in (*ENGINE, *GPUS, *SGLANG, BASE_URL)},
    **{option.name: f"sampling.{option.name}" for option in SAMPLING},
    "checkpoint": "model.checkpoint_path",  # convert's argument
    "images_background": "images.background",
    "engine": "engine.kind",
    "logprobs": "sampling.logprobs",
    "ignore_eos": "sampling.ignore_eos",
    "system": "system",
}


def shared(
    *groups: Parameter | tuple[Parameter, ...],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options and those of `TALK` after its own, and set how it speaks before it runs.

    All are in the context's `params`. A handler gets those that it names itself, as keywords without a default; an
    option that it declares with a default takes the place of the shared one of that name.
    """
    options = [
        each for group in (*groups, TALK) for each in (group if isinstance(group, tuple) else (group,))
    ]

    def with_options(handler: Callable[..., None]) -> Callable[..., None]:
        named = signature(handler, eval_str=True)
        own = [p for p in named.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        added = [option for option in options if option.name not in {each.name for each in own}]

        @wraps(handler)
        def command(**given: Any) -> None:
            _talk(given["quiet"], given["verbose"], given["color"])
            handler(**{name: given[name] for name in named.parameters})

        vars(command)["__signature__"] = named.replace(parameters=[*own, *added])
        return command

    return with_options


def was_typed(ctx: typer.Context, name: str) -> bool:
    """By where the value is from. The value can't tell: an option that may be repeated is () if it was not."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def flags(ctx: typer.Context) -> dict[str, Any]:
    """The settings that were typed as options of their own, by their keys."""
    return {KEYS[name]: value for name, value in ctx.params.items() if name in KEYS and was_typed(ctx, name)}


def read_profile(ctx: typer.Context, *, several: bool = False) -> "Resolved":
    """The profile of this call, nothing told yet. UsageError where it can't be."""
    from ghostvis_cli.profile import resolve

    chosen, sets = ctx.params.get("profile"), ctx.params.get("sets") or ()
    return resolve(chosen, flags=flags(ctx), sets=sets, several=several)


def resolve_profile(
    ctx: typer.Context, readers: "Iterable[Reader] | None" = None, *, several: bool = False
) -> "Resolved":
    """The profile of this call: what was typed over the environment over the chosen profile over defaults.

    What its engine does not read is refused, or told of where a profile says it. A command that knows only later
    what runs the model, or runs none, gives () for the readers and calls `heed` itself.
    """
    resolved = read_profile(ctx, several=several)
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


def _talk(quiet: bool, verbose: bool, color: str) -> None:
    if color not in ("auto", "always", "never"):
        raise typer.BadParameter("--color is auto, always or never")
    output.configure(quiet=quiet, verbose=verbose, color=color)  # type: ignore[arg-type]


def guarded(ctx: typer.Context) -> None:
    """Put --timeout, --lock and --log-file into effect, until the command's context closes."""
    timeout_s = ctx.params.get("timeout")
    if timeout_s is not None and not 0 < timeout_s < LONGEST_TIMEOUT_S:
        raise UsageError("--timeout is a number of seconds above 0")
    guard.start(ctx, timeout_s=timeout_s, lock=ctx.params.get("lock"), log_file=ctx.params.get("log_file"))
