"""What was said: turns with their own images, and the message that is being put together. Pure, no I/O.

Only the last turn may lack a reply, and only while that reply is on its way: a message that was not answered is
taken back, its text becomes the draft and its images are attached to the next message again. So the turns always
make a conversation that every engine takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ghostvis_cli.answer import counts, decoding_speed, statistics
from ghostvis_cli.encoding import well_formed
from ghostvis_cli.engines.base import Beside, FinishReason, Usage
from ghostvis_cli.errors import InputError, UsageError
from ghostvis_cli.prompt import Message

if TYPE_CHECKING:
    from ghostvis_cli.images import EncodedImage


@dataclass(frozen=True)
class Reply:
    """An answer, or the part that came. `usage` is None where it was stopped: no count came."""

    text: str
    finish_reason: FinishReason
    usage: Usage | None = None
    completion_tokens: int = 0  # counted here as they came
    ttft_s: float | None = None
    total_s: float = 0.0
    model: str = ""  # which one answered; a conversation may change its model
    beside: Beside = field(default_factory=Beside)

    @property
    def notice(self) -> str | None:
        """A line for people about a reply without text."""
        return self.beside.notice(self.text, self.finish_reason)

    @property
    def tokens_per_s(self) -> float | None:
        return decoding_speed(self.completion_tokens, self.ttft_s, self.total_s)

    def statistics(self) -> str:
        """The line of --stats: "ttft 41 ms · 312 tok/s · 128 + 57 tokens · 64 image · 96 cached"."""
        counted = counts(self.usage) if self.usage else [f"{self.completion_tokens} tokens", "stopped"]
        return statistics(self.ttft_s, self.tokens_per_s, counted)


@dataclass(frozen=True)
class Turn:
    """A message, its images, and what was answered."""

    text: str
    images: tuple["EncodedImage", ...] = ()
    reply: Reply | None = None

    @cached_property  # a turn is sent again with every later message
    def messages(self) -> tuple[Message, ...]:
        """The turn as messages for an engine."""
        asked = Message.of("user", self.text, self.images)
        return (asked,) if self.reply is None else (asked, Message.of("assistant", self.reply.text))

    @cached_property
    def text_bytes(self) -> int:
        """UTF-8 of message and reply."""
        return len(self.text.encode()) + (len(self.reply.text.encode()) if self.reply else 0)


@dataclass(frozen=True)
class Totals:
    """Tokens of all replies still in the conversation. `cached` is None where no reply reported it."""

    replies: int = 0
    prompt: int = 0  # text and image together, each reply's whole prompt
    image: int = 0
    cached: int | None = None
    completion: int = 0

    @property
    def text(self) -> int:
        return self.prompt - self.image


@dataclass
class Session:
    """A conversation. `pending` are the images of the next message, `draft` is one that was not answered."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    pending: list["EncodedImage"] = field(default_factory=list)
    draft: str | None = None
    forgotten: int = 0  # oldest turns that the model is no longer sent; they stay in what is saved
    cleared: list[Turn] = field(default_factory=list, repr=False)  # what /clear took, for /undo
    _before: Turn | None = field(default=None, repr=False)  # the last turn, while it is answered once more

    # The next message

    def attach(self, images: Sequence["EncodedImage"]) -> None:
        self.pending.extend(images)

    def detach(self, number: int) -> "EncodedImage":
        """Take the image with this number, counted from 1, off the next message."""
        if not 1 <= number <= len(self.pending):
            some = f"1 to {len(self.pending)}" if self.pending else "none"
            raise UsageError(f"no image {number} is attached; there is {some}", hint="/image lists them")
        return self.pending.pop(number - 1)

    def begin(self, text: str) -> Turn:
        """The message is sent: it takes the attached images with it."""
        assert self.answered, "a reply is still on its way"
        well_formed(text, "the message")
        if not text.strip():
            raise InputError("the message is empty", hint="ask something about the images attached")
        turn = Turn(text, tuple(self.pending))
        self.turns.append(turn)
        self.pending, self.draft, self.cleared, self._before = [], None, [], None
        return turn

    def answer(self, reply: Reply) -> None:
        """What came back for the message that `begin` or `reopen` left open."""
        self.turns[-1] = replace(self.turns[-1], reply=reply)
        self._before = None

    def take_back(self) -> None:
        """The message was not answered: it is the draft again, or keeps the answer it had before."""
        if self.answered:
            return
        turn = self.turns.pop()
        if self._before is not None:
            self.turns.append(self._before)
        else:
            self.draft, self.pending = turn.text, [*turn.images, *self.pending]
        self._before = None

    # Second thoughts

    def undo(self) -> Turn | None:
        """Take the last message and its reply out; where /clear came last, bring back what it took (None).

        A draft is the last message; its images stay attached.
        """
        if self.draft is not None:
            turn, self.draft = Turn(self.draft), None
            return turn
        if not self.turns and self.cleared:
            self.turns, self.cleared = self.cleared, []
            return None
        return self._last("there is nothing to undo", pop=True)

    def reopen(self, text: str | None = None) -> Turn:
        """The last message is to be answered again, with other words where `text` is given."""
        if self.draft is not None:
            return self.begin(self.draft if text is None else text)
        turn = self._last("there is no message yet", pop=False)
        if text is not None:
            well_formed(text, "the message")
            if not text.strip():
                raise InputError("the message is empty", hint="/undo takes the last message out")
        self._before = turn if text is None else None
        self.forgotten = min(self.forgotten, len(self.turns) - 1)
        self.turns[-1] = Turn(turn.text if text is None else text, turn.images)
        return self.turns[-1]

    def last_text(self) -> str:
        """The words that /edit begins with."""
        return self.draft if self.draft is not None else self._last("there is no message yet", pop=False).text

    def clear(self) -> None:
        """Forget messages, images and draft; the system message stays."""
        self.cleared = self.turns or self.cleared
        self.turns, self.pending, self.draft, self.forgotten = [], [], None, 0

    def _last(self, otherwise: str, *, pop: bool) -> Turn:
        if not self.turns:
            raise UsageError(otherwise)
        turn = self.turns.pop() if pop else self.turns[-1]
        self.forgotten = min(self.forgotten, len(self.turns))
        return turn

    # Room

    @property
    def sent(self) -> list[Turn]:
        """The turns that the model is sent."""
        return self.turns[self.forgotten :]

    def forget(self, count: int) -> list[Turn]:
        """Stop sending `count` of the oldest turns and their images. A message without a reply yet stays."""
        most = len(self.sent) - (not self.answered)
        gone = self.sent[: max(0, min(count, most))]
        self.forgotten += len(gone)
        return gone

    # What there is

    @property
    def answered(self) -> bool:
        return not self.turns or self.turns[-1].reply is not None

    @property
    def empty(self) -> bool:
        return not (self.turns or self.pending or self.draft)

    @property
    def images(self) -> list["EncodedImage"]:
        """Every image in the order shown, those of the next message last: the numbers of /view."""
        return [*(image for turn in self.turns for image in turn.images), *self.pending]

    @property
    def totals(self) -> Totals:
        usages = [turn.reply.usage for turn in self.turns if turn.reply and turn.reply.usage]
        cached = [usage.cached_tokens for usage in usages if usage.cached_tokens is not None]
        return Totals(
            replies=sum(turn.reply is not None for turn in self.turns),
            prompt=sum(usage.prompt_tokens for usage in usages),
            image=sum(usage.image_tokens for usage in usages),
            cached=sum(cached) if cached else None,
            completion=sum(turn.reply.completion_tokens for turn in self.turns if turn.reply),
        )

    def messages(self, skip: int = 0) -> tuple[Message, ...]:
        """The conversation as engines take it, with `skip` more of the oldest turns left out."""
        found = [Message.of("system", self.system)] if self.system else []
        for turn in self.sent[skip:]:
            found += turn.messages
        return tuple(found)
