"""A request -> the prompt's ids, for engines that have the tokenizer. Refuses what exceeds the context."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ghostvis_cli.engines.base import GenerateRequest, Sampling
from ghostvis_cli.errors import ContextLengthError, InputError
from ghostvis_cli.prompt import Prompt, render_for_reply, render_text

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.tokenizer import Tokenizer
    from ghostvis_cli.model.config import Layout

LONG_TEXT = 20_000  # characters; about 2 ms to tokenize


@dataclass
class Renderer:
    """Renders prompts. `image_tokens` 0: a text model. `positions`: of prompt and answer together."""

    tokenizer: "Tokenizer"
    layout: "Layout"
    image_tokens: int
    positions: int

    async def prompt(self, request: GenerateRequest) -> tuple[Prompt, Sampling]:
        """The prompt, and the sampling that fits it.

        Long texts are tokenized in a thread: a second on the loop would stop all other requests.
        """
        if not all(0 <= id_ < self.tokenizer.vocab_size for id_ in request.prompt_ids or ()):
            raise InputError(f"the prompt's ids must be within 0 and {self.tokenizer.vocab_size - 1}")
        size = len(request.prompt or "") + sum(len(message.text) for message in request.messages)
        if size > self.positions * self.tokenizer.longest_token_bytes:
            raise ContextLengthError(
                f"the prompt's {size:,} characters can't fit the model's {self.positions} positions",
                hint="shorten the prompt",
            )
        return await asyncio.to_thread(self._render, request) if size > LONG_TEXT else self._render(request)

    def _render(self, request: GenerateRequest) -> tuple[Prompt, Sampling]:
        if request.prompt_ids is not None:
            prompt = Prompt(request.prompt_ids, (0,) * len(request.prompt_ids))
        elif request.prompt is not None:
            prompt = render_text(request.prompt, self.tokenizer)
        else:
            prompt = render_for_reply(request.messages, self.tokenizer, self.layout, self.image_tokens)
        return prompt, request.fitted(len(prompt.ids), self.positions, prompt.image_tokens)
