"""The engine protocol: requests and answers of every way to run a model. Text and encoded images, no tensors.

Token counts come from the engine; times are measured by the caller.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias

from ghostvis_cli.encoding import well_formed
from ghostvis_cli.errors import ContextLengthError, InputError, RequestError, UsageError, printable
from ghostvis_cli.prompt import Message
from ghostvis_cli.sampling import MOST_TOKENS as MOST_TOKENS
from ghostvis_cli.sampling import Sampling as Sampling
from ghostvis_cli.sampling import SamplingError as SamplingError

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.locate import Checkpoint
    from ghostvis_cli.checkpoint.tokenizer import Tokenizer

CHAT_MAX_TOKENS = 200  # chat's default: replies may be longer than single answers


class GrammarError(InputError):
    """A JSON schema or a regular expression that is not supported."""


EngineKind: TypeAlias = Literal["local", "sglang", "remote", "fake"]
FinishReason: TypeAlias = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class GenerateRequest:
    """Messages to answer, or a raw `prompt` to continue, as text or as ids (exactly one of the three).

    `fit`: max_tokens is only an upper bound, which the engine lowers to the rest of its context.
    `prompt_logprobs` asks for log probabilities of the prompt's own tokens, with that many alternatives; without
    `answer` nothing is generated. Ids are used unchanged, text gets a BOS.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    fit: bool = False
    prompt_ids: tuple[int, ...] | None = None
    prompt_logprobs: int | None = None
    answer: bool = True

    def __post_init__(self) -> None:
        if bool(self.messages) + (self.prompt is not None) + (self.prompt_ids is not None) != 1:
            raise UsageError("a request holds either messages or a raw prompt")
        if self.prompt is not None:
            well_formed(self.prompt, "the prompt")

    def refuse_scoring(self) -> None:
        """RequestError for requests of evaluation, which only the local engine supports."""
        if self.prompt_ids is not None or self.prompt_logprobs is not None or not self.answer:
            raise RequestError("only the local engine takes ids and tells probabilities of a prompt")

    def fitted(self, prompt_tokens: int, context_tokens: int, image_tokens: int = 0) -> Sampling:
        """The sampling for a prompt of this length. ContextLengthError where they exceed the context."""
        left = context_tokens - prompt_tokens
        asked = self.sampling.max_tokens if self.answer else 0
        if left < (1 if self.fit else asked):
            images = f" ({image_tokens} of them for images)" if image_tokens else ""
            answer = "" if self.fit else f" and max_tokens {asked} make {prompt_tokens + asked}"
            raise ContextLengthError(
                f"the prompt's {prompt_tokens} tokens{images}{answer}, the model has {context_tokens} positions",
                hint="shorten the prompt" if left < 1 else f"--max-tokens {left}",
            )
        return replace(self.sampling, max_tokens=min(asked, left)) if self.fit else self.sampling


@dataclass(frozen=True)
class Usage:
    """Token counts of one request. `cached_tokens` None: not reported, which is not 0."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    image_tokens: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """Log probabilities (natural) of the chosen token and of the likeliest ones, before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A function call in an answer, or a piece of one; pieces with the same index belong together."""

    index: int = 0
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. The last one has a finish reason and the usage, and may have no text.

    Servers may send more than text: `reasoning` before it, a `refusal` or `tool_calls` in its place.
    `reasoning_tokens` comes with the usage; None: not reported.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_tokens: int | None = None
    prompt: tuple[TokenLogprob, ...] = ()  # where requested, before anything else

    @property
    def generated(self) -> bool:
        """Whether it holds generated output of any kind, for the time to the first token."""
        return bool(self.text or self.token_ids or self.reasoning or self.refusal or self.tool_calls)


@dataclass(frozen=True)
class Beside:
    """The parts of an answer besides its text."""

    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Self:
        calls: dict[int, ToolCall] = {}
        for piece in (piece for chunk in chunks for piece in chunk.tool_calls):
            so_far = calls.get(piece.index, ToolCall(piece.index))
            name, arguments = so_far.name + piece.name, so_far.arguments + piece.arguments
            calls[piece.index] = ToolCall(piece.index, so_far.id or piece.id, name, arguments)
        return cls(
            "".join(chunk.reasoning for chunk in chunks),
            "".join(chunk.refusal for chunk in chunks),
            tuple(calls[index] for index in sorted(calls)),
        )

    def notice(self, text: str, finish_reason: FinishReason) -> str | None:
        """A line to show where there is no visible text."""
        if text.strip():
            return None
        blank = "only white space came" if text else ""
        return f"the answer has no text: {self._instead(finish_reason, blank)}"

    def _instead(self, finish_reason: FinishReason, blank: str) -> str:
        if self.refusal:
            return f"the model refused: {printable(self.refusal)}"
        if self.tool_calls:
            return f"the model calls {printable(', '.join(call.name for call in self.tool_calls))}"
        if self.reasoning:
            cut = ", cut off at max_tokens" if finish_reason == "length" else ""
            return f"{len(self.reasoning)} characters of reasoning came{cut}"
        if finish_reason == "abort":
            return "the server cut it off"
        return blank or "the model ended it at once"

    def record(self) -> dict[str, Any]:
        """The parts that are present, as fields of a JSON record."""
        calls = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in self.tool_calls]
        fields = {"reasoning": self.reasoning, "refusal": self.refusal, "tool_calls": calls}
        return {name: value for name, value in fields.items() if value}


@dataclass(frozen=True)
class EngineInfo:
    """What is running. `context_tokens` is the hard limit, `trained_tokens` the length in training."""

    kind: EngineKind
    model: str
    device: str
    dtype: str
    context_tokens: int | None
    trained_tokens: int | None = None
    image_tokens: int = 0  # rows of an image; 0 for a text model
    layout: str | None = None
    source: str | None = None
    tag: str | None = None
    step: int | None = None
    notices: tuple[str, ...] = ()
    max_batch: int | None = None  # sequences in one step; None: not known
    kv_token_bytes: int | None = None  # keys and values of one position; None: not known
    image_pixels: int | None = None  # side of the vision tower's square input; None: not known
    checkpoint: "Checkpoint | None" = None  # loaded into this process, its tokenizer included


@dataclass(frozen=True)
class Server:
    """The server at the other end. Kinds other than openai get fields beyond OpenAI's."""

    kind: Literal["sglang", "ghostvis", "vllm", "openai"] = "openai"
    version: str | None = None
    cache_report: bool | None = None  # whether it counts cached tokens; None: not known


class Closing(ABC):
    """A base class: `async with` closes it at the end."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close it. May be called again."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class Engine(Protocol):
    """A loaded model or a connection to one.

    Any number of `generate` calls may run at once on one event loop, and are batched. Closing or cancelling
    the generator aborts the request and frees its cache. What an engine does not support it refuses with a
    RequestError.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """The model's tokenizer; None where another process has it."""

    @property
    def server(self) -> Server | None:
        """The server that a remote engine is connected to; None for an engine of this process."""

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
    beside: Beside = field(default_factory=Beside)

    @property
    def notice(self) -> str | None:
        """A line to show for an answer without text."""
        return self.beside.notice(self.text, self.finish_reason)


def gather(chunks: Sequence[Chunk]) -> Completion:
    """The whole answer, from a finished stream of chunks."""
    last = chunks[-1]
    assert last.finish_reason is not None and last.usage is not None, "an engine ended without saying why"
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(id_ for chunk in chunks for id_ in chunk.token_ids),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
        beside=Beside.of(chunks),
    )


async def complete(engine: Engine, request: GenerateRequest) -> Completion:
    """Run one request to its end."""
    async with aclosing(engine.generate(request)) as stream:
        return gather([chunk async for chunk in stream])
