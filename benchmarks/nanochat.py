"""The same weights in transformers' NanoChatForCausalLM: what our relu2 decoder is compared with."""

from typing import Any

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
