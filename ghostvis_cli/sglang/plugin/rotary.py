"""Rotary embedding as in training, for servers that must give the local engine's tokens.

Tables rounded to bfloat16 are no exact rotation, so it matters that training normalises after applying them.
SGLang's Qwen3 normalises before, which is then without effect. Slower than its fused kernels: see `numerics`.
"""

import os
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ghostvis_cli.model.decoder import rms, rotary_angles

Numerics = Literal["fast", "exact"]
VARIABLE = "GHOSTVIS_NUMERICS"


def numerics() -> Numerics:
    """GHOSTVIS_NUMERICS; by default exact in float32, where equal tokens are expected, else fast."""
    chosen = os.environ.get(VARIABLE, "auto")
    if chosen == "auto":
        return "exact" if torch.get_default_dtype() == torch.float32 else "fast"
    if chosen not in ("fast", "exact"):
        raise ValueError(f"{VARIABLE} is {chosen!r}: auto, fast or exact")
    return chosen  # type: ignore[return-value]


class ExactRotary(nn.Module):
    """Replaces SGLang's rotary embedding: T tokens, heads side by side in the last dimension."""

    cos_sin_cache: Tensor

    def __init__(self, head_dim: int, positions: int, theta: float, *, rounded: bool = True) -> None:
        super().__init__()
        self.head_dim = head_dim
        angle = rotary_angles(head_dim, theta, positions)
        table = torch.cat((angle.cos(), angle.sin()), dim=-1)
        table = table.bfloat16() if rounded else table
        self.register_buffer("cos_sin_cache", table.to(torch.get_default_device()), persistent=False)

    def forward(
        self, positions: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """positions (T,), query (T, H*h), key (T, K*h) -> both rotated by +theta and normalised."""
        cos, sin = self.cos_sin_cache[positions].float()[:, None].chunk(2, dim=-1)
        return self._turn(query, cos, sin), self._turn(key, cos, sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.view(x.size(0), -1, self.head_dim).chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return rms(turned).to(x.dtype).view_as(x)
