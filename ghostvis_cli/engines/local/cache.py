"""What is kept between requests: keys and values of prefixes, and images' rows.

A position's identity is its token id, or for an image's row a negative number made from the image's pixels.
Two sequences share their longest common prefix only: keys depend on all positions before them.
"""

from collections import OrderedDict
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
    """Token ids (T,) int64, each image's rows replaced by a negative number that only its pixels share."""
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
    """Finished sequences' keys and values, the least recently used thrown out beyond bytes or entries.

    Entries are compared one by one, so their number is what a look-up costs: some 2 us each.
    """

    def __init__(self, capacity_bytes: int, capacity: int = 256) -> None:
        self.capacity_bytes, self.capacity = capacity_bytes, capacity
        self.entries: list[Entry] = []  # least recently used first
        self.nbytes = 0

    def match(self, ids: "Identity") -> tuple[int, Entry | None]:
        """The entry that shares the longest prefix with `ids`, and the length of that prefix in positions."""
        shared = [common_prefix(entry.ids, ids) for entry in self.entries]
        length = max(shared, default=0)
        if not length:
            return 0, None
        entry = self.entries.pop(shared.index(length))
        self.entries.append(entry)
        return length, entry

    def insert(self, ids: "Identity", rows: Rows, row: int) -> None:
        """Keep the first len(ids) positions of a row, and drop entries that say nothing beyond them."""
        shared = [common_prefix(entry.ids, ids) for entry in self.entries]
        if not self.capacity_bytes or not len(ids) or len(ids) in shared:
            return
        kept = [e for e, length in zip(self.entries, shared, strict=True) if length < len(e.ids)]
        self.entries = [*kept, Entry(ids.copy(), rows.copy_out(row, len(ids)))]
        self.nbytes = sum(entry.nbytes for entry in self.entries)
        while self.nbytes > self.capacity_bytes or len(self.entries) > self.capacity:
            self.nbytes -= self.entries.pop(0).nbytes

    def clear(self) -> None:
        self.entries, self.nbytes = [], 0


class ImageCache:
    """Images' rows (N, D) by digest: the tower sees an image once, however often it is asked about.

    Only the step thread changes it; `get` may be asked from any thread.
    """

    def __init__(self, capacity: int = 128) -> None:
        self.capacity = capacity
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, digest: str) -> Tensor | None:
        """The rows (N, D) of an image by its digest; None where it was not seen, or forgotten."""
        return self._rows.get(digest)

    def insert(self, digest: str, rows: Tensor) -> None:
        """Remember, or remember as just used."""
        self._rows[digest] = rows
        self._rows.move_to_end(digest)
        while len(self._rows) > self.capacity:
            self._rows.popitem(last=False)
