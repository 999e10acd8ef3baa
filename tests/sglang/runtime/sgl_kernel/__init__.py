"""A stand-in for sgl-kernel, which has no CPU build on the package index.

It has the names that SGLang 0.5.23 imports at module level when SGLANG_USE_CPU_ENGINE=1, and no kernel: then SGLang
finds no AMX and every layer takes its forward_native path, the reference arithmetic in plain PyTorch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__version__ = "0.4.10"

SPECULATIVE_ONLY = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)
# Schemas that model files look up when they are imported; nothing stands behind them.
SCHEMAS = (
    "fused_sigmoid_mul_cpu(Tensor(a!) x, Tensor gate) -> ()",
    "fused_qk_gemma_rmsnorm_cpu(Tensor q, Tensor k, Tensor qw, Tensor kw, float eps) -> (Tensor, Tensor)",
    "fused_qk_gemma_rmsnorm_with_gate_cpu(Tensor q, Tensor k, Tensor qw, Tensor kw, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor, Tensor)",
)


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
) -> None:
    """Each request's row of the table takes, from its start to its end, the next of the cache places given."""
    used = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        places = out_cache_loc[used : used + end - start]
        req_to_token[row, start:end] = places.to(req_to_token.dtype)
        used += end - start


def _absent(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name} is for speculative decoding, which has no CPU stand-in")

    return refuse


globals().update({name: _absent(name) for name in SPECULATIVE_ONLY})
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for schema in SCHEMAS:
    _library.define(schema)
