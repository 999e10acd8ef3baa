"""The same weights in transformers' NanoChatForCausalLM: what our relu2 decoder is compared with."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostvis_cli.model.config import RMS_EPS
from ghostvis_cli.model.decoder import Block, Decoder


def nanochat(decoder: Decoder) -> Any:
    """A relu2 decoder's twin, sharing its weights, with transformers' defaults (SDPA attention)."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    c = decoder.config
    config = NanoChatConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.max_positions,
        rms_norm_eps=RMS_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        attention_bias=c.attention_bias,
        tie_word_embeddings=False,
    )
    model = NanoChatForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": decoder.wte.weight,
        "lm_head.weight": decoder.lm_head.weight,
    }
    for i, block in enumerate(decoder.blocks):
        assert isinstance(block, Block)
        name = f"model.layers.{i}"
        parts = block.attn.qkv.weight.split([q, kv, kv])  # type: ignore[no-untyped-call]
        state |= {f"{name}.self_attn.{p}_proj.weight": w for p, w in zip("qkv", parts, strict=True)}
        state[f"{name}.self_attn.o_proj.weight"] = block.attn.proj.weight
        state[f"{name}.mlp.fc1.weight"] = block.mlp.up.weight
        state[f"{name}.mlp.fc2.weight"] = block.mlp.down.weight
    model.load_state_dict(state, strict=True)
    return model


class PublishedEngine:
    """nanochat's own way of decoding, written from its description: the prompt once, then one token at a time,
    eager, with q, k and v as three matrices and one cache tensor, each token read on the host before the next step.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.config = decoder, decoder.config
        self.blocks: list[Any] = list(decoder.blocks)
        c = decoder.config
        sizes = [c.n_embd, c.kv_width, c.kv_width]
        self.qkv = [
            tuple(part.contiguous() for part in block.attn.qkv.weight.split(sizes)) for block in self.blocks
        ]

    def generate(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        c, weight = self.config, self.decoder.lm_head.weight
        shape = (c.n_layer, 2, 1, c.n_kv_head, len(ids) + new_tokens, c.head_dim)
        cache = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        tokens = [int(self._forward(torch.tensor([ids], device=weight.device), 0, cache).argmax())]
        while len(tokens) < new_tokens:
            at = len(ids) + len(tokens) - 1
            tokens.append(
                int(self._forward(torch.tensor([tokens[-1:]], device=weight.device), at, cache).argmax())
            )
        return tokens

    def _forward(self, ids: Tensor, at: int, cache: Tensor) -> Tensor:
        """ids (1, T) at positions from `at` on -> logits (V,) of the last."""
        T = ids.size(1)
        cos, sin = (table[None, at : at + T, None, : self.config.head_dim // 2] for table in self._tables())
        cos, sin = cos.to(cache.dtype), sin.to(cache.dtype)
        x = _norm(self.decoder.wte(ids))
        for layer, block in enumerate(self.blocks):
            x = x + block.attn.proj(self._attention(_norm(x), cos, sin, layer, at, cache))
            x = x + block.mlp.down(F.relu(block.mlp.up(_norm(x))).square())
        logits = self.decoder.lm_head(_norm(x)[:, -1]).float()
        return (15 * torch.tanh(logits / 15))[0]

    def _tables(self) -> tuple[Tensor, Tensor]:
        return self.decoder.cos, self.decoder.sin

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, at: int, cache: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (F.linear(x, w).view(B, T, -1, self.config.head_dim) for w in self.qkv[layer])
        q, k = (_norm(_rotated(each, cos, sin)) for each in (q, k))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        cache[layer, 0, :, :, at : at + T], cache[layer, 1, :, :, at : at + T] = k, v
        k, v = cache[layer, 0, :, :, : at + T], cache[layer, 1, :, :, : at + T]
        gqa = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=gqa)
        return y.transpose(1, 2).reshape(B, T, D)


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
