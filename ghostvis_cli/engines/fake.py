"""An engine without a model: repeats the last message, word by word. For tests of the layers above.

Follows the protocol (streaming, stop strings, limits, usage, abort), so that tests with it are meaningful. One word
is one token, whose id is its length.
"""

import asyncio
import re
from collections.abc import AsyncGenerator

from ghostvis_cli.engines.base import (
    Chunk,
    Closing,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    GrammarError,
    Usage,
)
from ghostvis_cli.errors import RequestError

IMAGE_TOKENS = 4


class FakeEngine(Closing):
    """`delay_s` passes before each token; `failure` is raised in place of the first one."""

    tokenizer, server = None, None

    def __init__(
        self, *, delay_s: float = 0.0, context_tokens: int = 4096, failure: Exception | None = None
    ) -> None:
        self.delay_s, self.failure = delay_s, failure
        self.info = EngineInfo(
            "fake", "fake", "none", "none", context_tokens=context_tokens, image_tokens=IMAGE_TOKENS
        )
        self.running = 0
        self.aborted = 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        request.refuse_scoring()
        if self.failure is not None:
            raise self.failure
        text = request.messages[-1].text if request.messages else request.prompt or ""
        images = sum(len(message.images) for message in request.messages)
        prompt_tokens = IMAGE_TOKENS * images + sum(len(message.text.split()) for message in request.messages)
        sampling, limit = request.sampling, self.info.context_tokens
        if sampling.has_grammar:
            raise GrammarError("the fake engine follows no grammar")
        if limit is not None:
            sampling = request.fitted(prompt_tokens, limit)
        self.running += 1
        done = 0
        reason: FinishReason = "stop"
        try:
            for word in re.findall(r"\s*\S+|\s+$", _until_stop(text, sampling.stop)):
                if done == sampling.max_tokens:
                    reason = "length"
                    break
                await asyncio.sleep(self.delay_s)
                done += 1
                yield Chunk(word, (len(word),))
            usage = Usage(prompt_tokens, done, cached_tokens=0, image_tokens=IMAGE_TOKENS * images)
            yield Chunk(finish_reason=reason, usage=usage)
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    async def aclose(self) -> None:
        self.failure = RequestError("the engine is closed")


def _until_stop(text: str, stop: tuple[str, ...]) -> str:
    """Text up to the first stop string."""
    return text[: min((text.find(string) for string in stop if string in text), default=len(text))]
