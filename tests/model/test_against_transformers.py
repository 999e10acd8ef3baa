"""The same weights in transformers' own classes give the same logits and vision features."""

from typing import Any

import pytest
import torch

from benchmarks.nanochat import nanochat
from ghostvis_cli.model.config import TowerConfig
from ghostvis_cli.model.vision import Tower
from tests.conftest import Reference

transformers = pytest.importorskip("transformers")


def test_relu2_logits_equal_transformers_nanochat() -> None:
    reference = Reference("text_relu2_nano1_pad")
    ours = reference.load().model.decoder
    theirs = nanochat(ours)
    ids = torch.tensor(reference.facts["prompts"]["long"])[None]
    with torch.inference_mode():
        a, b = ours(ours.embed(ids)), theirs(ids).logits
    # Its rotary tables are not rounded to bfloat16; ours are, as upstream's. Nothing else differs.
    assert (a - b).abs().max() <= 0.018
    assert (a.argmax(-1) == b.argmax(-1)).float().mean() >= 0.994


def test_relu2_logits_equal_transformers_nanochat_closely_with_the_same_rotary_tables() -> None:
    reference = Reference("text_relu2_nano1_pad")
    ours = reference.load().model.decoder
    theirs = nanochat(ours)
    ids = torch.tensor(reference.facts["prompts"]["long"])[None]
    h = ours.config.head_dim
    angle = torch.outer(torch.arange(1280.0), 10000.0 ** -(torch.arange(0, h, 2) / h))
    cos, sin = angle.cos(), angle.sin()
    ours.cos, ours.sin = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)
    with torch.inference_mode():
        difference = (ours(ours.embed(ids)) - theirs(ids).logits).abs().max()
    assert difference <= 1e-4


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_tower_equals_transformers(family: Any) -> None:
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
    }
    if family == "clip":
        theirs = randomised(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape)))
    else:
        theirs = randomised(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**shape)))
    ours = Tower(TowerConfig(family, 32, 2, 4, 48, 7, 28)).eval()
    ours.load_state_dict(_tower_state(theirs.state_dict(), family), strict=True)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        assert (ours(pixels) - theirs(pixels).last_hidden_state).abs().max() <= 1e-5


def _tower_state(theirs, family):
    """transformers' names -> ours, by the very map the loader uses for files."""
    from ghostvis_cli.checkpoint.header import TensorInfo
    from ghostvis_cli.checkpoint.keys import Classifier

    tensors = {
        f"vision_encoder.encoder.{key.removeprefix('vision_model.')}": value for key, value in theirs.items()
    }
    classifier = Classifier(
        {key: TensorInfo(tuple(value.shape), "float32", 4) for key, value in tensors.items()},
        {"model_config": {"vision_encoder_heads": 4}},
    )
    tower = classifier.tower()
    assert tower.family == family
    shapes = Tower(tower).state_dict()
    return {
        name.removeprefix("vision.tower."): torch.cat([tensors[key] for key in part.keys]).reshape(
            shapes[name.removeprefix("vision.tower.")].shape
        )
        for name, part in classifier.parts.items()
    }
