"""The certificate says yes to what `convert` makes and no, with a place, to what differs."""

import json
from pathlib import Path

import pytest
import torch

from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.convert.plan import ConvertSettings, make_plan
from ghostvis_cli.errors import CheckFailedError, ModelError
from tests.conftest import Reference
from tests.convert.conversions import DEMO, changed, converted, damaged

pytest.importorskip("transformers")


def certificate(checkpoint: Checkpoint, place: Path, **settings: object) -> dict:
    return json.loads((converted(checkpoint, place, verify=True, **settings) / "parity.json").read_text())


def figures(certificate: dict) -> dict[str, float]:
    return {check["name"]: check["value"] for check in certificate["verification"]["checks"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_conversion_is_certified(text_reference: Reference, tmp_path: Path, dtype: str) -> None:
    made = certificate(text_reference.checkpoint(), tmp_path / "out", dtype=dtype)
    assert made["verification"]["passed"]
    assert made["verification"]["texts_compared"] > 1000
    if dtype == "float32":
        # With the same rotary tables both are the same sums in another order: 1e-5 was seen.
        assert figures(made)["max |logit difference| with unrounded rotary tables"] <= 1e-4
        assert figures(made)["top-1 agreement"] >= 0.99


@pytest.mark.parametrize("layout", ["inline", "prepend", "prepend_slots", "prepend_literal"])
def test_a_vision_conversion_is_certified_in_every_layout(
    vlm_reference: Reference, tmp_path: Path, layout: str
) -> None:
    made = certificate(vlm_reference.checkpoint(), tmp_path / "out", layout=layout)
    assert made["verification"]["passed"]
    assert made["layout"] == layout
    assert figures(made)["max |pixel difference|"] == 0
    assert figures(made)["max |image feature difference|"] <= 1e-5
    assert figures(made)["max |logit difference| with unrounded rotary tables"] <= 1e-4


def test_the_demo_model_says_the_same_token_for_token(tmp_path: Path) -> None:
    for case in certificate(DEMO, tmp_path / "out")["verification"]["cases"]:
        assert case["greedy_match"] == case["greedy_tokens"] == 32, case["case"]


def test_a_relu2_decoder_with_average_pooling_is_certified_too(
    vlm_reference: Reference, tmp_path: Path
) -> None:
    """Neither is in a recorded file: the vision fixture's own tensors, with another MLP and no resampler."""

    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if "vision_resampler" in name]:
            del state[name]
        for name in [name for name in state if name.endswith("mlp.c_gate.weight")]:
            state[name.replace("c_gate", "c_fc")] = state.pop(name)
            del state[name.replace("c_gate", "c_up")]
        for name in [name for name in state if name.endswith((".c_q.bias", ".c_k.bias", ".c_v.bias"))]:
            state[name] = state[name] + 0.1

    checkpoint = changed(vlm_reference.checkpoint(), tmp_path / "in", change)
    meta = json.loads(checkpoint.meta_path.read_text())
    meta["model_config"] |= {"mlp_type": "relu2", "vision_resampler_mode": "avgpool"}
    checkpoint.meta_path.write_text(json.dumps(meta))
    made = certificate(checkpoint, tmp_path / "out", layout="inline")
    assert made["verification"]["passed"]
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["model_type"] == "nanochat"
    )


def test_prompts_longer_than_the_model_are_left_out_and_none_at_all_is_no_proof(tmp_path: Path) -> None:
    checkpoint = changed(Reference("text_swiglu").checkpoint(), tmp_path / "in", lambda state: None)
    meta = json.loads(checkpoint.meta_path.read_text())
    meta["model_config"]["sequence_len"] = 10  # and so 100 positions
    checkpoint.meta_path.write_text(json.dumps(meta))
    made = certificate(checkpoint, tmp_path / "out")
    assert made["verification"]["passed"]
    assert "paragraph" not in {case["case"] for case in made["verification"]["cases"]}
    meta["model_config"]["sequence_len"] = 1
    checkpoint.meta_path.write_text(json.dumps(meta))
    with pytest.raises(CheckFailedError, match="prompts compared 0"):
        certificate(checkpoint, tmp_path / "out", force=True)


def test_a_vision_model_without_an_image_token_is_refused(vlm_reference: Reference, tmp_path: Path) -> None:
    checkpoint = changed(vlm_reference.checkpoint(), tmp_path / "in", lambda state: None)
    without = Reference("text_relu2_nano1_pad").checkpoint().tokenizer_path
    (tmp_path / "in" / "tokenizer.pkl").write_bytes(without.read_bytes())
    with pytest.raises(ModelError, match=r"has no <\|image\|>"):
        make_plan(checkpoint, ConvertSettings())


def test_a_skipped_verification_says_so(tmp_path: Path) -> None:
    place = converted(Reference("text_swiglu").checkpoint(), tmp_path / "out")
    assert json.loads((place / "parity.json").read_text())["verification"] == {"skipped": True}


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("model.layers.2.mlp.down_proj.weight", "layers.2"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_damaged_tensor_is_found_and_its_layer_named(tmp_path: Path, name: str, named: str) -> None:
    from ghostvis_cli.convert.verify import verify

    checkpoint = Reference("text_swiglu").checkpoint()
    place = converted(checkpoint, tmp_path / "out")
    damaged(place, lambda state: state.update({name: state[name].roll(1, 0)}))
    found = verify(make_plan(checkpoint, ConvertSettings(dtype="float32")), place, lambda: None)
    assert not found["passed"]
    assert found["first_diverging_layer"] == named


def too_sharp(state: dict[str, torch.Tensor]) -> None:
    """Logits so steep that the rounding of the embedding table to bfloat16 shows in them."""
    state["lm_head.weight"] *= 100


def test_a_failed_check_keeps_the_output_aside_and_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoint = changed(Reference("text_swiglu").checkpoint(), tmp_path / "in", too_sharp)
    place = converted(Reference("text_swiglu").checkpoint(), tmp_path / "out")
    before = (place / "parity.json").read_bytes()
    for _ in range(2):  # a second failure takes the place of the first
        with pytest.raises(CheckFailedError, match="does not answer as the checkpoint") as failure:
            certificate(checkpoint, place, dtype="bfloat16", force=True)
    assert failure.value.code == 9
    assert (place / "parity.json").read_bytes() == before
    aside = json.loads((tmp_path / "out.failed" / "parity.json").read_text())
    assert not aside["verification"]["passed"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out", "out.failed"]
