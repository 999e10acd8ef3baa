"""One token for every running sequence: the step that must be fast. Two ways to run the same arithmetic.

`Eager` calls the model. `Padded` is for compilers, which want shapes that stay: it rounds the batch and the cached
length up, and masks what is not there. Unused rows of a padded batch write to positions that are never
read: `spare` is the next free position of the row in prefill.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ghostvis_cli.engines.local.rows import FIRST_CAPACITY, Rows
from ghostvis_cli.model.decoder import Decoder, KVCache

Step: TypeAlias = Callable[[Decoder, Tensor, Tensor, int, KVCache], Tensor]
SHAPES_COMPILED = 64  # batch sizes x cached lengths; torch gives up after eight otherwise


class Decode(Protocol):
    def __call__(self, rows: Rows, tokens: list[list[int]], filled: list[int], spare: int) -> Tensor:
        """Last tokens and lengths of B sequences in rows 0 to B-1 -> logits (B, V) float32.

        Of each sequence one token, and before it as many as the decoder's `reach` says.
        """
        ...


def one_step(decoder: Decoder, tokens: Tensor, positions: Tensor, length: int, cache: KVCache) -> Tensor:
    """tokens (B, 1 + reach), positions (B, 1) -> logits (B, V); keys and values go to the cache's first B rows."""
    step = decoder.plan(positions, length=length, padded=True)
    return decoder.logits(decoder.trunk(decoder.embed(tokens), step, cache)[:, -1])


class Eager:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __call__(self, rows: Rows, tokens: list[list[int]], filled: list[int], spare: int) -> Tensor:
        decoder, device = self.decoder, rows.device
        positions = torch.tensor(filled, device=device)[:, None]
        step = decoder.plan(positions, first=min(filled), length=max(filled) + 1)
        x = decoder.embed(torch.tensor(tokens, device=device))
        return decoder.logits(decoder.trunk(x, step, rows.cache)[:, -1])


class Padded:
    """`step` on shapes that are powers of two, which a compiler can specialise on."""

    def __init__(self, decoder: Decoder, step: Step) -> None:
        self.decoder, self.step = decoder, step

    def __call__(self, rows: Rows, tokens: list[list[int]], filled: list[int], spare: int) -> Tensor:
        count = len(tokens)
        batch = _power_of_two(count)
        rows.reserve(batch, spare + 1)
        length = min(max(FIRST_CAPACITY, _power_of_two(max(filled) + 1)), rows.cache.capacity)
        self.decoder.grow_rotary(max(length, spare + 1))
        unused = batch - count
        ids = torch.tensor([*tokens, *[[0] * len(tokens[0])] * unused], device=rows.device)
        positions = torch.tensor([*filled, *[spare] * unused], device=rows.device)[:, None]
        return self.step(self.decoder, ids, positions, length, rows.cache)[:count]


def compiled(decoder: Decoder) -> Padded:
    """torch.compile: up to halves a small model's step, after seconds of compiling for each shape."""
    torch._dynamo.config.recompile_limit = SHAPES_COMPILED
    return Padded(decoder, torch.compile(one_step, dynamic=False))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
