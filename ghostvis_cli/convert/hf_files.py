"""The directory's JSON files about the model: configuration, generation defaults, processor."""

from typing import Any

from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.convert.mapping import architecture, padded_mlp_width
from ghostvis_cli.convert.remote_code import TEXT_CLASSES, auto_map
from ghostvis_cli.model.config import RMS_EPS, DecoderConfig, GhostVisConfig, Layout
from ghostvis_cli.model.generations import PLAIN
from ghostvis_cli.sampling import Sampling


def model_config(
    config: GhostVisConfig, tokenizer: Tokenizer, dtype: str, layout: Layout | None
) -> dict[str, Any]:
    """config.json. `layout` is None for a text model."""
    text = _text_config(config.decoder, tokenizer) | {"dtype": dtype}
    if config.vision is None:
        own = config.decoder.generation is not PLAIN
        code = (
            auto_map("AutoConfig", "AutoModel", "AutoModelForCausalLM", classes=TEXT_CLASSES) if own else {}
        )
        return {"architectures": [architecture(config)], **code, **text}
    return {
        "architectures": [architecture(config)],
        **auto_map("AutoConfig", "AutoModel", "AutoModelForImageTextToText"),
        "model_type": "ghostvis",
        "dtype": dtype,
        "image_token_id": tokenizer.image_id,
        "image_layout": layout,
        "tie_word_embeddings": False,
        **_ids(tokenizer),
        "text_config": text,
        "vision_config": _vision_config(config) | {"dtype": dtype},
    }


def _text_config(config: DecoderConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": padded_mlp_width(config),
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "trained_positions": config.sequence_len,
        "rms_norm_eps": RMS_EPS,
        "rope_theta": config.rope_theta,  # read by transformers 4; 5 and later read the next line
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "final_logit_softcapping": config.softcap,
        "tie_word_embeddings": False,
        "use_cache": True,
        **_ids(tokenizer),
    }
    if config.generation is not PLAIN:
        return {"model_type": "ghostvis_nanochat", "hidden_act": "relu2", **common, **_generation(config)}
    if config.mlp_type == "relu2":
        return {"model_type": "nanochat", "hidden_act": "relu2", **common}
    return {"model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False, **common}


def _generation(config: DecoderConfig) -> dict[str, Any]:
    """Every constant of the model's mathematics."""
    return {
        "generation": config.generation.name,
        "qk_scale": config.qk_scale,
        "gate_channels": config.generation.gate_channels,
        "gate_scale": config.gate_scale,
        "smear": config.generation.smear,
        "window_sizes": list(config.windows),
        "rotary_tables": config.rotary_tables,
    }


def _vision_config(config: GhostVisConfig) -> dict[str, Any]:
    """The tower, resampler and projector, and `hidden_size` and the like under the names that others look for."""
    vision = config.vision
    assert vision is not None, "model_config asks for vision where there is some"
    tower = vision.tower
    return {
        "model_type": "ghostvis_vision",
        "tower_family": tower.family,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "patch_size": tower.patch_size,
        "image_size": tower.image_size,
        "num_tokens": vision.num_tokens,
        "resampler_mode": vision.resampler_mode,
        "resampler_depth": vision.resampler_depth,
        "resampler_heads": vision.resampler_heads,
        "proj_hidden": vision.proj_hidden,
        "output_size": config.decoder.n_embd,
        "image_mean": list(vision.image_mean),  # for servers that normalise where the tower runs
        "image_std": list(vision.image_std),
    }


def _ids(tokenizer: Tokenizer) -> dict[str, Any]:
    end = tokenizer.special("<|assistant_end|>")
    bos = tokenizer.special("<|bos|>")
    return {"bos_token_id": bos, "eos_token_id": [end, bos], "pad_token_id": end}


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The sampling defaults of the command line, for servers that take them from the model."""
    default = Sampling()
    return {
        **_ids(tokenizer),
        "do_sample": True,
        "temperature": default.temperature,
        "top_p": default.top_p,
        "top_k": default.top_k,
    }


def image_processor_config(config: GhostVisConfig) -> dict[str, Any]:
    vision = config.vision
    assert vision is not None, "a text model has no image processor"
    return {
        **auto_map("AutoImageProcessor", "AutoProcessor"),
        "image_processor_type": "GhostVisImageProcessor",
        "processor_class": "GhostVisProcessor",
        "image_size": vision.tower.image_size,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def processor_config(config: GhostVisConfig, layout: Layout, image_token: str) -> dict[str, Any]:
    vision = config.vision
    assert vision is not None, "a text model has no processor"
    return {
        **auto_map("AutoProcessor"),
        "processor_class": "GhostVisProcessor",
        "num_image_tokens": vision.num_tokens,
        "image_layout": layout,
        "image_token": image_token,
    }
