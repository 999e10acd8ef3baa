"""What is worth keeping between requests: keys and values of prompts' beginnings, and pictures' rows.

A position's identity is its token id, or for a picture's row a negative number made from the picture's pixels.
Two sequences share their longest common beginning, and nothing else: keys depend on all that came before.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ghostvis_cli.engines.local.rows import Rows
from ghostvis_cli.prompt import VISION_ROW, Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Identity = NDArray[np.int64]


def identities(prompt: Prompt, image_tokens: int) -> "Identity":
    """Token ids (T,) int64, each picture's rows replaced by a negative number that only its pixels share."""
    ids = np.asarray(prompt.ids, dtype=np.int64)
    marks = [-2 - int(image.digest[:15], 16) for image in prompt.images]  # 60 bits; never VISION_ROW itself
    if marks:
        ids[ids == VISION_ROW] = np.repeat(np.asarray(marks, dtype=np.int64), image_tokens)
    return ids


def common_prefix(a: "NDArray[Any]", b: "NDArray[Any]") -> int:
    """How many leading elements are equal."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


@dataclass(frozen=True)
class Entry:
    ids: "Identity"
    layers: Tensor  # (2L, K, n, h): keys and values of n positions

    @property
    def nbytes(self) -> int:
        return self.layers.numel() * self.layers.element_size()


class PrefixCache:
    """Finished sequences' keys and values, the least recently used thrown out beyond `capacity_bytes`."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.entries: list[Entry] = []  # least recently used first

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def best(self, ids: "Identity") -> tuple[int, Entry | None]:
        """The entry that shares the longest beginning with `ids`, and how long that is."""
        length, best = max(
            ((common_prefix(entry.ids, ids), index) for index, entry in enumerate(self.entries)),
            default=(0, -1),
        )
        if not length:
            return 0, None
        entry = self.entries.pop(best)
        self.entries.append(entry)
        return length, entry

    def put(self, ids: "Identity", rows: Rows, row: int) -> None:
        """Keep the first len(ids) positions of a row, and drop entries that say nothing beyond them."""
        if not self.capacity_bytes or any(
            common_prefix(entry.ids, ids) == len(ids) for entry in self.entries
        ):
            return
        self.entries = [e for e in self.entries if common_prefix(e.ids, ids) < len(e.ids)]
        self.entries.append(Entry(ids.copy(), rows.copy_out(row, len(ids))))
        while self.nbytes > self.capacity_bytes:
            self.entries.pop(0)


class ImageCache:
    """Pictures' rows (N, D) by digest: the tower sees a picture once, however often it is asked about."""

    def __init__(self, capacity: int = 128) -> None:
        self.capacity = capacity
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._rows

    def get(self, digest: str) -> Tensor | None:
        if digest in self._rows:
            self._rows.move_to_end(digest)
        return self._rows.get(digest)

    def put(self, digests: Iterable[str], rows: Tensor) -> None:
        for digest, one in zip(digests, rows, strict=True):
            self._rows[digest] = one
        while len(self._rows) > self.capacity:
            self._rows.popitem(last=False)
