"""The language model: nanochat's decoder as GhostVis trains it, and what nanochat's later generations add.

What would surprise a reader who knows Llama: norms have no weights, the embedding is normalised before the
first block, rotary rotates by -theta with tables rounded to bfloat16, q and k are normalised *after* rotary,
and logits are cap*tanh(x/cap). Projections that read the same input are stored as one matrix (`qkv`, `gate_up`).

Later generations (`model.generations`): before each block x = r*x + s*x0 with two trained scalars and the embedding
x0; on every second layer a value embedding of the token is added to v through a gate; some layers see a window of
keys; the embedding takes in its predecessor's (smear), and the middle layer's output is backed out at the end.

An *embedded row* is all that the network takes of a token's id: its row of `wte`, then its value embeddings.

B batch, T new positions, M cached positions, D width, H query heads, K key heads, h head size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostvis_cli.model.config import RMS_EPS, SMEAR_CHANNELS, DecoderConfig

FIRST_POSITIONS = 4096  # of the rotary tables, which grow on demand


def rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + 2⁻²³) over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """1 / theta^(2i/head_dim): (head_dim / 2,) float32, on the CPU.

    In this order: theta^(-2i/head_dim) has other last bits, which round to other bfloat16 tables.
    """
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)


def rotary_angles(head_dim: int, theta: float, positions: int) -> Tensor:
    """Each position over its frequencies: (positions, head_dim / 2) float32, on the CPU."""
    inverse = inverse_frequencies(head_dim, theta)
    return torch.outer(torch.arange(positions, dtype=torch.float32, device="cpu"), inverse)


def rotary_tables(config: DecoderConfig, positions: int) -> tuple[Tensor, Tensor]:
    """[cos cos] and [sin -sin], each (positions, h) float32, rounded as training's tables were."""
    angle = rotary_angles(config.head_dim, config.rope_theta, positions)
    cos, sin = angle.cos(), angle.sin()
    if config.rotary_tables == "bfloat16":
        cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x (B, T, n, h) by -theta: with halves a and b, [a cos + b sin, b cos - a sin].

    cos and sin are rows of the tables, (B or 1, T, 1, h).
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class KVCache:
    """Keys and values of `rows` sequences, each (rows, K, capacity, h) a layer; keys after rotary and norm.

    `layers` (2L, rows, K, capacity, h) is all of it, keys first; `k` and `v` are its views. For varlen attention
    the heads of a position lie side by side in memory (`heads_last`).
    """

    def __init__(self, layers: Tensor, *, heads_last: bool = False) -> None:
        self.layers, self.heads_last = layers, heads_last
        self.k, self.v = (half.unbind() for half in layers.chunk(2))
        self.rows, self.capacity = layers.size(1), layers.size(3)

    @classmethod
    def empty(
        cls,
        config: DecoderConfig,
        rows: int,
        capacity: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        heads_last: bool = False,
    ) -> "KVCache":
        L, K, h = 2 * config.n_layer, config.n_kv_head, config.head_dim
        shape = (L, rows, capacity, K, h) if heads_last else (L, rows, K, capacity, h)
        # Zeros, not empty: masked positions are multiplied by 0, and 0 * NaN would be NaN.
        layers = torch.zeros(shape, device=device, dtype=dtype)
        return cls(layers.transpose(2, 3) if heads_last else layers, heads_last=heads_last)


@dataclass(frozen=True)
class View:
    """Which keys the new positions see in layers of one window: those from `begin` on, under `mask`.

    `mask` (B, 1, T, M - begin) is 0 or -inf, in the weights' dtype, or None where every new position sees all of
    them; `causal`: T == M and the triangle applies.
    """

    begin: int
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True)
class Varlen:
    """Sequences of different lengths in one call, whose numbers stay on the device: S sequences, N new positions.

    Flash attention reads what `lengths` says is filled and no more, so that one CUDA graph serves every length.
    """

    rows: Tensor  # (N,) int64: the cache row of each new position
    positions: Tensor  # (N,) int64
    starts: Tensor  # (S + 1,) int32: sequence s has the new positions starts[s] to starts[s + 1]
    places: Tensor  # (S + 1,) int32: where the cache row of sequence s begins, in positions
    lengths: Tensor  # (S,) int32: of each sequence, with its new positions
    longest: int  # no sequence has more new positions

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float) -> Tensor:
        """q (N, H, h), keys and values (rows, K, capacity, h) -> (N, H, h)."""
        capacity = keys.size(2)
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
        left = -1 if window is None or window >= capacity else window
        out: Tensor = torch.ops.aten._flash_attention_forward(
            *(q, k, v, self.starts, self.places, self.longest, capacity, 0.0, True, False),
            scale=scale,
            window_size_left=left,
            window_size_right=-1 if left < 0 else 0,
            seqused_k=self.lengths,
        )[0]
        return out


class Places(NamedTuple):
    """Of a layer: keys and values (rows, K, capacity, h), and the rows and positions (N,) of new ones."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    positions: Tensor


Blend: TypeAlias = tuple[Tensor, Tensor, Tensor]  # r, s and x0 of r*x + s*x0


def blended(x: Tensor, blend: Blend | None) -> Tensor:
    """What enters a layer, of the last one's output x (B, T, D)."""
    if blend is None:
        return x
    r, s, x0 = blend
    return torch.addcmul(r * x, s, x0)


@dataclass(frozen=True)
class Step:
    """Where the T new positions of each row go, worked out once and shared by every layer.

    positions (B, T) int64; `first_row` is the cache row of the batch's first sequence (rows are contiguous);
    `length` M is how many cached positions any row may look at; `views` has one for each window of the model.
    Where there is `varlen`, it says whose the positions are, and `views` is empty.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    first_row: int
    length: int
    contiguous: bool  # a single row's positions are the last T of `length`
    views: dict[int | None, View]
    varlen: Varlen | None = None


class Attention(nn.Module):
    """`gate` opens a layer's value embedding: one number a key head, made of the first channels of its input."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.window = config.windows[layer] if config.windows else None
        self.scale = config.qk_scale**2 / config.head_dim**0.5  # q and k are scaled after their norms
        self.gate_channels, self.gate_scale = config.generation.gate_channels, config.gate_scale
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, heads * config.head_dim, bias=config.attention_bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if layer in config.value_layers:
            self.gate = nn.Linear(self.gate_channels, config.n_kv_head, bias=False)

    def heads(
        self, x: Tensor, cos: Tensor, sin: Tensor, value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> q (B, T, H, h), k and v (B, T, K, h).

        `value` (B, T, K*h) is the layer's value embedding of each token, where it has one.
        """
        B, T, _ = x.shape
        H, K, h = self.n_head, self.n_kv_head, self.head_dim
        qkv = self.qkv(x).view(B, T, H + 2 * K, h)
        qk = rms(rotate(qkv[:, :, : H + K], cos, sin)).to(qkv.dtype)
        v = qkv[:, :, H + K :]
        if value is not None:
            gate = self.gate_scale * torch.sigmoid(self.gate(x[..., : self.gate_channels]))
            v = torch.addcmul(v, gate[..., None], value.view(B, T, K, h).to(v.dtype))
        return qk[:, :, :H], qk[:, :, H:], v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, cache: KVCache | None, layer: int
    ) -> Tensor:
        """Heads (B, T, n, h) of new positions -> what they see, (B, T, D)."""
        B, T, H, h = q.shape
        K = self.n_kv_head
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = _extend(cache, layer, step, k, v)
        view = step.views[self.window]
        if view.begin:
            k, v = k[:, :, view.begin :], v[:, :, view.begin :]
        if T == 1:
            # One new position: the query heads of a key head attend together, as rows of one small product.
            q = q.reshape(B, K, H // K, h)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=view.mask, scale=self.scale)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=view.mask, is_causal=view.causal, scale=self.scale, enable_gqa=H != K
            ).transpose(1, 2)
        return y.reshape(B, T, H * h)


def _extend(cache: KVCache, layer: int, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write k and v (B, K, T, h) at the step's positions; give back views (B, K, M, h) of all up to `length`."""
    B, _, T, _ = k.shape
    rows = slice(step.first_row, step.first_row + B)
    keys, values = cache.k[layer][rows], cache.v[layer][rows]
    if B == 1 and step.contiguous:
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
        """x (B, T, D) -> (B, T, D)."""
        x = self.up(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.relu(x).square())


class Block(nn.Module):
    """One layer. A compiler takes what lies between two layers' attentions, which knows no lengths."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    @property
    def weights(self) -> torch.dtype:
        return self.mlp.down.weight.dtype

    def forward(
        self, x: Tensor, step: Step, cache: KVCache | None, layer: int, value: Tensor | None = None
    ) -> Tensor:
        """x (B, T, D) float32 -> (B, T, D) float32; `value` as for the attention."""
        heads = self.attn.heads(rms(x).to(self.weights), step.cos, step.sin, value)
        return self.leave(x, self.attn.attend(*heads, step, cache, layer))

    def enter(
        self, x: Tensor, blend: Blend | None, cos: Tensor, sin: Tensor, value: Tensor | None, at: Places
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> x blended, and queries (B*T, H, h). New keys and values are written where `at` says."""
        # The residual stream stays float32 whatever the matrices are, as on upstream's GPUs.
        x = blended(x, blend)
        heads = self.attn.heads(rms(x).to(self.weights), cos, sin, value)
        q, k, v = (each.flatten(0, 1) for each in heads)
        at.keys[at.rows, :, at.positions] = k
        at.values[at.rows, :, at.positions] = v
        return x, q

    def leave(self, x: Tensor, seen: Tensor) -> Tensor:
        """x and what attention saw (B, T, D) -> (B, T, D)."""
        x = x + self.attn.proj(seen)
        return x + self.mlp(rms(x).to(seen.dtype))

    def cross(self, x: Tensor, seen: Tensor, after: "Block", *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`leave`, and `enter` the layer after it with what is given: this one's output, and what that gives."""
        x = Block.leave(self, x, seen)
        return x, *Block.enter(after, x, *given)


class Decoder(nn.Module):
    """The language model: ids (B, T) and image rows (N, D) -> logits (B, T, V) float32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.values = nn.ModuleList(
            nn.Embedding(config.vocab_size, config.kv_width) for _ in config.value_layers
        )
        if config.generation.lambdas:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.generation.smear:
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
            self.backout_lambda = nn.Parameter(torch.zeros(1))
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

    def embed(self, ids: Tensor, images: Tensor | None = None) -> Tensor:
        """Ids (B, T) -> embedded rows (B, T, ...) float32, not yet normalised.

        Where images' rows (n, D) are given, they stand in order where ids are negative; they have no value
        embedding.
        """
        known = ids if images is None else ids.clamp(min=0)
        x = self.wte(known).float()
        if self.values:
            x = torch.cat((x, *(table(known).float() for table in self.values)), dim=-1)
        if images is not None:
            x[ids < 0] = F.pad(images.float(), (0, x.size(-1) - images.size(-1)))
        return x

    def plan(
        self,
        positions: Tensor,
        *,
        first_row: int = 0,
        first: int | None = None,
        length: int | None = None,
        padded: bool = False,
    ) -> Step:
        """Shared work of one forward. positions (B, T).

        `first` and `length` are min(positions) and max(positions) + 1, where the caller knows them; with `padded`
        the length may be more, and what lies beyond a position is masked.
        """
        B, T = positions.shape
        length = int(positions.max()) + 1 if length is None else length
        if length > self.cos.size(0):
            self.grow_rotary(max(length, 2 * self.cos.size(0)))
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        if first is None:
            first = length - T if B == 1 else 0
        first = 0 if padded else first
        windows = dict.fromkeys(self.config.windows or (None,))
        views = {window: self._view(positions, window, first, length, padded) for window in windows}
        return Step(positions, cos, sin, first_row, length, not padded, views)

    def plan_varlen(self, positions: Tensor, varlen: Varlen) -> Step:
        """`plan` for sequences that `varlen` tells apart: positions (B, T), flat they are varlen's."""
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        return Step(positions, cos, sin, 0, 0, False, {}, varlen)

    def _view(self, positions: Tensor, window: int | None, first: int, length: int, padded: bool) -> View:
        """A window of W sees W keys back, and oneself. It bites where the last position is beyond it."""
        B, T = positions.shape
        bites = window is not None and length - 1 > window
        begin = max(0, first - window) if window is not None else 0
        causal = length == T and not padded and not bites
        if not padded and (causal or (B == 1 and T == 1)):
            return View(begin, None, causal and T > 1)
        column, position = torch.arange(begin, length, device=positions.device), positions[:, None, :, None]
        hidden = column > position
        if window is not None and (bites or padded):
            hidden |= column < position - window
        mask = torch.zeros(hidden.shape, dtype=self.lm_head.weight.dtype, device=positions.device)
        return View(begin, mask.masked_fill_(hidden, -torch.inf), False)

    def trunk(self, x: Tensor, step: Step, cache: KVCache | None = None) -> Tensor:
        """Embedded rows (B, T, ...) -> final hidden rows (B, T, D), normalised, in the weights' dtype.

        Where `config.reach` is 1 and the step does not begin at position 0, x begins with the row before it.
        """
        values = self.value_rows(x, step)
        x0 = middle = x = self.begin(x, step)
        if step.varlen is not None and cache is not None:
            x, middle = self._layers_varlen(x, step, step.varlen, cache, values)
        else:
            for layer, block in enumerate(self.blocks):
                x = block(self.blend(x, x0, layer), step, cache, layer, values[layer])
                if layer == self.config.n_layer // 2:
                    middle = x
        return rms(self.back_out(x, middle)).to(self.lm_head.weight.dtype)

    def _layers_varlen(
        self, x: Tensor, step: Step, varlen: Varlen, cache: KVCache, values: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) through all layers, and the middle one's output."""
        at = [Places(k, v, varlen.rows, varlen.positions) for k, v in zip(cache.k, cache.v, strict=True)]
        given = [
            (self.blend_of(layer, x), step.cos, step.sin, values[layer], at[layer])
            for layer in range(self.config.n_layer)
        ]
        middle, blocks = x, cast("list[Block]", list(self.blocks))
        x, q = blocks[0].enter(x, *given[0])
        for layer, block in enumerate(blocks):
            seen = varlen.attend(q, cache.k[layer], cache.v[layer], block.attn.window, block.attn.scale)
            seen = seen.view(x.shape)
            if layer + 1 == self.config.n_layer:
                out = x = block.leave(x, seen)
            else:
                out, x, q = block.cross(x, seen, blocks[layer + 1], *given[layer + 1])
            if layer == self.config.n_layer // 2:
                middle = out
        return x, middle

    def begin(self, x: Tensor, step: Step) -> Tensor:
        """Embedded rows -> what enters the layers, (B, T, D): normalised, each with the one before it taken in."""
        e = rms(x[..., : self.config.n_embd])
        if not self.config.generation.smear:
            return e
        T = step.positions.size(1)
        before = (
            e[:, :-1] if e.size(1) > T else F.pad(e[:, :-1], (0, 0, 1, 0))
        )  # a sequence's first takes in none
        e = e[:, -T:]
        gate = self.smear_gate(e[..., :SMEAR_CHANNELS].to(self.smear_gate.weight.dtype)).float()
        return torch.addcmul(e, self.smear_lambda * torch.sigmoid(gate), before)

    def value_rows(self, x: Tensor, step: Step) -> Sequence[Tensor | None]:
        """Each layer's value embeddings (B, T, K*h) out of embedded rows; None where a layer has none."""
        config, T = self.config, step.positions.size(1)
        if not self.values:
            return [None] * config.n_layer
        tables = iter(x[:, -T:, config.n_embd :].chunk(len(config.value_layers), dim=-1))
        return [next(tables) if layer in config.value_layers else None for layer in range(config.n_layer)]

    def blend_of(self, layer: int, x0: Tensor) -> Blend | None:
        """What enters a layer beside the last one's output: the embedding x0, where the generation has it so."""
        if not self.config.generation.lambdas:
            return None
        return self.resid_lambdas[layer], self.x0_lambdas[layer], x0

    def blend(self, x: Tensor, x0: Tensor, layer: int) -> Tensor:
        """What enters a layer, of the last one's output and the embedding."""
        return blended(x, self.blend_of(layer, x0))

    def back_out(self, x: Tensor, middle: Tensor) -> Tensor:
        """x (…, D) less a learned share of `middle` (…, D), the middle layer's output."""
        return x - self.backout_lambda * middle if self.config.generation.smear else x

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…, V) float32, softly capped."""
        cap = self.config.softcap
        return cap * torch.tanh(self.lm_head(hidden).float() / cap)

    def forward(self, x: Tensor) -> Tensor:
        """Whole sequences without a cache: embedded rows (B, T, ...) -> logits (B, T, V)."""
        positions = torch.arange(x.size(1), device=x.device)[None]
        return self.logits(self.trunk(x, self.plan(positions, length=x.size(1))))
