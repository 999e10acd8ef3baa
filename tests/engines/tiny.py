"""A small random vision model on the recorded tokenizer: every engine test builds its own from a seed."""

from pathlib import Path

import torch

from ghostvis_cli.checkpoint.load import LoadedModel
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.model.config import DecoderConfig, GhostVisConfig, TowerConfig, VisionConfig
from ghostvis_cli.model.ghostvis import GhostVis
from ghostvis_cli.model.preprocess import CLIP_MEAN, CLIP_STD
from tests.conftest import DATA

TOKENIZER = Tokenizer.load(DATA / "_tok_ghost" / "tokenizer" / "tokenizer.pkl")
IMAGE_TOKENS = 6
DECODER = DecoderConfig(
    sequence_len=64,
    vocab_size=TOKENIZER.vocab_size,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=32,
    intermediate_size=48,
    mlp_type="swiglu",
)
VISION = VisionConfig(
    TowerConfig("clip", 32, 2, 2, 48, 8, 24), IMAGE_TOKENS, "perceiver", 1, 2, 40, CLIP_MEAN, CLIP_STD
)


def tiny_model(seed: int = 0, *, vision: bool = True) -> LoadedModel:
    """Weights large enough that greedy choices have a margin far above rounding."""
    torch.manual_seed(seed)
    model = GhostVis(GhostVisConfig(DECODER, VISION if vision else None, "inline" if vision else None))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 1.0 if "wte" in name else 1.5 / parameter.size(-1) ** 0.5
            torch.nn.init.normal_(parameter, std=std)
    model.eval().requires_grad_(False)
    return LoadedModel(model, TOKENIZER, Checkpoint(Path("tiny.pt"), "sft", "d2", 1), ())
