"""The chat at a terminal: read a line, run it, show the reply, until the user leaves.

Ctrl-C stops the reply that is on its way, and nothing else. SIGTERM and a closed window end the chat in order: the
engine is told, the session saved, the code is the signal's.
"""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ghostvis_cli import endings
from ghostvis_cli.chat import settings, slash
from ghostvis_cli.chat.commands import as_seen, attach, chip, described, perform, profile_names, session_names
from ghostvis_cli.chat.completion import Names, quoted
from ghostvis_cli.chat.context import TooLongError
from ghostvis_cli.chat.conversation import Conversation
from ghostvis_cli.chat.editor import MARK, Editor, dropped_image
from ghostvis_cli.chat.render import Markdown, Plain, Renderer
from ghostvis_cli.chat.session import Reply
from ghostvis_cli.chat.surface import Options
from ghostvis_cli.chat.terminal import Terminal, TerminalGoneError
from ghostvis_cli.checkpoint import hub
from ghostvis_cli.checkpoint.choose import choose_checkpoint
from ghostvis_cli.endings import Ending
from ghostvis_cli.engines.base import Chunk, EngineInfo
from ghostvis_cli.errors import EngineError, ExitCode, GhostvisError, printable
from ghostvis_cli.paths import state_dir
from ghostvis_cli.threads import Impatient, require_loop

if TYPE_CHECKING:
    from types import FrameType

    from ghostvis_cli.images import EncodedImage

CHIP_LENGTH = 40


def run(conversation: Conversation, options: Options) -> int:
    """The whole chat; its exit code."""
    require_loop()
    return asyncio.run(Chat(conversation, options, Terminal(options)).run())


class Chat:
    """One conversation on one terminal."""

    def __init__(self, conversation: Conversation, options: Options, terminal: Terminal) -> None:
        self._conversation, self._options, self._terminal = conversation, options, terminal
        self._renderer: Renderer = (
            Plain() if options.raw else Markdown(terminal.width, styled=terminal.colored)
        )
        self._editor = Editor(
            history=_history_file() if options.history else None,
            names=_names(),
            chips=self._chips,
            bar=self._bar,
            colored=terminal.colored,
        )
        terminal.above_line = self._editor.above_line
        conversation.note = terminal.note
        self._doing: asyncio.Task[str | None] | None = None  # what the last line asked for
        self._interrupted = False
        self._code: int | None = None  # of the signal that ends the chat
        self._failure: GhostvisError | None = None  # why there is no model to talk to

    async def run(self) -> int:
        asyncio.get_running_loop().set_default_executor(Impatient())
        with self._signals():
            try:
                async with self._conversation:
                    await self._converse()
            except (asyncio.CancelledError, OSError):
                if self._code is None:
                    raise
            except TerminalGoneError:
                self._code = self._code or ExitCode.HANGUP
        if self._failure is not None:
            raise self._failure
        return self._code or ExitCode.OK

    # --- lines

    async def _converse(self) -> None:
        loading = asyncio.create_task(self._connect())
        try:
            if self._options.resumed:
                self._show_where_it_was()
            if self._options.images:
                await attach(self._conversation, list(self._options.images), self._terminal)
                await self._preview([])
            line: str | None = ""
            while line is not None:
                line = await self._one_line(line)
            self._say_how_to_return()
        finally:
            loading.cancel()

    def _show_where_it_was(self) -> None:
        """The last exchange of an earlier session."""
        self._terminal.note(described(self._conversation))
        for turn in self._conversation.session.turns[-1:]:
            self._terminal.say(f"{MARK}{turn.text}")
            self._terminal.write(self._renderer.feed(turn.reply.text if turn.reply else ""))
            self._terminal.write(self._renderer.finish())

    def _say_how_to_return(self) -> None:
        file = self._conversation.file
        if file is not None and file.exists and self._failure is None:
            saved = "saved" if self._conversation.saved else "the end is not saved"
            self._terminal.note(f"{saved}; ghostvis chat --session {file.name} goes on")

    async def _connect(self) -> None:
        """Find the model while the first message is typed. A server that is not there may come back."""
        try:
            profile = self._conversation.profile
            if profile.engine.chosen_kind == "local":
                if hub.reference(profile.model) is None:
                    choose_checkpoint(profile.model)  # fails at once where there is none
                # Not on the loop: seconds in which no key would show.
                with suppress(ImportError):  # which connect() explains
                    await asyncio.to_thread(__import__, "ghostvis_cli.engines.local")
            await self._conversation.connect()
        except EngineError as error:
            self._terminal.error(error)
        except GhostvisError as error:
            if self._doing is None:
                self._failure = error
                self._editor.leave()
        self._editor.refresh()

    async def _one_line(self, begun: str) -> str | None:
        """Read a line and do what it says. What the next one begins with; None: there is none."""
        self._interrupted = False
        try:
            line = await self._editor.read(begun)
        except EOFError:
            return None
        if self._interrupted or self._editor.interrupted:  # before anything was done about it
            self._terminal.note("stopped")
            return line
        self._doing = asyncio.create_task(self._do(line))
        try:
            return await self._doing
        except asyncio.CancelledError:
            if self._code is not None:  # the chat ends, not this alone
                raise
            self._terminal.note("stopped")
        except GhostvisError as error:
            self._terminal.error(error)
        finally:
            self._doing = None
        return self._unanswered

    async def _do(self, line: str) -> str | None:
        meant = await self._meant(line)
        if isinstance(meant, slash.Message):
            await self._send(meant.text)
        elif meant is not None:
            before = list(self._conversation.session.pending)
            outcome = await perform(self._conversation, meant, self._terminal)
            await self._preview(before)
            if outcome.leave:
                return None
            if outcome.reply is None:
                return outcome.insert or ""
            await self._show(outcome.reply)
        return self._unanswered

    @property
    def _unanswered(self) -> str:
        """The message that got no reply, for the input line: Enter sends it again."""
        return self._conversation.session.draft or ""

    async def _meant(self, line: str) -> slash.Command | slash.Message | None:
        """What a line stands for. A path alone is a file dropped on the window, perhaps an image to attach."""
        path = dropped_image(line)
        if path is not None and await self._editor.confirm(f"Attach {_short(path)}?"):
            return slash.Command(slash.BY_NAME["image"], quoted(path))
        return slash.parse(line)

    async def _preview(self, before: "list[EncodedImage]") -> None:
        """The images that were just attached, as the model will see them."""
        if not self._options.preview:
            return
        for image in self._conversation.session.pending:
            if image not in before:
                self._terminal.show_image(await asyncio.to_thread(as_seen, image))

    async def _send(self, text: str) -> None:
        try:
            await self._show(self._conversation.send(text))
        except TooLongError as error:
            if not error.drop or not await self._may_drop(error):
                raise
            self._conversation.forget(error.drop)
            await self._show(self._conversation.regenerate())

    async def _may_drop(self, error: TooLongError) -> bool:
        self._terminal.note(error.message)
        turns = "the oldest turn" if error.drop == 1 else f"the {error.drop} oldest turns"
        return await self._editor.confirm(f"Drop {turns}, images included?")

    # --- replies

    async def _show(self, chunks: AsyncGenerator[Chunk, None]) -> None:
        """A reply as it comes, and what there is to say about it however it ended."""
        before = self._conversation.last
        feed, write = self._renderer.feed, self._terminal.write
        try:
            async with self._terminal.busy(), aclosing(chunks):
                try:
                    async for chunk in chunks:
                        if chunk.text:
                            write(feed(chunk.text))
                        if chunk.finish_reason is not None:  # before the conversation is saved
                            write(self._renderer.finish())
                finally:
                    write(self._renderer.finish())
        finally:
            if (reply := self._conversation.last) is not None and reply is not before:
                self._remark_on(reply)

    def _remark_on(self, reply: Reply) -> None:
        if reply.finish_reason == "length":
            limit = self._conversation.profile.sampling.max_tokens
            self._terminal.note(f"cut off at max_tokens = {limit}; /set max_tokens={2 * limit}")
        if self._options.stats:
            self._terminal.note(reply.statistics())

    # --- around the line

    def _chips(self) -> list[str]:
        return [chip(image) for image in self._conversation.session.pending]

    def _bar(self) -> str:
        """`profile · model · 1,240 of 4,096 tokens · 96 cached`"""
        conversation = self._conversation
        engine, last = conversation.engine, conversation.last
        parts = [conversation.profile.name, _model(engine.info) if engine else "no model yet"]
        used, room = conversation.context_used(), conversation.context_tokens
        if not conversation.session.turns:
            parts.append("/help")
        elif used is not None:
            parts.append(f"{used:,} of {room:,} tokens" if room else f"{used:,} tokens")
        if last is not None and last.usage is not None and last.usage.cached_tokens is not None:
            parts.append(f"{last.usage.cached_tokens:,} cached")
        return printable(" · ".join(parts))[: self._terminal.width() - 2]

    # --- signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop, chat = asyncio.get_running_loop(), asyncio.current_task()

        def end(ending: Ending) -> None:
            endings.hurry(ending)
            self._code = ending.code
            assert chat is not None
            loop.call_soon_threadsafe(chat.cancel)

        def on_sigint(_number: int, _frame: "FrameType | None") -> None:
            loop.call_soon_threadsafe(self._on_interrupt)

        before = signal.signal(signal.SIGINT, on_sigint)
        try:
            with endings.unwinding(end):
                yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_interrupt(self) -> None:
        if self._doing is not None:
            self._doing.cancel()
        elif not self._editor.interrupt():
            self._interrupted = True


def _short(name: str) -> str:
    """The last part of a name, of a readable length."""
    name = printable(os.path.basename(name) or name)  # noqa: PTH119 - an address is no path
    return name if len(name) <= CHIP_LENGTH else f"{name[: CHIP_LENGTH // 2]}…{name[-CHIP_LENGTH // 2 + 1 :]}"


def _model(info: EngineInfo) -> str:
    return f"{info.source} {info.tag}" if info.source and info.tag else _short(info.model)


def _history_file() -> Path | None:
    state = state_dir()
    return state / "chat_history" if state else None


def _names() -> dict[str, Names]:
    """What Tab offers for arguments that are names."""
    return {
        "profile": profile_names,
        "session": session_names,
        "setting": lambda: [f"{name}=" for name in settings.settable()],
    }
