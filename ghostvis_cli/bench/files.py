"""A report as a file: where it may lie, and which kind its name asks for."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

from ghostvis_cli import files
from ghostvis_cli.bench import schema
from ghostvis_cli.bench.html import drawing, page
from ghostvis_cli.bench.report import csv_text
from ghostvis_cli.bench.schema import Report
from ghostvis_cli.errors import UsageError, printable

KINDS = (".json", ".csv", ".html", ".svg")
LONGEST_NAME = 240  # bytes, of 255: what is not yet whole lies beside under a longer one


def check_place(path: Path | None) -> None:
    """Check, before measuring for an hour, that a report can be written to `path`. UsageError where it can't."""
    if path is None:
        return
    name = printable(str(path))
    if path.is_dir():
        inside = shlex.quote(printable(str(path / "report.json")))
        raise UsageError(f"--output {name}: that is a folder", hint=f"--output {inside}")
    if kind(path) not in KINDS:
        raise UsageError(
            f"a report is .json, .csv, .html or .svg, and {printable(path.name)!r} is none",
            hint="--output report.json",
        )
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UsageError(f"--output {name}: the name is too long", hint=f"--output report{path.suffix}")
    if not path.parent.is_dir():
        hint = shlex.join(["mkdir", "-p", printable(str(path.parent))])
        raise UsageError(f"--output {name}: there is no such folder", hint=hint)
    if not _is_writable(path):
        raise UsageError(f"--output {name} can't be written")


def _is_writable(path: Path) -> bool:
    """Whether `path` can be written: a FIFO, a device or a stream itself, a file by its folder."""
    try:
        place = files.target(path)
    except OSError:
        return False
    replaceable = files.is_special(place) or os.access(place.parent, os.W_OK)
    return replaceable and (os.access(path, os.W_OK) or not path.exists())


def kind(path: Path) -> str:
    """One of KINDS, if it is one. A FIFO, a device and /dev/stdout need no ending: they get JSON."""
    return path.suffix.lower() or (".json" if files.is_special(path) else "")


def save(report: Report, path: Path) -> None:
    """Write the report in the form of its ending, whole or not at all. OutputError where that fails."""
    check_place(path)
    written = _written(report, kind(path))
    try:
        files.write(path, written)
    except OSError as error:
        raise files.cannot_write(path, error, f"--output ELSEWHERE/{printable(path.name)}") from error


def _written(report: Report, ending: str) -> bytes:
    texts: dict[str, Callable[[Report], str]] = {
        ".json": schema.to_text,
        ".csv": csv_text,
        ".html": page,
        ".svg": drawing,
    }
    # Half a character, as of a file's name that is no UTF-8, becomes \udcff, which JSON reads back.
    return texts[ending](report).encode(errors="backslashreplace")
