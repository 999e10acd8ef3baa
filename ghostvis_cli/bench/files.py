"""A report as a file: where it may lie, and which kind its name asks for."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

from ghostvis_cli import files
from ghostvis_cli.bench import schema
from ghostvis_cli.bench.html import page
from ghostvis_cli.bench.report import csv_text
from ghostvis_cli.bench.schema import Report
from ghostvis_cli.errors import GhostvisError, UsageError, printable

KINDS = (".json", ".csv", ".html", ".png")
LONGEST_NAME = 240  # bytes, of 255: what is not yet whole lies beside under a longer one


def check_place(path: Path | None) -> None:
    """Before an hour of measuring, not after it. UsageError where a report could not be written to `path`.

    EngineError where it would be a picture and there is no browser to draw it.
    """
    if path is None:
        return
    name = printable(str(path))
    if path.is_dir():
        inside = shlex.quote(printable(str(path / "report.json")))
        raise UsageError(f"--output {name}: that is a folder", hint=f"--output {inside}")
    if kind(path) not in KINDS:
        raise UsageError(
            f"a report is .json, .csv, .html or .png, and {printable(path.name)!r} is none",
            hint="--output report.json",
        )
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UsageError(f"--output {name}: the name is too long", hint=f"--output report{path.suffix}")
    if not path.parent.is_dir():
        hint = shlex.join(["mkdir", "-p", printable(str(path.parent))])
        raise UsageError(f"--output {name}: there is no such folder", hint=hint)
    if not _is_writable(path):
        raise UsageError(f"--output {name} can't be written")
    if kind(path) == ".png":
        from ghostvis_cli.bench.png import browser

        browser()


def _is_writable(path: Path) -> bool:
    """A FIFO, a device and a stream need only be writable themselves; a file's folder gets a new one."""
    try:
        place = files.target(path)
    except OSError:
        return False
    replaceable = files.is_special(place) or os.access(place.parent, os.W_OK)
    return replaceable and (os.access(path, os.W_OK) or not path.exists())


def check_place_to_measure(path: Path | None) -> None:
    """`check_place`, also of what lies beside a picture while it is drawn, or has since a browser failed."""
    check_place(path)
    if path is None or kind(path) != ".png":
        return
    beside = _beside(path)
    if beside.is_file():
        raise UsageError(
            f"{printable(str(beside))} holds an earlier report, which would be lost",
            hint=shlex.join(["mv", printable(str(beside)), "earlier.json"]),
        )
    check_place(beside)


def save_measured(report: Report, path: Path, tell: Callable[[str], object]) -> None:
    """`save`. A browser may fail after an hour of measuring: while it draws, the report lies beside as JSON.

    An error says where; where drawing is cut short, `tell` hears it.
    """
    if kind(path) != ".png":
        save(report, path)
        return
    beside = _beside(path)
    save(report, beside)
    try:
        save(report, path)
    except GhostvisError as error:
        told = f"{error.message}; the report is in {printable(str(beside))}"
        again = shlex.join(["ghostvis", "bench", "report", str(beside), "--output", str(path)])
        raise type(error)(told, hint=again) from error
    except BaseException:
        tell(f"the report is in {printable(str(beside))}")
        raise
    beside.unlink(missing_ok=True)


def kind(path: Path) -> str:
    """One of KINDS, if it is one. A FIFO, a device and /dev/stdout need no ending: they get JSON."""
    return path.suffix.lower() or (".json" if files.is_special(path) else "")


def _beside(picture: Path) -> Path:
    return picture.with_name(f"{picture.name}.json")


def save(report: Report, path: Path) -> None:
    """Write what KINDS lists, whole or not at all. OutputError where the disk says no, EngineError a browser."""
    check_place(path)
    written = _written(report, kind(path))
    try:
        files.write(path, written)
    except OSError as error:
        raise files.cannot_write(path, error, f"--output ELSEWHERE/{printable(path.name)}") from error


def _written(report: Report, ending: str) -> bytes:
    if ending == ".png":
        return _png(report)
    texts: dict[str, Callable[[Report], str]] = {".json": schema.to_text, ".csv": csv_text, ".html": page}
    # Half a character, as of a file's name that is no UTF-8, becomes \udcff, which JSON reads back.
    return texts[ending](report).encode(errors="backslashreplace")


def _png(report: Report) -> bytes:
    from ghostvis_cli.bench.png import picture

    return picture(page(report))
