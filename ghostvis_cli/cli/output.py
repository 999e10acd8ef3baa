"""The only file that prints. stdout is the answer; stderr is the conversation about it.

Each stream is tested for a terminal on its own. A pipe gets the model's text exactly; a terminal gets it with
control characters taken out, because model text is data and must not drive the terminal.
"""

import json
import os
import re
import select
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from ghostvis_cli.endings import ReaderGone
from ghostvis_cli.errors import GhostvisError, OutputError
from ghostvis_cli.version import SCHEMA_VERSION

if TYPE_CHECKING:
    from ghostvis_cli.cli.logfile import Log

# All of C0 and C1 but tab and line feed, and what turns the direction of text around.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LAST_WORDS_MS = 200  # that a reader may take to make room for them
REDRAW_S, REPORT_S = 0.1, 30.0  # of progress, on a terminal and elsewhere
ColorChoice = Literal["auto", "always", "never"]


@dataclass
class _State:
    """How this run speaks. Set once, by the command that was called."""

    quiet: bool = False
    verbose: bool = False
    color: ColorChoice = "auto"
    json_errors: bool = False
    log: "Log | None" = None
    told: list[GhostvisError] = field(default_factory=list)
    mid_line: bool = False  # the answer on the terminal has begun a line and not ended it
    progress_drawn: bool = False  # the terminal's last line is one of progress


_state = _State()


def reset(*, json_errors: bool) -> None:
    """Forget the last run's settings, before the command's options are known."""
    global _state
    _state = _State(json_errors=json_errors)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def configure(*, quiet: bool, verbose: bool, color: ColorChoice = "auto") -> None:
    _state.quiet, _state.verbose, _state.color = quiet, verbose, color


def verbose() -> bool:
    """Whether this run was asked for more on stderr."""
    return _state.verbose


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is an open terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def is_terminal_stdout() -> bool:
    """Whether stdout is a terminal."""
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
    if is_terminal_stdout():
        text = CONTROL.sub("", text)
        _state.mid_line = not text.endswith("\n") if text else _state.mid_line
    _stdout(text)


def end_line() -> None:
    """End an answer's unfinished line on the terminal, so that what follows starts on a new line."""
    if _state.mid_line:
        with suppress(OutputError, ReaderGone):  # the terminal is gone
            answer("\n")


def record(value: dict[str, Any], *, indent: int | None = None) -> None:
    """One JSON object on one line, flushed, so that readers see whole records."""
    unicode = "utf" in (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    text = json.dumps(value, ensure_ascii=not unicode, indent=indent, allow_nan=False)
    if is_terminal_stdout():
        text = CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    _stdout(text + "\n")


def _stdout(text: str) -> None:
    if sys.stdout is None:  # closed by the caller
        return
    _erase_progress()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGone from None
    except OSError as error:
        raise OutputError(f"the output could not be written: {error.strerror}") from error


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, two spaces between; the header in bold where colour is on."""
    lines = [list(headers), *([_one_line(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for number, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        _stdout((_style(text, "1", sys.stdout) if number == 0 else text) + "\n")


def marked(mark: str, color: str, text: str) -> None:
    """A line of the answer, its first word in a colour: an SGR code such as "31"."""
    _stdout(f"{_style(mark, color, sys.stdout)}{_one_line(text)}\n")


# --- stderr


def notice(text: str) -> None:
    """One line that a person may want to know and a script need not. --quiet does not keep it from the log."""
    line = f"ghostvis: {_one_line(text)}"
    if not _state.quiet:
        _stderr(_style(line, "2", sys.stderr))
    elif _state.log is not None:
        _state.log.line(line)


def aside(lines: Iterable[str]) -> None:
    """Lines for a person on stderr, as they are: a table beside the answer. --quiet leaves them out."""
    for line in lines:
        if not _state.quiet:
            _stderr(CONTROL.sub("", line))


def loud(text: str) -> None:
    """A line on stderr that stands out and that --quiet does not hide, for findings that contradict each other."""
    _stderr(_style(f"ghostvis: {_one_line(text)}", "1;33", sys.stderr))


def notices(lines: Iterable[str]) -> None:
    """Several lines of `notice`."""
    for line in lines:
        notice(line)


def child_line(text: str, *, notable: bool) -> None:
    """A line of a child's log: to the log file where there is one, else to stderr what is notable of it."""
    if _state.log is not None:
        _state.log.line(text)
    elif _state.verbose or (notable and not _state.quiet):
        _stderr(CONTROL.sub("", text))


def detail(text: str) -> None:
    """A line on stderr with -v only."""
    if _state.verbose:
        notice(text)


def error(error: GhostvisError) -> None:
    """What went wrong and what to type next; with --json also as a record on stdout.

    One line; where a message lists several faults, the others follow indented.
    """
    _state.told.append(error)
    end_line()
    for line in _lines_of(error):
        _stderr(line)
    if _state.json_errors:
        with suppress(OutputError, ReaderGone):  # stdout may be what failed
            record(_record_of(error))


def _lines_of(error: GhostvisError) -> list[str]:
    message = CONTROL.sub("", error.message).strip().replace("\n", "\n  ")
    lines = [f"{_style('ghostvis: error:', '31', sys.stderr)} {message}"]
    return [*lines, f"hint: {_one_line(error.hint)}"] if error.hint else lines


def _record_of(error: GhostvisError) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "error": error.record()}


def last_words(error: GhostvisError | None) -> None:
    """As `error`, for signal handlers: past the streams, whose locks the interrupted code may hold."""
    if _state.progress_drawn:
        _write_now(2, "\r\x1b[K")
    if _state.mid_line:
        _write_now(1, "\n")
    if error is None or any(error is told for told in _state.told):
        return
    _write_now(2, "".join(f"{line}\n" for line in _lines_of(error)))
    if _state.log is not None:
        for line in _lines_of(error):
            _state.log.line(line)
    if _state.json_errors:
        _write_now(1, json.dumps(_record_of(error)) + "\n")


def _write_now(descriptor: int, text: str) -> None:
    """Write to a descriptor, unless that would wait for a reader."""
    ready = select.poll()
    ready.register(descriptor, select.POLLOUT)
    with suppress(OSError):
        if ready.poll(LAST_WORDS_MS):
            os.write(descriptor, text.encode(errors="backslashreplace"))


def traceback(error: BaseException) -> None:
    """An exception's traceback, on stderr."""
    from traceback import format_exception

    _stderr(CONTROL.sub("", "".join(format_exception(error))).rstrip("\n"))


@asynccontextmanager
async def progress(line: Callable[[], str]) -> AsyncIterator[None]:
    """Tell how far something is while it runs: a line drawn anew on a terminal, one every 30 s elsewhere."""
    import asyncio

    ticker = asyncio.create_task(_tell(line))
    try:
        yield
    finally:
        ticker.cancel()
        _erase_progress()


async def _tell(line: Callable[[], str]) -> None:
    import asyncio

    drawn = is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb" and not _state.quiet
    while True:
        await asyncio.sleep(REDRAW_S if drawn else REPORT_S)
        if drawn:
            _draw_progress(line())
        else:
            notice(line())


def _draw_progress(text: str) -> None:
    with suppress(OSError):
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        _to_terminal(f"\r\x1b[K{_one_line(text)[: width - 1]}")
        _state.progress_drawn = True


def _erase_progress() -> None:
    if _state.progress_drawn:
        _state.progress_drawn = False
        _to_terminal("\r\x1b[K")


def _to_terminal(text: str) -> None:
    """Write to the terminal, not to the log file, which needs no ten lines a second."""
    with suppress(OSError, ValueError):
        if sys.__stderr__ is not None:
            sys.__stderr__.write(text)
            sys.__stderr__.flush()


def _stderr(line: str) -> None:
    _erase_progress()
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # its reader is gone, its disk is full, it was closed: nowhere to say so
        return


def _one_line(text: str) -> str:
    return CONTROL.sub("", text.replace("\n", " "))


# --- the log file


def log_to(path: Path, command: str) -> None:
    """From here to the end of the process, copy stderr to `path`; say there when the run starts and how it ends."""
    from ghostvis_cli.cli.logfile import Log

    _state.log = Log(path, sys.stderr)
    _state.log.line(f"started: {command}")
    sys.stderr = _state.log


def end_log(code: int) -> None:
    if _state.log is not None:
        _state.log.end(code)
