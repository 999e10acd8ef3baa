"""The language model: nanochat's decoder as GhostVis trains it (format specification, section 4).

What would surprise a reader who knows Llama: norms have no weights, the embedding is normalised before the
first block, rotary rotates by -theta with tables rounded to bfloat16, q and k are normalised *after* rotary,
and logits are 15*tanh(x/15). Projections that read the same input are stored as one matrix (`qkv`, `gate_up`).

B batch, T new positions, M cached positions, D width, H query heads, K key heads, h head size, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostvis_cli.model.config import LOGIT_SOFTCAP, RMS_EPS, DecoderConfig

FIRST_POSITIONS = 4096  # of the rotary tables, which grow on demand


def rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + 2⁻²³) over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def rotary_angles(head_dim: int, theta: float, positions: int) -> Tensor:
    """theta^(-2i/head_dim) times each position: (positions, head_dim / 2) float32, on the CPU."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    return torch.outer(torch.arange(positions, dtype=torch.float32, device="cpu"), inverse)


def rotary_tables(config: DecoderConfig, positions: int) -> tuple[Tensor, Tensor]:
    """[cos cos] and [sin -sin], each (positions, h) float32 holding bfloat16 values, as upstream rounds them."""
    angle = rotary_angles(config.head_dim, config.rope_theta, positions)
    cos, sin = angle.cos().bfloat16().float(), angle.sin().bfloat16().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x (B, T, n, h) by -theta: with halves a and b, [a cos + b sin, b cos - a sin].

    cos and sin are rows of the tables, (B or 1, T, 1, h).
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


@dataclass
class KVCache:
    """Keys and values of `rows` sequences, each (rows, K, capacity, h) a layer; keys after rotary and norm."""

    k: list[Tensor]
    v: list[Tensor]

    @classmethod
    def empty(
        cls, config: DecoderConfig, rows: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        shape = (rows, config.n_kv_head, capacity, config.head_dim)
        # Zeros, not empty: masked positions are multiplied by 0, and 0 * NaN would be NaN.
        k, v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)] for _ in "kv")
        return cls(k, v)

    @property
    def rows(self) -> int:
        return self.k[0].size(0)

    @property
    def capacity(self) -> int:
        return self.k[0].size(2)


@dataclass(frozen=True)
class Step:
    """Where the T new positions of each row go, worked out once and shared by every layer.

    positions (B, T) int64; `first_row` is the cache row of the batch's first sequence (rows are contiguous);
    `length` M is how many cached positions any row may look at; `mask` (B, 1, T, M) is 0 or -inf, in the
    weights' dtype, or None where every new position sees all M; `causal`: T == M and the triangle applies.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    first_row: int
    length: int
    mask: Tensor | None
    causal: bool


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, heads * config.head_dim, bias=config.attention_bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, step: Step, cache: KVCache | None, layer: int) -> Tensor:
        B, T, D = x.shape
        H, K, h = self.n_head, self.n_kv_head, self.head_dim
        qkv = self.qkv(x).view(B, T, H + 2 * K, h)
        qk = rms(rotate(qkv[:, :, : H + K], step.cos, step.sin)).to(qkv.dtype).transpose(1, 2)
        q, k, v = qk[:, :H], qk[:, H:], qkv[:, :, H + K :].transpose(1, 2)
        if cache is not None:
            k, v = _extend(cache, layer, step, k, v)
        if T == 1:
            # One new position: the query heads of a key head attend together, as rows of one small product.
            q = q.reshape(B, K, H // K, h)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=step.mask, is_causal=step.causal, enable_gqa=H != K
            ).transpose(1, 2)
        return self.proj(y.reshape(B, T, D))


def _extend(cache: KVCache, layer: int, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write k and v (B, K, T, h) at the step's positions; give back views (B, K, M, h) of all up to `length`."""
    B, _, T, _ = k.shape
    rows = slice(step.first_row, step.first_row + B)
    keys, values = cache.k[layer][rows], cache.v[layer][rows]
    if B == 1 and (T > 1 or step.mask is None):
        new = slice(step.length - T, step.length)
        keys[:, :, new], values[:, :, new] = k, v
    else:
        at = step.positions[:, None, :, None].expand(B, k.size(1), T, k.size(3))
        keys.scatter_(2, at, k.to(keys.dtype))
        values.scatter_(2, at, v.to(values.dtype))
    return keys[:, :, : step.length], values[:, :, : step.length]


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gated = config.mlp_type == "swiglu"
        width = config.intermediate_size
        self.up = nn.Linear(config.n_embd, 2 * width if self.gated else width, bias=False)  # gate above up
        self.down = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.relu(x).square())


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, step: Step, cache: KVCache | None, layer: int) -> Tensor:
        # The residual stream stays float32 whatever the matrices are, as on upstream's GPUs.
        weights = self.mlp.down.weight.dtype
        x = x + self.attn(rms(x).to(weights), step, cache, layer)
        return x + self.mlp(rms(x).to(weights))


class Decoder(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.grow_rotary(min(config.sequence_len, FIRST_POSITIONS))

    def grow_rotary(self, positions: int) -> None:
        """Make the tables at least this long; they are derived, so never part of a file."""
        if hasattr(self, "cos") and positions <= self.cos.size(0):
            return
        cos, sin = rotary_tables(self.config, min(positions, self.config.max_positions))
        device = self.lm_head.weight.device
        if device.type != "meta":
            cos, sin = cos.to(device), sin.to(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Token rows (B, T) -> (B, T, D) float32, not yet normalised: vision rows join them first."""
        return self.wte(ids).float()

    def plan(
        self, positions: Tensor, *, first_row: int = 0, length: int | None = None, padded: bool = False
    ) -> Step:
        """Shared work of one forward. positions (B, T).

        `length` is max(positions) + 1, where the caller knows it; with `padded` it may be more, and what lies
        beyond a position is masked.
        """
        B, T = positions.shape
        length = int(positions.max()) + 1 if length is None else length
        if length > self.cos.size(0):
            self.grow_rotary(max(length, 2 * self.cos.size(0)))
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        causal = length == T and not padded
        mask = None
        if padded or not (causal or (B == 1 and T == 1)):
            hidden = torch.arange(length, device=positions.device) > positions[:, None, :, None]
            mask = torch.zeros(hidden.shape, dtype=self.lm_head.weight.dtype, device=positions.device)
            mask.masked_fill_(hidden, -torch.inf)
        return Step(positions, cos, sin, first_row, length, mask, causal and T > 1)

    def trunk(self, x: Tensor, step: Step, cache: KVCache | None = None) -> Tensor:
        """Embedded rows (B, T, D) -> final hidden rows (B, T, D), normalised, in the weights' dtype."""
        x = rms(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, step, cache, layer)
        return rms(x).to(self.lm_head.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…, V) float32, softly capped to ±15."""
        return LOGIT_SOFTCAP * torch.tanh(self.lm_head(hidden).float() / LOGIT_SOFTCAP)

    def forward(self, x: Tensor) -> Tensor:
        """Whole sequences without a cache: embedded rows (B, T, D) -> logits (B, T, V)."""
        positions = torch.arange(x.size(1), device=x.device)[None]
        return self.logits(self.trunk(x, self.plan(positions, length=x.size(1))))
