"""From pixels to rows the decoder can read: vision tower, resampler, projector (format spec, section 5).

One transformer serves the three tower families; the family says which norms, biases and activation it has.
Upstream's oddities are kept: CLIP's last norm is stored but unused, its class token is handed on, and the
resampler's keys are not normalised.

B images, S image size in pixels, P tower rows, W tower width, N rows an image, D decoder width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostvis_cli.model.config import LAYER_NORM_EPS, TowerConfig, TowerFamily, VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU, of any shape: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, of any shape."""
    return F.gelu(x, approximate="tanh")


ACTIVATION: dict[TowerFamily, Callable[[Tensor], Tensor]] = {
    "clip": quick_gelu,
    "timm": F.gelu,  # exact, though OpenAI trained these weights with quick_gelu: upstream does it so
    "siglip": tanh_gelu,
}


class TowerBlock(nn.Module):
    def __init__(self, config: TowerConfig, eps: float) -> None:
        super().__init__()
        self.heads, self.activation = config.heads, ACTIVATION[config.family]
        self.norm1 = nn.LayerNorm(config.width, eps=eps)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=eps)
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, W) -> (B, P, W)."""
        B, P, W = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, P, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, P, W))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class Tower(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        siglip = config.family == "siglip"
        eps = 1e-6 if siglip else LAYER_NORM_EPS
        self.patch = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=siglip)
        self.class_token = None if siglip else nn.Parameter(torch.zeros(config.width))
        self.position = nn.Parameter(torch.zeros(config.tokens, config.width))
        self.norm_pre = nn.Identity() if siglip else nn.LayerNorm(config.width, eps=eps)
        self.blocks = nn.ModuleList(TowerBlock(config, eps) for _ in range(config.layers))
        # CLIP hands on its last block's output; the norm in its file belongs to a pooled head we do not have.
        self.norm_post = nn.Identity() if config.family == "clip" else nn.LayerNorm(config.width, eps=eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, P, W)."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.size(0), 1, -1), x), dim=1)
        x = self.norm_pre(x + self.position)
        for block in self.blocks:
            x = block(x)
        return self.norm_post(x)


class CrossAttention(nn.Module):
    """torch's MultiheadAttention with its names, but `out_proj` is called, so that its weight may be packed."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # q above k above v
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, W) looks at context (B, P, W) -> (B, N, W)."""
        B, N, W = x.shape
        size = W // self.heads
        q = F.linear(x, self.in_proj_weight[:W], self.in_proj_bias[:W])
        kv = F.linear(context, self.in_proj_weight[W:], self.in_proj_bias[W:])
        k, v = kv.view(B, -1, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q.view(B, N, self.heads, size).transpose(1, 2), k, v)
        return self.out_proj(y.transpose(1, 2).reshape(B, N, W))


class ResamplerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, W) attends to context (B, P, W) -> (B, N, W)."""
        x = x + self.cross_attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


class Perceiver(nn.Module):
    """N learned queries look at the tower's rows: (B, P, W) -> (B, N, W)."""

    def __init__(self, num_tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, num_tokens, width))
        self.layers = nn.ModuleList(ResamplerBlock(width, heads) for _ in range(depth))

    def forward(self, context: Tensor) -> Tensor:
        """(B, P, W) -> (B, N, W)."""
        x = self.queries.expand(context.size(0), -1, -1)
        for layer in self.layers:
            x = layer(x, context)
        return x


class AveragePool(nn.Module):
    """Adaptive mean over the row sequence, class token included: (B, P, W) -> (B, N, W)."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, context: Tensor) -> Tensor:
        """(B, P, W) -> (B, N, W)."""
        return F.adaptive_avg_pool1d(context.transpose(1, 2), self.num_tokens).transpose(1, 2)


class Projector(nn.Module):
    def __init__(self, width: int, hidden: int, n_embd: int) -> None:
        super().__init__()
        # The indices are the file's: 1 is the activation, 2 a dropout that inference has no use for.
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Identity(),
            nn.Linear(hidden, n_embd),
            nn.LayerNorm(n_embd),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) -> (B, N, D)."""
        return self.mlp(x)


class Vision(nn.Module):
    """Images (B, 3, S, S) -> rows (B, N, D): tower, resampler, projector."""

    def __init__(self, config: VisionConfig, n_embd: int) -> None:
        super().__init__()
        self.config = config
        self.tower = Tower(config.tower)
        self.resampler = (
            Perceiver(config.num_tokens, config.tower.width, config.resampler_depth, config.resampler_heads)
            if config.resampler_mode == "perceiver"
            else AveragePool(config.num_tokens)
        )
        self.projector = Projector(config.tower.width, config.proj_hidden, n_embd)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pixels -> (B, N, D) float32."""
        pixels = pixels.to(self.tower.position.dtype)
        rows: Tensor = self.projector(self.resampler(self.tower(pixels)))
        return rows.float()
