"""nanochat's generations for tests: random checkpoints of any shape, and a plain decoder written from the formulas.

The decoder shares no line with the project's: one token after the other where that is plainest, no cache, no batch,
float64 but for what training rounded.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostvis_cli.checkpoint.locate import Checkpoint
from tests.conftest import DATA, Reference

TOKENIZER = DATA / "n7_smear" / "tokenizer"
VOCABULARY = 300  # the tokenizer's


@dataclass(frozen=True)
class Mathematics:
    """A generation as its trainer's source has it."""

    base: float
    m: float  # of q and k
    cap: float
    channels: int  # of the gates; 0: no value embeddings
    scale: float  # of the gates
    smear: bool
    windows: bool

    def short(self, seq: int) -> int:
        if self.m == 1:
            return seq // 2
        share = 3 if not self.smear else 4
        return math.ceil(math.ceil(seq / share) / 128) * 128


OF = {
    "n2": Mathematics(1e4, 1.0, 15, 0, 0, False, False),
    "n3": Mathematics(1e4, 1.0, 15, 0, 0, False, True),
    "n4": Mathematics(1e4, 1.0, 15, 32, 2, False, True),
    "n5": Mathematics(1e4, 1.0, 20, 32, 2, False, True),
    "n6": Mathematics(1e5, 1.15, 15, 12, 3, False, True),
    "n7": Mathematics(1e5, 1.2, 15, 12, 3, True, True),
}


@dataclass(frozen=True)
class Shape:
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    width: int = 64
    rows: int = 320  # of the tables: padded to a multiple of 64
    vocabulary: int = VOCABULARY
    seq: int = 32
    pattern: str = "SL"
    stored: torch.dtype = torch.bfloat16  # of the tables: float32 where a CPU trained it


SHAPE = Shape()


class Eyes:
    """The recorded vision model's eyes and tokenizer, for a decoder of its width."""

    def __init__(self) -> None:
        reference = Reference("vlm_clip_hf")
        checkpoint = reference.checkpoint()
        state = torch.load(checkpoint.path, weights_only=True)
        self.state = {name: tensor for name, tensor in state.items() if name.startswith("vision_")}
        stored = json.loads(checkpoint.meta_path.read_text())["model_config"]
        self.config = {name: value for name, value in stored.items() if name.startswith("vision_")}
        self.tokenizer = checkpoint.tokenizer_path.parent


def state_of(name: str, shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """A random file's tensors, none of them zero or neutral."""
    generator = torch.Generator().manual_seed(seed)
    D, h = shape.width, shape.width // shape.heads
    kv = shape.kv_heads * h

    def rand(*size: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(*size, generator=generator)

    state = {
        "transformer.wte.weight": rand(shape.rows, D).to(shape.stored),
        "lm_head.weight": rand(shape.rows, D, std=0.5),
        "resid_lambdas": rand(shape.layers, std=0.1, mean=1.0),
        "x0_lambdas": rand(shape.layers, std=0.2, mean=0.3),
    }
    of = OF[name]
    for i in range(shape.layers):
        block = f"transformer.h.{i}."
        sizes = {"c_q": (D, D), "c_k": (kv, D), "c_v": (kv, D), "c_proj": (D, D)}
        state |= {f"{block}attn.{key}.weight": rand(*size, std=1.5 / D**0.5) for key, size in sizes.items()}
        state[f"{block}mlp.c_fc.weight"] = rand(4 * D, D, std=1 / D**0.5)
        state[f"{block}mlp.c_proj.weight"] = rand(D, 4 * D, std=0.5 / D**0.5)
        if of.channels and i % 2 == (shape.layers - 1) % 2:
            state[f"value_embeds.{i}.weight"] = rand(shape.rows, kv).to(shape.stored)
            state[f"{block}attn.ve_gate.weight"] = rand(shape.kv_heads, of.channels, std=0.5)
    if of.smear:
        state["smear_gate.weight"] = rand(1, 24, std=0.5)
        state["smear_lambda"] = rand(1, std=0.1, mean=0.7)
        state["backout_lambda"] = rand(1, std=0.05, mean=0.3)
    return state


def write(
    place: Path, name: str, shape: Shape = SHAPE, seed: int = 0, eyes: Eyes | None = None, **meta: Any
) -> Checkpoint:
    """A base directory with one such checkpoint, of a vision model where `eyes` are given."""
    directory = place / "base_checkpoints" / f"d{shape.layers}"
    directory.mkdir(parents=True)
    torch.save(state_of(name, shape, seed) | (eyes.state if eyes else {}), directory / "model_000010.pt")
    config: dict[str, Any] = {
        "sequence_len": shape.seq,
        "vocab_size": shape.vocabulary,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_kv_head": shape.kv_heads,
        "n_embd": shape.width,
    }
    if eyes:
        config |= eyes.config
    if OF[name].windows:
        config["window_pattern"] = shape.pattern
    settings = {"eval_tokens": (80 if name == "n5" else 40) * 524288}
    content = {"step": 10, "model_config": config, "user_config": settings, "max_seq_len": shape.seq} | meta
    (directory / "meta_000010.json").write_text(json.dumps(content))
    shutil.copytree(eyes.tokenizer if eyes else TOKENIZER, place / "tokenizer")
    return Checkpoint(directory / "model_000010.pt", "base", f"d{shape.layers}", 10, place)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def plain_logits(
    state: dict[str, Tensor], name: str, shape: Shape, ids: list[int], images: Tensor | None = None
) -> Tensor:
    """(T, V) float64. Negative ids are images' rows (n, D), in order: without a value embedding."""
    of = OF[name]
    s = {key: value.double() for key, value in state.items()}
    T, L, H, K = len(ids), shape.layers, shape.heads, shape.kv_heads
    h = shape.width // H
    e = s["transformer.wte.weight"][ids].clone()
    is_image = torch.tensor(ids) < 0
    if images is not None:
        e[is_image] = images.double()
    e = rms(e)
    x = e.clone()
    if of.smear:
        for p in range(1, T):
            g = s["smear_lambda"] * torch.sigmoid(s["smear_gate.weight"] @ e[p, :24])
            x[p] = e[p] + g * e[p - 1]
    x0 = x
    for i in range(L):
        b = f"transformer.h.{i}."
        x = s["resid_lambdas"][i] * x + s["x0_lambdas"][i] * x0
        n = rms(x)
        q, k, v = ((n @ s[f"{b}attn.c_{one}.weight"].T).view(T, -1, h) for one in "qkv")
        if f"value_embeds.{i}.weight" in s:
            gate = of.scale * torch.sigmoid(n[:, : of.channels] @ s[f"{b}attn.ve_gate.weight"].T)
            gate[is_image] = 0
            v = v + gate[..., None] * s[f"value_embeds.{i}.weight"][ids].view(T, K, h)
        cos, sin = tables(of, shape, name, T, h)
        q, k = (of.m * rms(turn(each, cos, sin)) for each in (q, k))
        W = window(of, shape, i)
        y = torch.zeros(T, H, h, dtype=torch.float64)
        for head in range(H):
            scores = q[:, head] @ k[:, head // (H // K)].T / h**0.5
            for p in range(T):
                low = 0 if W is None else max(0, p - W)
                y[p, head] = scores[p, low : p + 1].softmax(-1) @ v[low : p + 1, head // (H // K)]
        x = x + y.reshape(T, -1) @ s[f"{b}attn.c_proj.weight"].T
        x = x + (rms(x) @ s[f"{b}mlp.c_fc.weight"].T).relu().square() @ s[f"{b}mlp.c_proj.weight"].T
        if i == L // 2:
            middle = x
    if of.smear:
        x = x - s["backout_lambda"] * middle
    z = (rms(x) @ s["lm_head.weight"].T)[:, : shape.vocabulary]
    return of.cap * torch.tanh(z / of.cap)


def window(of: Mathematics, shape: Shape, layer: int) -> int | None:
    if not of.windows:
        return None
    letter = "L" if layer == shape.layers - 1 else shape.pattern[layer % len(shape.pattern)].upper()
    return shape.seq if letter == "L" else of.short(shape.seq)


def tables(of: Mathematics, shape: Shape, name: str, length: int, h: int) -> tuple[Tensor, Tensor]:
    """(length, 1, h/2). Those before March 2026 are bfloat16 always, later ones as the embedding is stored."""
    inverse = 1.0 / of.base ** (torch.arange(0, h, 2, dtype=torch.float32) / h)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    cos, sin = angles.cos(), angles.sin()
    if shape.stored == torch.bfloat16 or name in ("n2", "n3", "n4", "n5"):
        cos, sin = cos.bfloat16(), sin.bfloat16()
    return cos.double()[:, None], sin.double()[:, None]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)
