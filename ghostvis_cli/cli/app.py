"""The `ghostvis` command. `main` is the console script, which says what a signal does before it imports the rest.

Whatever this module imports stands between the start of the process and its first line of defence: keep it small.
"""

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

    import typer


def main() -> "NoReturn":
    """Never returns: the process ends with one of the documented codes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    from ghostvis_cli.cli import process

    process.run(lambda: build()())


def _end(number: int, _frame: "FrameType | None") -> None:
    """While Python imports: nothing is to be said or put in order yet."""
    os._exit(128 + number)


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
        version: bool = typer.Option(
            False, "--version", "-V", help="Print the version and leave.", is_eager=True
        ),
    ) -> None:
        """Run, serve and measure the GhostVis models you train."""
        if version:
            from ghostvis_cli.cli.process import write_version

            raise typer.Exit(write_version())

    return app
