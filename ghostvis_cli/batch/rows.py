"""One line of a batch -> one checked row, and a row -> a request. Opens no image until the row's turn comes.

A row is `{"id", "prompt" | "messages", "images", "system", sampling...}`, or one of OpenAI's batch files:
`{"custom_id", "method", "url", "body"}`. Every refusal is an InputError whose message stands behind a line number.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from ghostvis_cli.engines.base import GenerateRequest, Sampling
from ghostvis_cli.errors import InputError, UsageError
from ghostvis_cli.profile.settings import keys
from ghostvis_cli.profile.values import as_json, from_python, nearest, shown
from ghostvis_cli.prompt import ImagePart, Message, Role, Text, with_line_breaks

if TYPE_CHECKING:
    from ghostvis_cli.images import EncodedImage
    from ghostvis_cli.openai import schema

Json: TypeAlias = Mapping[str, Any]
SAMPLING = tuple(each.name for each in fields(Sampling))
PROMPT_FIELDS = ("prompt", "messages", "images", "system", *SAMPLING)
OPENAI_FIELDS = ("custom_id", "method", "url", "body")
CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
KINDS: dict[object, "schema.Kind"] = {CHAT_URL: "chat", TEXT_URL: "text"}
# What a row answers in another way than a server does, or not at all.
NOT_HERE = {"stream": False, "n": 1, "return_token_ids": False}
SEEDS = 2**63


@dataclass(frozen=True)
class RunSettings:
    """What rows that do not say otherwise are run with."""

    sampling: Sampling
    system: str | None = None
    raw: bool = False


@dataclass(frozen=True)
class ImageSource:
    """An image by name: a path (relative to the input file), a URL or a data: URL."""

    url: str


@dataclass(frozen=True)
class Turn:
    """One message of a row."""

    role: Role
    parts: tuple[Text | ImageSource, ...]


@dataclass(frozen=True)
class Row:
    """`index` counts rows from 0. Exactly one of `turns` and `prompt` (raw text to continue) holds something."""

    index: int
    id: str | int
    sampling: Sampling
    turns: tuple[Turn, ...] = ()
    prompt: str | None = None
    metadata: Json | None = None  # for whoever reads the record

    @property
    def images(self) -> int:
        return sum(isinstance(part, ImageSource) for turn in self.turns for part in turn.parts)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all that decides the answer, but for the model and what is behind a path or a URL."""
        deciding = {name: value for name, value in vars(self).items() if name != "metadata"}
        plain = json.dumps(deciding, default=plain_fields, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(plain.encode()).digest()

    def request(self, load: "Callable[[str], EncodedImage]") -> GenerateRequest:
        """Loads the row's images: blocks, and raises their InputErrors."""
        if self.prompt is not None:
            return GenerateRequest(prompt=self.prompt, sampling=self.sampling)
        messages = [
            Message(turn.role, with_line_breaks([_loaded(part, load) for part in turn.parts]))
            for turn in self.turns
        ]
        return GenerateRequest(tuple(messages), sampling=self.sampling)


def plain_fields(value: object) -> dict[str, Any]:
    """Settings that came later count where they are set: a batch that was begun before them goes on."""
    unset = {"presence_penalty": 0, "frequency_penalty": 0, "json_schema": None, "regex": None}
    return {name: each for name, each in vars(value).items() if name not in unset or each != unset[name]}


def _loaded(part: Text | ImageSource, load: "Callable[[str], EncodedImage]") -> Text | ImagePart:
    return part if isinstance(part, Text) else ImagePart(load(part.url))


def read_row(line: bytes, index: int, line_number: int, settings: RunSettings) -> Row:
    """The row a line holds. One without an id is known by its line's number."""
    values = _parse(line)
    openai = "custom_id" in values or "body" in values
    row_id = _id(values, "custom_id" if openai else "id", line_number)
    row = _openai(values, index, settings) if openai else _short(values, index, settings)
    metadata = (values["body"] if openai else values).get("metadata")
    if not isinstance(metadata, dict | None):
        raise InputError(f"metadata is an object, not {_kind(metadata)}")
    return _checked(replace(row, id=row_id, metadata=metadata))


def _parse(line: bytes) -> Json:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_no_doubles, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error.reason} at byte {error.start} of the line") from error
    except RecursionError:
        raise InputError("nested too deeply") from None
    except ValueError as error:  # of JSON, and of numbers with thousands of digits
        place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"not JSON: {message}{place}") from error
    if not isinstance(value, dict):
        raise InputError(f"a row is a JSON object, not {_kind(value)}")
    return value


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{shown(doubled)} is there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _checked(row: Row) -> Row:
    """JSON can spell half a surrogate pair, which no tokenizer can read, and numbers that no record can hold."""
    try:
        _ = row.digest
        json.dumps(row.metadata, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise InputError("half a surrogate pair, which is no text") from None
    except ValueError:
        raise InputError("metadata holds a number that is out of range") from None
    return row


# --- the two forms


def _short(values: Json, index: int, settings: RunSettings) -> Row:
    _known(values, ("id", "metadata", *PROMPT_FIELDS))
    given = {name: _setting(name, values[name]) for name in SAMPLING if values.get(name) is not None}
    try:
        sampling = _seeded(settings.sampling, index).changed(**given)
    except UsageError as error:
        raise InputError(error.message) from error
    if settings.raw:
        if stray := [name for name in ("messages", "images", "system") if values.get(name)]:
            raise InputError(f"{stray[0]} has no place with --raw, which continues a prompt as it is")
        return Row(index, "", sampling, prompt=_prompt(values.get("prompt")))
    return Row(index, "", sampling, _turns(values, settings.system))


def _turns(values: Json, default_system: str | None) -> tuple[Turn, ...]:
    if (values.get("prompt") is None) == (values.get("messages") is None):
        raise InputError("a row has either a prompt or messages")
    own = values.get("system")
    if own is not None and not isinstance(own, str):
        raise InputError(f"system is text, not {_kind(own)}")
    system = default_system if own is None else own
    if values.get("messages") is None:
        images = [ImageSource(_url(url, "images")) for url in _list(values, "images")]
        return _complete([Turn("user", (*images, Text(_prompt(values.get("prompt")))))], system)
    if values.get("images"):
        raise InputError("images goes with a prompt; in messages an image is an image_url part of its turn")
    from ghostvis_cli.openai import schema

    messages = schema.read(schema.Conversation, {"messages": values["messages"]}).messages
    if own and messages[0].speaker == "system":
        raise InputError("system is there twice, as a field and as a message")
    return _complete(_spoken(messages), system)


def _openai(values: Json, index: int, settings: RunSettings) -> Row:
    """`model` is the run's to choose."""
    from ghostvis_cli.openai import schema

    _known(values, OPENAI_FIELDS)
    url, body = values.get("url"), values.get("body")
    if values.get("method", "POST") != "POST":
        raise InputError(f"method is POST, not {as_json(values['method'])}")
    if (kind := KINDS.get(url if isinstance(url, str) else None)) is None:
        raise InputError(f"url is {CHAT_URL} or {TEXT_URL}, not {as_json(url)}")
    if not isinstance(body, dict):
        raise InputError(f"body is a JSON object, not {_kind(body)}")
    asked = schema.read(schema.BODY[kind], body, "body")
    for name, neutral in NOT_HERE.items():
        if getattr(asked, name) not in (None, neutral):
            raise InputError(f"body.{name} is not supported here")
    sampling = asked.sampling(_seeded(settings.sampling, index))
    if isinstance(asked, schema.ChatBody):
        return Row(index, "", sampling, _complete(_spoken(asked.messages, "body."), settings.system))
    if len(asked.prompt) > 1 or not isinstance(asked.prompt[0], str):
        raise InputError("body.prompt is one text: a row has one answer")
    if asked.echo or asked.limit == 0:
        field = "echo" if asked.echo else "max_tokens 0"
        raise InputError(f"body.{field} is not supported here: a row has an answer")
    return Row(index, "", sampling, prompt=_prompt(asked.prompt[0]))


def _known(row: Json, names: Sequence[str]) -> None:
    for name in row:
        if name not in names:
            raise InputError(f"no field is called {shown(name)}{nearest(name, names)}")


# --- the fields


def _id(row: Json, name: str, line_number: int) -> str | int:
    value = row.get(name)
    if value is None:
        return line_number
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"{name} is text or a whole number, not {_kind(value)}")
    if value == "":
        raise InputError(f"{name} is empty")
    return value


def _prompt(value: object) -> str:
    if value is None:
        raise InputError("there is no prompt")
    if not isinstance(value, str):
        raise InputError(f"prompt is text, not {_kind(value)}")
    if not value.strip():
        raise InputError("prompt is empty")
    return value


def _seeded(default: Sampling, index: int) -> Sampling:
    """A seed of each row's own, made from the run's, so that an answer does not depend on other rows."""
    return default if default.seed is None else replace(default, seed=(default.seed + index) % SEEDS)


def _setting(name: str, value: object) -> Any:
    if name == "json_schema":
        if not isinstance(value, dict | str):
            raise InputError(f"json_schema is a JSON object, not {_kind(value)}")
        value = value if isinstance(value, str) else json.dumps(value)
    try:
        return from_python(_sampling_keys()[name], value)
    except UsageError as error:
        raise InputError(f"{name} {error.message}") from error


@cache
def _sampling_keys() -> dict[str, Any]:
    return {name: keys()[f"sampling.{name}"] for name in SAMPLING}


def _complete(turns: list[Turn], system: str | None) -> tuple[Turn, ...]:
    if system and turns[0].role != "system":
        turns.insert(0, Turn("system", (Text(system),)))
    if all(turn.role != "user" for turn in turns):
        raise InputError("no message is the user's, so there is nothing to answer")
    if turns[-1].role == "system":
        raise InputError("a system message must be followed by a user message")
    return tuple(turns)


def _spoken(messages: "Sequence[schema.Message]", place: str = "") -> list[Turn]:
    return [_turn(message, f"{place}messages[{number}]") for number, message in enumerate(messages)]


def _turn(message: "schema.Message", name: str) -> Turn:
    parts = tuple(
        Text(part.text)
        if part.type == "text"
        else ImageSource(_url(part.image_url.url, f"{name}.content[{n}]"))
        for n, part in enumerate(message.content)
    )
    if not any(isinstance(part, ImageSource) or part.text.strip() for part in parts):
        raise InputError(f"{name}.content is empty")
    return Turn(message.speaker, parts)


def _url(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{name} holds a path, a URL or a data: URL, not {_kind(value)}")
    if value == "-":
        raise InputError(f"{name} can't be -: stdin holds no image for a row")
    return value


def _list(values: Json, name: str) -> list[Any]:
    value = values.get(name)
    if not isinstance(value, list | None):
        raise InputError(f"{name} is a list, not {_kind(value)}")
    return value or []


def _kind(value: object) -> str:
    """A JSON value for messages: long ones by their kind."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return f"text {shown(value)}" if value else "empty"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return as_json(value)
