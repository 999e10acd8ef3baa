"""What each slash command does to a conversation, be it typed at a terminal or read from a script."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ghostvis_cli import files
from ghostvis_cli.chat import slash, store
from ghostvis_cli.chat.conversation import Conversation
from ghostvis_cli.chat.settings import plain, settable
from ghostvis_cli.chat.slash import Command
from ghostvis_cli.chat.surface import Surface
from ghostvis_cli.cli import output
from ghostvis_cli.engines.base import Chunk
from ghostvis_cli.errors import OutputError, UsageError, one_line, printable
from ghostvis_cli.paths import expanded, is_file

if TYPE_CHECKING:
    from PIL import Image

    from ghostvis_cli.images import EncodedImage

SHOWN_PIXELS = 336  # side of the square to preview where the model's is not known; what most towers see


@dataclass(frozen=True)
class Outcome:
    """What is left to do: leave, show a reply as it comes, or put a text on the line being typed."""

    leave: bool = False
    reply: AsyncGenerator[Chunk, None] | None = None
    insert: str | None = None


DONE = Outcome()


async def perform(conversation: Conversation, command: Command, surface: Surface) -> Outcome:
    """Run one command. GhostvisError where it can't be done; the conversation is then as it was."""
    return await ACTIONS[command.slash.name](conversation, command.rest, surface)


# --- images


async def image(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    if not rest:
        surface.say("\n".join(chips(chat)) or "no image is attached to the next message")
        return DONE
    arguments = slash.words(rest)
    if len(arguments) == 1 and (number := arguments[0].removeprefix("-")) != arguments[0]:
        if not number.isdecimal() or len(number) > 6:
            raise UsageError(
                "stdin is not read for images here", hint="/image PATH, or /image -1 to take one off"
            )
        surface.note(f"taken off: {chat.session.detach(int(number)).name}")
    else:
        await attach(chat, _sources(rest, arguments), surface)
    chat.save()
    return DONE


async def attach(chat: Conversation, sources: list[str], surface: Surface) -> None:
    """Put images on the next message: all of them, or, with an InputError, none."""
    from ghostvis_cli.images import load_image

    if "-" in sources:
        raise UsageError("stdin is not read for images here", hint="/image PATH")
    limits = chat.profile.images
    found = [await asyncio.to_thread(load_image, source, limits=limits) for source in sources]
    await chat.attach(found)
    for each in found:
        _say_attached(each, surface)


def _say_attached(image: "EncodedImage", surface: Surface) -> None:
    for line in (f"attached: {chip(image)}", *image.notices, *(image.details if output.verbose() else ())):
        surface.note(line)


def _sources(rest: str, arguments: list[str]) -> list[str]:
    """As a shell would split them; but where the whole line names a file, its blanks belong to the name."""
    return [rest] if is_file(rest) else arguments


def chip(image: "EncodedImage") -> str:
    """ "red-circle.png 224x224": how an image is named in the prompt."""
    return f"{printable(image.name.rsplit('/', 1)[-1])} {image.width}x{image.height}"


def chips(chat: Conversation) -> list[str]:
    """The images of the next message with the numbers that /image -N takes."""
    return [f"{number}. {chip(each)}" for number, each in enumerate(chat.session.pending, start=1)]


async def paste(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    clip = surface.clipboard()
    if clip.image is None:
        return Outcome(insert=clip.text or "")
    from ghostvis_cli.images import from_bytes

    found = await asyncio.to_thread(from_bytes, clip.image, "clipboard", chat.profile.images)
    await chat.attach([found])
    _say_attached(found, surface)
    chat.save()
    return DONE


async def view(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    images = chat.session.images
    number = _number(rest, len(images), "image")
    if not 1 <= number <= len(images):
        some = f"1 to {len(images)}" if images else "none"
        raise UsageError(f"there is no image {number}; there is {some}", hint="/image PATH")
    side = _tower_pixels(chat)
    seen = await asyncio.to_thread(as_seen, images[number - 1], side)
    surface.show_image(seen, seen_caption(images[number - 1], number, side))
    return DONE


def as_seen(image: "EncodedImage", side: int | None = None) -> "Image.Image":
    """The upright central square that the model sees; `side` in pixels, None where it is not known."""
    from ghostvis_cli.model.preprocess import crop

    return crop(image.pil(), min(side or SHOWN_PIXELS, image.width, image.height))


def _tower_pixels(chat: Conversation) -> int | None:
    """A side of the square that the model's tower sees; None where no engine, or no sound one, has said it."""
    side = chat.engine.info.image_pixels if chat.engine else None
    return side if type(side) is int and side > 0 else None


def seen_caption(image: "EncodedImage", number: int, side: int | None = None) -> str:
    size = f", as {side}x{side} pixels" if side else ""
    return f"image {number}: {chip(image)}; the model sees {share_seen(image)}{size}"


def share_seen(image: "EncodedImage") -> str:
    """How much of an image the model sees, in words."""
    percent = int(100 * image.kept_fraction)
    return "all of it" if percent == 100 else f"the central square, {percent} % of it"


# --- second thoughts


async def clear(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    chat.session.clear()
    chat.save()
    surface.note("the conversation is forgotten; /undo brings it back")
    return DONE


async def undo(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    count = _number(rest, 1, "count", least=1)
    there = len(chat.session.turns) + (chat.session.draft is not None)
    if count > max(1, there):
        raise UsageError(
            f"the conversation has {_counted(there, 'message')}, not {count}",
            hint=f"/undo {there}" if there else None,
        )
    for _ in range(count):
        turn = chat.session.undo()
        told = "the conversation is back" if turn is None else f"taken back: {_brief(turn.text)}"
        surface.note(told)
    chat.save()
    return DONE


async def regen(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    chat.session.last_text()  # refuses where there is nothing, before anything is shown
    return Outcome(reply=chat.regenerate())


async def edit(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    before = chat.session.last_text()
    text = rest or surface.edit_text(before)
    if text is None or not text.strip():
        surface.note("the message stays as it was")
        return DONE
    return Outcome(reply=chat.regenerate(text.strip()))


async def system(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    if not rest:
        surface.say(chat.session.system or "there is no system message")
        return DONE
    chat.session.system = None if rest == "-" else rest
    chat.save()
    return DONE


# --- settings


async def set_(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    if rest:
        chat.set(slash.assignments(rest))
    else:
        surface.say("\n".join(_settings(chat)))
    return DONE


def _settings(chat: Conversation) -> list[str]:
    return [f"{name} = {plain(getattr(chat.profile.sampling, name))}" for name in settable()]


async def show(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    info = chat.engine.info if chat.engine else None
    engine = f"{info.kind}, {info.device}, {info.dtype}" if info else "not loaded yet"
    session = chat.session
    forgotten = f" ({session.forgotten} no longer sent)" if session.forgotten else ""
    lines = [
        f"profile: {chat.profile.name}",
        f"model: {info.model if info else '-'}",
        f"engine: {engine}",
        f"context: {context(chat)}",
        f"messages: {len(session.turns)}{forgotten}, images: {len(session.images)}",
        f"session: {chat.file.name if chat.file else 'not saved'}",
        f"system: {session.system or '-'}",
    ]
    surface.say("\n".join([*lines, *_settings(chat)]))
    return DONE


def context(chat: Conversation) -> str:
    """ "312 of 2,048 tokens (15 %)", as far as it is known."""
    used, limit = chat.context_used(), chat.context_tokens
    known = f"{used:,}" if used is not None else "?"
    if limit is None:
        return f"{known} tokens"
    return f"{known} of {limit:,} tokens" + (f" ({100 * used // limit} %)" if used is not None else "")


async def profile(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    if not rest:
        surface.say(chat.profile.name)
        return DONE
    await chat.switch(rest)
    info = chat.engine.info if chat.engine else None
    surface.note(f"profile {chat.profile.name}: {info.model if info else ''}")
    if info and chat.session.images and not info.image_tokens and info.kind == "local":
        surface.note(
            "this model reads text only, and there are images in the conversation: /clear, or /profile"
        )
    return DONE


# --- files


async def save(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    force, target = _target(rest)
    if target is None:
        if chat.file is None:
            raise UsageError("this conversation has no name to be saved under", hint="/save FILE.jsonl")
        chat.save()
        place = chat.file.directory / store.SESSION
        if not chat.saved:
            raise OutputError(f"{place} can't be written", hint="/save FILE.jsonl")
        surface.note(f"saved: {place}")
        return DONE
    path = _writable(chat, target, force)
    try:
        await asyncio.to_thread(store.write_file, path, chat.session, chat.about())
    except OSError as error:
        raise files.cannot_write(path, error, "/save OTHER.jsonl") from error
    surface.note(f"saved: {path}")
    return DONE


async def load(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    if not rest:
        surface.say("\n".join(session_names()) or "there is no saved session")
        return DONE
    await chat.load(" ".join(slash.words(rest)) if not is_file(rest) else rest)
    surface.note(f"loaded: {described(chat)}")
    return DONE


def described(chat: Conversation) -> str:
    """ "trip: 4 messages, 1 image"."""
    session = chat.session
    name = chat.file.name if chat.file else "conversation"
    images = f", {_counted(len(session.images), 'image')}" if session.images else ""
    draft = "; the last message was not answered, /regen sends it again" if session.draft else ""
    return f"{name}: {_counted(len(session.turns), 'message')}{images}{draft}"


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


async def export(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    style, _, rest = rest.partition(" ")
    if style not in slash.FORMATS:
        raise UsageError(f"{style[:20]!r} is no format", hint="/export md, /export json or /export html")
    force, target = _target(rest)
    text = await exported(chat, style)
    if target == "-":
        surface.answer(text)
        return DONE
    path = _writable(chat, target or f"chat-{time.strftime('%Y%m%d-%H%M%S')}.{style}", force)
    try:
        await asyncio.to_thread(files.write, path, text.encode(), mode=store.PRIVATE)
    except OSError as error:
        raise files.cannot_write(path, error, f"/export {style} OTHER") from error
    surface.note(f"exported: {path}")
    return DONE


async def exported(chat: Conversation, style: str) -> str:
    """The conversation for reading, as md, json or html."""
    from ghostvis_cli.chat.export import export

    title = f"Conversation with {_model_name(chat)}, {time.strftime('%Y-%m-%d %H:%M')}"
    return await asyncio.to_thread(export, chat.session, style, title)


def _model_name(chat: Conversation) -> str:
    info = chat.engine.info if chat.engine else None
    return printable((info.tag or info.model.rsplit("/", 1)[-1]) if info else "a model")


def _target(rest: str) -> tuple[bool, str | None]:
    """Whether -f was given, and the file's name if there is one."""
    arguments = slash.words(rest)
    names = [each for each in arguments if each != "-f"]
    return "-f" in arguments, " ".join(names) or None


def _writable(chat: Conversation, target: str, force: bool) -> Path:
    """A file that is new, or that this chat wrote; any other only with -f."""
    try:
        path = files.target(expanded(target))
        taken = path.exists() and path not in chat.written and not force
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{printable(target)} is no file: {one_line(error)}") from error
    if path.is_dir() or taken:
        reason = "is a directory" if path.is_dir() else "exists"
        raise UsageError(f"{printable(str(path))} {reason}", hint="another name, or -f to replace the file")
    chat.written.add(path)
    return path


# --- about


def session_names() -> list[str]:
    """What can be gone on with, the newest first."""
    return store.SessionStore.of_user().names()


def profile_names() -> list[str]:
    """What can be switched to."""
    from ghostvis_cli.profile.files import Library

    return Library(os.environ).names()


async def stats(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    totals = chat.session.totals
    cached = "not reported" if totals.cached is None else f"{totals.cached:,}"
    if totals.cached is not None and totals.prompt:
        cached += f" ({100 * totals.cached // totals.prompt} % of the prompts)"
    lines = [
        f"replies: {totals.replies}",
        f"prompt tokens: {totals.prompt:,} ({totals.text:,} text + {totals.image:,} image)",
        f"cached tokens: {cached}",
        f"completion tokens: {totals.completion:,}",
        f"context: {context(chat)}",
    ]
    surface.say("\n".join([*lines, *([f"last reply: {chat.last.statistics()}"] if chat.last else [])]))
    return DONE


async def help_(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    surface.say(slash.help_text(rest))
    return DONE


async def leave(chat: Conversation, rest: str, surface: Surface) -> Outcome:
    return Outcome(leave=True)


def _number(rest: str, default: int, name: str, least: int = 0) -> int:
    if not rest:
        return default
    if not rest.isdecimal() or len(rest) > 6 or int(rest) < least:
        raise UsageError(f"{rest[:20]!r} is no {name}")
    return int(rest)


def _brief(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


Action = Callable[[Conversation, str, Surface], Awaitable[Outcome]]
ACTIONS: dict[str, Action] = {
    "image": image, "paste": paste, "view": view, "clear": clear, "undo": undo, "regen": regen, "edit": edit,
    "system": system, "set": set_, "show": show, "profile": profile, "save": save, "load": load,
    "export": export, "stats": stats, "help": help_, "quit": leave, "exit": leave,
}  # fmt: skip
