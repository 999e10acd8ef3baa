"""OpenAI's request bodies as models: the one reading of them, for the local server, batches and the SGLang plug-in.

A field is read, or ignored because it changes nothing, or refused: an unsupported one unless its value is neutral,
an unknown one always. An answer that leaves out what was asked for would be wrong. null is the same as absent.
/openapi.json has these models' JSON schemas.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic import Field as Rules
from pydantic_core import CoreSchema, PydanticCustomError

from ghostvis_cli.errors import InputError
from ghostvis_cli.prompt import Role
from ghostvis_cli.sampling import RANGES, Sampling, SamplingError

Kind: TypeAlias = Literal["chat", "text"]
Values: TypeAlias = Mapping[str, tuple[object, ...]]
M = TypeVar("M", bound="Fields")

LONGEST_NAME = 64  # characters of a field's name that a refusal repeats
SURROGATE = re.compile("[\ud800-\udfff]")
TYPE_OF_PART = re.compile(r"(content\[\d+\])\.(?:text|image_url)\b")
MAX_N, MAX_PROMPTS, MAX_STOPS = 16, 64, 16


_TOOLS = ": the chat format has no place for tools; response_format answers in JSON"
INSTEAD = dict.fromkeys(("tools", "tool_choice", "tool_calls", "functions", "function_call"), _TOOLS)


class BodyError(InputError):
    """An invalid body. `param` is the path of the field at fault; the message names it."""

    def __init__(self, message: str, param: str | None = None, api_code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.api_code = param, api_code


class BadField(NamedTuple):
    """A field that can't be accepted, by its name as it may be shown, and the reason."""

    name: str
    rule: str
    code: Literal["unknown_parameter", "unsupported_parameter"]


@dataclass(frozen=True)
class Known:
    """The fields that one object of a body may have, and the values of some that ask for nothing (`neutral`)."""

    read: frozenset[str]
    ignored: frozenset[str] = frozenset()
    neutral: Values = field(default_factory=dict)

    def bad_field(self, values: Mapping[str, Any]) -> BadField | None:
        """The first field of `values` that can't be accepted."""
        for name, value in values.items():
            if value is None or name in self.read or name in self.ignored:
                continue
            if name not in self.neutral:
                rule = f"is not a field that is known here{self._meant(name)}"
                return BadField(_shown(name), rule, "unknown_parameter")
            if not any(_same(value, neutral) for neutral in self.neutral[name]):
                rule = f"is not supported here{INSTEAD.get(name, '')}"
                return BadField(name, rule, "unsupported_parameter")
        return None

    def _meant(self, name: str) -> str:
        near = get_close_matches(name[:LONGEST_NAME], self.read, n=1, cutoff=0.8)
        return f" (did you mean {near[0]}?)" if near else ""


def _same(value: object, other: object) -> bool:
    """Equal in JSON, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _shown(name: str) -> str:
    """The name, if it is plausible: nothing else of what was sent gets into answers and logs."""
    return name if re.fullmatch(rf"[\w.-]{{1,{LONGEST_NAME}}}", name, re.ASCII) else "a field"


# --- from pydantic's errors to ours

RULES = {
    "missing": "is required",
    "model_type": "must be a JSON object{not_this}",
    "dict_type": "must be a JSON object{not_this}",
    "model_attributes_type": "must be a JSON object{not_this}",
    "list_type": "must be a list{not_this}",
    "string_type": "must be a string{not_this}",
    "bool_type": "must be true or false{not_this}",
    "int_type": "must be an integer{not_this}",
    "float_type": "must be a number{not_this}",
    "union_tag_invalid": "is one of text or image_url",
    "union_tag_not_found": "is one of text or image_url",
    "literal_error": "is one of {expected}{not_this}",
    "too_short": "is empty",
    "too_long": "has more than {max_length} entries",
    "greater_than_equal": "is {input}, less than {ge}",
    "less_than_equal": "is {input}, more than {le}",
}
# What JSON calls them, one alone (null, true, false and numbers are shown themselves) and several.
ALONE: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
SEVERAL: dict[type, str] = {
    str: "strings", list: "lists", dict: "objects", int: "integers", float: "numbers", bool: "booleans",
    type(None): "nulls",
}  # fmt: skip


def read(model: type[M], values: object, place: str = "") -> M:
    """Parsed JSON as a model. BodyError for the first field at fault, its name prefixed by `place`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, place) from None


def fault(rule: str, *at: str | int, code: str = "field") -> PydanticCustomError:
    """The error that a validator raises. `at` is the path within the validated value."""
    return PydanticCustomError(code, "{rule}", {"rule": rule, "at": at})


def _refusal(error: ValidationError, place: str) -> BodyError:
    first = error.errors(include_url=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    within = ("type",) if kind.startswith("union_tag") else context.get("at", ())
    path = _path(place, *first["loc"], *within)
    code = kind if kind.endswith("_parameter") else None
    return BodyError(f"{path or 'the body'} {rule_of(first) or first['msg']}", path or None, code)


def rule_of(error: Mapping[str, Any]) -> str | None:
    """What one of pydantic's errors asks for and what came, to stand behind a field's name; None: not known."""
    if (rule := RULES.get(error["type"])) is None:
        return None
    said = {name: _in_words(value) for name, value in error.get("ctx", {}).items()}
    given = error.get("input")
    another = error["type"] == "literal_error" and isinstance(given, str)
    return rule.format(**said, input=_number(given), not_this="" if another else not_this(given))


def not_this(value: object) -> str:
    """ ", not 5", ", not a list of strings": a value that came, without the texts that may be in it."""
    shown = ALONE.get(type(value)) or _number(value)
    if isinstance(value, list) and value:
        kinds = [SEVERAL.get(kind, kind.__name__) for kind in dict.fromkeys(map(type, value))]
        shown += f" of {' and '.join(kinds)}"
    return f", not {shown}"


def _number(value: object) -> str:
    """As JSON writes it; true, false and null too."""
    return json.dumps(value)[:LONGEST_NAME] if isinstance(value, int | float | None) else ""


def _in_words(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("'", "")


def _path(place: str, *steps: int | str) -> str:
    """The path as JavaScript writes it, without the type that pydantic puts after a part's number."""
    path = place + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return TYPE_OF_PART.sub(r"\1", path).removeprefix(".")


# --- the models


class Fields(BaseModel):
    """One JSON object of a body. Its fields are those that are read."""

    model_config = ConfigDict(strict=True, frozen=True)
    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Values] = {}

    @classmethod
    @cache
    def known(cls) -> Known:
        read = frozenset(about.alias or name for name, about in cls.model_fields.items())
        return Known(read, cls.ignored, cls.neutral)

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if bad_field := cls.known().bad_field(values):
            raise fault(bad_field.rule, bad_field.name, code=bad_field.code)
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        own = handler.resolve_ref_schema(schema)
        own["properties"] |= {name: {"description": "Not looked at."} for name in sorted(cls.ignored)}
        own["properties"] |= {name: {"enum": [*values, None]} for name, values in sorted(cls.neutral.items())}
        own["additionalProperties"] = {"type": "null"}
        return schema


def _unicode(text: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer can read."""
    if not text.isascii() and SURROGATE.search(text):
        raise fault("is not valid Unicode text")
    return text


def _texts(value: object) -> list[str]:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise fault(f"must be a string or a list of strings{not_this(value)}")
    return [_unicode(entry) for entry in entries]


def _prompts(value: object) -> object:
    """One prompt or several, each text or ids, as a list of texts and tuples."""
    prompts = [value] if isinstance(value, str) or _are_ids(value) else value
    if isinstance(prompts, list):
        if all(isinstance(prompt, str) for prompt in prompts):
            return _texts(prompts)
        if all(_are_ids(prompt) for prompt in prompts):
            return [tuple(ids) for ids in prompts]
    raise fault(f"must be a string, token ids, or a list of one of these{not_this(value)}")


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and {*map(type, value)} == {int}


def _stops(value: object) -> list[str]:
    if "" in (entries := _texts(value)):
        raise fault("holds an empty string")
    return entries


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": _unicode(value)}]
    if not isinstance(value, list):
        raise fault(f"must be a string or a list of parts{not_this(value)}")
    return value


def _linked(value: object) -> object:
    if not isinstance(value, str | dict):
        raise fault(f"must be a string or a JSON object with url{not_this(value)}")
    return {"url": value} if isinstance(value, str) else value


def ranged(name: str, about: str | None = None, *, low: int | None = None) -> Any:
    """An optional field, with its range in `Sampling`."""
    least, most = RANGES[name]
    return Rules(None, description=about, ge=least if low is None else low, le=most)


Str = Annotated[str, AfterValidator(_unicode)]
Filled = Annotated[str, Rules(min_length=1)]
Stops = Annotated[list[str], BeforeValidator(_stops, Filled | list[Filled]), Rules(max_length=MAX_STOPS)]
Ids = Annotated[list[int], Rules(min_length=1)]
Prompts = Annotated[
    list[str | tuple[int, ...]],
    BeforeValidator(_prompts, str | list[str] | Ids | list[Ids]),
    Rules(min_length=1, max_length=MAX_PROMPTS),
]
_PART_IGNORED = frozenset(("cache_control", "prompt_cache_breakpoint"))


class TextPart(Fields):
    """A piece of text in a message."""

    ignored = _PART_IGNORED
    neutral = {"annotations": ([],)}
    type: Literal["text"]
    text: Str


class ImageUrl(Fields):
    ignored = frozenset(("detail",))  # every image is seen at one size
    url: Str = Rules(description="A data: URL; http(s) only from the hosts that the server was started with.")


class ImagePart(Fields):
    """In a user's message only."""

    ignored = _PART_IGNORED
    neutral = {"modalities": ("image",)}
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_linked, ImageUrl | str)]


Part: TypeAlias = Annotated[TextPart | ImagePart, Rules(discriminator="type")]
Parts = Annotated[list[Part], Rules(fail_fast=True, min_length=1)]


class Message(Fields):
    """A message's text, and the empty fields that clients copy from an earlier answer."""

    ignored = frozenset(("name", "id", "cache_control", "reasoning_content", "reasoning"))
    neutral = {
        "tool_calls": ([],), "function_call": (), "refusal": ("",), "audio": (), "annotations": ([],),
        "prefix": (False,), "partial": (False,), "provider_specific_fields": ({},), "images": ([],),
    }  # fmt: skip
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Parts, BeforeValidator(_parts, str | Parts)]

    @property
    def speaker(self) -> Role:
        return "system" if self.role == "developer" else self.role

    @model_validator(mode="after")
    def _images_are_the_users(self) -> Self:
        for number, part in enumerate(self.content):
            if part.type == "image_url" and self.role != "user":
                raise fault("image_url belongs to a user's message", "content", number, "type")
        return self


Messages = Annotated[list[Message], Rules(fail_fast=True, min_length=1)]


class Conversation(Fields):
    """Messages alone, as rows of a batch hold them."""

    messages: Messages


class StreamOptions(Fields):
    """What a stream has besides text."""

    ignored = frozenset(("include_obfuscation",))
    neutral = {"continuous_usage_stats": (False,)}
    include_usage: bool | None = None


class JsonSchema(Fields):
    ignored = frozenset(("name", "description", "strict"))
    # Not `schema`, which is a method of pydantic's.
    wanted: dict[str, Any] | None = Rules(
        None, alias="schema", description="JSON Schema; absent is any object."
    )


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _a_schema_has_its_type(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            rule = "is required" if self.json_schema is None else f"has no place beside type {self.type}"
            raise fault(rule, "json_schema")
        return self

    @property
    def as_text(self) -> str | None:
        """The JSON Schema of the answer."""
        if self.type == "text":
            return None
        return json.dumps((self.json_schema and self.json_schema.wanted) or {"type": "object"})


# Fields of real clients without effect here: user, billing, storage, scheduling, speed-ups, and the effort of
# reasoning for a model that does none.
_IGNORED = frozenset((
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prediction", "reasoning_effort",
    "reasoning", "verbosity", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
    "safety_identifier", "rid", "request_id", "priority", "separate_reasoning", "stream_reasoning",
    "cache_prompt", "keep_alive", "ttl",
    "custom_labels",
))  # fmt: skip

# Fields that would change the answer, and that none of our engines supports.
_NEUTRAL: Values = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "logit_bias": ({},), "modalities": (["text"],), "audio": (), "web_search_options": (), "moderation": (),
    "best_of": (1,),
    "suffix": ("",), "min_tokens": (0,), "stop_token_ids": ([],), "stop_regex": ([], ""),
    "ebnf": (), "json_schema": (), "structural_tag": (), "skip_special_tokens": (True,),
    "no_stop_trim": (False,), "include_stop_str_in_output": (False,), "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,), "chat_template": (),
    "chat_template_kwargs": ({}, {"enable_thinking": False}, {"thinking": False}), "enable_thinking": (False,),
    "thinking": ({"type": "disabled"},), "lora_path": (), "custom_logit_processor": (), "logits_processors": ([],),
    "custom_params": ({},), "input_ids": (), "prompt_logprobs": (), "cache_salt": (), "extra_key": (),
    "length_penalty": (1,), "use_beam_search": (False,), "bad_words": ([],), "allowed_token_ids": ([],),
    "return_hidden_states": (False,), "return_prompt_token_ids": (False,), "return_meta_info": (False,),
    "return_cached_tokens_details": (False,), "return_tokens_as_token_ids": (False,),
}  # fmt: skip


class Generation(Fields):
    """The fields of both generating routes."""

    kind: ClassVar[Kind]
    ignored = _IGNORED
    neutral = _NEUTRAL
    model: Str | None = Rules(
        None, description="The served model's name; absent or empty: whatever is served."
    )
    max_tokens: int | None = ranged("max_tokens", "Not looked at beside max_completion_tokens.")
    max_completion_tokens: int | None = ranged("max_tokens")
    temperature: float | None = ranged("temperature", "0 takes the likeliest token.")
    top_p: float | None = ranged("top_p")
    top_k: int | None = ranged("top_k", "0 or -1: all. Beyond OpenAI.", low=-1)
    min_p: float | None = ranged("min_p", "Beyond OpenAI.")
    repetition_penalty: float | None = ranged("repetition_penalty", "Beyond OpenAI.")
    presence_penalty: float | None = ranged("presence_penalty")
    frequency_penalty: float | None = ranged("frequency_penalty")
    response_format: ResponseFormat | None = None
    regex: Str | None = Rules(None, description="What the whole answer matches. Beyond OpenAI.")
    ignore_eos: bool | None = Rules(None, description="Beyond OpenAI.")
    stop: Stops | None = None
    seed: int | None = ranged("seed")
    n: int | None = Rules(None, ge=1, le=MAX_N)
    stream: bool | None = Rules(None, description="Answer with server-sent events, the last one [DONE].")
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Rules(None, description="Beyond OpenAI: token_ids in every choice.")

    @property
    def top(self) -> int | None:
        """How many alternatives to report for each token; None for no log-probabilities at all."""
        raise NotImplementedError

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self, default: Sampling) -> Sampling:
        """The sampling that the body asks for, on top of `default`."""
        asked = {each.name: getattr(self, each.name, None) for each in fields(Sampling)}
        asked |= {
            "max_tokens": self.limit or None,
            "stop": tuple(self.stop or ()) or None,
            "logprobs": self.top,
        }
        asked["top_k"] = 0 if self.top_k == -1 else self.top_k  # SGLang writes all so
        asked["json_schema"] = self.response_format and self.response_format.as_text
        try:
            return default.changed(**{name: value for name, value in asked.items() if value is not None})
        except SamplingError as error:
            raise BodyError(error.message, error.field) from error


class ChatBody(Generation):
    """The body of /v1/chat/completions."""

    kind = "chat"
    neutral = {**_NEUTRAL, "echo": (False,), "add_special_tokens": (False,)}
    messages: Messages
    logprobs: bool | None = None
    top_logprobs: int | None = ranged("logprobs", "Needs logprobs: true.")
    continue_final_message: bool | None = Rules(
        None, description="Nothing but what a last message of the assistant's asks for anyway. Beyond OpenAI."
    )

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise fault("needs logprobs: true", "top_logprobs")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise fault("needs a last message of the assistant's", "continue_final_message")
        return self

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TextBody(Generation):
    """The body of /v1/completions."""

    kind = "text"
    neutral = {**_NEUTRAL, "continue_final_message": (False,), "add_special_tokens": (True,)}
    prompt: Prompts
    echo: bool | None = Rules(None, description="The prompt stands before its answer, in logprobs too.")
    max_tokens: int | None = ranged("max_tokens", "0: no answer, for the sake of echo.", low=0)
    max_completion_tokens: int | None = ranged("max_tokens", low=0)
    logprobs: int | None = ranged("logprobs", "Alternatives a token.")

    @property
    def top(self) -> int | None:
        return self.logprobs


class TokenizeBody(Fields):
    """The body of /tokenize."""

    neutral = {"add_special_tokens": (False,)}
    model: Str | None = None
    prompt: Str


BODY: dict[Kind, type[ChatBody] | type[TextBody]] = {"chat": ChatBody, "text": TextBody}
