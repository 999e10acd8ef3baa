"""A Typer group that reads its commands from the registry, and the one place where errors become messages."""

import sys
import traceback
from typing import Any, NoReturn

import typer
import typer.core
import typer.main

from ghostvis_cli.cli import app, output
from ghostvis_cli.cli.registry import COMMANDS, Command
from ghostvis_cli.errors import ExitCode, GhostvisError, UsageError

# Typer carries its own Click and exports this much of it: the class of every parsing error.
CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
BY_NAME = {command.name: command for command in COMMANDS}


class CommandTable(typer.core.TyperGroup):
    def list_commands(self, ctx: typer.Context) -> list[str]:
        return [command.name for command in COMMANDS]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:
        return _load(BY_NAME[cmd_name]) if cmd_name in BY_NAME else None

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(command.name, command.summary) for command in COMMANDS])

    def shell_complete(self, ctx: typer.Context, incomplete: str) -> list[Any]:
        """Names from the table; the base class would import every command for its help."""
        from typer._completion_classes import CompletionItem  # type: ignore[attr-defined]

        found = [c for c in COMMANDS if c.name.startswith(incomplete)]
        return [CompletionItem(command.name, help=command.summary) for command in found]

    def invoke(self, ctx: typer.Context) -> Any:
        args = [*getattr(ctx, "_protected_args", []), *ctx.args]
        output.reset(json_errors="--json" in args or "--jsonl" in args)
        try:
            return super().invoke(ctx)
        except GhostvisError as error:
            _fail(error, show_traceback=output.verbose() or error.code == ExitCode.BUG)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except CLICK_ERROR as error:
            if getattr(error, "exit_code", 2) == 0:
                raise
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "ghostvis"
            message = str(getattr(error, "format_message", lambda: error)())
            _fail(UsageError(message.rstrip(".").replace("\n", " "), hint=f"{command} --help"))
        except Exception as error:
            bug = GhostvisError(
                f"a bug: {type(error).__name__}: {error}",
                hint="please report it with the lines above at the project's issue tracker",
            )
            traceback.print_exc(file=sys.stderr)
            _fail(bug)


def _load(command: Command) -> Any:
    loaded = typer.main.get_command(app.load_command(command.module))
    loaded.name = command.name
    return loaded


def _fail(error: GhostvisError, *, show_traceback: bool = False) -> NoReturn:
    if show_traceback:
        traceback.print_exception(error, file=sys.stderr)
    output.error(error)
    raise typer.Exit(app.exit_code_of(error))
