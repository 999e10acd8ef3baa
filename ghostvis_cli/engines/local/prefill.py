"""Reading prompts: parts of several sequences in one forward, each in a cache row of its own."""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ghostvis_cli.engines.local.device import sent
from ghostvis_cli.engines.local.rows import Rows
from ghostvis_cli.engines.local.sequence import Sequence
from ghostvis_cli.model.decoder import Decoder, Step, Varlen
from ghostvis_cli.prompt import VISION_ROW


@dataclass(frozen=True)
class Part:
    """Positions start to end of a sequence's prompt."""

    sequence: Sequence
    start: int
    end: int


def read_parts(decoder: Decoder, parts: Ordered[Part], rows: Rows, first_row: int) -> Tensor:
    """Run the parts, in cache rows from `first_row` on: hidden rows (S, D) of their last positions.

    More than one part only where there is varlen attention, and the decoder's `reach` is 0.
    """
    ids: list[int] = []
    images: list[Tensor] = []
    for part in parts:
        some, seen = _taken_in(part, decoder.config.reach)
        ids += some
        images += seen
    x = decoder.embed(sent(torch.tensor([ids]), rows.device), torch.cat(images) if images else None)
    hidden = decoder.trunk(x, _plan(decoder, parts, rows, first_row), rows.cache)[0]
    if len(parts) == 1:
        return hidden[-1:]
    lasts = [end - 1 for end in accumulate(part.end - part.start for part in parts)]
    return hidden[sent(torch.tensor(lasts), rows.device)]


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


def _plan(decoder: Decoder, parts: Ordered[Part], rows: Rows, first_row: int) -> Step:
    if rows.varlen:
        decoder.grow_rotary(rows.cache.capacity)
        varlen = _varlen(parts, rows, first_row)
        return decoder.plan_varlen(varlen.positions[None], varlen)
    positions = torch.arange(parts[0].start, parts[0].end, device=rows.device)[None]
    return decoder.plan(positions, first_row=first_row, length=parts[0].end)


def _varlen(parts: Ordered[Part], rows: Rows, first_row: int) -> Varlen:
    sizes = [part.end - part.start for part in parts]
    places = range(first_row, first_row + len(parts) + 1)
    fields = [
        [row for row, size in zip(places, sizes, strict=False) for _ in range(size)],
        [position for part in parts for position in range(part.start, part.end)],
        [0, *accumulate(sizes)],
        [row * rows.cache.capacity for row in places],
        [part.end for part in parts],
    ]
    numbers = sent(torch.tensor([number for field in fields for number in field]), rows.device)
    of_row, positions, starts, begins, lengths = torch.split(numbers, [len(field) for field in fields])
    return Varlen(of_row, positions, starts.int(), begins.int(), lengths.int(), max(sizes))
