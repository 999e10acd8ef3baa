"""The `ghostvis` command: finds the subcommand, runs it, and turns whatever ends it into an exit code."""

import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from ghostvis_cli import __version__
from ghostvis_cli.errors import ExitCode, GhostvisError

if TYPE_CHECKING:
    import typer


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception: nothing but the top may swallow it."""


def main() -> NoReturn:
    """The console script. Never returns: the process ends with one of the documented codes."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        _leave(_write_version())
    signal.signal(signal.SIGTERM, _on_sigterm)
    _leave(_run())


def _run() -> int:
    try:
        build()()
    except SystemExit as stop:
        return _finish_stdout(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except BrokenPipeError:
        return _reader_gone()
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Terminated:
        return ExitCode.TERMINATED
    return _finish_stdout(ExitCode.OK)


def build() -> "typer.Typer":
    """The Typer application; also what the tests run."""
    import typer

    from ghostvis_cli.cli.group import CommandTable

    app = typer.Typer(
        name="ghostvis",
        cls=CommandTable,
        rich_markup_mode=None,  # 120 ms of every --help
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="ghostvis COMMAND --help explains a command. Exit codes: docs/exit-codes.md.",
    )

    @app.callback()
    def ghostvis(
        version: bool = typer.Option(False, "--version", "-V", help="Print the version and leave.", is_eager=True),
    ) -> None:
        """Run, serve and measure the GhostVis models you train."""
        if version:
            raise typer.Exit(_write_version())

    return app


def load_command(module: str) -> Any:
    """The Typer application of one command module."""
    return import_module(f"ghostvis_cli.commands.{module}").app


def exit_code_of(error: BaseException) -> int:
    return int(error.code) if isinstance(error, GhostvisError) else int(ExitCode.BUG)


def _write_version() -> int:
    sys.stdout.write(f"ghostvis {__version__}\n")
    return ExitCode.OK


def _on_sigterm(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def _finish_stdout(code: int) -> int:
    """Flush while an error can still be told; a reader that left early is not an error of ours."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        return _reader_gone()
    except OSError as error:  # a full disk
        if sys.stderr is not None:
            sys.stderr.write(f"ghostvis: error: the output could not be written: {error.strerror}\n")
        _discard_stdout()
        return code or ExitCode.BUG
    return code


def _reader_gone() -> int:
    _discard_stdout()
    return ExitCode.READER_GONE


def _discard_stdout() -> None:
    """Let the interpreter's last flush go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(code: int) -> NoReturn:
    """End at once: loader threads may still be reading weights that nobody waits for any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            continue
    os._exit(code)
