"""Each token's predecessor, for models whose embedding takes it in (smear): SGLang hands over new tokens alone.

What a slot of the key-value cache holds was computed for one token at one position, so a buffer with an entry a
slot remembers it exactly as long as the cache does: through prefix hits, chunks, decoding, retraction and CUDA
graphs. It is wrong where keys come from elsewhere, which `limits` refuses.
"""

from typing import Any

import torch
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool
from torch import Tensor


class Neighbours:
    """An entry for each slot: a token's id, or a row (D,) where images' rows are neighbours too."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def before(self, new: Tensor, positions: Tensor, batch: Any) -> Tensor:
        """Keep the T new entries (T, ...); those of the positions before them, zero at position 0."""
        if self._kept is None:  # the first forward, which no graph records
            pool = get_token_to_kv_pool()
            self._kept = new.new_zeros((pool.size + pool.page_size, *new.shape[1:]))
        self._kept[batch.out_cache_loc] = new
        requests = batch.req_pool_indices[_rows(positions, batch)]
        slots = get_req_to_token_pool().req_to_token[requests, (positions - 1).clamp(min=0)]
        return self._kept[slots.long()]


def _rows(positions: Tensor, batch: Any) -> Tensor:
    """(T,) which request of the batch each token belongs to, in shapes that a graph can replay."""
    tokens = torch.arange(positions.size(0), device=positions.device)
    if batch.forward_mode.is_decode_or_idle() or batch.extend_seq_lens is None:
        return tokens
    ends = batch.extend_seq_lens.cumsum(0)
    return torch.searchsorted(ends, tokens, right=True).clamp(max=ends.size(0) - 1)
