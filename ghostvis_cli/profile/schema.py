"""The JSON Schema of profile files, for editors to complete and check by: `python -m ghostvis_cli.profile`.

Written from the same table as everything else. It is a little laxer than the program: ranges that only a
dataclass knows, and the traps of YAML, are found by `ghostvis profile validate`.
"""

import json
from typing import Any

from ghostvis_cli.profile.files import NAME
from ghostvis_cli.profile.settings import SECTIONS, Key, keys

TYPES = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "choice": "string"}


def schema() -> dict[str, Any]:
    """A file with `profiles` is a project's; any other is one profile."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "GhostVis profile",
        "description": "One profile, or a project's ghostvis.yaml with several under `profiles`.",
        "if": {"type": "object", "required": ["profiles"]},
        "then": {"$ref": "#/$defs/project"},
        "else": {"$ref": "#/$defs/profile"},
        "$defs": {"profile": _profile(), "project": _project()},
    }


def _project() -> dict[str, Any]:
    named = {
        "type": "object",
        "propertyNames": {"pattern": f"^{NAME.pattern}$"},
        "additionalProperties": {"$ref": "#/$defs/profile"},
        "description": "Profiles by name.",
    }
    return _object({"profiles": named}) | {"required": ["profiles"]}


def _profile() -> dict[str, Any]:
    properties: dict[str, Any] = {
        "description": {"type": "string", "description": "What it is for; `ghostvis profile list` shows it."},
        "extends": {"type": "string", "description": "Profile to inherit from."},
    }
    for section in SECTIONS:
        own = {key.name: _key(key) for key in keys().values() if key.path.startswith(section + ".")}
        properties[section] = _object(own)
    return _object(properties | {path: _key(key) for path, key in keys().items() if "." not in path})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _key(key: Key) -> dict[str, Any]:
    entry: dict[str, Any] = {"description": f"{key.about}. Environment: {key.variable}"}
    if key.kind == "texts":
        entry["type"] = ["array", "string"]
        entry["items"] = {"type": "string"}
    else:
        entry["type"] = [TYPES[key.kind], "null"] if key.nullable else TYPES[key.kind]
    if key.choices:
        entry["enum"] = [*key.choices, None] if key.nullable else list(key.choices)
    bounds = {"minimum": key.low, "maximum": key.high}
    return entry | {name: bound for name, bound in bounds.items() if bound is not None} | _default(key)


def _default(key: Key) -> dict[str, Any]:
    return {"default": list(key.default) if isinstance(key.default, tuple) else key.default}


def as_text() -> str:
    return json.dumps(schema(), indent=2) + "\n"
