"""A chat without a terminal: a line of stdin is a message or a command, stdout has the answers and nothing else.

The first line that fails ends it, with that failure's exit code: what follows would be asked of a conversation that
is not the one the script's author had in mind.
"""

import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ghostvis_cli import encoding, endings
from ghostvis_cli.answer import of_record
from ghostvis_cli.chat import slash
from ghostvis_cli.chat.commands import attach, perform
from ghostvis_cli.chat.conversation import Conversation
from ghostvis_cli.chat.surface import Clip, Options
from ghostvis_cli.cli import output
from ghostvis_cli.encoding import decode, pieces_of
from ghostvis_cli.engines.base import Chunk
from ghostvis_cli.errors import ExitCode, GhostvisError, InputError, UsageError
from ghostvis_cli.version import SCHEMA_VERSION

if TYPE_CHECKING:
    from PIL import Image

LINE_LIMIT_BYTES = 16 * 1024**2


class ScriptSurface:
    """stdout for what was asked for there, stderr for all else; no images, no editor, no clipboard."""

    def say(self, text: str) -> None:
        output.notices(text.split("\n"))

    def answer(self, text: str) -> None:
        output.answer(text)

    def note(self, text: str) -> None:
        output.notice(text)

    def show_image(self, image: "Image.Image", caption: str) -> None:
        output.notice(caption)

    def edit_text(self, text: str) -> str | None:
        raise UsageError("there is no editor without a terminal", hint="/edit NEW TEXT")

    def clipboard(self) -> Clip:
        raise UsageError("there is no clipboard without a terminal", hint="/image PATH")


def run(conversation: Conversation, options: Options) -> int:
    """The whole of stdin. GhostvisError names the line that failed."""
    return endings.run(_run(conversation, options))


async def _run(conversation: Conversation, options: Options) -> int:
    surface, number = ScriptSurface(), 0
    async with conversation:
        await attach(conversation, list(options.images), surface)
        for number, line in enumerate(lines(), start=1):
            try:
                if await _do(line, conversation, options, surface):
                    break
            except GhostvisError as error:
                error.message = f"line {number}: {error.message}"
                raise
        if not number:
            raise UsageError("stdin holds no messages", hint="echo 'What can you do?' | ghostvis chat")
        if conversation.session.pending:
            output.notice("the last images were attached, and nothing was asked about them")
    return ExitCode.OK


def lines() -> Iterator[str]:
    """Lines of stdin as they come, without their ends. Waiting blocks the loop: nothing else is going on."""
    stream = getattr(sys.stdin, "buffer", None)
    pieces = pieces_of(stream) if stream is not None else ()
    try:
        for number, line in enumerate(encoding.lines(pieces, "stdin", LINE_LIMIT_BYTES), start=1):
            if line is None:
                raise InputError(f"line {number} holds more than {LINE_LIMIT_BYTES // 1024**2} MiB")
            yield decode(line, f"line {number}")
    except OSError as error:
        raise InputError(f"stdin can't be read: {error.strerror}") from error


async def _do(line: str, conversation: Conversation, options: Options, surface: ScriptSurface) -> bool:
    """One line; True where it says to leave."""
    match slash.parse(line):
        case slash.Message(text):
            await _show(conversation.send(text), conversation, options)
        case slash.Command() as command:
            outcome = await perform(conversation, command, surface)
            if outcome.reply is not None:
                await _show(outcome.reply, conversation, options)
            return outcome.leave
    return False


async def _show(reply: AsyncGenerator[Chunk, None], conversation: Conversation, options: Options) -> None:
    """The answer as it comes, or its record."""
    async with aclosing(reply) as chunks:
        async for chunk in chunks:
            if chunk.text and not options.json:
                output.answer(chunk.text)
    if options.json:
        output.record(record(conversation))
    else:
        output.answer("\n")
    if options.stats and conversation.last is not None:
        output.notice(conversation.last.statistics())


def record(conversation: Conversation) -> dict[str, Any]:
    """The JSON object of the last turn."""
    turn, engine = conversation.session.turns[-1], conversation.engine
    reply = turn.reply
    assert reply is not None and engine is not None, "only finished turns are recorded"
    return {
        "schema_version": SCHEMA_VERSION,
        "turn": len(conversation.session.turns),
        "prompt": turn.text,
        "images": [image.name for image in turn.images],
        "text": reply.text,
        **reply.beside.record(),
        "finish_reason": reply.finish_reason,
        "usage": asdict(reply.usage) if reply.usage else None,
        "timing": {"ttft_s": reply.ttft_s, "total_s": reply.total_s, "tokens_per_s": reply.tokens_per_s},
        **of_record(engine.info),
    }
