"""Whether a conversation fits its model, in numbers a person can check. Counts; changes nothing.

With the model's tokenizer at hand the count is exact. Over a server it is an estimate, by the bytes a token had in
the replies so far: it says how much to leave out, and the server's own refusal is what counts.
"""

import asyncio
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ghostvis_cli.chat.session import Session
from ghostvis_cli.engines.rendering import LONG_TEXT
from ghostvis_cli.errors import GhostvisError, InputError, RequestError
from ghostvis_cli.prompt import render_for_reply

if TYPE_CHECKING:
    from ghostvis_cli.engines.base import Engine

BYTES_A_TOKEN = 3.0  # of a reply, before there is one
SAMPLE = 100  # of the newest turns, whose replies say how many bytes a token has
# How full the model may be once turns were left out. Leaving out just enough would change the beginning of the
# prompt with every further message, and with it all that is cached.
FULL = 0.75
MARKUP_TOKENS = 5  # around a message and its reply, and one more for the whole
# How the engines and servers we know say it: ours, SGLang, vLLM, llama.cpp, OpenAI.
TOO_LONG = re.compile(
    r"\bpositions\b|do not fit|context (length|size|window)|maximum[\w ]* length|too long|longer than the model",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Room:
    """The sum of prompt and reply against the model's limit. `drop`: oldest turns to leave out where it is over."""

    prompt_tokens: int
    max_tokens: int
    context_tokens: int
    drop: int = 0
    exact: bool = True

    @property
    def excess(self) -> int:
        return self.prompt_tokens + self.max_tokens - self.context_tokens

    @property
    def arithmetic(self) -> str:
        """As in: 1,950 tokens of conversation + 200 for the reply (max_tokens) = 2,150, and the model has 2,048."""
        about = "" if self.exact else "about "
        return (
            f"{about}{self.prompt_tokens:,} tokens of conversation + {self.max_tokens:,} for the reply "
            f"(max_tokens) = {self.prompt_tokens + self.max_tokens:,}, and the model has {self.context_tokens:,}"
        )


class TooLongError(InputError):
    """The conversation does not fit. `drop` oldest turns less and it does; 0: not even the message alone does."""

    def __init__(self, message: str, drop: int, room: Room | None = None) -> None:
        if drop:
            hint = f"--overflow drop-oldest ({drop} of the oldest turns), or /clear"
        elif room is not None and room.prompt_tokens < room.context_tokens:
            hint = f"/set max_tokens={room.context_tokens - room.prompt_tokens}"
        else:
            hint = "a shorter message, or fewer images"
        super().__init__(message, hint=hint)
        self.drop, self.room = drop, room


def says_too_long(error: GhostvisError) -> bool:
    """Whether an engine refused because of the length."""
    return isinstance(error, InputError | RequestError) and TOO_LONG.search(error.message) is not None


async def measure(session: Session, engine: "Engine", max_tokens: int) -> Room | None:
    """The room that the next reply would have; None where nothing is known, or it certainly fits."""
    limit = engine.info.context_tokens
    if limit is None or _most_tokens(session, engine.info.image_tokens) + max_tokens <= limit:
        return None
    tokenizer = engine.tokenizer
    long = sum(len(turn.text) for turn in session.sent) > LONG_TEXT
    if long and tokenizer is not None:
        return await asyncio.to_thread(_measure, session, engine, tokenizer, max_tokens, limit)
    return _measure(session, engine, tokenizer, max_tokens, limit)


def _measure(session: Session, engine: "Engine", tokenizer: Any, max_tokens: int, limit: int) -> Room:
    a_token = _bytes_a_token(session) if tokenizer is None else 0.0

    def tokens(drop: int) -> int:
        if tokenizer is None:
            return _estimate(session, drop, engine.info.image_tokens, a_token)
        rows, layout = engine.info.image_tokens, engine.info.layout or "inline"
        return len(render_for_reply(session.messages(drop), tokenizer, layout, rows).ids)  # type: ignore[arg-type]

    def fewest(room: int) -> int:
        """Oldest turns to leave out for so many tokens of prompt, by halving; 0 where that is not enough."""
        low, high = 1, len(session.sent) - 1
        if high < 1 or tokens(high) > room:
            return 0
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if tokens(middle) <= room else (middle + 1, high)
        return low

    room = Room(tokens(0), max_tokens, limit, exact=tokenizer is not None)
    if room.excess <= 0:
        return room
    return replace(room, drop=fewest(int(limit * FULL) - max_tokens) or fewest(limit - max_tokens))


def _most_tokens(session: Session, rows: int) -> int:
    """An upper bound, without a tokenizer: no token has less than a byte; a layout may take rows twice."""
    return _bytes(session, 0) + sum(MARKUP_TOKENS + 2 * rows * len(turn.images) for turn in session.sent)


def _estimate(session: Session, drop: int, rows: int, a_token: float) -> int:
    markup = sum(MARKUP_TOKENS + rows * len(turn.images) for turn in session.sent[drop:])
    return round(_bytes(session, drop) / a_token) + markup


def _bytes_a_token(session: Session) -> float:
    newest = [turn.reply for turn in session.turns[-SAMPLE:] if turn.reply and turn.reply.completion_tokens]
    said = sum(len(reply.text.encode()) for reply in newest)
    return max(1.0, said / sum(reply.completion_tokens for reply in newest)) if said else BYTES_A_TOKEN


def _bytes(session: Session, drop: int) -> int:
    system = len(session.system.encode()) if session.system else 0
    return system + sum(turn.text_bytes + len(turn.images) for turn in session.sent[drop:]) + 2
