"""A session, an engine and settings: what happens between a message and its reply. Shows nothing.

    async with Conversation(resolved, note=surface.note) as conversation:
        async with aclosing(conversation.send("What is this?")) as chunks:
            async for chunk in chunks: ...

Closing or cancelling that stream stops the reply and keeps the part that came; so does `stop()`, after which the
stream ends by itself with a chunk whose finish reason is "abort".
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from ghostvis_cli.chat.session import Reply, Session
from ghostvis_cli.engines.base import Chunk, Engine

if TYPE_CHECKING:
    from ghostvis_cli.profile import Profile, Resolved

Overflow: TypeAlias = Literal["refuse", "drop-oldest"]


class Conversation:
    """What a terminal or a script talks to."""

    def __init__(
        self,
        resolved: "Resolved",
        session: Session | None = None,
        *,
        kept: Mapping[str, Any] | None = None,  # flags that stay when the profile changes
        overflow: Overflow = "refuse",
        note: Callable[[str], None] = lambda line: None,
    ) -> None: ...

    profile: "Profile"
    session: Session
    engine: Engine | None
    last: Reply | None  # the newest reply, with its statistics

    async def connect(self) -> Engine:
        """Load the model or find the server, once; `send` waits for it. A lost server is looked for again."""
        raise NotImplementedError

    def send(self, text: str) -> AsyncGenerator[Chunk, None]:
        """Ask, with the pictures attached. TooLongError where it does not fit (see context.py)."""
        raise NotImplementedError

    def regenerate(self, text: str | None = None) -> AsyncGenerator[Chunk, None]:
        """Answer the last message again, or a changed one, or send the draft."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the reply that is on its way, and tell the engine so."""
        raise NotImplementedError

    def context_used(self) -> int | None:
        """Tokens of the whole conversation after its last reply; None where nobody counted."""
        raise NotImplementedError

    @property
    def context_tokens(self) -> int | None:
        """What fits the model; None where a server does not say."""
        raise NotImplementedError

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()
