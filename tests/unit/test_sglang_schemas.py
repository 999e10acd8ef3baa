"""Which JSON schemas the plug-in refuses, since SGLang's grammar backend would leave a part of them out."""

import json
from typing import Any

import pytest

from ghostvis_cli.sglang.plugin.schemas import refuse_what_is_left_out


def within(schema: dict[str, Any]) -> str:
    """Somewhere in a larger one."""
    whole = {"type": "object", "properties": {"not": {"type": "array", "items": {"anyOf": [schema]}}}}
    return json.dumps({"$defs": {"if": whole}, "$ref": "#/$defs/if"})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 100000007},
        {"type": "number", "multipleOf": 0.5},
        {"type": ["integer", "null"], "multipleOf": 2},
        {"type": "integer", "multipleOf": 7, "minimum": 3},
        {"multipleOf": 7},
        {"type": "array", "items": {}, "uniqueItems": True},
        {"not": {}},
        {"type": "string", "pattern": "^a*$", "minLength": 3},
        {"type": "integer", "minimum": 5, "anyOf": [{"maximum": 7}]},
        {"$ref": "#/$defs/if", "required": ["a"]},
        {"type": "object", "if": {}, "then": {}},
        {"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]},
    ],
    ids=str,
)
def test_a_rule_that_would_be_left_out_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the JSON schema can't be followed: "):
        refuse_what_is_left_out(within(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 7},
        {"type": "array", "uniqueItems": False},
        {"enum": [{"not": 1}], "default": {"contains": 1}},
        {"allOf": [{"type": "integer"}]},
        {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "A", "description": "b"},
        {"oneOf": [{"type": "object"}], "discriminator": {"propertyName": "kind"}, "type": "object"},
        {"type": "object", "properties": {"multipleOf": {"type": "string"}, "contains": {"enum": ["if"]}}},
    ],
    ids=str,
)
def test_a_rule_that_is_followed_and_a_name_that_looks_like_one_pass(schema: dict[str, Any]) -> None:
    refuse_what_is_left_out(within(schema))


@pytest.mark.parametrize(
    "text", [None, "", "{", "[" * 100_000, "5", "$$ANY$$"], ids=lambda text: str(text)[:9]
)
def test_what_is_no_schema_is_sglangs_to_refuse(text: str | None) -> None:
    refuse_what_is_left_out(text)
