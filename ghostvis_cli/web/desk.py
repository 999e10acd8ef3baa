"""What the page does to the conversation: what the same commands do at a terminal. Knows nothing of Gradio.

A reply is a task of its own, so that it goes on while the page is loaded again; pages `watch` it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ghostvis_cli.chat import slash
from ghostvis_cli.chat.commands import perform, session_names
from ghostvis_cli.chat.context import TooLongError
from ghostvis_cli.chat.conversation import Conversation
from ghostvis_cli.chat.surface import Clip
from ghostvis_cli.encoding import well_formed
from ghostvis_cli.engines.base import Chunk
from ghostvis_cli.errors import GhostvisError, InputError, UsageError, one_line

if TYPE_CHECKING:
    from PIL import Image

    from ghostvis_cli.images import EncodedImage

log = logging.getLogger("ghostvis.web")

PAUSE_S = 0.05  # between two looks at a reply that is coming: 20 a second are fluent
# Commands that may be typed in the page. The others read and write this machine's files, for whoever has the key.
TYPED = ("clear", "undo", "regen", "edit", "system", "set", "show", "profile", "stats", "help")

Action: TypeAlias = Coroutine[None, None, None]


class Desk:
    """One conversation, for any number of pages. `coming` is what there is of the reply on its way.

    lines      what there is to say about the last reply
    too_long   how many turns have to go before the last message fits
    """

    def __init__(self, chat: Conversation) -> None:
        self.chat, self.coming, self.too_long = chat, "", 0
        self.lines: list[str] = []
        self._said = self.lines  # about what is being done, for whoever asked for it
        self._one = asyncio.Lock()  # thing at a time
        self._reply: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
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

    async def watch(self) -> AsyncIterator[str]:
        """The reply so far: the first word at once, then as often as is fluent, until it is over."""
        loop, next_s = asyncio.get_running_loop(), 0.0
        while self.busy:
            news = self._news
            yield self.coming
            await news.wait()
            await asyncio.sleep(next_s - loop.time())
            next_s = loop.time() + PAUSE_S

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # What people do

    async def at(self, mark: int | None, action: Action) -> tuple[bool, list[str]]:
        """Do it for a tab that was shown `mark` (None: by no page of this process).

        Whether it was done, so that what was typed can go, and what there is to say to that tab.
        """
        async with self._one:
            with closing(action):
                said: list[str] = []
                try:
                    self._require(mark)
                    self.lines, self._said, self.too_long = [], said, 0
                    await action
                except GhostvisError as error:
                    said.append(line_of(error))
                    return False, said
                return True, said

    def _require(self, mark: int | None) -> None:
        if self.busy:
            raise UsageError("a reply is still on its way", hint="stop it first")
        if mark != self.mark:
            where = "after ghostvis started again" if mark is None else "in another tab"
            raise UsageError(f"this was not done: the conversation went on {where}", hint="this is it now")

    async def send(self, text: str, uploads: Sequence[Path]) -> None:
        """A message with these files as its images, or a command."""
        meant = slash.parse(text)
        if isinstance(meant, slash.Command):
            await self.do(meant.slash.name, meant.rest)
        else:
            await self._ask(text.strip(), uploads)

    async def _ask(self, text: str, uploads: Sequence[Path]) -> None:
        from ghostvis_cli.images import from_bytes

        if not text:
            raise UsageError("the message is empty", hint="ask something about the images attached")
        well_formed(text, "the message")

        def load() -> "list[EncodedImage]":
            return [from_bytes(path.read_bytes(), path.name, self.chat.profile.images) for path in uploads]

        try:
            found = await asyncio.to_thread(load)
        except OSError as error:
            raise InputError(f"an image can't be read: {one_line(error)}", hint="attach it again") from error
        while self.chat.session.pending:  # the box had those, too
            self.chat.session.detach(1)
        await self.chat.attach(found)
        for path in uploads:
            path.unlink(missing_ok=True)
        await self._start(self.chat.send(text))

    async def do(self, command: str, rest: str = "") -> None:
        """A slash command, and the reply that it asks for."""
        if command not in TYPED:
            there_is = ", ".join(f"/{name}" for name in TYPED)
            raise UsageError(f"/{command} is for terminals", hint=there_is)
        if command == "help":
            self.say(slash.help_text(rest, TYPED))
            return
        outcome = await perform(self.chat, slash.Command(slash.BY_NAME[command], rest), self)
        if outcome.reply is not None:
            await self._start(outcome.reply)

    async def edit(self, turn: int, text: str) -> None:
        """Change an earlier message: what was said after it is taken back."""
        if not text.strip():
            raise UsageError("the message is empty", hint="undo takes it out")
        well_formed(text, "the message")
        await self._start(self._changed(turn, text.strip()))

    async def _changed(self, turn: int, text: str) -> AsyncGenerator[Chunk, None]:
        """The answer to it. Where no word comes, everything stands there again and `text` is the draft."""
        session = self.chat.session
        before = replace(session, turns=session.turns, draft=text)
        session.turns, session.draft = session.turns[: turn + 1], None
        try:
            async with aclosing(self.chat.regenerate(text)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            if session.draft is not None:
                self.chat.session = before
                self.chat.save()

    async def make_room(self, count: int) -> None:
        """Leave out so many of the oldest turns, and send the last message."""
        if count:
            self.chat.forget(count)
            await self._start(self.chat.regenerate())

    async def open(self, name: str) -> None:
        if name not in session_names():  # a path would be one of this machine
            raise UsageError("there is no session of that name")
        await self.chat.load(name)

    async def now(self, action: Callable[[], None]) -> None:
        """Something that the conversation does at once."""
        action()

    async def stop(self) -> None:
        if self._reply is not None:
            self._reply.cancel()
            await asyncio.wait((self._reply,))

    # The reply

    async def _start(self, chunks: AsyncGenerator[Chunk, None]) -> None:
        self.lines = self._said
        self._reply = asyncio.create_task(self._show(chunks))
        self._reply.add_done_callback(self._end)
        await asyncio.sleep(0)  # the message is there then

    async def _show(self, chunks: AsyncGenerator[Chunk, None]) -> None:
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    self.coming += chunk.text
                    self._tell()
        except asyncio.CancelledError:
            self.note("stopped")
        except GhostvisError as error:
            self.too_long = error.drop if isinstance(error, TooLongError) else 0
            self.note(line_of(error))

    def _end(self, reply: "asyncio.Task[None]") -> None:
        self._reply, self.coming = None, ""
        if not reply.cancelled() and (error := reply.exception()) is not None:
            self.note(f"a fault of ghostvis: {one_line(error)}")
            log.error("a reply failed", exc_info=error)
        self._tell()

    # As a Surface

    def say(self, text: str) -> None:
        self._said.extend(text.split("\n"))

    note = answer = say

    def show_image(self, image: "Image.Image", caption: str) -> None:
        self.note(caption)

    def edit_text(self, text: str) -> str | None:
        raise UsageError("there is no editor here", hint="/edit NEW TEXT")

    def clipboard(self) -> Clip:
        raise UsageError("there is no clipboard here", hint="paste into the message")


def line_of(error: GhostvisError) -> str:
    """What happened, and what can be done about it."""
    return f"{error.message} ({error.hint})" if error.hint else error.message
