"""What each slash command does to a conversation."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from ghostvis_cli.chat.conversation import Conversation
from ghostvis_cli.chat.slash import Command
from ghostvis_cli.chat.surface import Surface
from ghostvis_cli.engines.base import Chunk


@dataclass(frozen=True)
class Outcome:
    """What is left to do: leave, show a reply as it comes, or put a text on the line being typed."""

    leave: bool = False
    reply: AsyncGenerator[Chunk, None] | None = None
    insert: str | None = None


async def perform(conversation: Conversation, command: Command, surface: Surface) -> Outcome:
    """Run one command. GhostvisError where it can't be done; the conversation is then as it was."""
    raise NotImplementedError
