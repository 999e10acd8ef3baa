"""Writes images' rows into a prompt's embedding, at positions computed by the processor.

SGLang's own routine searches for the positions on the device and waits for the result, which leaves the device idle
in every batch with an image.

N rows an image, D width, T tokens of a batch.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

CACHE_VARIABLE, CACHE_MB = "SGLANG_VLM_CACHE_SIZE_MB", 100  # SGLang's own, and its default
Compute: TypeAlias = Callable[[list[Any]], Tensor]


@dataclass(frozen=True)
class Place:
    """Rows `first` to `end` of an item's image go to position `at` of the batch's tokens."""

    item: Any
    at: int
    first: int
    end: int


def places(batch: Any) -> Iterator[Place]:
    """The places of all images with rows in this batch, without rows of earlier or later batches."""
    begin = 0
    for inputs, known, new in zip(
        batch.mm_inputs, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True
    ):
        for item in () if inputs is None else inputs.mm_items:
            ((start, last),) = item.offsets  # one image an item
            first, end = max(start, known), min(last + 1, known + new)
            if first < end:
                yield Place(item, begin + first - known, first - start, end - start)
        begin += new


class ImageRows:
    """`compute`'s rows of items, (items * N, D), cached by their hashes."""

    def __init__(self, compute: Compute, rows: int, cache_mb: float | None = None) -> None:
        self._compute, self._rows = compute, rows
        chosen = float(os.environ.get(CACHE_VARIABLE, CACHE_MB)) if cache_mb is None else cache_mb
        self._bytes = 2**20 * chosen
        self._known: OrderedDict[int, Tensor] = OrderedDict()

    def forget(self) -> None:
        self._known.clear()

    def put(self, embedding: Tensor, batch: Any) -> None:
        """Write the batch's image rows into the embedding (T, D)."""
        found = list(places(batch))
        rows = self._of([place.item for place in found])
        for place in found:
            wanted = rows[place.item.hash][place.first : place.end]
            embedding[place.at : place.at + len(wanted)].copy_(wanted)

    def _of(self, items: Sequence[Any]) -> dict[int, Tensor]:
        new = {item.hash: item for item in items if item.hash not in self._known}
        if new:
            self._known.update(zip(new, self._compute(list(new.values())).split(self._rows), strict=True))
        found = {item.hash: self._known[item.hash] for item in items}
        for hash_ in found:
            self._known.move_to_end(hash_)
        self._trim()
        return found

    def _trim(self) -> None:
        while self._known and len(self._known) * next(iter(self._known.values())).nbytes > self._bytes:
            self._known.popitem(last=False)
