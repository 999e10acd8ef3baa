"""The live key-value cache: one row a running sequence, rows 0 to n-1 in use, so that a batch is a slice."""

import torch
from torch import Tensor

from ghostvis_cli.model.config import DecoderConfig
from ghostvis_cli.model.decoder import KVCache

FIRST_CAPACITY = 256  # positions; doubles as sequences grow
IDLE_BYTES = 64 * 1024**2  # more than this is given back when nothing runs,
IDLE_SHARE = 8  # on a GPU, where graphs would have to be captured again, more than this part of its memory


class Rows:
    def __init__(
        self, config: DecoderConfig, *, device: torch.device, dtype: torch.dtype, varlen: bool = False
    ) -> None:
        self.config, self.device, self.dtype, self.varlen = config, device, dtype, varlen
        self.idle_bytes = IDLE_BYTES
        if device.type == "cuda":
            self.idle_bytes = torch.cuda.mem_get_info(device)[1] // IDLE_SHARE
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        # A compiler takes one row for something else than several.
        self.cache = self._empty(2 if self.varlen else 1, FIRST_CAPACITY)

    def _empty(self, rows: int, capacity: int) -> KVCache:
        return KVCache.empty(
            self.config, rows, capacity, device=self.device, dtype=self.dtype, heads_last=self.varlen
        )

    @property
    def token_bytes(self) -> int:
        """Of one position: keys and values, over layers and key-value heads."""
        return token_bytes(self.config, self.dtype)

    def give_back(self, capacity: int | None = None) -> None:
        """Reset empty rows that take much, or would with so many positions each."""
        if self.cache.rows * (capacity or self.cache.capacity) * self.token_bytes > self.idle_bytes:
            self.reset()

    def reserve(self, rows: int, capacity: int) -> None:
        """Make room for that many rows and positions, keeping what is there. What grows, doubles at least."""
        old, most = self.cache, self.config.max_positions
        if rows <= old.rows and capacity <= old.capacity:
            return
        if rows > old.rows:
            rows = max(rows, 2 * old.rows)
        if capacity > old.capacity:
            whole = -(-capacity // FIRST_CAPACITY) * FIRST_CAPACITY
            capacity = max(capacity, min(max(whole, 2 * old.capacity), most))
        new = self._empty(max(rows, old.rows), max(capacity, old.capacity))
        new.layers[:, : old.rows, :, : old.capacity] = old.layers
        self.cache = new

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one row into another."""
        layers = self.cache.layers
        layers[:, target, :, :length] = layers[:, source, :, :length]

    def copy_in(self, row: int, layers: Tensor, length: int) -> None:
        """Begin a row with `length` positions of an entry (2L, K, n, h)."""
        self.cache.layers[:, row, :, :length] = layers[:, :, :length]

    def copy_out(self, row: int, length: int) -> Tensor:
        """The first `length` positions of a row: (2L, K, length, h), a copy."""
        return self.cache.layers[:, row, :, :length].clone()


def token_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * dtype.itemsize
