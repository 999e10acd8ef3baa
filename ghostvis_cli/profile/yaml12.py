"""YAML as its version 1.2 reads plain scalars: `on` and `yes` are words, 010 is ten, 1:30 and dates are text.

The one loader and the one dumper of the project. PyYAML by itself reads 1.1.
"""

import re

import yaml

TAG = "tag:yaml.org,2002:"
SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class Loader(yaml.SafeLoader):
    """Without the resolvers of 1.1."""


class Dumper(yaml.SafeDumper):
    """Quotes what 1.1 would not read as text either, for other programs' sake."""


def whole(text: str) -> int:
    """ValueError where it is no whole number, or one of thousands of digits."""
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


def is_number(text: str) -> bool:
    return any(re.fullmatch(pattern, text) for name, pattern, _ in SCALARS if name in ("int", "float"))


Loader.yaml_implicit_resolvers = {}
for name, pattern, first in SCALARS:
    for each in (Loader, Dumper):
        each.add_implicit_resolver(TAG + name, re.compile(rf"^(?:{pattern})$"), first)
Loader.add_constructor(TAG + "int", lambda loader, node: whole(node.value))
