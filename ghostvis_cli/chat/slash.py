"""The table of slash commands, and what a line means: a command, a message, or a slip of the keyboard. Pure.

Only a name of the table makes a line a command, so a message may begin with a path. A line that begins with a
blank is always a message.
"""

import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, TypeAlias

from ghostvis_cli.errors import UsageError

# What an editor offers after the command's name.
Completion: TypeAlias = Literal["none", "image", "file", "session", "profile", "setting", "format", "command"]


@dataclass(frozen=True)
class Slash:
    """One command. `multiline`: what follows the name may run over several lines."""

    name: str
    arguments: str
    summary: str
    completes: Completion = "none"
    multiline: bool = False

    @property
    def usage(self) -> str:
        return f"/{self.name} {self.arguments}".rstrip()


TABLE: tuple[Slash, ...] = (
    Slash("image", "PATH|URL...|-N", "Attach images to the next message; list them; take one off.", "image"),
    Slash("paste", "", "Attach or insert what is on the clipboard."),
    Slash("view", "[N]", "Show an image as the model sees it."),
    Slash("clear", "", "Forget the conversation; /undo brings it back."),
    Slash("undo", "[N]", "Take back the last message and its reply."),
    Slash("regen", "", "Answer the last message again."),
    Slash("edit", "[TEXT]", "Change the last message, and answer it again.", multiline=True),
    Slash("system", "[TEXT|-]", "Show or set the system message; - takes it away.", multiline=True),
    Slash("set", "KEY=VALUE...", "Change how the model answers, e.g. temperature=0.", "setting"),
    Slash("show", "", "Show model, settings and what is in the conversation."),
    Slash("profile", "[NAME]", "Switch to another profile and keep the conversation.", "profile"),
    Slash("save", "[-f] [FILE]", "Write the conversation with its images to a file.", "file"),
    Slash("load", "NAME|FILE", "Go on with an earlier conversation.", "session"),
    Slash("export", "md|json|html [-f] [FILE]", "Write the conversation for reading; - is stdout.", "format"),
    Slash("stats", "", "Show tokens, speed and context used."),
    Slash("help", "[COMMAND]", "Show the commands, or what one does.", "command"),
    Slash("quit", "", "Leave; so do /exit, quit and exit."),
    Slash("exit", "", "Leave."),
)
BY_NAME = {slash.name: slash for slash in TABLE}
LEAVE = ("quit", "exit")
FORMATS = ("md", "json", "html")
ALIASES = {"?": "help"}
_NAME = re.compile(r"/(\?|[A-Za-z][A-Za-z_-]*)(?=\s|\Z)")


@dataclass(frozen=True)
class Command:
    """A command and the rest of its line, outer blanks taken off."""

    slash: Slash
    rest: str = ""


@dataclass(frozen=True)
class Message:
    """Something to say to the model."""

    text: str


def parse(line: str) -> Command | Message | None:
    """What was typed; None for a blank line. UsageError for a command that is none, with the nearest one."""
    text = line.strip()
    if not text:
        return None
    if text.lower() in LEAVE:
        return Command(BY_NAME["quit"])
    found = _NAME.match(line)
    if found is None:
        return Message(text)
    name = ALIASES.get(found[1], found[1].lower())
    if name not in BY_NAME:
        raise UsageError(f"there is no command /{found[1][:40]}", hint=_suggestion(name))
    slash, rest = BY_NAME[name], line[found.end() :].strip()
    if "\n" in rest and not slash.multiline:
        raise UsageError(f"/{name} stands on a line of its own", hint=slash.usage)
    return Command(slash, rest)


def suggestions(typed: str, count: int = 3) -> list[str]:
    """Names of commands near to what was typed (without the slash), the nearest first."""
    begun = [name for name in BY_NAME if name.startswith(typed)] if typed else []
    return [*begun, *(n for n in get_close_matches(typed, BY_NAME, n=count) if n not in begun)][:count]


def _suggestion(typed: str) -> str:
    near = suggestions(typed, 1)
    return (
        f"/{near[0]}, or begin with a blank to send it" if near else "/help, or begin with a blank to send it"
    )


def words(rest: str) -> list[str]:
    """Arguments as a shell splits them: quotes and backslashes hold blanks together, # is no comment.

    Text that a shell would refuse, such as a lone apostrophe, is split at blanks alone.
    """
    lexer = shlex.shlex(rest, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        return list(lexer)
    except ValueError:
        return rest.split()


def assignments(rest: str) -> list[tuple[str, str]]:
    """`temperature=0.2 stop=["a b"]`, or `temperature 0.2`, as pairs of text."""
    if "=" not in rest:
        name, _, value = rest.partition(" ")
        if not value.strip():
            raise UsageError(f"{name[:40]!r} is not KEY=VALUE", hint="/set temperature=0.2")
        return [(name, value.strip())]
    parts = re.split(r"\s+(?=[A-Za-z_.-]+\s*=)", rest)
    pairs = [(key.strip(), value.strip()) for key, _, value in (part.partition("=") for part in parts)]
    if wrong := next((part for part in parts if "=" not in part or part.startswith("=")), None):
        raise UsageError(f"{wrong[:40]!r} is not KEY=VALUE", hint="/set temperature=0.2")
    return pairs


def help_text(name: str = "", among: Collection[str] = BY_NAME) -> str:
    """Every command in two columns, or one in full. `among`: those that can be typed here."""
    if name:
        wanted = ALIASES.get(name, name.lower().removeprefix("/"))
        if wanted not in among:
            near = next((each for each in suggestions(wanted) if each in among), "")
            raise UsageError(f"there is no command /{wanted[:40]}", hint=f"/help {near}".rstrip())
        return f"{BY_NAME[wanted].usage}\n  {BY_NAME[wanted].summary}"
    shown = [slash for slash in TABLE if slash.name in among and slash.name != "exit"]
    width = max(len(slash.usage) for slash in shown)
    return "\n".join(f"{slash.usage.ljust(width)}  {slash.summary}" for slash in shown)
