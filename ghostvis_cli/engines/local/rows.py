"""The live key-value cache: one row a running sequence, rows 0 to n-1 in use, so that a batch is a slice."""

import torch
from torch import Tensor

from ghostvis_cli.model.config import DecoderConfig
from ghostvis_cli.model.decoder import KVCache

FIRST_CAPACITY = 256  # positions; doubles as sequences grow


class Rows:
    def __init__(self, config: DecoderConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.cache = KVCache.empty(config, 1, FIRST_CAPACITY, device=device, dtype=dtype)

    def reserve(self, rows: int, capacity: int) -> None:
        """Make room for that many rows and positions, keeping what is there."""
        old = self.cache
        if rows <= old.rows and capacity <= old.capacity:
            return
        rows = old.rows if rows <= old.rows else max(rows, 2 * old.rows)
        if capacity > old.capacity:
            capacity = min(max(capacity, 2 * old.capacity), self.config.max_positions)
        else:
            capacity = old.capacity
        new = KVCache.empty(self.config, rows, capacity, device=self.device, dtype=self.dtype)
        for ours, theirs in zip(new.k + new.v, old.k + old.v, strict=True):
            ours[: old.rows, :, : old.capacity] = theirs
        self.cache = new

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one row into another."""
        for layer in self.cache.k + self.cache.v:
            layer[target, :, :length] = layer[source, :, :length]

    def copy_in(self, row: int, layers: Tensor, length: int) -> None:
        """Begin a row with `length` positions of an entry (2L, K, n, h)."""
        for ours, theirs in zip(self.cache.k + self.cache.v, layers, strict=True):
            ours[row, :, :length] = theirs[:, :length]

    def copy_out(self, row: int, length: int) -> Tensor:
        """The first `length` positions of a row: (2L, K, length, h), a copy."""
        return torch.stack([layer[row, :, :length] for layer in self.cache.k + self.cache.v])
