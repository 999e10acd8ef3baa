"""A request -> the prompt's ids, for engines that have the tokenizer. What can't fit is refused with the sums."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ghostvis_cli.engines.base import GenerateRequest
from ghostvis_cli.errors import InputError
from ghostvis_cli.prompt import Prompt, render_for_reply, render_text

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.tokenizer import Tokenizer
    from ghostvis_cli.model.config import Layout

LONG_TEXT = 20_000  # characters; about 2 ms of splitting


@dataclass
class Renderer:
    """`image_tokens` 0 is a model that reads text only. `positions` hold prompt and answer together."""

    tokenizer: "Tokenizer"
    layout: "Layout"
    image_tokens: int
    positions: int

    async def prompt(self, request: GenerateRequest) -> Prompt:
        """Long texts are split in a thread: a second on the loop would stop every other request."""
        size = len(request.prompt or "") + sum(len(message.text) for message in request.messages)
        if size > self.positions * self.tokenizer.longest_token_bytes:
            raise InputError(
                f"the prompt's {size:,} characters can't fit the model's {self.positions} positions",
                hint="shorten the prompt",
            )
        return await asyncio.to_thread(self._render, request) if size > LONG_TEXT else self._render(request)

    def _render(self, request: GenerateRequest) -> Prompt:
        if request.prompt is not None:
            prompt = render_text(request.prompt, self.tokenizer)
        else:
            prompt = render_for_reply(request.messages, self.tokenizer, self.layout, self.image_tokens)
        asked, limit = len(prompt.ids) + request.sampling.max_tokens, self.positions
        if asked > limit:
            pictures = f" ({prompt.image_tokens} of them for pictures)" if prompt.images else ""
            raise InputError(
                f"the prompt's {len(prompt.ids)} tokens{pictures} and max_tokens {request.sampling.max_tokens} "
                f"make {asked}, the model has {limit} positions",
                hint=f"--max-tokens {limit - len(prompt.ids)}"
                if len(prompt.ids) < limit
                else "shorten the prompt",
            )
        return prompt
