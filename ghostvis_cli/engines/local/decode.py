"""One token for every running sequence: the step that must be fast. Two ways to run the same arithmetic.

`Eager` calls the model. `Padded` is for CUDA graphs and compilers, which want shapes that stay: it rounds the batch
up, and the cached length too where attention needs a mask to hide what is not there. Rows of a padded batch that
belong to nobody write where nobody reads: `spare` says where the row of a prompt that is still being read has its
next free position.
"""

import os
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostvis_cli.engines.local.device import power_of_two, sent
from ghostvis_cli.engines.local.graphs import Graphs
from ghostvis_cli.engines.local.rows import FIRST_CAPACITY, Rows
from ghostvis_cli.model.decoder import Block, Decoder, KVCache, Places, Varlen
from ghostvis_cli.paths import cache_dir

Step: TypeAlias = Callable[[Decoder, Tensor, Tensor, int, KVCache], Tensor]
SHAPES_COMPILED = 64  # batch sizes x cached lengths; torch gives up after eight otherwise
# Kernels are launched before the last one has ended (programmatic dependent launch).
OPTIONS: dict[str, Any] = {"triton.enable_pdl": True}
# Matrices times one row become kernels of the compiler's own, tuned by trying: they read weights faster. For
# several rows it writes small kernels only: they take 2 us, too short for a trial to tell them apart.
ONE_ROW_OPTIONS: dict[str, Any] = {
    **OPTIONS,
    "coordinate_descent_tuning": True,
    "max_autotune_pointwise": True,
}


class Decode(Protocol):
    def __call__(self, rows: Rows, tokens: Tensor, filled: list[int], spare: int) -> Tensor:
        """Last tokens and lengths of B sequences in rows 0 to B-1 -> logits (B, V) float32, until the next call.

        tokens (B, 1 + reach) int64 on the device: of each sequence one token, and before it as many as the
        decoder's `reach` says.
        """
        ...


def one_step(decoder: Decoder, tokens: Tensor, positions: Tensor, length: int, cache: KVCache) -> Tensor:
    """tokens (B, 1 + reach), positions (B, 1) -> logits (B, V); keys and values go to the cache's first B rows."""
    if cache.heads_last:
        step = decoder.plan_varlen(positions, _alone(positions.flatten(), cache.capacity))
    else:
        step = decoder.plan(positions, length=length, padded=True)
    return decoder.logits(decoder.trunk(decoder.embed(tokens), step, cache))[:, 0]


def _alone(positions: Tensor, capacity: int) -> Varlen:
    """One new position in each of the first B rows."""
    rows = torch.arange(len(positions) + 1, device=positions.device)
    starts = rows.int()
    return Varlen(rows[:-1], positions, starts, starts * capacity, (positions + 1).int(), longest=1)


class Eager:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __call__(self, rows: Rows, tokens: Tensor, filled: list[int], spare: int) -> Tensor:
        decoder = self.decoder
        positions = sent(torch.tensor(filled), rows.device)[:, None]
        step = decoder.plan(positions, first=min(filled), length=max(filled) + 1)
        return decoder.logits(decoder.trunk(decoder.embed(tokens), step, rows.cache)[:, -1])


class Padded:
    """`step` on shapes that are powers of two, which graphs are captured for and a compiler can specialise on."""

    def __init__(self, decoder: Decoder, step: Step = one_step, graphs: Graphs | None = None) -> None:
        self.decoder, self.step, self.graphs = decoder, step, graphs

    def __call__(self, rows: Rows, tokens: Tensor, filled: list[int], spare: int) -> Tensor:
        count = len(filled)
        batch = power_of_two(count)
        rows.reserve(batch, spare + 1)
        decoder, cache = self.decoder, rows.cache
        length = cache.capacity
        if not rows.varlen:
            length = min(max(FIRST_CAPACITY, power_of_two(max(filled) + 1)), length)
        decoder.grow_rotary(max(length, spare + 1))
        positions = sent(torch.tensor([*filled, *[spare] * (batch - count)]), rows.device)[:, None]
        tokens = F.pad(tokens, (0, 0, 0, batch - count))
        if self.graphs is None:
            return self.step(decoder, tokens, positions, length, cache)[:count]

        def compute(tokens: Tensor, positions: Tensor) -> Tensor:
            return self.step(decoder, tokens, positions, length, cache)

        self.graphs.on(cache, decoder.cos)
        return self.graphs.run(("steps", batch, length), compute, tokens, positions)[:count]


def compiled(decoder: Decoder, graphs: Graphs | None) -> Padded:
    """torch.compile: up to halves a small model's step, after seconds of compiling for each shape.

    On a GPU not the step is compiled but what lies between two layers' attentions, once for all layers.
    """
    if (ours := cache_dir()) is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ours / "compiled"))
    if decoder.lm_head.weight.device.type != "cuda":
        return Padded(decoder, torch.compile(one_step, dynamic=False), graphs)
    compile_layers(decoder)
    return Padded(decoder, graphs=graphs)


def prepare_compiler(device: torch.device) -> None:
    """In the thread that runs what is compiled: a setting of another thread does not hold there."""
    torch._dynamo.config.cache_size_limit = SHAPES_COMPILED
    if device.type == "cuda":
        torch._dynamo.config.suppress_errors = True  # what can't be compiled runs as it is


def compile_layers(decoder: Decoder) -> None:
    """Compiled: what lies between two layers' attentions, before the first and after the last, and the head.

    For one new position a sequence, each batch size by itself. Prompts run as they are: they are of any length.
    """
    for name in ("enter", "cross", "leave"):
        method = _compiled_for_steps(getattr(Block, name))
        for block in decoder.blocks:
            setattr(block, name, method.__get__(block))
    logits = _compiled_for_steps(Decoder.logits)
    decoder.logits = logits.__get__(decoder)  # type: ignore[method-assign]


def _compiled_for_steps(method: Callable[..., Any]) -> Any:
    several = torch.compile(method, options=_known(OPTIONS), dynamic=False)
    alone = torch.compile(method, options=_known(ONE_ROW_OPTIONS), dynamic=False)

    def any_size(self: torch.nn.Module, x: Tensor, *given: Any) -> Any:
        if x.dim() != 3 or x.size(1) != 1:
            return method(self, x, *given)
        if given and isinstance(given[-1], Places):
            for each in (given[-1].keys, given[-1].values):  # whose rows and positions grow
                torch._dynamo.maybe_mark_dynamic(each, [0, 2])
        return (alone if x.size(0) == 1 else several)(self, x, *given)

    return any_size


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Those that this torch has."""
    known = torch._inductor.list_options()
    return {name: value for name, value in options.items() if name in known}
