"""A session as lines of JSON, and back. What comes back may have been written by anyone: every value is checked.

    {"schema_version": 1, "kind": "ghostvis chat", "system": ..., "forgotten": 0, "profile": ..., "model": ...}
    {"text": ..., "images": [{"sha256", "name", "data"?}], "reply": {"text", "finish_reason", "usage", ...} | null}
    {"draft": ... | null, "images": [...]}                        the message being put together, where there is one

An image's bytes are base64 in the first place that names them, or lie beside the file under their hash.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar, get_args
from weakref import WeakKeyDictionary

from ghostvis_cli.chat.session import Reply, Session, Turn
from ghostvis_cli.encoding import well_formed
from ghostvis_cli.engines.base import Beside, FinishReason, ToolCall, Usage
from ghostvis_cli.errors import GhostvisError, InputError
from ghostvis_cli.version import SCHEMA_VERSION

if TYPE_CHECKING:
    from ghostvis_cli.image_limits import ImageLimits
    from ghostvis_cli.images import EncodedImage

T = TypeVar("T")
KIND = "ghostvis chat"
HASH = re.compile(r"[0-9a-f]{64}")
LARGEST_COUNT = 10**12  # of tokens
_hashes: "WeakKeyDictionary[EncodedImage, str]" = WeakKeyDictionary()


def image_hash(image: "EncodedImage") -> str:
    """sha256 of the bytes a server would be sent; worked out once."""
    if image not in _hashes:
        _hashes[image] = sha256(image.data).hexdigest()
    return _hashes[image]


def lines(session: Session, about: dict[str, str]) -> Iterator[str]:
    """A file that needs nothing else: the images are inside, each once."""
    embedded: set[str] = set()

    def with_bytes(image: "EncodedImage") -> dict[str, str]:
        row = named(image)
        if row["sha256"] not in embedded:
            embedded.add(row["sha256"])
            row["data"] = base64.b64encode(image.data).decode("ascii")
        return row

    yield head(session, about)
    for turn in session.turns:
        yield line_of(turn, with_bytes)
    yield from draft(session, with_bytes)


def named(image: "EncodedImage") -> dict[str, str]:
    """An image whose bytes lie elsewhere."""
    return {"sha256": image_hash(image), "name": image.name}


def head(session: Session, about: dict[str, str]) -> str:
    first = {"schema_version": SCHEMA_VERSION, "kind": KIND, "system": session.system}
    return _line(first | {"forgotten": session.forgotten} | about)


def line_of(turn: Turn, write_image: "Callable[[EncodedImage], dict[str, str]]" = named) -> str:
    reply = asdict(turn.reply) if turn.reply else None
    return _line({"text": turn.text, "images": [write_image(image) for image in turn.images], "reply": reply})


def draft(session: Session, write_image: "Callable[[EncodedImage], dict[str, str]]" = named) -> Iterator[str]:
    """The message that is being put together, if there is one."""
    if session.pending or session.draft is not None:
        yield _line({"draft": session.draft, "images": [write_image(image) for image in session.pending]})


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read(
    content: Iterable[bytes], name: str, limits: "ImageLimits", beside: Callable[[str], bytes]
) -> Session:
    """The session of a file's lines; InputError with the line. `beside` finds an image's bytes by their hash."""
    reader = _Reader(limits, beside)
    number = 0
    try:
        for number, line in enumerate(content, start=1):
            reader.line(number, line)
    except (ValueError, RecursionError, GhostvisError) as error:  # ValueError: JSON, UTF-8, a number too long
        reason = error.message if isinstance(error, GhostvisError) else "not a line of JSON"
        raise InputError(
            f"{name}: line {number}: {reason}", hint="ghostvis chat --session NEW; the file stays as it is"
        ) from error
    if not number:
        raise InputError(f"{name}: empty, so no conversation", hint="ghostvis chat --session NEW")
    return reader.finished()


class _Reader:
    """Builds a session line by line."""

    def __init__(self, limits: "ImageLimits", beside: Callable[[str], bytes]) -> None:
        self.limits, self.beside = limits, beside
        self.session = Session()
        self.images: dict[str, EncodedImage] = {}

    def line(self, number: int, line: bytes) -> None:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise InputError("no JSON object")
        if number == 1:
            self._head(row)
        elif self.session.draft is not None or self.session.pending or not self.session.answered:
            raise InputError("comes after the last message")
        elif "draft" in row:
            self.session.draft = _text(row, "draft", None)
            self.session.pending = list(self._images(row))
        else:
            reply = _reply(_field(row, "reply", dict)) if row.get("reply") is not None else None
            self.session.turns.append(Turn(_needed(row, "text"), self._images(row), reply))

    def finished(self) -> Session:
        """A message without a reply becomes the draft again."""
        self.session.take_back()
        self.session.forgotten = min(self.session.forgotten, len(self.session.turns))
        return self.session

    def _head(self, row: dict[str, Any]) -> None:
        if row.get("kind") != KIND:
            raise InputError("this is no conversation of ghostvis chat")
        if row.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"written by another version (schema_version {str(row.get('schema_version'))[:20]})"
            )
        self.session.system = _text(row, "system", None)
        self.session.forgotten = _count(row, "forgotten")

    def _images(self, row: dict[str, Any]) -> "tuple[EncodedImage, ...]":
        return tuple(self._image(each) for each in _field(row, "images", list))

    def _image(self, row: object) -> "EncodedImage":
        from ghostvis_cli.images import from_bytes

        if not isinstance(row, dict):
            raise InputError("an image is no JSON object")
        digest, name = _needed(row, "sha256"), _needed(row, "name")
        if not HASH.fullmatch(digest):
            raise InputError("an image's sha256 is none")
        if digest not in self.images:
            content = self._embedded(row) if "data" in row else self.beside(digest)
            if sha256(content).hexdigest() != digest:
                raise InputError(f"the image {name[:80]!r} is damaged")
            self.images[digest] = from_bytes(content, name, self.limits)
        return self.images[digest]

    def _embedded(self, row: dict[str, Any]) -> bytes:
        text = _needed(row, "data")
        if len(text) > self.limits.max_bytes * 4 // 3 + 4:
            raise InputError(f"an image is larger than {self.limits.size}")
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise InputError("an image is no base64") from error


def _reply(row: dict[str, Any]) -> Reply:
    reason: Any = row.get("finish_reason")
    if reason not in get_args(FinishReason):
        raise InputError("a reply has no finish_reason")
    return Reply(
        text=_needed(row, "text"),
        finish_reason=reason,
        usage=_usage(row["usage"]) if isinstance(row.get("usage"), dict) else None,
        completion_tokens=_count(row, "completion_tokens"),
        ttft_s=_seconds(row, "ttft_s"),
        total_s=_seconds(row, "total_s") or 0.0,
        model=_text(row, "model", "") or "",
        beside=_beside(_field(row, "beside", dict)),
    )


def _beside(row: dict[str, Any]) -> Beside:
    calls = _field(row, "tool_calls", list)
    if not all(isinstance(call, dict) for call in calls):
        raise InputError("a tool call is no JSON object")
    texts = ("id", "name", "arguments")
    found = [ToolCall(_count(call, "index"), *(_needed(call, key) for key in texts)) for call in calls]
    return Beside(_text(row, "reasoning", "") or "", _text(row, "refusal", "") or "", tuple(found))


def _usage(row: dict[str, Any]) -> Usage:
    return Usage(
        prompt_tokens=_count(row, "prompt_tokens"),
        completion_tokens=_count(row, "completion_tokens"),
        cached_tokens=None if row.get("cached_tokens") is None else _count(row, "cached_tokens"),
        image_tokens=_count(row, "image_tokens"),
    )


def _field(row: dict[str, Any], key: str, kind: type[T]) -> T:
    value = row.get(key, kind())
    if not isinstance(value, kind):
        raise InputError(f"{key} is no {kind.__name__}")
    return value


def _text(row: dict[str, Any], key: str, default: str | None) -> str | None:
    value = row.get(key, default)
    if value is not None:
        well_formed(value, key)
    return value


def _needed(row: dict[str, Any], key: str) -> str:
    if (value := _text(row, key, None)) is None:
        raise InputError(f"{key} is missing")
    return value


def _count(row: dict[str, Any], key: str) -> int:
    value = row.get(key, 0)
    if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
        raise InputError(f"{key} is no count")
    return value


def _seconds(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise InputError(f"{key} is no number of seconds")
    return float(value)
