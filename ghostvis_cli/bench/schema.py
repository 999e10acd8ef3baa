"""The report document: what a benchmark run leaves behind, and the seam between measuring and analysing.

    Report
      manifest     the machine, the versions, the command, how noisy it was
      workload     what was asked, in numbers, with the seed and a hash of every row
      engines      who was asked: one card for each engine measured
      runs         one repeat of one engine at one load point: flat figures, and with --details every request
      summaries    one engine at one load point over all its repeats: each figure with an interval
      notes        what a reader must know before believing a number

Every time in a Record is in seconds since its run began, on one monotonic clock; so are latencies in figures.
None is "not reported" or "not measurable", never 0.
"""

import json
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ghostvis_cli.engines.base import FinishReason
from ghostvis_cli.errors import InputError, printable
from ghostvis_cli.version import SCHEMA_VERSION

LARGEST, LEAST = 1e18, 1e-18  # a figure of another's report beyond them, or not a number, is no measurement
LARGEST_FILE = 2**30
A_REPORT = "ghostvis bench --output report.json"  # makes one
Better = Literal["lower", "higher", "neither"]

STATISTICS = ("mean", "sd", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True)
class Metric:
    """What a figure means to a reader. A latency has one figure per statistic: `ttft_p95`."""

    title: str
    unit: str
    better: Better


LATENCIES = {
    "ttft": Metric("time to first token", "s", "lower"),
    "tpot": Metric("time per output token", "s", "lower"),
    "itl_token": Metric("inter-token latency, per token", "s", "lower"),
    "itl_chunk": Metric("inter-token latency, per chunk", "s", "lower"),
    "e2e": Metric("end to end", "s", "lower"),
    "send_lag": Metric("sent later than scheduled", "s", "neither"),
}
SCALARS = {
    "duration": Metric("duration", "s", "neither"),
    "requests": Metric("requests answered", "", "neither"),
    "failed": Metric("requests failed", "", "lower"),
    "input_tokens": Metric("input tokens", "", "neither"),
    "output_tokens": Metric("output tokens", "", "neither"),
    "reasoning_tokens": Metric("output tokens that were reasoning", "", "neither"),
    "image_tokens": Metric("image tokens asked for", "", "neither"),
    "image_tokens_computed": Metric("image tokens computed", "", "lower"),
    "cached_tokens": Metric("cached tokens", "", "higher"),
    "cache_hit_rate": Metric("share of input tokens cached", "", "higher"),
    "requests_per_s": Metric("requests", "1/s", "higher"),
    "input_tokens_per_s": Metric("input tokens", "1/s", "higher"),
    "output_tokens_per_s": Metric("output tokens", "1/s", "higher"),
    "total_tokens_per_s": Metric("input and output tokens", "1/s", "higher"),
    "image_tokens_per_s": Metric("image tokens", "1/s", "higher"),
    "goodput_per_s": Metric("requests within the objectives", "1/s", "higher"),
    "goodput_share": Metric("share of requests within the objectives", "", "higher"),
    "mean_concurrency": Metric("requests in flight, mean", "", "neither"),
    "peak_memory_bytes": Metric("peak device memory", "B", "lower"),
    "mean_power_w": Metric("device power, mean", "W", "lower"),
    "fixed_work": Metric("the same work on the client's processor, around the run", "s", "neither"),
    "loop_lag_p99": Metric("client's event loop late, p99", "s", "neither"),
    "loop_busy": Metric("share of time the client's loop was busy", "", "neither"),
}


METRICS = frozenset((*SCALARS, *(f"{base}_{statistic}" for base in LATENCIES for statistic in STATISTICS)))


def metric(name: str) -> Metric:
    """What the figure called `name` means. KeyError for a name that no figure has."""
    base, _, statistic = name.rpartition("_")
    if base in LATENCIES and statistic in STATISTICS:
        return LATENCIES[base]
    return SCALARS[name]


@dataclass(frozen=True)
class Record:
    """One request. `chunk_s` and `chunk_tokens` have one entry per chunk of which the model made something."""

    id: str
    scheduled_s: float  # when the schedule wanted it sent; in a closed loop, when a place became free
    sent_s: float
    first_token_s: float | None
    finished_s: float  # the end of the stream, or the failure
    chunk_s: tuple[float, ...] = ()
    chunk_tokens: tuple[int, ...] = ()  # 0: the engine does not say
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None  # of the completion
    hidden_tokens: int = 0  # of those, such as the server counted and never sent
    image_tokens: int = 0
    images: int = 0
    images_seen: int = 0  # of those, sent to this engine before
    finish_reason: FinishReason | None = None
    error: str | None = None  # the kind, as in errors.py; None: it succeeded
    error_message: str | None = None


@dataclass(frozen=True)
class Load:
    """One load point. Closed: so many requests in flight. Open: so many a second, whatever the server does."""

    concurrency: int | None = None  # in an open loop: the most in flight; None: no limit
    request_rate: float | None = None  # requests a second; None: closed loop
    arrival: Literal["poisson", "constant"] | None = None
    ramp_up_s: float = 0.0  # from nothing to the full load, in a straight line

    @property
    def name(self) -> str:
        if self.request_rate is None:
            return f"concurrency={self.concurrency}"
        return f"request_rate={self.request_rate:g}"


@dataclass(frozen=True)
class Run:
    """One repeat of one engine at one load point. `figures` are named as in LATENCIES and SCALARS."""

    engine: str
    load: Load
    repeat: int  # from 0; equal repeats of two engines had the same rows
    started_at: str  # UTC, ISO 8601
    duration_s: float  # from the first request's time to the last one's end
    figures: Mapping[str, float | None]
    failures: Mapping[str, int] = field(default_factory=dict)  # by kind
    records: tuple[Record, ...] = ()  # only with --details
    notes: tuple[str, ...] = ()
    cut_short: bool = False  # only the requests that had ended when the benchmark was stopped


@dataclass(frozen=True)
class Estimate:
    """A figure over repeats: its mean, and a 95 % bootstrap interval (None for fewer than 2 repeats)."""

    value: float
    low: float | None
    high: float | None
    repeats: int


@dataclass(frozen=True)
class Summary:
    engine: str
    load: Load
    figures: Mapping[str, Estimate | None]


@dataclass(frozen=True)
class EngineCard:
    """The engine that was measured. `model_hash` and `profile_hash` are SHA-256 in hex, None where not known."""

    name: str  # as in Run.engine
    kind: str
    model: str
    device: str
    dtype: str
    layout: str | None = None
    image_tokens: int = 0
    context_tokens: int | None = None
    server: str | None = None  # kind and version, of a remote engine
    address: str | None = None  # without secrets
    model_hash: str | None = None
    profile_hash: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Where, when and how. `noise` tells how calm the machine was: load averages and the like, by name."""

    command: str
    started_at: str
    finished_at: str
    seed: int
    versions: Mapping[str, str]
    machine: Mapping[str, str]  # cpu, cores, memory, system, device, driver
    noise: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkloadSummary:
    """What was asked. `sha256` covers the rows of all different runs: equal hashes are equal requests in order."""

    kind: str  # text, vision, shared-images, shared-prefix, turns, file
    seed: int
    rows: int  # per run
    sha256: str
    images: int = 0  # different images, per run
    settings: Mapping[str, Any] = field(default_factory=dict)  # as typed: lengths, sizes, formats
    sampling: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None  # the file that replays it


@dataclass(frozen=True)
class Report:
    """What a run of bench writes: where, what, how, and every figure."""

    manifest: Manifest
    workload: WorkloadSummary
    engines: tuple[EngineCard, ...]
    runs: tuple[Run, ...]
    summaries: tuple[Summary, ...]
    slo: Mapping[str, float] = field(default_factory=dict)  # metric -> most seconds
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)  # sections of other commands, such as prefix
    cut_short: str | None = None  # what stopped it before its end
    schema_version: int = SCHEMA_VERSION


# --- to and from JSON


def to_json(report: Report) -> dict[str, Any]:
    """Plain JSON values. Times keep microseconds: more is noise, and a tenth of the file."""
    rounded: dict[str, Any] = _rounded(asdict(report))
    return rounded


def from_json(document: Any) -> Report:
    """The report in a parsed document. InputError says what is wrong with one that is none."""
    if not isinstance(document, dict) or "schema_version" not in document:
        raise InputError("this is no report of ghostvis bench: it has no schema_version")
    if document["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"this report has schema_version {document['schema_version']!r}, and this version reads"
            f" {SCHEMA_VERSION}",
            hint="measure again with this version",
        )
    report: Report = build(Report, document, "report")
    _check(report)
    return report


def _check(report: Report) -> None:
    """Check what types do not say: engines and figures that exist."""
    cards = {card.name for card in report.engines}
    if not cards:
        raise InputError("report.engines is empty")
    measured: tuple[Run | Summary, ...] = (*report.runs, *report.summaries)
    for each in measured:
        if each.engine not in cards:
            raise InputError(f"report.engines has no {printable(each.engine)!r}, which was measured")
        if stray := each.figures.keys() - METRICS:
            raise InputError(f"no figure is called {printable(min(stray))!r}")


def to_text(report: Report) -> str:
    return json.dumps(to_json(report), ensure_ascii=False, allow_nan=False) + "\n"


def read(path: Path) -> Report:
    """A report from its JSON file. InputError where it is none, or of another version."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise InputError(f"it is larger than {LARGEST_FILE:,} bytes")
        return from_json(json.loads(content))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}", hint=A_REPORT) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}", hint=A_REPORT) from error
    except InputError as error:
        raise InputError(f"{path}: {error.message}", hint=error.hint or A_REPORT) from error


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value


def build(kind: Any, value: Any, where: str) -> Any:
    """A dataclass from a JSON object. Keys it does not know are left out: a later version may add some."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is not an object")
    hints = _hints(kind)
    known = {f.name: f for f in fields(kind)}
    given = {name: _typed(hints[name], value[name], f"{where}.{name}") for name in known if name in value}
    try:
        return kind(**given)
    except TypeError as error:
        raise InputError(f"{where} is not whole: {error}") from error


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return (
            None if value is None else _typed(next(a for a in args if a is not types.NoneType), value, where)
        )
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(args[0], each, f"{where}[{n}]") for n, each in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _typed(args[1], each, f"{where}.{key}") for key, each in value.items()}
    if is_dataclass(hint):
        return build(hint, value, where)
    if origin is Literal and value in args:
        return value
    if isinstance(value, int | float) and value != 0 and not LEAST < abs(value) < LARGEST:
        raise InputError(f"{where} is no number of a measurement")
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{where} is {value!r}, which does not belong there"[:200])
