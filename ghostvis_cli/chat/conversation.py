"""A session, an engine and settings: what happens between a message and its reply. Shows nothing.

    async with Conversation(resolved, note=surface.note) as conversation:
        async with aclosing(conversation.send("What is this?")) as chunks:
            async for chunk in chunks: ...

Closing or cancelling that stream stops the reply and keeps the part that came.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ghostvis_cli import endings
from ghostvis_cli.chat.context import Room, TooLongError, measure, says_too_long
from ghostvis_cli.chat.session import Reply, Session
from ghostvis_cli.engines.base import CHAT_MAX_TOKENS, Beside, Chunk, Closing, Engine, GenerateRequest
from ghostvis_cli.errors import (
    EngineError,
    GhostvisError,
    LockedError,
    OutputError,
    RequestError,
    UsageError,
    one_line,
)

if TYPE_CHECKING:
    from ghostvis_cli.chat.store import SessionFile
    from ghostvis_cli.images import EncodedImage
    from ghostvis_cli.profile import Profile, Resolved

Overflow: TypeAlias = Literal["refuse", "drop-oldest"]


class Conversation(Closing):
    """What a terminal or a script talks to. `session` is what was said, `last` the newest reply.

    file      where the session is saved after every change
    note      is told one line at a time what a person may want to know
    """

    def __init__(
        self,
        resolved: "Resolved",
        session: Session | None = None,
        *,
        overflow: Overflow = "refuse",
        file: "SessionFile | None" = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.resolved, self.profile = resolved, _for_chat(resolved)
        self.session = session or Session(system=self.profile.system)
        self.overflow, self.file, self.note = overflow, file, note
        self.written: set[Path] = set()  # files this chat may write again
        self.engine: Engine | None = None
        self.last: Reply | None = None
        self._kept = _typed(resolved)
        self._set: set[str] = set()
        self._door = asyncio.Lock()  # one at a time loads the model
        self._lost = False
        self._told: set[str] = set()
        self.saved = True  # whether the file has all there is

    # The engine

    async def connect(self) -> Engine:
        """Load the model or find the server, once; `send` waits for it. A lost server is looked for again."""
        async with self._door:
            if self.engine is not None and self._lost:
                engine, self.engine = self.engine, None
                await engine.aclose()
            if self.engine is None:
                from ghostvis_cli.engines.factory import make_engine

                self.engine = await make_engine(self.profile, report=self._tell)
                self._lost = False
                self._tell_notices()
            return self.engine

    async def switch(self, name: str) -> None:
        """Go on with another profile: its engine first, so that a profile that fails changes nothing.

        What was typed about the model ends here; --temperature, --system and the like stay, and what was /set.
        """
        from ghostvis_cli.engines.factory import make_engine
        from ghostvis_cli.profile import resolve
        from ghostvis_cli.profile.readers import heeded

        resolved = await asyncio.to_thread(resolve, name, flags=self._kept)
        resolved = heeded(resolved, (resolved.profile.engine.chosen_kind,))
        profile = _for_chat(resolved)
        async with self._door:
            engine = await make_engine(profile, report=self._tell)
            old, self.engine, self._lost = self.engine, engine, False
        if self.session.system == self.profile.system:
            self.session.system = profile.system
        self.resolved, self.profile, self.session.forgotten = resolved, profile, 0
        self._told.clear()
        for line in resolved.notices:
            self._tell(line)
        self._tell_notices()
        if old is not None:
            await old.aclose()
        self.save()

    def set(self, pairs: list[tuple[str, str]]) -> None:
        """Change how the model answers, all of it or, with a UsageError, nothing."""
        from ghostvis_cli.chat.settings import changes

        new = changes(pairs)
        self._set |= new.keys()
        self.profile = replace(self.profile, sampling=replace(self.profile.sampling, **new))
        self._kept |= {f"sampling.{name}": value for name, value in new.items()}

    def origin(self, name: str) -> str:
        """Where the value of a setting comes from, as people read it."""
        if name in self._set:
            return "set in this chat"
        if name == "max_tokens" and not self.resolved.chose("sampling.max_tokens"):
            return "default of chats"
        return str(self.resolved.origins[f"sampling.{name}"])

    async def aclose(self) -> None:
        async with self._door:
            engine, self.engine = self.engine, None
        if engine is not None:
            await engine.aclose()
        if self.file is not None:
            self.file.close()

    # Messages

    async def attach(self, images: "Sequence[EncodedImage]") -> None:
        """Put images on the next message."""
        if self.file is not None:  # saving wants bytes that may have to be made: a second for a large photo
            from ghostvis_cli.chat.transcript import image_hash

            await asyncio.to_thread(lambda: [image_hash(each) for each in images])
        self.session.attach(images)

    async def send(self, text: str) -> AsyncGenerator[Chunk, None]:
        """Ask, with the images attached. TooLongError where it does not fit.

        Where no word of a reply came, the message becomes the session's draft, which `regenerate` sends.
        """
        self.session.begin(text)
        self.save(durable=False)
        async with aclosing(self._reply()) as chunks:
            async for chunk in chunks:
                yield chunk

    async def regenerate(self, text: str | None = None) -> AsyncGenerator[Chunk, None]:
        """Answer the last message again, or a changed one, or send the draft. The old reply stays until then."""
        self.session.reopen(text)
        async with aclosing(self._reply()) as chunks:
            async for chunk in chunks:
                yield chunk

    def forget(self, count: int) -> None:
        """Stop sending the oldest turns to the model."""
        gone = self.session.forget(count)
        images = sum(len(turn.images) for turn in gone)
        and_images = f" with {images} image{'s' * (images > 1)}" if images else ""
        self.note(f"the model no longer sees the {_oldest(len(gone))}{and_images}")

    async def _reply(self) -> AsyncGenerator[Chunk, None]:
        coming = _Coming()
        with endings.unwinding() if self.file else nullcontext():
            try:
                engine = await self.connect()
                coming = _Coming(engine.info.model)
                async with aclosing(self._fitting(engine)) as chunks:
                    async for chunk in chunks:
                        coming.add(chunk)
                        yield chunk
            except (EngineError, RequestError):
                self._lost = self.engine is not None and self.engine.info.kind == "remote"
                raise
            finally:
                self._keep(coming)

    def _keep(self, coming: "_Coming") -> None:
        """Record what came of a reply, however it ended."""
        if coming.worth_keeping:
            self.last = coming.reply()
            self.session.answer(self.last)
            if self.last.notice is not None:
                self.note(self.last.notice)
        else:
            self.session.take_back()
        self.save()
        self._tell_notices()
        self._tell_trained()

    async def _fitting(self, engine: Engine) -> AsyncGenerator[Chunk, None]:
        """The reply, after leaving out as many of the oldest turns as it takes and --overflow allows."""
        limit = self.profile.sampling.max_tokens
        if (room := await measure(self.session, engine, limit)) and room.exact and room.excess > 0:
            self._make_room(room, None)
        while True:
            request = GenerateRequest(messages=self.session.messages(), sampling=self.profile.sampling)
            try:
                async with aclosing(engine.generate(request)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except GhostvisError as error:
                if not says_too_long(error):
                    raise
                self._make_room(await measure(self.session, engine, limit), error)

    def _make_room(self, room: Room | None, refusal: GhostvisError | None) -> None:
        """Drop turns as --overflow allows, or raise why it does not fit. A server's refusal beats our estimate."""
        drop, turns = room.drop if room else 0, len(self.session.sent)
        if refusal is not None and not drop and turns > 1:  # our estimate was too low, or there is none
            drop = max(1, turns // 4)
        if room is not None and refusal is None:
            message = f"the message does not fit: {room.arithmetic}"
        else:
            message = refusal.message if refusal else ""
        if self.overflow == "refuse" or not drop:
            raise TooLongError(message, drop, room)
        self.note(message)
        self.forget(drop)

    # Earlier sessions

    async def load(self, name: str) -> None:
        """Go on with a session by its name, or with a copy of one in a file. What was said until now is saved."""
        from ghostvis_cli.chat.store import SessionStore, read_file

        sessions, limits = SessionStore.of_user(), self.profile.images
        self._require_saved()
        if name in sessions.names():
            if self.file is not None and self.file.name == name:
                return
            file = sessions.open(name)
            try:
                session = await asyncio.to_thread(file.load, limits)
            except BaseException:
                file.close()
                raise
            keep: SessionFile | None = file
        else:
            session = await asyncio.to_thread(read_file, Path(name), limits)
            keep = sessions.unnamed() if self.file is not None else None
        self._go_on_with(session, keep)

    def renew(self) -> None:
        """Begin another conversation. What was said until now is saved."""
        from ghostvis_cli.chat.store import SessionStore

        self._require_saved()
        keep = SessionStore.of_user().unnamed() if self.file is not None else None
        self._go_on_with(Session(system=self.profile.system), keep)

    def rename(self, name: str) -> None:
        """Give the session another name."""
        self.save()
        try:
            self._file.rename(name)
        except OSError as error:
            raise OutputError(f"the session can't be renamed: {one_line(error)}") from error

    def delete(self) -> None:
        """Remove the session from the disk, and begin another conversation."""
        try:
            self._file.remove()
        except OSError as error:
            raise OutputError(f"the session can't be deleted: {one_line(error)}") from error
        self.session = Session()
        self.renew()

    @property
    def _file(self) -> "SessionFile":
        if self.file is None:
            raise UsageError("this conversation is not being saved", hint="ghostvis chat --session NAME")
        return self.file

    def _require_saved(self) -> None:
        self.save()
        if not (self.saved or self.session.empty):
            raise OutputError("what was said until now is not saved", hint="/save FILE.jsonl, then /clear")

    def _go_on_with(self, session: Session, file: "SessionFile | None") -> None:
        if self.file is not None:
            self.file.close()
        self.session, self.file, self.last = session, file, None
        self.save()

    # What there is to know

    @property
    def context_tokens(self) -> int | None:
        """What fits the model; None where a server does not say, or nothing is loaded yet."""
        return self.engine.info.context_tokens if self.engine else None

    def context_used(self) -> int | None:
        """Tokens of the whole conversation after its last reply; None where the engine did not count."""
        reply = self.session.turns[-1].reply if self.session.turns else None
        if reply is None or reply.usage is None:
            return None
        return reply.usage.prompt_tokens + reply.usage.completion_tokens

    def save(self, *, durable: bool = True) -> None:
        """Save after a change. With `durable` False the system decides when it reaches the disk."""
        if self.file is None:
            return
        try:
            self.file.save(self.session, self.about(), durable=durable)
        except (OSError, LockedError) as error:
            if self.saved:
                self.note(f"the conversation is not being saved: {one_line(error)}")
            self.saved = False
        else:
            self.saved = True

    def about(self) -> dict[str, str]:
        return {"profile": self.profile.name, "model": self.engine.info.model if self.engine else ""}

    def _tell_notices(self) -> None:
        for line in self.engine.info.notices if self.engine else ():
            self._tell(line)

    def _tell_trained(self) -> None:
        used, trained = self.context_used(), self.engine.info.trained_tokens if self.engine else None
        if used and trained is not None and used > trained and self.session.answered:
            self._tell(
                f"longer than the {trained} positions the model learnt on: replies get worse; /clear helps"
            )

    def _tell(self, line: str) -> None:
        """Pass each notice on once."""
        if line not in self._told:
            self._told.add(line)
            self.note(line)


class _Coming:
    """A reply as far as it has come, with times by the caller's clock."""

    def __init__(self, model: str = "") -> None:
        self.model, self.last = model, Chunk()
        self._started = time.perf_counter()
        self._first: float | None = None
        self._chunks: list[Chunk] = []

    def add(self, chunk: Chunk) -> None:
        if self._first is None and chunk.generated:
            self._first = time.perf_counter()
        self._chunks.append(chunk)
        self.last = chunk

    @property
    def worth_keeping(self) -> bool:
        """Whether there is text, or the model itself ended the reply."""
        return any(chunk.text for chunk in self._chunks) or self.last.finish_reason in ("stop", "length")

    def reply(self) -> Reply:
        usage = self.last.usage
        return Reply(
            text="".join(chunk.text for chunk in self._chunks),
            finish_reason=self.last.finish_reason or "abort",
            usage=usage,
            completion_tokens=usage.completion_tokens if usage else self._tokens(),
            ttft_s=self._first - self._started if self._first is not None else None,
            total_s=time.perf_counter() - self._started,
            model=self.model,
            beside=Beside.of(self._chunks),
        )

    def _tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self._chunks)


def _for_chat(resolved: "Resolved") -> "Profile":
    """The profile, with chat's default of max_tokens where none was chosen."""
    profile = resolved.profile
    if resolved.chose("sampling.max_tokens"):
        return profile
    return replace(profile, sampling=replace(profile.sampling, max_tokens=CHAT_MAX_TOKENS))


def _typed(resolved: "Resolved") -> dict[str, Any]:
    """What was typed about answers, by its dotted key; what was typed about the model belongs to one profile."""
    typed = [path for path, origin in resolved.origins.items() if origin.place == "flag"]
    sampling, profile = vars(resolved.profile.sampling), resolved.profile
    return {
        path: profile.system if path == "system" else sampling[path.removeprefix("sampling.")]
        for path in typed
        if path == "system" or path.startswith("sampling.")
    }


def _oldest(count: int) -> str:
    return "oldest turn" if count == 1 else f"{count} oldest turns"
