"""What SGLang's grammar backend leaves out of a JSON schema without a word is refused (seen on xgrammar 0.2.7).

The local engine's backend refuses by itself what it can't follow.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

BACKENDS = ("xgrammar", None)  # None: not chosen, which is the same
MOST_DIVIDED = 1024
LEFT_OUT = (
    "not", "if", "contains", "uniqueItems", "dependentRequired", "dependentSchemas", "dependencies",
    "unevaluatedProperties", "unevaluatedItems",
)  # fmt: skip
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
SIZES, SHAPES = ("minLength", "maxLength"), ("pattern", "format")
# Beside one of the first, none of the others is looked at.
ELSEWHERE = ("anyOf", "oneOf", "$ref")
RULES = (
    *BOUNDS, *SIZES, *SHAPES, "multipleOf", "enum", "const", "items", "prefixItems", "minItems", "maxItems",
    "properties", "required", "additionalProperties", "patternProperties", "propertyNames",
    "minProperties", "maxProperties",
)  # fmt: skip
NAMED = ("properties", "patternProperties", "$defs", "definitions")  # schemas by names, which are no keywords
PLAIN = ("enum", "const", "default", "examples", "discriminator")  # values, which are no schemas


def refuse_what_is_left_out(text: object) -> None:
    """ValueError with the keyword at fault. What is no schema at all is left for SGLang to refuse."""
    try:
        schema = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return
    for table in _schemas(schema):
        if (keyword := _left_out(table)) is not None:
            raise ValueError(f"the JSON schema can't be followed: {keyword}")


def _left_out(table: dict[str, Any]) -> str | None:
    if found := next((name for name in LEFT_OUT if table.get(name, False) is not False), None):
        return f"{found} is not supported"
    if len(table.get("allOf") or ()) > 1:
        return "allOf of more than one is not supported"
    for some, others in ((ELSEWHERE, RULES), (SHAPES, SIZES)):
        if (one := _first(some, table)) and (other := _first(others, table)):
            return f"{other} beside {one} is not supported"
    if (divisor := table.get("multipleOf")) is not None:
        counts = isinstance(divisor, int | float) and divisor in range(1, MOST_DIVIDED + 1)
        if not counts or table.get("type") != "integer" or _first(BOUNDS, table):
            return f"multipleOf goes with type integer, up to {MOST_DIVIDED}, without bounds"
    return None


def _first(names: Iterable[str], table: dict[str, Any]) -> str | None:
    return next((name for name in names if name in table), None)


def _schemas(value: Any) -> Iterator[dict[str, Any]]:
    """The schema and those within it."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            yield value
            for name, each in value.items():
                if name in NAMED and isinstance(each, dict):
                    waiting += each.values()
                elif name not in PLAIN:
                    waiting.append(each)
