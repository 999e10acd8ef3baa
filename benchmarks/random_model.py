"""Vision and text models with random weights, of the real sizes and tiny: checkpoints as training writes them."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ghostvis_cli import demo
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.locate import Checkpoint


@dataclass(frozen=True)
class Sizes:
    """A swiglu decoder and, where it has layers, a CLIP tower of 14-pixel patches with a perceiver behind it."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    mlp: int
    tower_layers: int
    tower: int
    tower_heads: int
    vocabulary: int = 65536
    image: int = 224
    rows: int = 64

    @property
    def kv(self) -> int:
        return self.kv_heads * self.width // self.heads

    @property
    def patches(self) -> int:
        return (self.image // 14) ** 2 + 1

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        D = self.width
        yield "transformer.wte.weight", (self.vocabulary, D)
        yield "lm_head.weight", (self.vocabulary, D)
        for i in range(self.layers):
            for name, rows in {"c_q": D, "c_k": self.kv, "c_v": self.kv, "c_proj": D}.items():
                yield f"transformer.h.{i}.attn.{name}.weight", (rows, D)
            for name in ("c_q", "c_k", "c_v"):
                yield f"transformer.h.{i}.attn.{name}.bias", (self.kv if name != "c_q" else D,)
            yield f"transformer.h.{i}.mlp.c_gate.weight", (self.mlp, D)
            yield f"transformer.h.{i}.mlp.c_up.weight", (self.mlp, D)
            yield f"transformer.h.{i}.mlp.c_proj.weight", (D, self.mlp)
        if self.tower_layers:
            yield from self._vision()

    def _vision(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        W, root = self.tower, "vision_encoder.encoder"
        yield f"{root}.embeddings.class_embedding", (W,)
        yield f"{root}.embeddings.patch_embedding.weight", (W, 3, 14, 14)
        yield f"{root}.embeddings.position_embedding.weight", (self.patches, W)
        for norm in ("pre_layrnorm", "post_layernorm"):
            yield from _both(f"{root}.{norm}", (W,))
        for i in range(self.tower_layers):
            layer = f"{root}.encoder.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield from _both(f"{layer}.self_attn.{name}", (W, W))
            for norm in ("layer_norm1", "layer_norm2"):
                yield from _both(f"{layer}.{norm}", (W,))
            yield from _both(f"{layer}.mlp.fc1", (4 * W, W))
            yield from _both(f"{layer}.mlp.fc2", (W, 4 * W))
        yield "vision_resampler.queries", (1, self.rows, W)
        for i in range(2):
            layer = f"vision_resampler.layers.{i}"
            for norm in ("norm1", "norm2"):
                yield from _both(f"{layer}.{norm}", (W,))
            yield f"{layer}.cross_attn.in_proj_weight", (3 * W, W)
            yield f"{layer}.cross_attn.in_proj_bias", (3 * W,)
            yield from _both(f"{layer}.cross_attn.out_proj", (W, W))
            yield from _both(f"{layer}.mlp.0", (4 * W, W))
            yield from _both(f"{layer}.mlp.2", (W, 4 * W))
        yield from _both("vision_projector.mlp.0", (self.width, W))
        yield from _both("vision_projector.mlp.3", (self.width, self.width))
        yield from _both("vision_projector.mlp.4", (self.width,))

    def config(self) -> dict[str, object]:
        found: dict[str, object] = {
            "sequence_len": 2048,
            "vocab_size": self.vocabulary,
            "n_layer": self.layers,
        }
        found |= {
            "n_head": self.heads,
            "n_kv_head": self.kv_heads,
            "n_embd": self.width,
            "mlp_type": "swiglu",
        }
        found |= {"rope_theta": 10000.0, "attention_bias": True}
        if not self.tower_layers:
            return found
        found |= {"vision_encoder_name": "clip_vit_l14", "vision_encoder_heads": self.tower_heads}
        found |= {"vision_image_size": self.image, "vision_num_tokens": self.rows}
        found |= {"vision_resampler_mode": "perceiver", "vision_resampler_depth": 2}
        return found | {"vision_resampler_heads": min(8, self.tower_heads), "vision_proj_hidden": self.width}


def _both(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


# d32 (format specification, 2.2): 2.1 billion parameters, CLIP ViT-L/14 at 224 pixels.
MODELS = {
    "d32": Sizes(32, 16, 8, 2048, 5529, 24, 1024, 16),
    "d32-text": Sizes(32, 16, 8, 2048, 5529, 0, 0, 0),
    "tiny": Sizes(2, 2, 1, 128, 352, 1, 64, 2),
    "tiny-text": Sizes(2, 2, 1, 128, 352, 0, 0, 0),
}


def make(sizes: Sizes, folder: Path, device: str) -> Checkpoint:
    """Weights of a scale at which activations stay in range, from a seed, in bfloat16."""
    import torch

    torch.manual_seed(0)
    state = {}
    for name, shape in sizes.shapes():
        if "norm" in name or name.startswith("vision_projector.mlp.4"):
            tensor = torch.full(shape, float(name.endswith("weight")), device=device)
        elif len(shape) == 1:
            tensor = torch.zeros(shape, device=device)
        else:
            fan_in = max(1, torch.Size(shape[1:]).numel())
            tensor = torch.randn(shape, device=device) * (1.0 if "wte" in name else fan_in**-0.5)
        state[name] = tensor.bfloat16().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "model_000001.pt")
    meta = {"step": 1, "layout": "inline", "model_config": sizes.config()}
    (folder / "meta_000001.json").write_text(json.dumps(meta))
    shutil.copy(demo.BASE_DIR / "tokenizer" / "tokenizer.pkl", folder)
    return locate.from_path(folder, None, folder)
