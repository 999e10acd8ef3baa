"""Layer by layer a verification says what the whole-model one says, and takes less memory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.convert.memory import fitted
from ghostvis_cli.convert.plan import ConvertSettings, make_plan
from ghostvis_cli.errors import MemoryLimitError
from tests.cli import invoke
from tests.conftest import Reference
from tests.convert.conversions import DEMO, converted, damaged

pytest.importorskip("transformers")
GB = 10**9
SWIGLU = "text_swiglu"
CHECKPOINTS = [SWIGLU, "text_relu2_nano1_pad", "vlm_clip_hf", "demo"]
MAPPED = "max |logit difference| with unrounded rotary tables"


def checkpoint(name: str) -> Checkpoint:
    return DEMO if name == "demo" else Reference(name).checkpoint()


def verified(source: Checkpoint, place: Path, *, by_layer: bool, **settings: Any) -> dict:
    from ghostvis_cli.convert import by_layer as layers
    from ghostvis_cli.convert import verify as whole

    plan = make_plan(source, ConvertSettings(**{"dtype": "float32", **settings}))
    return (layers if by_layer else whole).verify(plan, place, lambda: None)


def figures(verification: dict) -> dict[str, float]:
    return {check["name"]: check["value"] for check in verification["checks"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_both_ways_find_the_same(tmp_path: Path, name: str, dtype: str) -> None:
    source = checkpoint(name)
    place = converted(source, tmp_path / "out", dtype=dtype, max_shard_bytes=2_000_000)
    whole, by_layer = (verified(source, place, by_layer=way, dtype=dtype) for way in (False, True))
    assert (whole["mode"], by_layer["mode"]) == ("whole", "layer by layer")
    assert whole["passed"]
    assert by_layer["passed"]
    assert [case["case"] for case in by_layer["cases"]] == [case["case"] for case in whole["cases"]]
    ours, theirs = figures(by_layer), figures(whole)
    assert list(ours) == list(theirs)
    assert ours[MAPPED] <= 2 * theirs[MAPPED] + 1e-5  # sums in another order
    # The whole-model way looks at 31 greedy tokens a prompt besides: other positions, the same kind of difference.
    for check in ("max |logit difference|", "mean |logit difference|", "mean KL divergence"):
        assert ours[check] == pytest.approx(theirs[check], rel=0.3)
    assert ours["top-1 agreement"] == pytest.approx(theirs["top-1 agreement"], abs=0.01)


@pytest.mark.parametrize("name", ["text_swiglu", "demo"])
def test_over_the_same_positions_the_logits_differ_by_the_same(tmp_path: Path, name: str) -> None:
    """A planted difference, alike for both ways and far above rounding: 1% of one layer's MLP."""
    source = checkpoint(name)
    mlp = "layers.1.mlp.down_proj.weight"
    place = damaged(
        converted(source, tmp_path / "out"),
        lambda state: [state[key].mul_(1.01) for key in state if key.endswith(mlp)],
    )
    expected, got = (verified(source, place, by_layer=way) for way in (False, True))
    for a, b in zip(expected["cases"], got["cases"], strict=True):
        # Greatest over the prompt is at most greatest over prompt and answer; sums in another order differ by 1e-4.
        assert b["max_logit_difference"] <= a["max_logit_difference"] + 1e-4
        assert b["max_logit_difference"] > 1e-3
        assert (b["greedy_match"], b["greedy_tokens"]) == ("not checked", 0)


@pytest.mark.parametrize("layout", ["inline", "prepend", "prepend_slots", "prepend_literal"])
def test_images_stand_where_they_belong_in_every_layout(tmp_path: Path, layout: str) -> None:
    source = checkpoint("vlm_clip_hf")
    place = converted(source, tmp_path / "out", layout=layout)
    found = verified(source, place, by_layer=True, layout=layout)
    assert found["passed"]
    assert figures(found)[MAPPED] <= 1e-4  # as for the whole model: sums in another order


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        (SWIGLU, "model.embed_tokens.weight", "embed_tokens"),
        (SWIGLU, "model.layers.2.mlp.down_proj.weight", "layers.2"),
        (SWIGLU, "model.norm.weight", "lm_head"),
        (SWIGLU, "lm_head.weight", "lm_head"),
        ("text_relu2_nano1_pad", "model.layers.1.self_attn.q_proj.weight", "layers.1"),
        ("vlm_clip_hf", "model.language_model.layers.3.self_attn.o_proj.weight", "layers.3"),
    ],
)
def test_a_damaged_tensor_is_found_and_its_layer_named(
    tmp_path: Path, name: str, tensor: str, named: str
) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        old = state[tensor]
        state[tensor] = old.roll(1, 0) + (old.dim() == 1) * torch.rand(old.shape)

    source = checkpoint(name)
    found = verified(source, damaged(converted(source, tmp_path / "out"), change), by_layer=True)
    assert not found["passed"]
    assert found["first_diverging_layer"] == named


def test_a_damaged_eye_is_found(tmp_path: Path) -> None:
    source, tensor = checkpoint("vlm_clip_hf"), "model.vision.projector.mlp.3.weight"
    place = damaged(converted(source, tmp_path / "out"), lambda state: state[tensor].mul_(1.5))
    found = verified(source, place, by_layer=True)
    assert not found["passed"]
    assert figures(found)["max |image feature difference|"] > 0.01


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_model_that_answers_with_no_numbers_at_all_is_found_too(tmp_path: Path, by_layer: bool) -> None:
    source, tensor = checkpoint(SWIGLU), "model.layers.1.mlp.up_proj.weight"
    place = damaged(converted(source, tmp_path / "out"), lambda state: state[tensor][0, :1].fill_(torch.nan))
    found = verified(source, place, by_layer=by_layer)
    assert not found["passed"]
    assert found["first_diverging_layer"] == "layers.1"
    json.dumps(found, allow_nan=False)


# --- as it is typed


def test_it_is_chosen_where_the_whole_does_not_fit_and_told() -> None:
    plan = make_plan(checkpoint(SWIGLU), ConvertSettings())
    assert fitted(plan, 10 * GB) == (plan, None)
    large = replace(plan, classified=replace(plan.classified, parameters=4 * 10**9))
    whole, told = fitted(large, 20 * GB)
    assert not whole.settings.by_layer
    assert told == "verification will take up to 17.0 GB of memory; --no-verify skips it"
    by_layer, told = fitted(large, 10 * GB)
    assert by_layer.settings.by_layer
    assert told is not None
    assert "layer by layer, since the whole model would take 17.0 GB" in told


def test_what_does_not_fit_layer_by_layer_either_is_refused() -> None:
    plan = make_plan(checkpoint(SWIGLU), ConvertSettings(by_layer=True))
    with pytest.raises(MemoryLimitError, match="even layer by layer") as refused:
        fitted(plan, GB / 2)
    assert (refused.value.code, refused.value.hint) == (7, "--no-verify")


def test_layer_by_layer_can_be_asked_for_and_the_certificate_says_so(tmp_path: Path) -> None:
    done = invoke("convert", checkpoint(SWIGLU).path, "--out", tmp_path / "out", "--verify-by-layer")
    assert done.exit_code == 0, done.stderr
    assert "verification will run layer by layer" in done.stderr
    assert "greedy tokens not checked" in done.stderr
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert parity["verification"]["mode"] == "layer by layer"


def test_a_verification_that_is_both_wanted_and_not_is_refused(tmp_path: Path) -> None:
    done = invoke(
        "convert", checkpoint(SWIGLU).path, "--out", tmp_path / "out", "--verify-by-layer", "--no-verify"
    )
    assert done.exit_code == 2
    assert "contradict" in done.stderr
