"""Each token's predecessor, for models whose embedding uses it (smear): SGLang passes only new tokens.

A slot of the key-value cache belongs to one token at one position. A buffer with one entry for each slot therefore
lives exactly as long as the cache: through prefix hits, chunks, decoding, retraction and CUDA graphs. It is wrong
where keys come from elsewhere, which `limits` refuses.
"""

from typing import Any

import torch
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool
from torch import Tensor


class Neighbours:
    """One entry for each slot: a token's id, or a row (D,) where images' rows are neighbours too."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def before(self, new: Tensor, positions: Tensor, batch: Any) -> Tensor:
        """Store T new entries (T, ...); returns those of the positions before them, zero at position 0."""
        if self._kept is None:  # the first forward, which is never captured in a graph
            pool = get_token_to_kv_pool()
            self._kept = new.new_zeros((pool.size + pool.page_size, *new.shape[1:]))
        self._kept[batch.out_cache_loc] = new
        requests = batch.req_pool_indices[_rows(positions, batch)]
        slots = get_req_to_token_pool().req_to_token[requests, (positions - 1).clamp(min=0)]
        return self._kept[slots.long()]


def _rows(positions: Tensor, batch: Any) -> Tensor:
    """(T,) index of each token's request in the batch, with shapes that a graph can replay."""
    tokens = torch.arange(positions.size(0), device=positions.device)
    if batch.forward_mode.is_decode_or_idle() or batch.extend_seq_lens is None:
        return tokens
    ends = batch.extend_seq_lens.cumsum(0)
    return torch.searchsorted(ends, tokens, right=True).clamp(max=ends.size(0) - 1)
