"""The only file that prints. stdout is the answer; stderr is the conversation about it.

Each stream is tested for a terminal on its own. A pipe gets the model's text exactly; a terminal gets it with
control characters taken out, because model text is data and must not drive the terminal.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from ghostvis_cli.errors import GhostvisError

SCHEMA_VERSION = 1
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all of C0 and C1 but tab and line feed
ColorChoice = Literal["auto", "always", "never"]


@dataclass
class _State:
    """How talkative this run is. Set once, by the command that was called."""

    quiet: bool = False
    verbose: bool = False
    color: ColorChoice = "auto"
    json_errors: bool = False


_state = _State()


def reset(*, json_errors: bool) -> None:
    """A fresh start, before the command's options are known."""
    global _state
    _state = _State(json_errors=json_errors)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def configure(*, quiet: bool, verbose: bool, color: ColorChoice = "auto") -> None:
    _state.quiet, _state.verbose, _state.color = quiet, verbose, color


def verbose() -> bool:
    return _state.verbose


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def is_terminal_stdout() -> bool:
    return is_terminal(sys.stdout)


def colored(stream: TextIO | None) -> bool:
    """--color, then NO_COLOR, FORCE_COLOR, TERM=dumb, then whether the stream is a terminal."""
    if _state.color != "auto":
        return _state.color == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return is_terminal(stream) and os.environ.get("TERM") != "dumb"


def _style(text: str, code: str, stream: TextIO | None) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colored(stream) else text


# --- stdout


def answer(text: str) -> None:
    """A piece of the answer, written at once."""
    if sys.stdout is None:
        return
    sys.stdout.write(CONTROL.sub("", text) if is_terminal(sys.stdout) else text)
    sys.stdout.flush()


def record(value: dict[str, Any], *, indent: int | None = None) -> None:
    """One JSON object on a line of its own, flushed: whoever reads along sees whole records."""
    if sys.stdout is None:
        return
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False) + "\n")
    sys.stdout.flush()


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, two spaces between; the header in bold where colour is on."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for number, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        answer((_style(text, "1", sys.stdout) if number == 0 else text) + "\n")


# --- stderr


def notice(text: str) -> None:
    """One line that a person may want to know and a script need not."""
    if not _state.quiet:
        _stderr(_style(f"ghostvis: {_one_line(text)}", "2", sys.stderr))


def detail(text: str) -> None:
    """Only with -v."""
    if _state.verbose and not _state.quiet:
        _stderr(_style(f"ghostvis: {_one_line(text)}", "2", sys.stderr))


def error(error: GhostvisError) -> None:
    """What went wrong and what to type next; with --json also as a record on stdout."""
    _stderr(f"{_style('ghostvis: error:', '31', sys.stderr)} {CONTROL.sub('', error.message)}")
    if error.hint:
        _stderr(f"hint: {CONTROL.sub('', error.hint)}")
    if _state.json_errors:
        record({"schema_version": SCHEMA_VERSION, "error": error_record(error)})


def error_record(error: GhostvisError) -> dict[str, Any]:
    return {"code": int(error.code), "kind": error.kind, "message": error.message, "hint": error.hint}


def _stderr(line: str) -> None:
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except (BrokenPipeError, ValueError):
        return


def _one_line(text: str) -> str:
    return CONTROL.sub("", text.replace("\n", " "))
