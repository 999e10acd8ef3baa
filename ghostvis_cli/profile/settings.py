"""What a profile may say: every setting with its type, range, default and meaning. Reads no file.

A default lives in one of these dataclasses, in `engines.base.Sampling` or in `image_limits.ImageLimits`, and
nowhere else. `keys()` lists them all; YAML, environment, --set, JSON Schema and starter file read that table.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from ghostvis_cli.addresses import root_of
from ghostvis_cli.errors import UsageError
from ghostvis_cli.image_limits import ImageLimits
from ghostvis_cli.model.config import Layout
from ghostvis_cli.sampling import Sampling

T = TypeVar("T")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")  # lower case is refused: a pasted key often is a valid name too


OF_A_HUB = "hf://"  # what a path begins with that is none: a model of a hub


def setting(
    default: T, about: str, *, low: float | None = None, high: float | None = None, is_path: bool = False
) -> T:
    """A field with its meaning. A path is relative to the file it is written in, and may begin with ~."""
    return field(default=default, metadata={"about": about, "low": low, "high": high, "is_path": is_path})


@dataclass(frozen=True)
class EngineSettings:
    """What runs the model, and where."""

    kind: Literal["auto", "local", "sglang", "remote"] = setting(
        "auto", "PyTorch in this process, SGLang in this process, or a server; auto is remote with a base_url"
    )
    base_url: str | None = setting(None, "Address of an OpenAI-compatible server, such as http://gpu-1:30000")
    api_key_env: str | None = setting(None, "Name of the environment variable that holds the server's key")
    api_key_file: str | None = setting(None, "File that holds the server's key", is_path=True)
    ca_file: str | None = setting(None, "Certificates to trust besides the system's (PEM)", is_path=True)
    model: str | None = setting(None, "Name of the served model; null is the first one the server lists")
    connect_timeout_s: float = setting(5.0, "Seconds to wait for a connection", low=0.01, high=3600)
    timeout_s: float = setting(600.0, "Seconds one request may take", low=0.01, high=604_800)
    retries: int = setting(3, "Repeats of a request the server did not take", low=0, high=100)
    device: str = setting("auto", "auto, cpu, mps, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "Type of the weights")
    max_batch: int | None = setting(
        None,
        "Sequences in one step of the local engine; null is 32, on a GPU as many as fit, to 256",
        low=1,
        high=4096,
    )
    prefill_tokens: int | None = setting(
        None,
        "Prompt tokens in one step of the local engine; null is 512, on a GPU 4096",
        low=1,
        high=1_000_000,
    )
    prefix_cache_mb: int = setting(
        512, "Memory for shared prefixes, local engine; 0 is off", low=0, high=10**7
    )
    graphs: Literal["met", "start", "off"] = setting(
        "met",
        "CUDA graphs for decoding, local engine: when a batch size comes again, all at the start, or none",
    )
    compile: bool = setting(False, "Compile decoding, local engine; for long runs, on a CPU of small models")
    threads: int | None = setting(
        None, "CPU threads of the local engine; null is one for a small model, else all", low=1, high=4096
    )
    tensor_parallel_size: int = setting(1, "GPUs that share the model, SGLang", low=1, high=1024)
    gpu_memory_utilization: float | None = setting(
        None, "Share of GPU memory SGLang takes; null leaves it to SGLang", low=0.01, high=1
    )
    data_parallel_size: int = setting(1, "Copies of the model behind one address, SGLang", low=1, high=1024)
    context_length: int | None = setting(
        None,
        "Longest prompt and answer together, SGLang; null is what the model was trained for",
        low=16,
        high=10**7,
    )
    schedule_policy: Literal["lpm", "fcfs", "random", "dfs-weight", "lof"] = setting(
        "lpm", "Which waiting request SGLang takes next; lpm: the one that shares most with what is cached"
    )
    attention_backend: str | None = setting(
        None, "Attention kernels of SGLang, such as fa3 or triton; null leaves it to SGLang"
    )

    def __post_init__(self) -> None:
        _check_ranges(self)
        if not DEVICE.fullmatch(self.device):
            raise UsageError(f"device is {self.device!r}, not auto, cpu, mps, cuda or cuda:N")
        if self.base_url is not None:
            root_of(self.base_url)  # UsageError where it is none
        if self.api_key_env is not None and not VARIABLE.fullmatch(self.api_key_env):
            raise UsageError("api_key_env takes the upper-case name of an environment variable, not the key")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise UsageError("api_key_env and api_key_file are both given")

    @property
    def chosen_kind(self) -> Literal["local", "sglang", "remote"]:
        """`kind` with `auto` decided."""
        if self.kind == "auto":
            return "local" if self.base_url is None else "remote"
        return self.kind

    @property
    def usual_in_flight(self) -> int:
        """Requests at once by default: what fills one step. A server may have other users."""
        return {"local": self.max_batch or 32, "sglang": 64, "remote": 16}[self.chosen_kind]


@dataclass(frozen=True)
class ModelSettings:
    """Which checkpoint, and how it sees images. Nothing set: the newest sft checkpoint, else the demo."""

    base_dir: str | None = setting(None, "Where training put its checkpoints", is_path=True)
    source: Literal["base", "mid", "sft", "rl", "demo"] | None = setting(
        None, "Stage of training; demo is the built-in model"
    )
    model_tag: str | None = setting(
        None, "Name of the run, such as d32; null is the one upstream would choose"
    )
    step: int | None = setting(None, "Training step; null is the last one", low=0, high=10**12)
    checkpoint_path: str | None = setting(
        None, "A model_*.pt or a directory, instead of source and model_tag", is_path=True
    )
    hf: str | None = setting(None, "A model of a hub: OWNER/NAME[@REVISION][:PATH]")
    tokenizer_path: str | None = setting(
        None,
        "A tokenizer.pkl, where it is neither beside the weights nor in the base directory",
        is_path=True,
    )
    layout: Literal["auto", Layout] = setting(
        "auto", "Where an image's rows stand in the prompt; auto is what the checkpoint says"
    )
    # What no file of nanochat's says, or not always; null is what its generation or its meta file says.
    sequence_len: int | None = setting(None, "Positions it was trained on", low=1, high=10**7)
    rotary_base: float | None = setting(None, "Rotary base (theta)", low=1.001, high=1e12)
    qk_scale: float | None = setting(None, "Factor of queries and keys, nanochat 2026", low=1e-3, high=1e3)
    gate_scale: float | None = setting(
        None, "Factor of the value embeddings' gates, nanochat 2026", low=1e-3, high=1e3
    )
    softcap: float | None = setting(None, "Soft cap of the logits", low=1e-3, high=1e6)
    short_window: int | None = setting(
        None, "Keys back that short layers see, nanochat 2026", low=1, high=10**7
    )
    window_pattern: str | None = setting(
        None, "Short and long layers, such as SSSL, over and over, nanochat 2026"
    )
    rotary_tables: Literal["bfloat16", "float32"] | None = setting(
        None, "Type of the rotary tables in training, nanochat 2026"
    )

    def __post_init__(self) -> None:
        _check_ranges(self)


@dataclass(frozen=True)
class Profile:
    """Everything a run is set to. `system` None leaves the conversation without a system message."""

    name: str = "default"
    description: str = ""
    engine: EngineSettings = field(default_factory=EngineSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    sampling: Sampling = field(default_factory=Sampling)
    images: ImageLimits = field(default_factory=ImageLimits)
    system: str | None = None


# Meanings (and ranges, where the class has none) of the settings whose dataclasses live elsewhere.
ABOUT: dict[str, Mapping[str, Any]] = {
    "sampling.max_tokens": {"about": "Longest answer, in tokens"},
    "sampling.temperature": {"about": "0 takes the likeliest token; higher is more varied"},
    "sampling.top_p": {"about": "Draw from the likeliest tokens that make up this share; 1 is off"},
    "sampling.top_k": {"about": "Draw from this many of the likeliest tokens; 0 is off"},
    "sampling.min_p": {"about": "Leave out tokens less likely than this share of the likeliest; 0 is off"},
    "sampling.repetition_penalty": {"about": "Above 1 makes tokens already used less likely; 1 is off"},
    "sampling.presence_penalty": {"about": "Above 0 makes tokens that the answer has less likely; 0 is off"},
    "sampling.frequency_penalty": {"about": "The same, for each time that the answer has them; 0 is off"},
    "sampling.json_schema": {"about": "JSON Schema, as text, that the answer fits; null is any text"},
    "sampling.regex": {"about": "Regular expression that the whole answer matches; null is any text"},
    "sampling.stop": {"about": "Texts that end the answer; not part of it"},
    "sampling.seed": {"about": "Makes the draw repeatable; null draws a new one for each request"},
    "sampling.logprobs": {"about": "Likeliest alternatives to report for each token; null reports nothing"},
    "sampling.ignore_eos": {"about": "Go on after the end of the turn, for measurements"},
    "images.max_bytes": {"about": "Largest encoded image, in bytes", "low": 1, "high": 2**40},
    "images.max_pixels": {"about": "Largest image, in pixels", "low": 1, "high": 2**40},
    "images.max_aspect": {"about": "Longest side over the shortest", "low": 1, "high": 10**6},
    "images.timeout_s": {"about": "Seconds to fetch an image", "low": 0.01, "high": 86_400},
    "images.max_redirects": {"about": "Redirects to follow", "low": 0, "high": 100},
    "images.allow_private": {"about": "Fetch images from loopback and private addresses too"},
    "images.background": {"about": "What shows where an image is transparent: white, black, grey, #rrggbb"},
    "system": {"about": "System message of every conversation; null is none"},
}  # fmt: skip
SECTIONS = ("engine", "model", "sampling", "images")
ENVIRONMENT = "GHOSTVIS_"


Kind: TypeAlias = Literal["bool", "int", "float", "str", "choice", "texts"]
_KINDS: Mapping[Any, Kind] = {bool: "bool", int: "int", float: "float", str: "str", tuple[str, ...]: "texts"}


@dataclass(frozen=True)
class Key:
    """One setting. `kind` is its type once null is taken off; `texts` is a list of strings."""

    path: str  # sampling.temperature
    kind: Kind
    nullable: bool
    choices: tuple[str, ...]
    default: object
    about: str
    low: float | None = None
    high: float | None = None
    is_path: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def option(self) -> str:
        """The name outside YAML. `kind` alone would say nothing, and two sections have a timeout_s."""
        if self.path == "engine.kind":
            return "engine"
        return self.path.replace(".", "_") if self.path.startswith("images.") else self.name

    @property
    def variable(self) -> str:
        return ENVIRONMENT + self.option.upper()

    @property
    def flag(self) -> str:
        return "--" + self.option.replace("_", "-")

    @property
    def expects(self) -> str:
        """The type in words, for messages."""
        words = {
            "bool": "true or false",
            "int": "a whole number",
            "float": "a number",
            "str": "text",
            "choice": "one of " + ", ".join(self.choices),
            "texts": "text or a list of texts",
        }[self.kind]
        return words + (" or null" if self.nullable else "")

    def check(self, value: object) -> None:
        """UsageError where the value alone is out of range."""
        if isinstance(value, int | float):
            within(self.name, value, self.low, self.high)
        section, dot, name = self.path.partition(".")
        if dot:
            section_class(section)(**{name: value})


@cache
def keys() -> dict[str, Key]:
    """Every setting by its dotted path, in the order of the dataclasses."""
    found = [
        _key(f"{section}.{each.name}", each, get_type_hints(section_class(section))[each.name])
        for section in SECTIONS
        for each in fields(section_class(section))
    ]
    system = next(each for each in fields(Profile) if each.name == "system")
    return {key.path: key for key in [*found, _key("system", system, str | None)]}


def section_class(section: str) -> type[Any]:
    classes = (EngineSettings, ModelSettings, Sampling, ImageLimits)
    return dict(zip(SECTIONS, classes, strict=True))[section]


def _key(path: str, each: "Field[Any]", hint: Any) -> Key:
    assert each.default is not MISSING, f"{path} has no default"
    nullable = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    plain = next(arg for arg in get_args(hint) if arg is not NoneType) if nullable else hint
    choices = get_args(plain) if get_origin(plain) is Literal else ()
    kind: Kind = "choice" if choices else _KINDS[plain]
    return Key(path, kind, nullable, choices, each.default, **{**each.metadata, **ABOUT.get(path, {})})


def _check_ranges(section: EngineSettings | ModelSettings) -> None:
    for each in fields(section):
        within(each.name, getattr(section, each.name), each.metadata["low"], each.metadata["high"])


def within(name: str, value: float | None, low: float | None, high: float | None) -> None:
    if value is None or low is None or high is None or low <= value <= high:
        return
    raise UsageError(f"{name} is {value:g}, outside {low:g} to {high:g}")
