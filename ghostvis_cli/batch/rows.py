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
from ghostvis_cli.profile.values import from_python, nearest, shown
from ghostvis_cli.prompt import ImagePart, Message, Role, Text, with_line_breaks
from ghostvis_cli.serve.openai_fields import BODY, IMAGE_PART, IMAGE_URL, MESSAGE, TEXT_PART, Known
from ghostvis_cli.serve.openai_types import ROLES

if TYPE_CHECKING:
    from ghostvis_cli.images import EncodedImage

Json: TypeAlias = Mapping[str, Any]
SAMPLING = tuple(each.name for each in fields(Sampling))
PROMPT_FIELDS = ("prompt", "messages", "images", "system", *SAMPLING)
OPENAI_FIELDS = ("custom_id", "method", "url", "body")
CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
# What a row answers in another way than a server does, or not at all.
NOT_HERE = {"stream": (False,), "n": (1,), "return_token_ids": (False,)}
BODIES = {
    url: replace(known, read=known.read - set(NOT_HERE), neutral={**known.neutral, **NOT_HERE})
    for url, known in ((CHAT_URL, BODY["chat"]), (TEXT_URL, BODY["text"]))
}
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

    @property
    def images(self) -> int:
        return sum(isinstance(part, ImageSource) for turn in self.turns for part in turn.parts)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all that decides the answer, but for the model and what is behind a path or a URL."""
        plain = json.dumps(vars(self), default=vars, ensure_ascii=False, sort_keys=True)
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


def _loaded(part: Text | ImageSource, load: "Callable[[str], EncodedImage]") -> Text | ImagePart:
    return part if isinstance(part, Text) else ImagePart(load(part.url))


def read_row(line: bytes, index: int, line_number: int, settings: RunSettings) -> Row:
    """The row a line holds. One without an id is known by its line's number."""
    row = _parse(line)
    openai = "custom_id" in row or "body" in row
    name, given, raw = _openai(row) if openai else _short(row, settings.raw)
    row_id = _id(row, name, line_number)
    sampling = _sampling(given, settings.sampling, index)
    if raw:
        return _checked(Row(index, row_id, sampling, prompt=_prompt(given)))
    return _checked(Row(index, row_id, sampling, turns=_turns(given, settings.system)))


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
    """JSON can spell half a surrogate pair, which no tokenizer can read; the digest meets every text."""
    try:
        _ = row.digest
    except UnicodeEncodeError:
        raise InputError("half a surrogate pair, which is no text") from None
    return row


# --- the two forms


def _short(row: Json, raw: bool) -> tuple[str, Json, bool]:
    _known(row, ("id", *PROMPT_FIELDS))
    if raw and (stray := [name for name in ("messages", "images", "system") if row.get(name)]):
        raise InputError(f"{stray[0]} has no place with --raw, which continues a prompt as it is")
    return "id", row, raw


def _openai(row: Json) -> tuple[str, Json, bool]:
    _known(row, OPENAI_FIELDS)
    url, body = row.get("url"), row.get("body")
    if row.get("method", "POST") != "POST":
        raise InputError(f"method is POST, not {shown(str(row['method']))}")
    if not isinstance(url, str) or url not in BODIES:
        raise InputError(f"url is {CHAT_URL} or {TEXT_URL}, not {shown(str(url))}")
    if not isinstance(body, dict):
        raise InputError(f"body is a JSON object, not {_kind(body)}")
    return "custom_id", _body(body, url), url == TEXT_URL


def _body(body: Json, url: str) -> Json:
    """The body with OpenAI's spellings replaced by ours. `model` is the run's to choose."""
    _allowed(BODIES[url], body, "body")
    read = BODIES[url].read - {"model", "stream_options"}
    given = {name: value for name, value in body.items() if value is not None and name in read}
    if given.get("top_k") == -1:  # SGLang's way to say: all
        given["top_k"] = 0
    if (limit := given.pop("max_completion_tokens", None)) is not None:
        given["max_tokens"] = limit
    if url == CHAT_URL:
        top = given.pop("top_logprobs", 0)
        wanted = given.pop("logprobs", False)
        if not isinstance(wanted, bool):
            raise InputError(f"body.logprobs is true or false, not {_kind(wanted)}")
        given |= {"logprobs": top} if wanted else {}
    return given


def _allowed(known: Known, values: Json, place: str) -> None:
    if stray := known.stray(values, place):
        raise InputError(stray.message)


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


def _prompt(row: Json) -> str:
    value = row.get("prompt")
    if value is None:
        raise InputError("there is no prompt")
    if not isinstance(value, str):
        raise InputError(f"prompt is text, not {_kind(value)}")
    if not value.strip():
        raise InputError("prompt is empty")
    return value


def _sampling(row: Json, default: Sampling, index: int) -> Sampling:
    """A seed for the run becomes one for each row, so that an answer does not depend on its neighbours."""
    given = {name: _setting(name, row[name]) for name in SAMPLING if row.get(name) is not None}
    if default.seed is not None:
        given.setdefault("seed", (default.seed + index) % SEEDS)
    return replace(default, **given) if given else default


def _setting(name: str, value: object) -> Any:
    try:
        return from_python(
            _sampling_keys()[name], [value] if name == "stop" and isinstance(value, str) else value
        )
    except UsageError as error:
        raise InputError(f"{name} {error.message}") from error


@cache
def _sampling_keys() -> dict[str, Any]:
    return {name: keys()[f"sampling.{name}"] for name in SAMPLING}


def _turns(row: Json, system: str | None) -> tuple[Turn, ...]:
    if (row.get("prompt") is None) == (row.get("messages") is None):
        raise InputError("a row has either a prompt or messages")
    if row.get("messages") is None:
        images = [ImageSource(_url(url, "images")) for url in _list(row, "images", or_none=True)]
        turns = [Turn("user", (*images, Text(_prompt(row))))]
    elif row.get("images"):
        raise InputError("images goes with a prompt; in messages an image is an image_url part of its turn")
    else:
        turns = [_turn(each, f"messages[{n}]") for n, each in enumerate(_list(row, "messages"))]
    own = row.get("system")
    if own is not None and not isinstance(own, str):
        raise InputError(f"system is text, not {_kind(own)}")
    if turns[0].role == "system":
        if own:
            raise InputError("system is there twice, as a field and as a message")
    elif text := system if own is None else own:
        turns.insert(0, Turn("system", (Text(text),)))
    if turns[-1].role != "user":
        raise InputError("the last message is the user's: it is what the model answers")
    return tuple(turns)


def _turn(message: object, name: str) -> Turn:
    if not isinstance(message, dict):
        raise InputError(f"{name} is a JSON object, not {_kind(message)}")
    _allowed(MESSAGE, message, name)
    role = ROLES.get(str(message.get("role")))
    if role is None:
        raise InputError(f"{name}.role is one of {', '.join(ROLES)}, not {shown(str(message.get('role')))}")
    content = message.get("content")
    if isinstance(content, str):
        parts: tuple[Text | ImageSource, ...] = (Text(content),)
    else:
        entries = enumerate(_list(message, "content", f"{name}."))
        parts = tuple(_part(entry, role, f"{name}.content[{n}]") for n, entry in entries)
    if not any(isinstance(part, ImageSource) or part.text.strip() for part in parts):
        raise InputError(f"{name}.content is empty")
    return Turn(role, parts)


def _part(entry: object, role: Role, name: str) -> Text | ImageSource:
    part = entry if isinstance(entry, dict) else {}
    match part.get("type"):
        case "text":
            _allowed(TEXT_PART, part, name)
            if not isinstance(part.get("text"), str):
                raise InputError(f"{name}.text is text, not {_kind(part.get('text'))}")
            return Text(part["text"])
        case "image_url" if role == "user":
            _allowed(IMAGE_PART, part, name)
            image = part.get("image_url")
            _allowed(IMAGE_URL, image if isinstance(image, dict) else {}, f"{name}.image_url")
            return ImageSource(
                _url(image.get("url") if isinstance(image, dict) else image, f"{name}.image_url")
            )
        case "image_url":
            raise InputError(f"{name}: an image belongs to a user's message")
    raise InputError(f'{name} is an object of type "text" or "image_url"')


def _url(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{name} holds a path, a URL or a data: URL, not {_kind(value)}")
    if value == "-":
        raise InputError(f"{name} can't be -: stdin holds no image for a row")
    return value


def _list(row: Json, name: str, path: str = "", *, or_none: bool = False) -> list[Any]:
    value = row.get(name)
    if value is None and or_none:
        return []
    if not isinstance(value, list):
        raise InputError(f"{path}{name} is a list, not {_kind(value)}")
    if not value and not or_none:
        raise InputError(f"{path}{name} is empty")
    return value


def _kind(value: object) -> str:
    """A JSON value's kind, for messages."""
    if value is None:
        return "missing"
    names = {
        bool: "true or false",
        dict: "an object",
        list: "a list",
        str: f"text {shown(str(value))}" if value else "empty",
    }
    return names.get(type(value), "a number")
