"""One value for one setting: from a YAML node, from text (--set, environment) or from Python. Says why not.

Strict on purpose: a model tag or a limit silently turned into something else is worse than a message. Every
refusal is a UsageError whose message stands behind a place and a key, so it begins in lower case and names
neither.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostvis_cli.errors import UsageError
from ghostvis_cli.profile.document import YAML_TAG, Document, compose, what
from ghostvis_cli.profile.secrets import redact
from ghostvis_cli.profile.settings import OF_A_HUB, Key

if TYPE_CHECKING:
    from yaml.nodes import Node

LONGEST_SHOWN = 60


def from_node(key: Key, node: "Node", base: Path | None) -> object:
    """What the node means for this key. A relative path is taken from `base`, the directory of the file."""
    return _checked(key, _from_node(key, node), base)


def from_text(key: Key, text: str) -> object:
    """As in YAML, but text needs no quotes (though it may have them), and a switch may also be 1 or 0."""
    if key.nullable and text.strip() in ("", "null", "~"):
        return None
    if key.kind == "bool" and text in ("0", "1"):
        return text == "1"
    if key.kind in ("str", "choice") and text[:1] not in ('"', "'"):
        return _checked(key, _choice(key, text) if key.kind == "choice" else text, None)
    if key.kind == "texts" and text[:1] not in ('"', "'", "["):
        return (text,)
    document = Document("")
    node = compose(text, document)
    if node is None:
        raise UsageError(f"{shown(text)} {document.faults[0].reason}; it takes {key.expects}")
    return from_node(key, node, None)


def from_python(key: Key, value: object) -> object:
    """A value given in Python: paths become text, sequences tuples; types are held to as in YAML."""
    if isinstance(value, PathLike):
        value = fspath(value)
    if key.kind == "texts" and isinstance(value, Sequence):
        value = (value,) if isinstance(value, str) else tuple(value)
    fits: dict[str, Any] = {
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, int | float) and not isinstance(value, bool),
        "str": isinstance(value, str),
        "choice": value in key.choices,
        "texts": isinstance(value, tuple) and all(isinstance(each, str) for each in value),
    }
    if not fits[key.kind] and not (value is None and key.nullable):
        raise UsageError(f"takes {key.expects}, not {as_json(value)}")
    return _checked(key, float(value) if key.kind == "float" and isinstance(value, int) else value, None)


def _checked(key: Key, value: object, base: Path | None) -> object:
    if key.is_path and isinstance(value, str) and not value.startswith(OF_A_HUB):
        value = _absolute(value, base)
    try:
        key.check(value)
    except UsageError as error:
        raise UsageError(error.message.removeprefix(f"{key.name} ")) from error
    return value


def _absolute(value: str, base: Path | None) -> str:
    """Without a base, as given: the shell's current directory is what its user means."""
    if not value or "\0" in value:
        raise UsageError("is no path")
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise UsageError("begins with ~, and the home directory is not known") from error
    return str(path if base is None else base / path)


def _from_node(key: Key, node: "Node") -> object:
    from yaml.nodes import ScalarNode, SequenceNode

    if node.tag == YAML_TAG + "null":
        if not key.nullable:
            raise UsageError(f"has no value; it takes {key.expects}, or leave it out")
        return None
    if key.kind == "texts" and isinstance(node, SequenceNode):
        return tuple(_text(each) for each in node.value)
    if not isinstance(node, ScalarNode):
        raise UsageError(f"takes {key.expects}, not {what(node)}")
    match key.kind:
        case "texts":
            return (_text(node),)
        case "str":
            return _text(node)
        case "choice":
            return _choice(key, _text(node) if node.value in key.choices else str(node.value))
        case "bool":
            return _bool(key, node)
        case _:
            return _number(key, node)


def _text(node: "Node") -> str:
    if node.tag == YAML_TAG + "str":
        return str(node.value)
    if node.tag.removeprefix(YAML_TAG) not in ("bool", "int", "float"):
        raise UsageError(f"takes text, not {what(node)}")
    raise UsageError(f'without quotes YAML reads {shown(node.value)} as {what(node)}; write "{node.value}"')


def _choice(key: Key, text: str) -> str:
    if text in key.choices:
        return text
    raise UsageError(f"{shown(text)} is not one of {', '.join(key.choices)}{nearest(text, key.choices)}")


def _bool(key: Key, node: "Node") -> bool:
    if node.tag != YAML_TAG + "bool":
        raise UsageError(f"{shown(node.value)} is {what(node)}; write true or false")
    return what(node) == "true"


def _number(key: Key, node: "Node") -> int | float:
    from ghostvis_cli.profile.yaml12 import is_number, whole

    text, tag, found = str(node.value), node.tag.removeprefix(YAML_TAG), None
    with suppress(ValueError, OverflowError):  # not a number, not a finite one, thousands of digits
        found = whole(text) if tag == "int" else float(text) if tag == "float" else None
        if found is not None and key.kind == "float":
            return float(found)
    if key.kind == "int" and isinstance(found, int):
        return found
    if tag == "str" and getattr(node, "style", None) is not None and is_number(text):
        raise UsageError(f"{text} in quotes is text; write it without")
    if tag in ("str", "float"):
        hint = f"; write {found:.0f}" if isinstance(found, float) and _is_whole(found) else ""
        raise UsageError(f"takes {key.expects}, not {shown(text)}{hint}")
    raise UsageError(f"takes {key.expects}; YAML reads {shown(text)} as {what(node)}")


def _is_whole(value: float) -> bool:
    return abs(value) < 1e15 and value.is_integer()


def shown(text: str) -> str:
    """A value as messages quote it: short, on one line, secrets taken out."""
    return repr(_short(text))


def as_json(value: object) -> str:
    """The same for a value that is no text: [5], true, {"a": 1}."""
    if isinstance(value, str):
        return shown(value)
    return _short(json.dumps(value, ensure_ascii=False, default=str))


def _short(text: str) -> str:
    text = redact(text)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 1] + "…"


def nearest(name: str, known: Sequence[str]) -> str:
    """' (did you mean X?)' or nothing."""
    from difflib import get_close_matches

    by_lower = {each.lower(): each for each in known}
    found = get_close_matches(name.lower().replace("-", "_"), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean {by_lower[found[0]]}?)" if found else ""
