"""What the page does to the conversation: what the same commands do at a terminal. Knows nothing of Gradio.

A reply is a task of its own, so that it goes on while the page is loaded again; pages `watch` it.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ghostvis_cli.chat import slash
from ghostvis_cli.chat.commands import perform
from ghostvis_cli.chat.context import TooLongError
from ghostvis_cli.chat.conversation import Conversation
from ghostvis_cli.chat.store import SessionStore
from ghostvis_cli.chat.surface import Clip
from ghostvis_cli.engines.base import Chunk
from ghostvis_cli.errors import GhostvisError, UsageError, one_line

if TYPE_CHECKING:
    from PIL import Image

    from ghostvis_cli.images import EncodedImage

log = logging.getLogger("ghostvis.web")

PAUSE_S = 0.05  # between two looks at a reply that is coming: 20 a second are fluent
# Commands that may be typed in the page. The others read and write this machine's files, for whoever has the key.
TYPED = ("clear", "undo", "regen", "edit", "system", "set", "show", "profile", "stats", "help")

Action: TypeAlias = Coroutine[None, None, None]


class Desk:
    """One conversation, for any number of pages. `coming` is what there is of the reply on its way."""

    def __init__(self, chat: Conversation) -> None:
        self.chat, self.coming = chat, ""
        self.lines: list[str] = []  # what there is to say about the last thing that was done
        self.too_long: TooLongError | None = None
        self._one = asyncio.Lock()  # thing at a time
        self._reply: asyncio.Task[None] | None = None
        self._news: asyncio.Future[None] | None = None
        chat.note = self.note

    # What pages see

    @property
    def busy(self) -> bool:
        return self._reply is not None

    @property
    def mark(self) -> int:
        """Another number for another session, or when something else has been said in it."""
        said = ((turn.text, turn.reply.text if turn.reply else None) for turn in self.chat.session.turns)
        return hash((self.chat.file and self.chat.file.name, *said))

    async def is_at(self, mark: int | None) -> bool:
        """Whether a tab that was shown this (None: nothing yet) may go on from there. Else it is told why not."""
        if mark is None or mark == self.mark:
            return True
        moved = UsageError(
            "this was not done: the conversation went on in another tab", hint="this is it now"
        )
        return await self._try(self._fail(moved))

    async def watch(self) -> AsyncIterator[None]:
        """At once, after changes while a reply is coming, and when it is over."""
        await asyncio.sleep(0)  # a reply that was just started has put its message there
        while self.busy:
            news = self._news = self._news or asyncio.get_running_loop().create_future()
            yield
            await asyncio.sleep(PAUSE_S)
            await asyncio.wait((news,))
        yield

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set_result(None)
            self._news = None

    @staticmethod
    def sessions() -> list[str]:
        return SessionStore.of_user().names()

    @staticmethod
    def profiles() -> list[str]:
        from ghostvis_cli.profile.files import Library

        return Library(os.environ).names()

    # What people do. False: it failed, a line says why, and what was typed should stay.

    async def send(self, text: str, uploads: Sequence[Path]) -> bool:
        """A message with these files as its images, or a command."""
        try:
            meant = slash.parse(text)
        except UsageError as error:
            return await self._try(self._fail(error))
        if not isinstance(meant, slash.Command):
            return await self._try(self._ask(text.strip(), uploads))
        if meant.slash.name not in TYPED:
            there_is = ", ".join(f"/{name}" for name in TYPED)
            return await self._try(
                self._fail(UsageError(f"/{meant.slash.name} is for terminals", hint=there_is))
            )
        return await self.do(meant.slash.name, meant.rest)

    async def _ask(self, text: str, uploads: Sequence[Path]) -> None:
        from ghostvis_cli.images import from_bytes

        if not text:
            raise UsageError("the message is empty", hint="ask something about the images attached")

        def load() -> "list[EncodedImage]":
            return [from_bytes(path.read_bytes(), path.name, self.chat.profile.images) for path in uploads]

        found = await asyncio.to_thread(load)
        while self.chat.session.pending:  # the box had those, too
            self.chat.session.detach(1)
        await self.chat.attach(found)
        self._start(self.chat.send(text))

    async def do(self, command: str, rest: str = "") -> bool:
        """A slash command, and the reply that it asks for."""

        async def act() -> None:
            outcome = await perform(self.chat, slash.Command(slash.BY_NAME[command], rest), self)
            if outcome.reply is not None:
                self._start(outcome.reply)

        return await self._try(act())

    async def edit(self, turn: int, text: str) -> bool:
        """Change an earlier message: what was said after it is taken back."""
        if not text.strip():
            return await self._try(self._fail(UsageError("the message is empty", hint="undo takes it out")))
        session = self.chat.session
        later = len(session.turns) - 1 - turn + (session.draft is not None)
        return (not later or await self.do("undo", str(later))) and await self.do("edit", text)

    async def make_room(self) -> bool:
        """Leave out as many of the oldest turns as the last message needs, and send it."""

        async def act() -> None:
            if too_long is not None:
                self.chat.forget(too_long.drop)
                self._start(self.chat.regenerate())

        too_long = self.too_long
        return await self._try(act())

    async def open(self, name: str) -> bool:
        async def act() -> None:
            if name not in self.sessions():  # a path would be one of this machine
                raise UsageError("there is no session of that name")
            await self.chat.load(name)

        return await self._try(act())

    async def now(self, action: Callable[[], None]) -> bool:
        """Something that the conversation does at once."""

        async def act() -> None:
            action()

        return await self._try(act())

    async def stop(self) -> None:
        if self._reply is not None:
            self._reply.cancel()
            await asyncio.wait((self._reply,))

    async def _fail(self, error: GhostvisError) -> None:
        raise error

    async def _try(self, action: Action) -> bool:
        async with self._one:
            self.lines, self.too_long = [], None
            try:
                if self.busy:
                    raise UsageError("a reply is still on its way", hint="stop it first")
                await action
            except GhostvisError as error:
                self._say_error(error)
                return False
            finally:
                action.close()
        return True

    # The reply

    def _start(self, chunks: AsyncGenerator[Chunk, None]) -> None:
        self._reply = asyncio.create_task(self._show(chunks))
        self._reply.add_done_callback(self._end)

    async def _show(self, chunks: AsyncGenerator[Chunk, None]) -> None:
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    self.coming += chunk.text
                    self._tell()
        except asyncio.CancelledError:
            self.note("stopped")
        except GhostvisError as error:
            self.too_long = error if isinstance(error, TooLongError) and error.drop else None
            self._say_error(error)

    def _end(self, reply: "asyncio.Task[None]") -> None:
        self._reply, self.coming = None, ""
        if not reply.cancelled() and (error := reply.exception()) is not None:
            self.note(f"a fault of ghostvis: {one_line(error)}")
            log.error("a reply failed", exc_info=error)
        self._tell()

    def _say_error(self, error: GhostvisError) -> None:
        self.lines.append(f"{error.message} ({error.hint})" if error.hint else error.message)

    # As a Surface

    def say(self, text: str) -> None:
        self.lines.extend(text.split("\n"))

    answer = say

    def note(self, text: str) -> None:
        self.lines.append(text)

    def show_image(self, image: "Image.Image", caption: str) -> None:
        self.note(caption)

    def edit_text(self, text: str) -> str | None:
        raise UsageError("there is no editor here", hint="/edit NEW TEXT")

    def clipboard(self) -> Clip:
        raise UsageError("there is no clipboard here", hint="paste into the message")
