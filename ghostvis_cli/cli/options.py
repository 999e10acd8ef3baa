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


def option(
    kind: Any, form: str, about: str, *, name: str = "", default: Any = None, **limits: Any
) -> Parameter:
    """An option as its help shows it: "--image -i SOURCE". One that was not typed is None, or False.

    `name` is what the command calls it, where that is not the first flag's.
    """
    flags = [word for word in form.split() if word.startswith("-")]
    metavar = " ".join(word for word in form.split() if word not in flags)
    default = False if kind is bool and default is None else default
    kind = kind if default is not None else kind | None
    name = name or flags[0].split("/")[0].removeprefix("--").replace("-", "_")
    annotated = Annotated[kind, typer.Option(*flags, metavar=metavar or None, help=about, **limits)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotated)


def _default(name: str) -> str:
    return f"default {getattr(_DEFAULT, name)}"


# --- which model

BASE_DIR = option(
    str, "--base-dir DIR", "Where training wrote (default: NANOCHAT_BASE_DIR, else ~/.cache/nanochat)."
)
HF = option(str, "--hf OWNER/NAME", "A model of a hub: OWNER/NAME[@REVISION][:PATH].")
MODEL = (
    option(str, "--source SOURCE", "Checkpoint source: sft, mid, rl, base, or demo."),
    option(str, "--model-tag -g TAG", "Tag, such as d32 (default: the largest)."),
    option(int, "--step N", "Training step (default: the newest).", min=0),
    option(
        str,
        "--checkpoint-path PATH",
        "A model_*.pt file, or a directory: of some, or in Hugging Face's format.",
    ),
    HF,
    BASE_DIR,
    option(
        str, "--layout LAYOUT", "Where image rows go: auto, inline, prepend, prepend_slots, prepend_literal."
    ),
)
IMAGES_BACKGROUND = option(
    str,
    "--images-background COLOUR",
    "What shows where an image is transparent: white (default), black, grey, #rrggbb.",
)

# --- how to run it

PROFILE = (
    option(str, "--profile -p NAME", "Named settings; see ghostvis profile list."),
    option(list[str], "--set KEY=VALUE", "Any profile key, e.g. sampling.top_k=20.", name="sets"),
)
BASE_URL = option(str, "--base-url URL", "A running OpenAI-compatible server to use.")
ENGINE = (
    option(str, "--engine KIND", "auto, local, sglang or remote."),
    option(str, "--device DEVICE", "auto, cpu, cuda, cuda:N or mps."),
    option(str, "--dtype TYPE", "auto, float32, bfloat16 or float16."),
)
ANY_ENGINE = (*ENGINE, BASE_URL)
GPUS = (
    option(int, "--tensor-parallel-size N", "Devices to spread the model over (SGLang).", min=1),
    option(float, "--gpu-memory-utilization X", "Share of GPU memory to take (SGLang)."),
)
SGLANG = (
    option(int, "--data-parallel-size N", "Copies of the model (SGLang).", min=1),
    option(int, "--context-length N", "Longest prompt and answer together (SGLang)."),
    option(
        str, "--schedule-policy NAME", "lpm (shared prefixes first), fcfs, random, dfs-weight, lof (SGLang)."
    ),
    option(str, "--attention-backend NAME", "fa3, flashinfer, triton... (SGLang)."),
)

# --- how to choose tokens

SERVED_SAMPLING = (
    option(int, "--max-tokens N", f"Most tokens in an answer ({_default('max_tokens')})."),
    option(float, "--temperature -t X", f"0 takes the likeliest ({_default('temperature')})."),
    option(float, "--top-p X", f"Nucleus mass ({_default('top_p')})."),
    option(int, "--top-k -k N", f"Likeliest tokens kept; 0: all ({_default('top_k')})."),
)
SAMPLING = (
    *SERVED_SAMPLING,
    option(float, "--min-p X", f"Least share of the likeliest ({_default('min_p')})."),
    option(float, "--repetition-penalty X", f"Above 1 discourages ({_default('repetition_penalty')})."),
    option(int, "--seed N", "The same seed gives the same answer."),
    option(list[str], "--stop TEXT", "End the answer before this text. Repeatable."),
)
SYSTEM = option(str, "--system -s TEXT", "Instructions put before the first message.")

# --- how to talk

JSON = option(bool, "--json", "One JSON object on stdout.")
TALK = (
    option(bool, "--quiet -q", "Only errors on stderr."),
    option(bool, "--verbose -v", "More on stderr; tracebacks with errors."),
    option(str, "--color WHEN", "auto, always or never.", default="auto"),
)

# --- how to be run by others: shells, cron, systemd

LOG_FILE = option(str, "--log-file FILE", "Append stderr to FILE too, each line with the time.")
GUARD = (
    option(float, "--timeout SECONDS", "End after this long, loading included, with code 124."),
    option(
        str, "--lock FILE|auto", "Refuse with code 10 while another run holds FILE; auto: this command line."
    ),
    LOG_FILE,
)

# What programs that run others want of a command.
SCRIPTED = (*PROFILE, JSON, *GUARD)
# What a command takes that asks a model.
ANSWERING = (SYSTEM, *MODEL, IMAGES_BACKGROUND, *SAMPLING, *ANY_ENGINE, *GPUS, *SCRIPTED)

KEYS = {
    **{option.name: f"model.{option.name}" for option in MODEL},
    **{option.name: f"engine.{option.name}" for option in (*ENGINE, *GPUS, *SGLANG, BASE_URL)},
    **{option.name: f"sampling.{option.name}" for option in SAMPLING},
    "checkpoint": "model.checkpoint_path",  # convert's argument
    "images_background": "images.background",
    "engine": "engine.kind",
    "logprobs": "sampling.logprobs",
    "ignore_eos": "sampling.ignore_eos",
    "regex": "sampling.regex",
    "system": "system",
}


def takes(*groups: Parameter | tuple[Parameter, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options and those of `TALK`, and set how it speaks before it runs.

    All are in the context's `params`; the handler gets those that it names, as keywords. Of two options of one name
    the first counts.
    """
    given = [each for group in (*groups, TALK) for each in (group if isinstance(group, tuple) else (group,))]
    options = {each.name: each for each in reversed(given)}
    ordered = sorted(options.values(), key=given.index)

    def with_options(handler: Callable[..., None]) -> Callable[..., None]:
        named = signature(handler, eval_str=True)
        own = [each for each in named.parameters.values() if each.kind is not each.KEYWORD_ONLY]

        @wraps(handler)
        def command(**values: Any) -> None:
            _talk(values["quiet"], values["verbose"], values["color"])
            handler(**{name: values[name] for name in named.parameters})

        vars(command)["__signature__"] = named.replace(parameters=[*own, *ordered])
        return command

    return with_options


def was_typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option was typed. Its value can't tell: a repeatable option is () where it was not."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def flags(ctx: typer.Context) -> dict[str, Any]:
    """The settings that were typed as options of their own, by their keys."""
    return {KEYS[name]: value for name, value in ctx.params.items() if name in KEYS and was_typed(ctx, name)}


def read_profile(ctx: typer.Context, *, several: bool = False) -> "Resolved":
    """The profile of this call, without telling its notices. UsageError where it has faults."""
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
    output.notices(resolved.notices)
    for file in resolved.files:
        output.detail(f"profile read from {file}")
    heed(resolved, (resolved.profile.engine.chosen_kind,) if readers is None else readers)
    return resolved


def heed(resolved: "Resolved", readers: "Iterable[Reader]", *, option: str = "--engine") -> None:
    """Refuse typed settings that none of these readers reads, and tell of those from elsewhere."""
    from ghostvis_cli.profile.readers import heeded

    if readers := tuple(readers):
        output.notices(heeded(resolved, readers, option=option).notices[len(resolved.notices) :])


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
