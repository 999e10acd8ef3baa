"""Training weights -> the files that ship: a GhostVis base directory, native names, all in bfloat16."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.model.config import GhostVisConfig
from ghostvis_cli.model.ghostvis import GhostVis
from tools.train_demo.network import ENCODER_NAME
from tools.train_demo.vocabulary import save

MODEL_TAG = "vlm_tiny"
SOURCE = "chatsft_checkpoints"


def native_state(model: GhostVis) -> dict[str, Tensor]:
    """The model's weights under GhostVis's names, fused matrices cut apart."""
    ours = model.state_dict()
    state: dict[str, Tensor] = {}
    decoder = model.config.decoder
    q, kv = decoder.n_head * decoder.head_dim, decoder.n_kv_head * decoder.head_dim
    state["transformer.wte.weight"] = ours["decoder.wte.weight"]
    for layer in range(decoder.n_layer):
        block, name = f"decoder.blocks.{layer}.", f"transformer.h.{layer}."
        parts = ours[block + "attn.qkv.weight"].split((q, kv, kv))
        state |= {f"{name}attn.c_{part}.weight": weight for part, weight in zip("qkv", parts, strict=True)}
        state[name + "attn.c_proj.weight"] = ours[block + "attn.proj.weight"]
        gate, up = ours[block + "mlp.up.weight"].chunk(2)
        state |= {name + "mlp.c_gate.weight": gate, name + "mlp.c_up.weight": up}
        state[name + "mlp.c_proj.weight"] = ours[block + "mlp.down.weight"]
    state["lm_head.weight"] = ours["decoder.lm_head.weight"]
    state |= _tower(ours, model)
    for key, value in ours.items():
        for part in ("resampler", "projector"):
            if key.startswith(f"vision.{part}."):
                state["vision_" + key.removeprefix("vision.")] = value
    return {name: weight.detach().cpu().bfloat16().contiguous().clone() for name, weight in state.items()}


def _tower(ours: dict[str, Tensor], model: GhostVis) -> dict[str, Tensor]:
    assert model.config.vision is not None
    tower, root = "vision.tower.", "vision_encoder.encoder."
    width = model.config.vision.tower.width
    state = {
        "embeddings.class_embedding": ours[tower + "class_token"],
        "embeddings.patch_embedding.weight": ours[tower + "patch.weight"],
        "embeddings.position_embedding.weight": ours[tower + "position"],
        "pre_layrnorm.weight": ours[tower + "norm_pre.weight"],
        "pre_layrnorm.bias": ours[tower + "norm_pre.bias"],
    }
    names = {
        "proj": "self_attn.out_proj",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    for layer in range(model.config.vision.tower.layers):
        block, name = f"{tower}blocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for part, piece in zip("qkv", ours[f"{block}qkv.{kind}"].chunk(3), strict=True):
                state[f"{name}self_attn.{part}_proj.{kind}"] = piece
            for mine, theirs in names.items():
                state[f"{name}{theirs}.{kind}"] = ours[f"{block}{mine}.{kind}"]
    # A CLIP tower has this norm although nothing reads it.
    state |= {"post_layernorm.weight": torch.ones(width), "post_layernorm.bias": torch.zeros(width)}
    return {root + key: value for key, value in state.items()}


def model_config(config: GhostVisConfig) -> dict[str, Any]:
    """The meta file's `model_config`."""
    decoder, vision = config.decoder, config.vision
    assert vision is not None
    return {
        "sequence_len": decoder.sequence_len,
        "vocab_size": decoder.vocab_size,
        "n_layer": decoder.n_layer,
        "n_head": decoder.n_head,
        "n_kv_head": decoder.n_kv_head,
        "n_embd": decoder.n_embd,
        "intermediate_size": decoder.intermediate_size,
        "mlp_type": decoder.mlp_type,
        "rope_theta": decoder.rope_theta,
        "attention_bias": decoder.attention_bias,
        "use_flash_attn": False,
        "use_fused_kernels": False,
        "use_fused_loss": False,
        "use_gradient_checkpointing": False,
        "vision_encoder_name": ENCODER_NAME,
        "vision_encoder_trainable": True,
        "vision_encoder_heads": vision.tower.heads,
        "vision_image_size": vision.tower.image_size,
        "vision_num_tokens": vision.num_tokens,
        "vision_resampler_mode": vision.resampler_mode,
        "vision_resampler_depth": vision.resampler_depth,
        "vision_resampler_heads": vision.resampler_heads,
        "vision_proj_hidden": vision.proj_hidden,
        "vision_proj_dropout": 0.0,
        "image_token_id": None,
    }


def write(model: GhostVis, tokenizer: Tokenizer, base: Path, step: int, facts: dict[str, Any]) -> Path:
    """Write tokenizer, weights and meta under `base`, in place of any earlier step; -> the weights' path."""
    save(tokenizer, base / "tokenizer")
    folder = base / SOURCE / MODEL_TAG
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("model_*.pt"), *folder.glob("meta_*.json")):
        old.unlink()
    path = folder / f"model_{step:06d}.pt"
    torch.save(native_state(model), path)
    meta = {"step": step, "layout": "inline", "model_config": model_config(model.config), **facts}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return path


def load(base: Path) -> tuple[GhostVis, Tokenizer]:
    """The exported model as users get it, in float32."""
    from ghostvis_cli.checkpoint.load import load_model
    from ghostvis_cli.checkpoint.locate import find

    loaded = load_model(find(base, "sft", MODEL_TAG))
    return loaded.model, loaded.tokenizer


def rounded(model: GhostVis) -> GhostVis:
    """The same model with the weights that the file will hold."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model
