"""Option tables of docs/*.md, made of the commands' own help: `make docs` writes them, a test compares them.

A table stands between two comments. The first names the command; after a colon, the options if not all are meant:

    <!-- options of generate: timeout lock -->
    <!-- end of options -->
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from ghostvis_cli.cli.app import build

DOCS = Path(__file__).parents[1] / "docs"
TABLE = re.compile(r"(<!-- options of ([a-z ]+)(?:: ([a-z ,-]+))? -->\n).*?(<!-- end of options -->)", re.S)


def command(name: str) -> Any:
    """A command by its words: `generate`, `bench prefix`."""
    found: Any = typer.main.get_command(build())
    for word in name.split():
        found = found.get_command(typer.Context(found), word)
    return found


def names(group: Any = None, before: str = "") -> Iterator[str]:
    """Every command that does something by itself, by its words."""
    group = group or typer.main.get_command(build())
    context = typer.Context(group)
    for word in group.list_commands(context):
        found, name = group.get_command(context, word), f"{before}{word}"
        if not hasattr(found, "commands") or found.invoke_without_command:
            yield name
        if hasattr(found, "commands"):
            yield from names(found, f"{name} ")


def table(name: str, wanted: list[str]) -> str:
    """The Markdown table of a command's options, all of them or those named without their dashes."""
    found = (option for option in command(name).params if option.opts[0].startswith("--"))
    options = {option.opts[0].removeprefix("--"): option for option in found}
    rows = [_row(options[each]) for each in wanted or options if each != "help"]
    return "\n".join(["| option | |", "|---|---|", *rows, ""])


def _row(option: Any) -> str:
    spelled = ", ".join(f"`{flag}`" for flag in flags(option))
    return "| " + " | ".join(text.replace("|", "\\|") for text in (spelled, option.help)) + " |"


def flags(option: Any) -> Iterator[str]:
    """The long name with what it takes, its opposite, and the short name."""
    takes = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
    long, *short = option.opts
    yield f"{long}{takes}"
    yield from (*option.secondary_opts, *short)


def filled(text: str) -> str:
    """A page with all of its tables as they should be."""
    return TABLE.sub(lambda at: f"{at[1]}{table(at[2], (at[3] or '').split())}{at[4]}", text)


if __name__ == "__main__":
    for page in DOCS.glob("*.md"):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
