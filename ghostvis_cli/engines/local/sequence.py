"""One request on its way through the scheduler."""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ghostvis_cli.engines.base import Sampling, Usage
from ghostvis_cli.engines.local.cache import identities
from ghostvis_cli.engines.local.grammar import Grammar
from ghostvis_cli.engines.text_stream import TextStream
from ghostvis_cli.prompt import VISION_ROW, Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    ImageInput: TypeAlias = (
        "NDArray[Any] | Tensor"  # preprocessed pixels (3, S, S), or rows (N, D) already known
    )


@dataclass(eq=False)
class Sequence:
    """One request on its way. `filled` counts the positions whose keys and values are in the cache."""

    prompt: Prompt
    images: "Ordered[ImageInput]"  # one per image of the prompt
    sampling: Sampling
    identity: "NDArray[np.int64]"
    text: TextStream
    generator: torch.Generator | None
    grammar: Grammar | None = None
    output: list[int] = field(default_factory=list)
    filled: int = 0
    cached_tokens: int = 0
    done: bool = False
    vision_rows: Tensor | None = None  # (images x N, D), while the prompt is being read

    @classmethod
    def start(
        cls,
        prompt: Prompt,
        images: "Ordered[ImageInput]",
        sampling: Sampling,
        image_tokens: int,
        grammar: Grammar | None = None,
    ) -> "Sequence":
        generator = None
        if sampling.temperature > 0:
            generator = torch.Generator()
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed)
        identity = identities(prompt, image_tokens)
        return cls(prompt, images, sampling, identity, TextStream(sampling.stop), generator, grammar)

    @property
    def usage(self) -> Usage:
        prompt = self.prompt
        return Usage(len(prompt.ids), len(self.output), self.cached_tokens, prompt.image_tokens)

    def last(self, count: int) -> list[int]:
        """The latest ids, of which the answer's last one is not in the cache yet."""
        return [*self.prompt.ids[-count:], *self.output[-count:]][-count:]

    def seen(self) -> list[int]:
        """Ids that a repetition penalty falls on: each id of prompt and answer once."""
        return sorted({*self.prompt.ids, *self.output} - {VISION_ROW})
