"""A Typer group that reads its commands from the registry, and the one place where errors become messages."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
import typer.core
import typer.main

from ghostvis_cli.cli import output
from ghostvis_cli.cli.registry import COMMANDS, Command, load_command
from ghostvis_cli.endings import Ended, ReaderGone
from ghostvis_cli.errors import GhostvisError, OutputError, UsageError, limit_reached

# Typer carries its own Click and exports this much of it: the class of every parsing error.
CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BY_NAME = {command.name: command for command in COMMANDS}


class CommandTable(typer.core.TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [command.name for command in COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _load(BY_NAME[cmd_name]) if cmd_name in BY_NAME else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in BY_NAME and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise UsageError(f"no command named {args[0]!r}", hint=_nearest(args[0]))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(command.name, command.summary) for command in COMMANDS])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Names from the table; the base class would import every command for its help."""
        from typer._completion_classes import CompletionItem  # type: ignore[attr-defined]

        found = [c for c in COMMANDS if c.name.startswith(incomplete)]
        return [CompletionItem(command.name, help=command.summary) for command in found]

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        typed = args[: args.index("--")] if "--" in args else args
        output.reset(json_errors="--json" in typed or "--jsonl" in typed)
        with _errors_become_messages():
            return super().make_context(info_name, args, *more, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _errors_become_messages():
            return super().invoke(ctx)


@contextmanager
def _errors_become_messages() -> Iterator[None]:
    try:
        yield
    except GhostvisError as error:
        is_bug = type(error) is GhostvisError
        limit = limit_reached(error.__cause__) if isinstance(error.__cause__, OSError) else None
        _fail(limit or error, show_traceback=output.verbose() or is_bug)
    except Ended as ended:
        if ended.ending.error is None:
            raise
        _fail(ended.ending.error)
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:  # Typer printing help
        raise ReaderGone from None
    except CLICK_ERROR as error:
        _fail(_usage_error(error))
    except Exception as error:
        if limit := limit_reached(error):
            _fail(limit, show_traceback=output.verbose())
        if isinstance(error, OSError) and error.errno in DISK_FULL and error.filename is None:
            _fail(OutputError(f"the output could not be written: {error.strerror}"))
        reason = str(error).strip().partition("\n")[0]
        bug = GhostvisError(
            f"a bug: {type(error).__name__}: {reason}",
            hint="please report it with the lines above at the project's issue tracker",
        )
        output.traceback(error)
        _fail(bug)


def _usage_error(error: Exception) -> UsageError:
    """What Typer's parser says, on one line. A group called without a command explains itself instead."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(str(error), err=True)
        raise typer.Exit(int(UsageError.code))
    message = " ".join(str(getattr(error, "format_message", lambda: error)()).split()).rstrip(".")
    command = context.command_path if context else "ghostvis"
    return UsageError(message[:1].lower() + message[1:], hint=f"{command} --help")


def _nearest(typed: str) -> str:
    from difflib import get_close_matches

    return " ".join(["ghostvis", *(get_close_matches(typed, BY_NAME, n=1) or ["--help"])])


def _load(command: Command) -> Any:
    loaded = typer.main.get_command(load_command(command))
    loaded.name = command.name
    # Typer gives every application its completion options; they belong to `ghostvis` alone.
    loaded.params = [p for p in loaded.params if p.name not in ("install_completion", "show_completion")]
    return loaded


def _fail(error: GhostvisError, *, show_traceback: bool = False) -> NoReturn:
    if show_traceback:
        output.traceback(error)
    output.error(error)
    raise typer.Exit(int(error.code))
