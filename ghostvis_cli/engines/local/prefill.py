"""Reading prompts: parts of several sequences in one forward, each in a cache row of its own."""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ghostvis_cli.engines.local.device import power_of_two, sent
from ghostvis_cli.engines.local.graphs import Graphs
from ghostvis_cli.engines.local.rows import Rows
from ghostvis_cli.engines.local.sequence import Sequence
from ghostvis_cli.model.decoder import Decoder, Varlen
from ghostvis_cli.prompt import VISION_ROW

LEAST_PADDED, MOST_PADDED = 64, 2048  # positions of one forward; longer ones keep a card busy without graphs


@dataclass(frozen=True)
class Part:
    """Positions start to end of a sequence's prompt."""

    sequence: Sequence
    start: int
    end: int


def read_parts(
    decoder: Decoder, parts: Ordered[Part], rows: Rows, first_row: int, graphs: Graphs | None = None
) -> Tensor:
    """Run the parts, in cache rows from `first_row` on: hidden rows (S, D) of their last positions.

    More than one part only where there is varlen attention, and the decoder's `reach` is 0.
    """
    ids: list[int] = []
    images: list[Tensor] = []
    for part in parts:
        some, seen = _taken_in(part, decoder.config.reach)
        ids += some
        images += seen
    lasts = [end - 1 for end in accumulate(part.end - part.start for part in parts)]
    padding = _padding(parts, rows)
    ids += [0] * padding
    x = decoder.embed(sent(torch.tensor([ids]), rows.device), torch.cat(images) if images else None)
    if rows.varlen:
        hidden = _run_varlen(decoder, x, parts, padding, rows, first_row, graphs)
    else:
        positions = torch.arange(parts[0].start, parts[0].end, device=rows.device)[None]
        step = decoder.plan(positions, first_row=first_row, length=parts[0].end)
        hidden = decoder.trunk(x, step, rows.cache)[0]
    if len(parts) == 1:
        return hidden[lasts[0] :][:1]
    return hidden[sent(torch.tensor(lasts), rows.device)]


def padded(size: int) -> int:
    """So many positions are read for `size`: few sizes, so that a graph serves each, and little in vain."""
    return max(LEAST_PADDED, power_of_two(size)) if size <= 512 else -(-size // 256) * 256


def _padding(parts: Ordered[Part], rows: Rows) -> int:
    """Positions to read beyond the last part's end, where nobody looks before they are written again."""
    size = sum(part.end - part.start for part in parts)
    padding = padded(size) - size
    fits = size <= MOST_PADDED and parts[-1].end + padding <= rows.cache.capacity
    return padding if rows.varlen and fits else 0


def _taken_in(part: Part, reach: int) -> tuple[Ordered[int], list[Tensor]]:
    """Ids and image rows of a part and of what lies before it, as far as the decoder reaches."""
    prompt, begin = part.sequence.prompt, max(0, part.start - reach)
    ids = prompt.ids[begin : part.end]
    count = ids.count(VISION_ROW)
    if not count:
        return ids, []
    first = prompt.ids[:begin].count(VISION_ROW)
    assert part.sequence.vision_rows is not None, "images are seen before they are read"
    return ids, [part.sequence.vision_rows[first : first + count]]


def _run_varlen(
    decoder: Decoder,
    x: Tensor,
    parts: Ordered[Part],
    padding: int,
    rows: Rows,
    first_row: int,
    graphs: Graphs | None,
) -> Tensor:
    """Embedded rows (1, N, ...) of the parts and the padding -> hidden rows (N, D)."""
    cache = rows.cache
    decoder.grow_rotary(cache.capacity)
    sizes = [part.end - part.start for part in parts]
    sizes[-1] += padding
    fields = _fields(sizes, [part.start for part in parts], first_row, cache.capacity)
    count = len(fields[0])
    is_fixed = count == padded(count) <= MOST_PADDED
    longest = count if is_fixed else max(sizes)

    def compute(x: Tensor, numbers: Tensor) -> Tensor:
        of_row, positions, *of_sequences = torch.split(numbers, [len(field) for field in fields])
        starts, places, lengths = (each.int() for each in of_sequences)
        varlen = Varlen(of_row, positions, starts, places, lengths, longest)
        return decoder.trunk(x, decoder.plan_varlen(positions[None], varlen), cache)[0]

    numbers = sent(torch.tensor([number for field in fields for number in field]), rows.device)
    if graphs is None or not is_fixed:
        return compute(x, numbers)
    graphs.on(cache, decoder.cos)
    return graphs.run(("prompts", x.shape, numbers.shape), compute, x, numbers)


def _fields(sizes: list[int], begins: list[int], first_row: int, capacity: int) -> list[list[int]]:
    """What `Varlen` tells of new positions, and of sequences: a power of two of them, the last ones empty."""
    empty = power_of_two(len(sizes)) - len(sizes)
    places = range(first_row, first_row + len(sizes) + 1)
    return [
        [row for row, size in zip(places, sizes, strict=False) for _ in range(size)],
        [begin + i for begin, size in zip(begins, sizes, strict=True) for i in range(size)],
        [0, *accumulate(sizes), *[sum(sizes)] * empty],
        [row * capacity for row in (*places, *[places[-1]] * empty)],
        [*(begin + size for begin, size in zip(begins, sizes, strict=True)), *[0] * empty],
    ]
