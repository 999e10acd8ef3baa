"""The demonstration model's dimensions, its first weights, and the auxiliary task that gives it eyes.

A tower trained only through the answers finds nothing for a long time: at first most of the loss is wording.
So every patch, and the vision row that belongs to it, also has to say which colour and kind of shape it sees
and which patch it is. The heads that say so are not shipped.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostvis_cli.model.config import DecoderConfig, GhostVisConfig, TowerConfig, VisionConfig
from ghostvis_cli.model.ghostvis import GhostVis
from ghostvis_cli.model.preprocess import normalisation
from ghostvis_cli.model.vision import Perceiver, Vision
from tools.train_demo.rows import IGNORED
from tools.train_demo.scenes import COLORS, KINDS
from tools.train_demo.vocabulary import VOCABULARY

ENCODER_NAME = "clip_vit_l14"  # says "normalise as CLIP does"; the tower itself is far smaller
GROUND_WEIGHT = 0.12  # most patches show only ground, which must not drown the shapes


def demo_config() -> GhostVisConfig:
    mean, std = normalisation(ENCODER_NAME)
    return GhostVisConfig(
        DecoderConfig(
            sequence_len=1024,
            vocab_size=VOCABULARY,
            n_layer=5,
            n_head=4,
            n_kv_head=2,
            n_embd=256,
            intermediate_size=512,
            mlp_type="swiglu",
        ),
        VisionConfig(
            TowerConfig("clip", width=192, layers=4, heads=3, mlp_width=768, patch_size=14, image_size=112),
            num_tokens=64,
            resampler_mode="perceiver",
            resampler_depth=2,
            resampler_heads=3,
            proj_hidden=256,
            image_mean=mean,
            image_std=std,
        ),
        "inline",
    )


def tiny_config() -> GhostVisConfig:
    """A network of the same make that takes ten steps in a second: for tests."""
    full = demo_config()
    assert full.vision is not None
    mean, std = full.vision.image_mean, full.vision.image_std
    return GhostVisConfig(
        DecoderConfig(1024, VOCABULARY, 1, 2, 1, 32, 32, "swiglu"),
        VisionConfig(TowerConfig("clip", 32, 1, 2, 32, 14, 112), 64, "perceiver", 1, 2, 32, mean, std),
        "inline",
    )


def first_weights(model: GhostVis) -> None:
    """Random, but blocks start as identities and vision row i starts by looking at patch i."""
    assert model.vision is not None
    decoder = model.decoder
    nn.init.normal_(decoder.wte.weight)
    nn.init.normal_(decoder.lm_head.weight, std=0.01)
    for name, weight in decoder.blocks.named_parameters():
        if name.endswith(("proj.weight", "down.weight")):
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, std=weight.size(1) ** -0.5)
    _first_sight(model.vision)


@torch.no_grad()
def _first_sight(vision: Vision) -> None:
    tower = vision.tower
    config = tower.config
    place = _places(config.image_size // config.patch_size, config.width)
    tower.position[1:].copy_(place)
    assert tower.class_token is not None
    tower.class_token.normal_(std=0.5)
    for block in tower.blocks:
        for end in (block.proj, block.fc2):
            end.weight.mul_(0.2)  # type: ignore[union-attr,operator]
            end.bias.zero_()  # type: ignore[union-attr,operator]
    resampler = vision.resampler
    if not isinstance(resampler, Perceiver) or resampler.queries.size(1) != len(place):
        return
    resampler.queries.copy_(F.layer_norm(place, (config.width,))[None])
    eye = torch.eye(config.width)
    for layer in resampler.layers:
        attention: nn.MultiheadAttention = layer.cross_attn  # type: ignore[assignment]
        attention.in_proj_weight.copy_(torch.cat((1.5 * eye, 1.5 * eye, eye)))
        attention.in_proj_bias.zero_()
        attention.out_proj.weight.copy_(0.7 * eye)
        attention.out_proj.bias.zero_()


def _places(grid: int, width: int) -> Tensor:
    """(grid², width): sines and cosines of column and row, mixed so that every attention head sees both."""
    at = torch.arange(grid, dtype=torch.float32) / grid
    waves = torch.cat(
        [f(math.pi * k * at)[:, None] for k in range(1, grid + 1) for f in (torch.sin, torch.cos)], 1
    )
    n = waves.size(1)
    pairs = torch.cat((waves[:, None].expand(grid, grid, n), waves[None].expand(grid, grid, n)), 2).reshape(
        -1, 2 * n
    )
    mixed = pairs @ torch.randn(2 * n, width) / math.sqrt(2 * n)
    return 0.7 * (mixed - mixed.mean()) / mixed.std()


class Probes(nn.Module):
    """The auxiliary heads: colour, kind and patch number from a row of the tower, and from a vision row."""

    def __init__(self, config: GhostVisConfig) -> None:
        super().__init__()
        assert config.vision is not None
        self.sizes = (1 + len(COLORS), 1 + len(KINDS), config.vision.num_tokens)
        self.tower = nn.Linear(config.vision.tower.width, sum(self.sizes))
        self.rows = nn.Linear(config.decoder.n_embd, sum(self.sizes))

    def forward(self, tower: Tensor, rows: Tensor, colors: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and the share of shape patches whose vision row names the right colour and kind.

        tower (P, patches, W) without the class token, rows (P, patches, D), labels (P, patches).
        """
        patches = torch.arange(rows.size(1), device=rows.device).expand(rows.size(0), -1)
        loss = torch.zeros((), device=rows.device)
        for head, features in ((self.tower, tower), (self.rows, rows)):
            guesses = head(F.layer_norm(features, features.shape[-1:])).float().split(self.sizes, -1)
            for guess, label in zip(guesses[:2], (colors, kinds), strict=True):
                weight = torch.ones(guess.size(-1), device=guess.device)
                weight[0] = GROUND_WEIGHT
                loss = loss + F.cross_entropy(guess.flatten(0, 1), label.flatten(), weight)
            loss = loss + 0.5 * F.cross_entropy(guesses[2].flatten(0, 1), patches.flatten())
        right = (guesses[0].argmax(-1) == colors) & (guesses[1].argmax(-1) == kinds)
        shapes = colors > 0
        return loss / 2, (right & shapes).sum() / shapes.sum().clamp(min=1)


def see(vision: Vision, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Tower rows without the class token, and vision rows: what `Vision.forward` does, keeping the middle."""
    tower = vision.tower(pixels)
    return tower[:, 1:], vision.projector(vision.resampler(tower))


def place_rows(embedded: Tensor, ids: Tensor, image_id: int, rows: Tensor) -> Tensor:
    """Vision rows (n, N, D) take the places of image ids, in order: (R, T, D) -> (R, T, D)."""
    return embedded.masked_scatter((ids == image_id)[..., None], rows.to(embedded.dtype))


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=IGNORED)
