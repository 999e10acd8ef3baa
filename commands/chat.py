"""`ghostvis chat`: the conversation, at a terminal or line by line from a script."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ghostvis_cli import endings
from ghostvis_cli.cli import guard, options, output
from ghostvis_cli.cli.options import option
from ghostvis_cli.errors import EngineError, UsageError

if TYPE_CHECKING:
    from ghostvis_cli.chat.conversation import Conversation
    from ghostvis_cli.chat.store import SessionFile
    from ghostvis_cli.profile import Resolved

app = typer.Typer(rich_markup_mode=None)
EXAMPLES = """Examples:

  ghostvis chat

  ghostvis chat --source sft --model-tag d32 --session trip

  ghostvis chat --continue

  ghostvis chat --web

  printf '/image red.png\\nWhat is this?\\nWhich colour?\\n' | ghostvis chat -t 0
"""
WEB_PORT, WEB_KEY = 7860, "GHOSTVIS_WEB_KEY"
OVERFLOWS = ("refuse", "drop-oldest")
ON_THE_PAGE = (("host", "--host"), ("port", "--port"), ("browse", "--open"))
AT_THE_TERMINAL = (  # parameter, its default, the flag that changes it
    ("raw", False, "--raw"),
    ("stats", False, "--stats"),
    ("history", True, "--no-history"),
    ("preview", True, "--no-preview"),
)


@app.command(epilog=EXAMPLES)
@options.takes(
    option(list[str], "--image -i SOURCE", "Attach to the first message. Repeatable."),
    option(str, "--session NAME", "Go on with this session, or begin it."),
    option(bool, "--continue -c", "Go on with the newest session.", name="resume"),
    option(
        str,
        "--overflow WHAT",
        "When the model is full: refuse, or drop-oldest turns (default refuse).",
        default="refuse",
    ),
    option(bool, "--raw", "Show the model's text without Markdown."),
    option(bool, "--stats", "A line of statistics per reply, on stderr."),
    option(bool, "--history/--no-history", "Remember typed lines for the arrow keys.", default=True),
    option(bool, "--preview/--no-preview", "Show images in the terminal.", default=True),
    option(bool, "--web", "Talk in a browser; the page's address is printed."),
    option(
        str, "--host ADDRESS", f"With --web: address to listen on; beyond this machine only with {WEB_KEY}."
    ),
    option(int, "--port N", f"With --web: port; 0 takes a free one ({WEB_PORT}).", min=0, max=65535),
    option(bool, "--open", "With --web: open the page in a browser.", name="browse"),
    option(int, "--max-tokens N", "Most tokens in a reply (default 200)."),
    option(bool, "--json", "Without a terminal: one JSON object per turn."),
    options.ANSWERING,
)
def chat(
    ctx: typer.Context,
    *,
    image: list[str] | None,
    session: str | None,
    resume: bool,
    overflow: str,
    web: bool,
) -> None:
    """Talk with a model about images. Without a terminal, each line of stdin is a message or a command."""
    _check_web(ctx)
    interactive = web or (output.is_terminal(sys.stdin) and output.is_terminal_stdout())
    if interactive:
        _guarded_at_terminal(ctx)
    else:
        options.guarded(ctx)
    if overflow not in OVERFLOWS:
        raise UsageError(
            f"--overflow is refuse or drop-oldest, not {overflow!r}", hint="--overflow drop-oldest"
        )
    if session is not None and resume:
        raise UsageError("--session and --continue exclude each other", hint=f"--session {session}")
    resolved = options.resolve_profile(ctx)
    conversation = _conversation(ctx, resolved, autosave=interactive)
    if web:
        raise typer.Exit(_web(ctx, conversation))

    from ghostvis_cli.chat.surface import Options

    words = ("raw", "stats", "json", "history", "preview", "quiet")
    shown = Options(
        **{name: ctx.params[name] for name in words},
        resumed=not conversation.session.empty,
        images=tuple(image or ()),
    )
    if interactive:
        from ghostvis_cli.chat import repl

        raise typer.Exit(repl.run(conversation, shown))
    from ghostvis_cli.chat import script

    raise typer.Exit(script.run(conversation, shown))


def _web(ctx: typer.Context, conversation: "Conversation") -> int:
    from ghostvis_cli.serve.settings import ServerSettings
    from ghostvis_cli.web import server

    typed = ctx.params
    settings = ServerSettings(
        host=typed["host"] or ServerSettings.host,
        port=WEB_PORT if typed["port"] is None else typed["port"],
        api_key=os.environ.get(WEB_KEY),
        key_variable=WEB_KEY,
    )

    def on_ready(url: str, once: str) -> None:
        output.answer(f"{url}\n")
        if typed["browse"]:
            import webbrowser

            webbrowser.open(once)

    return endings.run(server.serve(conversation, settings, typed["image"] or (), on_ready=on_ready))


def _check_web(ctx: typer.Context) -> None:
    """What is for the page alone, what is for the terminal alone, and what the page needs."""
    if not ctx.params["web"]:
        for name, flag in ON_THE_PAGE:
            if ctx.params[name] is not None and ctx.params[name] is not False:
                raise UsageError(f"{flag} is for the page", hint=f"ghostvis chat --web {flag}")
        return
    for name, usual, flag in AT_THE_TERMINAL:
        if ctx.params[name] is not usual:
            raise UsageError(f"{flag} is for the terminal", hint=f"leave out {flag}, or --web")
    if find_spec("gradio") is None:
        raise EngineError(
            "the page needs gradio, which is not installed", hint="pip install 'ghostvis-cli[web]'"
        )


def _guarded_at_terminal(ctx: typer.Context) -> None:
    """Put --lock and --log-file into effect. At a terminal the chat handles signals itself and has no deadline."""
    for name in ("json", "timeout"):
        if ctx.params[name]:
            raise UsageError(f"--{name} is for scripts alone", hint="ghostvis chat < script.txt")
    if (log_file := ctx.params["log_file"]) is not None:
        output.log_to(Path(log_file), ctx.command_path)
    if (lock := ctx.params["lock"]) is not None:
        ctx.with_resource(guard.locked(guard.automatic_lock(ctx) if lock == "auto" else Path(lock)))


def _conversation(ctx: typer.Context, resolved: "Resolved", *, autosave: bool) -> "Conversation":
    """The conversation to continue, or a new one. A home that can't be written is only a notice."""
    from ghostvis_cli.chat.conversation import Conversation

    file = None
    try:
        file = _session_file(ctx.params, autosave=autosave)
    except OSError as error:
        output.notice(f"the conversation will not be saved: {error.strerror}")
    if file is not None:
        ctx.call_on_close(file.close)
    conversation = Conversation(resolved, overflow=ctx.params["overflow"], file=file, note=output.notice)
    if file is not None and file.exists:
        conversation.session = file.load(resolved.profile.images)
        if resolved.origins["system"].place == "flag":
            conversation.session.system = resolved.profile.system
    return conversation


def _session_file(params: dict[str, Any], *, autosave: bool) -> "SessionFile | None":
    from ghostvis_cli.chat.store import SessionStore

    sessions = SessionStore.of_user()
    if params["session"] is not None:
        return sessions.open(params["session"])
    if params["resume"]:
        return sessions.newest()
    if not autosave:  # else --continue would go on with what a cron job asked
        return None
    sessions.prune()
    return sessions.unnamed()
