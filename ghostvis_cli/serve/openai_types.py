"""OpenAI's request bodies -> engine requests. Knows JSON and its fields; nothing of sockets or of answers."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

from ghostvis_cli.engines.base import EngineInfo, GenerateRequest, Sampling
from ghostvis_cli.errors import InputError
from ghostvis_cli.fetch import is_from
from ghostvis_cli.images import EncodedImage, load_image
from ghostvis_cli.prompt import Message, Part, Picture, Role, Text, with_line_breaks
from ghostvis_cli.serve.api_errors import ApiError
from ghostvis_cli.serve.settings import Served, ServerSettings

T = TypeVar("T")
Kind: TypeAlias = Literal["chat", "text"]

MAX_N = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
PIXELS_PER_REQUEST = 4  # times the limit of one picture, so that many small files can't fill the memory
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

READ = frozenset((
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
    "min_p", "repetition_penalty", "ignore_eos", "stop", "seed", "n", "stream", "stream_options", "logprobs",
    "top_logprobs", "return_token_ids",
))  # fmt: skip

# Fields that would change the answer and that no engine of ours follows, and values that ask for nothing.
REFUSED: dict[str, tuple[object, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "logit_bias": ({},),
    "frequency_penalty": (0,), "presence_penalty": (0,), "modalities": (["text"],), "audio": (),
    "web_search_options": (), "best_of": (1,), "echo": (False,), "suffix": ("",), "min_tokens": (0,),
    "stop_token_ids": ([],), "stop_regex": ([], ""), "regex": (), "ebnf": (), "json_schema": (),
    "structural_tag": (), "skip_special_tokens": (True,), "no_stop_trim": (False,),
    "continue_final_message": (False,), "add_generation_prompt": (True,), "chat_template": (),
    "chat_template_kwargs": ({},), "lora_path": (), "custom_logit_processor": (), "custom_params": ({},),
    "input_ids": (), "prompt_logprobs": (), "cache_salt": (), "extra_key": (),
}  # fmt: skip

# Fields that mean nothing here, known so that they are not taken for a slip of the pen.
IGNORED = frozenset((
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prediction", "reasoning_effort",
    "verbosity", "prompt_cache_key", "safety_identifier", "rid", "priority", "add_special_tokens",
))  # fmt: skip


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
    def logprobs(self) -> bool:
        return self.requests[0].sampling.logprobs is not None


class Fields:
    """Typed reading of one JSON object. null is the same as absent; a fault names its field."""

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, dict):
            raise ApiError(400, f"{path or 'the body'} must be a JSON object", param=path or None)
        self.values, self.path = value, path

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
    """Reads bodies for one model. Blocks while pictures are decoded or fetched: call it in a thread."""

    settings: ServerSettings
    served: Served

    @cached_property
    def model(self) -> str:
        return self.served.name(self.settings)

    def read(self, kind: Kind, body: bytes) -> Call:
        fields = Fields(parse_json(body))
        _refuse_unsupported(fields)
        self._check_model(fields)
        n = 1 if (n_given := fields.integer("n")) is None else n_given
        if not 1 <= n <= MAX_N:
            raise fields.fault("n", f"must be within 1 and {MAX_N}")
        sampling = self._sampling(kind, fields)
        prompts = [self._chat(fields, sampling)] if kind == "chat" else list(_prompts(fields, sampling))
        options = fields.values.get("stream_options")
        return Call(
            kind=kind,
            requests=tuple(choice for request in prompts for choice in _choices(request, n)),
            n=n,
            stream=fields.flag("stream"),
            include_usage=options is not None and Fields(options, "stream_options").flag("include_usage"),
            token_ids=fields.flag("return_token_ids"),
        )

    def read_tokenize(self, body: bytes) -> str:
        fields = Fields(parse_json(body))
        self._check_model(fields)
        prompt = fields.text("prompt")
        if prompt is None:
            raise fields.fault("prompt", "is required, a string")
        return prompt

    def _check_model(self, fields: Fields) -> None:
        if fields.text("model") not in (None, "", self.model):
            message = f"the model asked for is not served here; this server has {self.model}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _sampling(self, kind: Kind, fields: Fields) -> Sampling:
        max_tokens, newer_name = fields.integer("max_tokens"), fields.integer("max_completion_tokens")
        top_k = fields.integer("top_k")
        given: dict[str, Any] = {
            "max_tokens": max_tokens if newer_name is None else newer_name,
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
        return replace(self.settings.sampling, **chosen, logprobs=self._logprobs(kind, fields))

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
        pictures = _Pictures(self.settings, self.served.engine.info)
        messages = [
            _message(Fields(entry, f"messages[{number}]"), pictures)
            for number, entry in enumerate(fields.items("messages"))
        ]
        return GenerateRequest(tuple(messages), sampling=sampling)


def parse_json(body: bytes) -> object:
    """Strict JSON. Python's parser by itself takes NaN too, and dies of depth and length in its own ways."""
    try:
        return json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError:
        raise ApiError(400, "the body is not valid JSON") from None


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


def _refuse_unsupported(fields: Fields) -> None:
    for field, value in fields.values.items():
        if field in READ or field in IGNORED or value is None:
            continue
        if field in REFUSED:
            if value not in REFUSED[field]:
                raise ApiError(
                    400, f"{field} is not supported here", param=field, code="unsupported_parameter"
                )
        elif meant := get_close_matches(field[:64], READ, n=1, cutoff=0.8):
            message = f"there is a field that is not known; {meant[0]} is the nearest one"
            raise ApiError(400, message, param=meant[0], code="unknown_parameter")


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


def _message(fields: Fields, pictures: "_Pictures") -> Message:
    role = ROLES.get(fields.text("role") or "")
    if role is None:
        raise fields.fault("role", f"must be one of {', '.join(ROLES)}")
    if fields.values.get("tool_calls"):
        raise fields.fault("tool_calls", "is not supported here")
    content = fields.values.get("content")
    if content is None or isinstance(content, str):
        return Message(role, (Text(fields.text("content") or ""),))
    parts: list[Part] = []
    for number, entry in enumerate(fields.items("content")):
        part = Fields(entry, f"{fields.name('content')}[{number}]")
        match part.values.get("type"):
            case "text":
                parts.append(Text(part.text("text") or ""))
            case "image_url" if role == "user":
                parts.append(Picture(pictures.load(part)))
            case "image_url":
                raise part.fault("type", "image_url belongs to a user's message")
            case _:
                raise part.fault("type", "must be text or image_url")
    return Message(role, with_line_breaks(parts))


class _Pictures:
    """Loads the pictures of one request, within what one request may cost."""

    def __init__(self, settings: ServerSettings, info: EngineInfo) -> None:
        self.hosts = {host.lower() for host in settings.allowed_image_hosts}
        self.limits, self.info = settings.image_limits, info
        self.pixels_left = PIXELS_PER_REQUEST * self.limits.max_pixels
        self.tokens = 0

    def load(self, part: Fields) -> EncodedImage:
        field = part.values.get("image_url")
        url = (
            Fields({"url": field}) if isinstance(field, str) else Fields(field, part.name("image_url"))
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
            raise ApiError(400, "this model reads text only, so it can't be given a picture", param=name)
        self.tokens += self.info.image_tokens
        if self.info.context_tokens is not None and self.tokens > self.info.context_tokens:
            message = f"more pictures than fit the model's {self.info.context_tokens} positions"
            raise ApiError(400, message, param=name, code="context_length_exceeded")

    def _allowed(self, url: str) -> bool:
        return url[:5].lower() == "data:" or is_from(url, self.hosts)
