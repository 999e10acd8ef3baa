"""One token for every running sequence: the step that must be fast. Three ways to run the same arithmetic.

`Eager` calls the model. `Graphs` (CUDA) and `Compiled` (CPU) need shapes that stay: they round the batch and the
cached length up, and let a mask hide what is not there. Rows of a padded batch that belong to nobody write
where nobody reads: `spare` says where the row of a prompt that is still being read has its next free position.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ghostvis_cli.engines.local.rows import FIRST_CAPACITY, Rows
from ghostvis_cli.model.decoder import Decoder, KVCache

SHAPES_COMPILED = 64  # batch sizes x cached lengths; torch gives up after eight otherwise


class Decode(Protocol):
    def __call__(self, rows: Rows, tokens: list[int], filled: list[int], spare: int) -> Tensor:
        """Last tokens and lengths of B sequences in rows 0 to B-1 -> logits (B, V) float32."""
        ...


def one_step(decoder: Decoder, tokens: Tensor, positions: Tensor, length: int, cache: KVCache) -> Tensor:
    """tokens, positions (B, 1) -> logits (B, V); keys and values go into the cache's first B rows."""
    step = decoder.plan(positions, length=length, padded=True)
    return decoder.logits(decoder.trunk(decoder.embed(tokens), step, cache)[:, -1])


class Eager:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __call__(self, rows: Rows, tokens: list[int], filled: list[int], spare: int) -> Tensor:
        decoder, device = self.decoder, rows.device
        positions = torch.tensor(filled, device=device)[:, None]
        step = decoder.plan(positions, length=max(filled) + 1)
        x = decoder.embed(torch.tensor(tokens, device=device)[:, None])
        return decoder.logits(decoder.trunk(x, step, rows.cache)[:, -1])


class Padded:
    """What `Graphs` and `Compiled` share: fixed shapes, powers of two."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __call__(self, rows: Rows, tokens: list[int], filled: list[int], spare: int) -> Tensor:
        count = len(tokens)
        batch = _power_of_two(count)
        rows.reserve(batch, 0)
        length = min(max(FIRST_CAPACITY, _power_of_two(max(filled) + 1)), rows.cache.capacity)
        nobody = batch - count
        ids = torch.tensor([*tokens, *[0] * nobody], device=rows.device)[:, None]
        positions = torch.tensor([*filled, *[spare] * nobody], device=rows.device)[:, None]
        return self.run(ids, positions, length, rows.cache)[:count]

    def run(self, tokens: Tensor, positions: Tensor, length: int, cache: KVCache) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class _Captured:
    graph: "torch.cuda.CUDAGraph"
    tokens: Tensor
    positions: Tensor
    logits: Tensor
    tables: tuple[Tensor, Tensor]  # kept alive: the graph reads them by address


class Graphs(Padded):
    """CUDA graphs: a step is one launch instead of some twenty a layer. One graph a shape, made on first use."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.cache: KVCache | None = None
        self.captured: dict[tuple[int, int], _Captured] = {}

    def run(self, tokens: Tensor, positions: Tensor, length: int, cache: KVCache) -> Tensor:
        if cache is not self.cache:  # it grew: every graph points at the old one
            self.cache, self.captured = cache, {}
        key = (tokens.size(0), length)
        if key not in self.captured:
            self.decoder.grow_rotary(length)
            self.captured[key] = self._capture(tokens, positions, length, cache)
        captured = self.captured[key]
        captured.tokens.copy_(tokens)
        captured.positions.copy_(positions)
        captured.graph.replay()
        return captured.logits

    def _capture(self, tokens: Tensor, positions: Tensor, length: int, cache: KVCache) -> _Captured:
        tokens, positions = tokens.clone(), positions.clone()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # once outside the graph: libraries allocate on first use
            one_step(self.decoder, tokens, positions, length, cache)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = one_step(self.decoder, tokens, positions, length, cache)
        return _Captured(graph, tokens, positions, logits, (self.decoder.cos, self.decoder.sin))


class Compiled(Padded):
    """torch.compile: halves a small model's step on a CPU, after some seconds of compiling for each shape."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        torch._dynamo.config.recompile_limit = SHAPES_COMPILED
        self.step = torch.compile(one_step, dynamic=False)

    def run(self, tokens: Tensor, positions: Tensor, length: int, cache: KVCache) -> Tensor:
        self.decoder.grow_rotary(length)
        return self.step(self.decoder, tokens, positions, length, cache)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
