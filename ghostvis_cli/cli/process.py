"""One run of `ghostvis` as a process: its streams, and the exit code that whatever ends it becomes."""

import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from ghostvis_cli import address_space
from ghostvis_cli.cli import guard
from ghostvis_cli.errors import ExitCode
from ghostvis_cli.version import __version__


def run(command: Callable[[], object]) -> NoReturn:
    """Run the command and leave. `command` raises SystemExit for any end but success."""
    _occupy_closed_streams()
    sys.stdout = _whole(sys.stdout)
    address_space.spare()
    guard.own_process()
    step = write_version if sys.argv[1:] in (["--version"], ["-V"]) else lambda: _done(command)
    code = _code_of(step)
    _leave(_code_of(lambda: _finish(code)))


def _done(command: Callable[[], object]) -> int:
    command()
    return ExitCode.OK


def write_version() -> int:
    return _to_stdout(lambda: sys.stdout.write(f"ghostvis {__version__}\n"))


def _code_of(step: Callable[[], int]) -> int:
    """Run a step to its end, or to the signal, deadline or exit that ends it."""
    try:
        return step()
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _finish(code: int) -> int:
    """Flush while a failure can still be told."""
    if code and (output := _output_where_used()):
        output.end_line()
    failed = _to_stdout(lambda: sys.stdout.flush(), told=bool(code))
    return code or failed


def _to_stdout(write: Callable[[], object], *, told: bool = False) -> int:
    try:
        if sys.stdout is not None:
            write()
    except BrokenPipeError:  # a reader that left early is no error of ours
        return ExitCode.READER_GONE
    except OSError as error:  # a full disk
        if sys.stderr is not None and not told:
            sys.stderr.write(f"ghostvis: error: the output could not be written: {error.strerror}\n")
        return ExitCode.BUG
    return ExitCode.OK


def _leave(code: int) -> NoReturn:
    """End at once, without waiting for threads that still read weights."""
    if output := _output_where_used():
        output.end_log(code)
    if code == ExitCode.INTERRUPTED:
        guard.die_of_interrupt()
    os._exit(code)


def _output_where_used() -> Any:
    return sys.modules.get("ghostvis_cli.cli.output")  # --version does without


def _whole(stream: TextIO) -> TextIO:
    """A buffer for a stream that PYTHONUNBUFFERED left without: only the buffer handles short writes."""
    raw = getattr(stream, "buffer", None)
    if not isinstance(raw, io.RawIOBase):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True
    )


def _occupy_closed_streams() -> None:
    """Put /dev/null where the caller closed a stream; else the next file opened gets its number, and its text."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
