"""OpenAI's request bodies -> engine requests. Knows JSON and its fields; nothing of sockets or of answers."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from ghostvis_cli.engines.base import MOST_TOKENS, EngineInfo, GenerateRequest, Sampling, SamplingError
from ghostvis_cli.errors import InputError
from ghostvis_cli.fetch import is_from
from ghostvis_cli.images import EncodedImage, load_image
from ghostvis_cli.prompt import ImagePart, Message, Part, Role, Text, with_line_breaks
from ghostvis_cli.serve.api_errors import ApiError, too_long
from ghostvis_cli.serve.openai_fields import (
    BODY,
    IMAGE_PART,
    IMAGE_URL,
    MESSAGE,
    STREAM_OPTIONS,
    TEXT_PART,
    TOKENIZE,
    Kind,
    Known,
)
from ghostvis_cli.serve.settings import Served, ServerSettings

T = TypeVar("T")

MAX_N = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
PIXELS_PER_REQUEST = 4  # times the limit of one image, so that many small files can't fill the memory
# Of text: what any body may have, and what a token may stand for, escaped as JSON can.
SMALL_TEXT_BYTES, TOKEN_BYTES = 2**20, 128
IMAGE = re.compile(rb'"data:[^"]{256,}"')
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Call:
    """One API call, checked: what to generate, choice by choice, and how to answer."""

    kind: Kind
    requests: tuple[GenerateRequest, ...]  # prompt by prompt, each with its n choices
    n: int
    stream: bool
    include_usage: bool
    token_ids: bool

    @property
    def asks(self) -> str:
        """The field that holds the prompt."""
        return "messages" if self.kind == "chat" else "prompt"

    @property
    def logprobs(self) -> bool:
        return self.requests[0].sampling.logprobs is not None


class Fields:
    """Typed reading of one JSON object. null is the same as absent; a fault names its field."""

    def __init__(self, value: object, path: str = "", known: Known | None = None) -> None:
        if not isinstance(value, dict):
            raise ApiError(400, f"{path or 'the body'} must be a JSON object", param=path or None)
        self.values, self.path = value, path
        if known is not None:
            self.only(known)

    def only(self, known: Known) -> "Fields":
        if stray := known.stray(self.values, self.path):
            raise ApiError(400, stray.message, param=stray.path, code=stray.code)
        return self

    def name(self, field: str) -> str:
        return f"{self.path}.{field}" if self.path else field

    def fault(self, field: str, rule: str) -> ApiError:
        return ApiError(400, f"{self.name(field)} {rule}", param=self.name(field))

    def _typed(self, field: str, kind: type[T], rule: str) -> T | None:
        value = self.values.get(field)
        if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        raise self.fault(field, rule)

    def text(self, field: str) -> str | None:
        return _unicode(self._typed(field, str, "must be a string"), self.name(field))

    def needed_text(self, field: str) -> str:
        if (text := self.text(field)) is None:
            raise self.fault(field, "is required, a string")
        return text

    def flag(self, field: str) -> bool:
        return self._typed(field, bool, "must be true or false") or False

    def integer(self, field: str) -> int | None:
        return self._typed(field, int, "must be an integer")

    def number(self, field: str) -> float | None:
        value = self.values.get(field)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        raise self.fault(field, "must be a number")

    def items(self, field: str) -> list[Any]:
        value = self._typed(field, list, "must be a list")
        if not value:
            raise self.fault(field, "must be a list with at least one entry")
        return value

    def texts(self, field: str, limit: int) -> tuple[str, ...]:
        """A string or a list of strings; nothing when absent."""
        value = self.values.get(field)
        entries = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise self.fault(field, "must be a string or a list of strings")
        if len(entries) > limit:
            raise self.fault(field, f"has more than {limit} entries")
        return tuple(_unicode(entry, self.name(field)) for entry in entries)


@dataclass(frozen=True)
class RequestReader:
    """Reads bodies for one model. Blocks while images are decoded or fetched: call it in a thread."""

    settings: ServerSettings
    served: Served

    @cached_property
    def model(self) -> str:
        return self.served.name(self.settings)

    @property
    def _context(self) -> int | None:
        return self.served.engine.info.context_tokens

    def read(self, kind: Kind, body: bytes | bytearray) -> Call:
        fields = Fields(parse_json(body, self._context), known=BODY[kind])
        self._check_model(fields)
        n = 1 if (n_given := fields.integer("n")) is None else n_given
        if not 1 <= n <= MAX_N:
            raise fields.fault("n", f"must be within 1 and {MAX_N}")
        sampling, fit = self._sampling(kind, fields)
        prompts = [self._chat(fields, sampling)] if kind == "chat" else list(_prompts(fields, sampling))
        options = Fields(
            {} if (given := fields.values.get("stream_options")) is None else given,
            "stream_options",
            STREAM_OPTIONS,
        )
        return Call(
            kind=kind,
            requests=tuple(
                choice for request in prompts for choice in _choices(replace(request, fit=fit), n)
            ),
            n=n,
            stream=fields.flag("stream"),
            include_usage=options.flag("include_usage"),
            token_ids=fields.flag("return_token_ids"),
        )

    def read_tokenize(self, body: bytes | bytearray) -> str:
        fields = Fields(parse_json(body, self._context), known=TOKENIZE)
        self._check_model(fields)
        return fields.needed_text("prompt")

    def _check_model(self, fields: Fields) -> None:
        if fields.text("model") not in (None, "", self.model):
            message = f"the model asked for is not served here; this server has {self.model}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _sampling(self, kind: Kind, fields: Fields) -> tuple[Sampling, bool]:
        """And whether its max_tokens is only a bound, because the client named none."""
        max_tokens, newer_name = fields.integer("max_tokens"), fields.integer("max_completion_tokens")
        wished = max_tokens if newer_name is None else newer_name
        top_k = fields.integer("top_k")
        given: dict[str, Any] = {
            "max_tokens": self._most_tokens if wished is None else wished,
            "temperature": fields.number("temperature"),
            "top_p": fields.number("top_p"),
            "top_k": 0 if top_k == -1 else top_k,  # SGLang's way to say: all
            "min_p": fields.number("min_p"),
            "repetition_penalty": fields.number("repetition_penalty"),
            "seed": fields.integer("seed"),
            "stop": fields.texts("stop", MAX_STOPS) or None,
            "ignore_eos": fields.flag("ignore_eos") or None,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        try:
            sampling = replace(self.settings.sampling, **chosen, logprobs=self._logprobs(kind, fields))
        except SamplingError as error:
            param = _spelled(error.field, kind, newer_name is not None)
            message = error.message.replace(error.field, param, 1)
            raise ApiError(400, message, param=param) from error
        return sampling, wished is None

    @property
    def _most_tokens(self) -> int:
        """Where the client names no limit: what the server was started with, else all that the model holds."""
        return self.settings.max_tokens or min(self._context or MOST_TOKENS, MOST_TOKENS)

    def _logprobs(self, kind: Kind, fields: Fields) -> int | None:
        """How many alternatives a token; None for no log-probabilities at all."""
        if kind == "text":
            wanted = fields.integer("logprobs")
        else:
            top = fields.integer("top_logprobs")
            wanted = (top or 0) if fields.flag("logprobs") else None
            if top and wanted is None:
                raise fields.fault("top_logprobs", "needs logprobs: true")
        if wanted is not None and self.served.vocabulary is None:
            raise fields.fault("logprobs", "is not supported by this server's engine")
        return wanted

    def _chat(self, fields: Fields, sampling: Sampling) -> GenerateRequest:
        entries = fields.items("messages")
        _check_number(entries, self._context)
        images = _Images(self.settings, self.served.engine.info)
        messages = [
            _message(Fields(entry, f"messages[{number}]", MESSAGE), images)
            for number, entry in enumerate(entries)
        ]
        return GenerateRequest(tuple(messages), sampling=sampling)


def parse_json(body: bytes | bytearray, context_tokens: int | None = None) -> object:
    """Strict JSON. Python's parser by itself takes NaN too, and dies of depth and length in its own ways.

    It also takes seconds and gigabytes for a body of millions of small things, which no model could be asked:
    what is more text than fits the context is refused unread. Images are not counted.
    """
    if context_tokens is not None:
        text_bytes = len(body) - sum(found.end() - found.start() for found in IMAGE.finditer(body))
        if text_bytes > SMALL_TEXT_BYTES + TOKEN_BYTES * context_tokens:
            raise too_long(f"{text_bytes:,} bytes of text can't fit the model's {context_tokens} positions")
    try:
        return json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError:
        raise ApiError(400, "the body is not valid JSON") from None


def _check_number(messages: list[Any], context_tokens: int | None) -> None:
    """Each takes a position at least, so many can be refused before any is looked at."""
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    count = len(messages) + sum(len(content) for content in contents if isinstance(content, list))
    if context_tokens is not None and count > context_tokens:
        message = f"{count:,} messages and parts can't fit the model's {context_tokens} positions"
        raise too_long(message, "messages")


def _spelled(field: str, kind: Kind, newer_name: bool) -> str:
    """A field of `Sampling` by the name that the request has for it."""
    if field == "max_tokens" and newer_name:
        return "max_completion_tokens"
    return "top_logprobs" if field == "logprobs" and kind == "chat" else field


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _unicode(text: T, name: str) -> T:
    """JSON can spell half a surrogate pair, which no tokenizer can read."""
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ApiError(400, f"{name} is not valid Unicode text", param=name) from None
    return text


def _prompts(fields: Fields, sampling: Sampling) -> Iterable[GenerateRequest]:
    texts = fields.texts("prompt", MAX_PROMPTS)
    if not texts:
        raise fields.fault("prompt", "is required, a string or a list of strings")
    return (GenerateRequest(prompt=text, sampling=sampling) for text in texts)


def _choices(request: GenerateRequest, n: int) -> Iterable[GenerateRequest]:
    """One request a choice. A seed gives each choice its own, so that they differ and can be repeated."""
    sampling = request.sampling
    for number in range(n):
        seed = None if sampling.seed is None else (sampling.seed + number) % 2**63
        yield replace(request, sampling=replace(sampling, seed=seed))


def _message(fields: Fields, images: "_Images") -> Message:
    role = ROLES.get(fields.text("role") or "")
    if role is None:
        raise fields.fault("role", f"must be one of {', '.join(ROLES)}")
    content = fields.values.get("content")
    if isinstance(content, str):
        return Message(role, (Text(fields.needed_text("content")),))
    if not isinstance(content, list):
        raise fields.fault("content", "must be a string or a list of parts")
    places = enumerate(fields.items("content"))
    parts = [_part(Fields(entry, f"{fields.name('content')}[{at}]"), role, images) for at, entry in places]
    return Message(role, with_line_breaks(parts))


def _part(part: Fields, role: Role, images: "_Images") -> Part:
    match part.values.get("type"):
        case "text":
            return Text(part.only(TEXT_PART).needed_text("text"))
        case "image_url" if role == "user":
            return ImagePart(images.load(part.only(IMAGE_PART)))
        case "image_url":
            raise part.fault("type", "image_url belongs to a user's message")
    raise part.fault("type", "must be text or image_url")


class _Images:
    """Loads the images of one request, within what one request may cost."""

    def __init__(self, settings: ServerSettings, info: EngineInfo) -> None:
        self.hosts = {host.lower() for host in settings.allowed_image_hosts}
        self.limits, self.info = settings.image_limits, info
        self.pixels_left = PIXELS_PER_REQUEST * self.limits.max_pixels
        self.tokens = 0

    def load(self, part: Fields) -> EncodedImage:
        field = part.values.get("image_url")
        url = (
            Fields({"url": field})
            if isinstance(field, str)
            else Fields(field, part.name("image_url"), IMAGE_URL)
        ).text("url")
        name = part.name("image_url")
        self._make_room(name)
        if not url or not self._allowed(url):
            hosts = ", ".join(sorted(self.hosts))
            allowed = f"a data: URL, or http(s) from {hosts}" if hosts else "a data: URL"
            raise ApiError(400, f"{name} must be {allowed}", param=name, code="invalid_image_url")
        pixels = min(self.limits.max_pixels, self.pixels_left)
        # A redirect would lead from an allowed host to any other.
        limits = replace(self.limits, max_pixels=pixels, max_redirects=0)
        try:
            image = load_image(url, limits=limits)
        except InputError as error:
            raise ApiError(400, f"{name}: {error.message}", param=name, code="invalid_image") from error
        self.pixels_left -= image.width * image.height
        return image

    def _make_room(self, name: str) -> None:
        """Refuse before anything is decoded what the model could not hold."""
        if not self.info.image_tokens:
            raise ApiError(400, "this model reads text only, so it can't be given an image", param=name)
        self.tokens += self.info.image_tokens
        if self.info.context_tokens is not None and self.tokens > self.info.context_tokens:
            message = f"more images than fit the model's {self.info.context_tokens} positions"
            raise too_long(message, name)

    def _allowed(self, url: str) -> bool:
        return url[:5].lower() == "data:" or is_from(url, self.hosts)
