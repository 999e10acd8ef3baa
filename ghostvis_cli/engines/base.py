"""The engine protocol: what every way of running a model takes and gives. Text and encoded images, no tensors.

Token counts come from the engine; times are the caller's, from its own clock.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, TypeAlias

from ghostvis_cli.errors import UsageError
from ghostvis_cli.prompt import Message, well_formed

CHAT_MAX_TOKENS = 200  # where nobody chose: a conversation may run on a little longer
EngineKind: TypeAlias = Literal["local", "sglang", "remote", "fake"]
FinishReason: TypeAlias = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens, in this order: penalty, top-k, temperature, top-p, min-p, draw. One home of defaults.

    temperature 0 takes the likeliest token. top_k 0, top_p 1 and min_p 0 switch that filter off. Without a
    seed every request draws its own. logprobs asks for that many alternatives a token besides the one chosen.
    """

    max_tokens: int = 100
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1, 1_000_000)
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 1e-9, 1)
        _whole("top_k", self.top_k, 0, 1_000_000)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, 20)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) for text in self.stop):
            raise UsageError("stop is not a tuple of strings")
        if not all(self.stop):
            raise UsageError("a stop string is empty", hint="leave it out")
        for text in self.stop:
            well_formed(text, "a stop string")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int:
        raise UsageError(f"{name} is {value!r}, not a whole number")
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}, outside {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}, not a number")
    if not low <= value <= high:  # also catches NaN
        raise UsageError(f"{name} is {value:g}, outside {low:g} to {high:g}")


@dataclass(frozen=True)
class GenerateRequest:
    """Messages to answer, or a raw `prompt` to continue (exactly one of the two)."""

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.prompt is not None):
            raise UsageError("a request holds either messages or a raw prompt")
        if self.prompt is not None:
            well_formed(self.prompt, "the prompt")


@dataclass(frozen=True)
class Usage:
    """Tokens of one request. `cached_tokens` None: the server does not report it, which is not 0."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    image_tokens: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log of the probability of the token chosen, and of the likeliest ones, before any filter."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. The last one has a finish reason and the usage, and may have no text."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What is running. `context_tokens` is the hard limit, `trained_tokens` what the model learnt on."""

    kind: EngineKind
    model: str
    device: str
    dtype: str
    context_tokens: int | None
    trained_tokens: int | None = None
    image_tokens: int = 0  # rows a picture takes; 0 for a text model
    layout: str | None = None
    source: str | None = None
    tag: str | None = None
    step: int | None = None
    notices: tuple[str, ...] = ()
    kv_token_bytes: int | None = None  # keys and values of one position; None: not known
    constants: tuple[tuple[str, object], ...] = ()  # of the model's mathematics, those that the user set
    image_pixels: int | None = None  # a side of the square that the vision tower sees; None: not known


class Engine(Protocol):
    """A loaded model or a connection to one.

    Any number of `generate` calls may run at once on one event loop; that is what batches them. Closing or
    cancelling the generator aborts the request and gives its cache back. What an engine can't do it refuses
    with a RequestError.
    """

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]: ...

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...


@dataclass(frozen=True)
class Completion:
    """A whole answer, gathered from its chunks."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    usage: Usage


def gather(chunks: Sequence[Chunk]) -> Completion:
    """The whole answer that a finished stream of chunks adds up to."""
    last = chunks[-1]
    assert last.finish_reason is not None and last.usage is not None, "an engine ended without saying why"
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(id_ for chunk in chunks for id_ in chunk.token_ids),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
    )


async def complete(engine: Engine, request: GenerateRequest) -> Completion:
    """Run one request to its end."""
    async with aclosing(engine.generate(request)) as stream:
        return gather([chunk async for chunk in stream])
