"""Real requests to the engine: text, then the test card upright, turned, and upright again."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ghostvis_cli import demo
from ghostvis_cli.doctor import card
from ghostvis_cli.doctor.finding import Finding, Status, from_error
from ghostvis_cli.errors import GhostvisError

if TYPE_CHECKING:
    from ghostvis_cli.answer import TimedAnswer
    from ghostvis_cli.engines.base import Engine
    from ghostvis_cli.image_limits import ImageLimits
    from ghostvis_cli.images import EncodedImage

TEXT_TOKENS, IMAGE_TOKENS = 8, 16
SHOWN_CHARS = 60


@dataclass(frozen=True)
class Trips:
    """An open engine and how to judge it. `takes_images` is None where only sending one tells."""

    engine: "Engine"
    limits: "ImageLimits"
    request_s: float
    takes_images: bool | None = None
    report_fix: str | None = None  # what makes this engine report cached tokens
    reuse_fix: str | None = None  # what makes it reuse any

    async def run(self) -> AsyncGenerator[Finding, None]:
        try:
            text = await self.ask(TEXT_TOKENS)
        except GhostvisError as error:
            yield from_error("trip", "text", error)
            return
        yield _text(text)
        if self.takes_images is False:
            yield Finding("trip", "picture", "note", "the model reads text only: no image was sent")
            return
        async for finding in self.images(text):
            yield finding

    async def images(self, text: "TimedAnswer") -> AsyncGenerator[Finding, None]:
        upright = card.loaded(self.limits)
        try:
            seen = await self.ask(IMAGE_TOKENS, upright)
            yield self.counted(text, seen)
            turned = await self.ask(IMAGE_TOKENS, card.loaded(self.limits, tagged=False))
            yield self.orientation(seen, turned)
            yield self.cached(await self.ask(IMAGE_TOKENS, upright))
        except GhostvisError as error:
            yield self.refused(error)

    async def ask(self, tokens: int, *images: "EncodedImage") -> "TimedAnswer":
        """Greedy, without the profile's system text: the same question each time."""
        from ghostvis_cli.answer import ask
        from ghostvis_cli.engines.base import GenerateRequest, Sampling
        from ghostvis_cli.errors import EngineError
        from ghostvis_cli.prompt import Message

        sampling = Sampling(max_tokens=tokens, temperature=0, top_p=1, top_k=0)
        request = GenerateRequest((Message.of("user", card.QUESTION, images),), sampling=sampling)
        try:
            async with asyncio.timeout(self.request_s):
                return await ask(self.engine, request)
        except TimeoutError as error:
            hint = f"--time-limit {4 * self.request_s:g}"
            raise EngineError(f"no answer within {self.request_s:g} s", hint=hint) from error

    def refused(self, error: GhostvisError) -> Finding:
        """A refusal of the image: a warning where the server may serve a text model."""
        expected = self.takes_images is None and 400 <= getattr(error, "status", 500) < 500
        return from_error("trip", "picture", error, "warning" if expected else "error")

    def counted(self, text: "TimedAnswer", seen: "TimedAnswer") -> Finding:
        before, after = text.completion.usage, seen.completion.usage
        if not before.prompt_tokens or not after.prompt_tokens:
            message = "the server counts no tokens: whether it looked is not known"
            return Finding("trip", "picture", "note", message)
        added = after.image_tokens or after.prompt_tokens - before.prompt_tokens
        if after.prompt_tokens <= before.prompt_tokens:
            same = f"{after.prompt_tokens} prompt tokens with an image as without"
            fix = "serve a vision model, and its processor with it"
            return Finding("trip", "picture", "error", f"{same}: the server ignores images", fix)
        return Finding("trip", "picture", "ok", f"{added} tokens for the image, {_speed(seen)}")

    def orientation(self, seen: "TimedAnswer", turned: "TimedAnswer") -> Finding:
        """Whether the answers prove that images arrive upright. The demo model must prove it; others may not."""
        words = f'"{card.QUESTION}" upright: {_quoted(seen)}, on its side: {_quoted(turned)}'
        if _says_top(seen) and not _says_top(turned):
            return Finding("trip", "orientation", "ok", words)
        if self.engine.info.tag == demo.MODEL_TAG:
            fix = "ghostvis generate --source demo -i IMAGE, and report what it says"
            return Finding("trip", "orientation", "error", f"the demo model sees it wrongly: {words}", fix)
        known = "not proven: the same answer to both"
        if seen.text != turned.text:
            known = "its answers differ, so the pixels arrive; that they arrive upright its words don't tell"
        return Finding("trip", "orientation", "note", f"{known} ({words})")

    def cached(self, again: "TimedAnswer") -> Finding:
        usage = again.completion.usage
        if usage.cached_tokens is None:
            status: Status = "warning" if self.report_fix else "note"
            return Finding("trip", "cache", status, "cached tokens are not reported", self.report_fix)
        if usage.cached_tokens == 0:
            message = "nothing was reused when the same image and question came again"
            return Finding("trip", "cache", "warning", message, self.reuse_fix)
        reused = f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens reused"
        message = f"{reused} when the same question came again, {_speed(again)}"
        return Finding("trip", "cache", "ok", message)


def _text(answer: "TimedAnswer") -> Finding:
    if not answer.text and not answer.completion.usage.completion_tokens:
        return Finding("trip", "text", "warning", "an empty answer", "ghostvis generate --stats Hello")
    return Finding("trip", "text", "ok", f"{_quoted(answer)}, {_speed(answer)}")


def _says_top(answer: "TimedAnswer") -> bool:
    return card.WORD in answer.text.lower()


def _speed(answer: "TimedAnswer") -> str:
    return "no first token" if answer.ttft_s is None else f"first token after {answer.ttft_s * 1000:.0f} ms"


def _quoted(answer: "TimedAnswer") -> str:
    """The model's words in one line that can't drive a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in answer.text).split())
    return f'"{line if len(line) <= SHOWN_CHARS else line[: SHOWN_CHARS - 1] + "…"}"'
