"""The live key-value cache: one row a running sequence, rows 0 to n-1 in use, so that a batch is a slice."""

import torch
from torch import Tensor

from ghostvis_cli.model.config import DecoderConfig
from ghostvis_cli.model.decoder import KVCache

FIRST_CAPACITY = 256  # positions; doubles as sequences grow
IDLE_BYTES = 64 * 1024**2  # more than this is given back when nothing runs


class Rows:
    def __init__(self, config: DecoderConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.cache = KVCache.empty(self.config, 1, FIRST_CAPACITY, device=self.device, dtype=self.dtype)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.cache.k + self.cache.v)

    @property
    def token_bytes(self) -> int:
        """Of one position: keys and values, over layers and key-value heads."""
        config = self.config
        return 2 * config.n_layer * config.n_kv_head * config.head_dim * self.dtype.itemsize

    def reserve(self, rows: int, capacity: int) -> None:
        """Make room for that many rows and positions, keeping what is there. What grows, doubles."""
        old = self.cache
        if rows <= old.rows and capacity <= old.capacity:
            return
        if rows > old.rows:
            rows = max(rows, 2 * old.rows)
        if capacity > old.capacity:
            capacity = max(capacity, min(2 * old.capacity, self.config.max_positions))
        rows, capacity = max(rows, old.rows), max(capacity, old.capacity)
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
