"""Which generation a nanochat file is: told by keys and shapes alone, its constants by it, settings before all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.generations import Constants, windows
from ghostvis_cli.checkpoint.load import inspect
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.errors import ModelError
from tests.cli import invoke
from tests.conftest import DATA, Reference
from tests.nanochat import OF, Shape, write


def change_meta(checkpoint: Checkpoint, change: Any) -> Checkpoint:
    meta = json.loads(checkpoint.meta_path.read_text())
    change(meta)
    checkpoint.meta_path.write_text(json.dumps(meta))
    return checkpoint


def change_tensors(checkpoint: Checkpoint, change: Any) -> Checkpoint:
    state = torch.load(checkpoint.path, weights_only=True)
    change(state)
    torch.save(state, checkpoint.path)
    return checkpoint


@pytest.mark.parametrize("name", OF)
def test_each_generation_is_told_and_has_its_constants(name: str, tmp_path: Path) -> None:
    classified = inspect(write(tmp_path, name, Shape(seq=300)))
    config, of = classified.config.decoder, OF[name]
    assert config.generation.name == name
    assert (config.rope_theta, config.qk_scale, config.softcap) == (of.base, of.m, of.cap)
    assert config.generation.gate_channels == of.channels
    assert not of.channels or config.gate_scale == of.scale
    assert config.windows == ((of.short(300), 300, 300) if of.windows else ())
    assert classified.kind.startswith("text, nanochat, ")


@pytest.mark.parametrize(
    ("seq", "shorts"),
    [
        (2048, (1024, 1024, 1024, 1024, 768, 512)),
        (128, (64, 64, 64, 64, 128, 128)),
        (65, (32,) * 4 + (128,) * 2),
    ],
)
def test_short_windows_are_as_each_generation_rounds_them(seq: int, shorts: tuple[int, ...]) -> None:
    from ghostvis_cli.model.generations import GENERATIONS

    assert tuple(GENERATIONS[name].short_window(seq) for name in OF) == shorts


def test_the_last_layer_is_long_and_the_pattern_goes_on_and_on() -> None:
    assert windows("SSSL", 9, 3, 7) == (3, 3, 3, 7, 3, 3, 3, 7, 7)
    assert windows("s", 3, 3, 7) == (3, 3, 7)
    with pytest.raises(ModelError, match="not made of the letters"):
        windows("SXL", 3, 3, 7)


def test_no_meta_is_needed_for_the_heads_where_there_are_gates(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "n6")
    change_meta(checkpoint, lambda meta: [meta["model_config"].pop(key) for key in ("n_head", "n_kv_head")])
    config = inspect(checkpoint).config.decoder
    assert (config.n_head, config.n_kv_head) == (4, 2)


def test_a_meta_without_the_trained_length_is_said_where_windows_depend_on_it(tmp_path: Path) -> None:
    checkpoint = change_meta(write(tmp_path, "n6"), lambda meta: meta["model_config"].pop("sequence_len"))
    classified = inspect(checkpoint)
    assert classified.config.decoder.windows == (768, 2048, 2048)
    assert classified.constants["sequence_len"] == (2048, "default")
    assert any(
        "no sequence_len" in notice and "model.sequence_len" in notice for notice in classified.notices
    )
    chosen = inspect(replace(checkpoint, constants=Constants(sequence_len=300)))
    assert chosen.config.decoder.windows == (128, 300, 300)
    assert not any("no sequence_len" in notice for notice in chosen.notices)


def test_a_missing_meta_asks_for_all_that_no_tensor_says(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "n7")
    checkpoint.meta_path.unlink()
    with pytest.raises(ModelError, match="trained length and windows") as caught:
        inspect(checkpoint)
    assert "sequence_len" in str(caught.value.hint) and "window_pattern" in str(caught.value.hint)


def test_a_meta_that_belies_the_gates_is_not_believed_and_it_is_said(tmp_path: Path) -> None:
    checkpoint = change_meta(write(tmp_path, "n7"), lambda meta: meta["model_config"].update(n_kv_head=4))
    classified = inspect(checkpoint)
    assert classified.config.decoder.n_kv_head == 2
    assert "the meta file says n_kv_head = 4, the tensors say 2" in classified.notices


def test_a_later_file_without_a_pattern_has_long_windows_and_it_is_said(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "n4")
    change_meta(checkpoint, lambda meta: meta["model_config"].pop("window_pattern"))
    classified = inspect(checkpoint)
    assert classified.config.decoder.windows == (32, 32, 32)
    assert any("no window_pattern" in notice for notice in classified.notices)
    chosen = replace(checkpoint, constants=Constants(window_pattern="SL"))
    assert inspect(chosen).config.decoder.windows == (16, 32, 32)


def test_residual_scalars_with_a_pattern_set_are_n3(tmp_path: Path) -> None:
    chosen = replace(write(tmp_path, "n2"), constants=Constants(window_pattern="SL"))
    config = inspect(chosen).config.decoder
    assert (config.generation.name, config.windows) == ("n3", (16, 32, 32))


@pytest.mark.parametrize("millions, cap", [(20, 15), (40, 15), (80, 20)])
def test_the_soft_cap_is_dated_by_what_a_base_run_evaluates_on(
    millions: int, cap: int, tmp_path: Path
) -> None:
    checkpoint = write(tmp_path, "n4", user_config={"eval_tokens": millions * 524288})
    assert inspect(checkpoint).config.decoder.softcap == cap
    assert not any("soft cap" in notice for notice in inspect(checkpoint).notices)


def test_a_later_stage_asks_its_base_run_for_the_soft_cap_and_else_says_what_it_took(tmp_path: Path) -> None:
    base = write(tmp_path, "n5")
    sft = tmp_path / "chatsft_checkpoints" / "d3"
    sft.mkdir(parents=True)
    meta = json.loads(base.meta_path.read_text())
    own = {"val_bpb": 1.0, "user_config": {"eval_tokens": 20 * 524288}, "model_config": meta["model_config"]}
    (sft / "model_000001.pt").write_bytes(base.path.read_bytes())
    (sft / "meta_000001.json").write_text(json.dumps(own))
    checkpoint = locate.find(tmp_path, "sft")
    assert inspect(checkpoint).config.decoder.softcap == 20
    base.meta_path.unlink()
    alone = inspect(checkpoint)
    assert alone.config.decoder.softcap == 15
    assert any("15 or 20" in notice and "model.softcap" in notice for notice in alone.notices)
    chosen = inspect(replace(checkpoint, constants=Constants(softcap=20.0)))
    assert chosen.constants["softcap"] == (20.0, "setting")
    assert "softcap is 20.0 as it was set, not 15.0 (n4)" in chosen.notices
    assert not any("15 or 20" in notice for notice in chosen.notices)


@pytest.mark.parametrize(("name", "rounded"), [("n2", True), ("n5", True), ("n6", False), ("n7", False)])
def test_rotary_tables_are_rounded_as_training_rounded_them(name: str, rounded: bool, tmp_path: Path) -> None:
    """Until March 2026 always; later in the type that the embedding has."""
    checkpoint = write(tmp_path, name, Shape(stored=torch.float32))
    assert inspect(checkpoint).config.decoder.rotary_tables == ("bfloat16" if rounded else "float32")
    other = replace(checkpoint, constants=Constants(rotary_tables="bfloat16"))
    assert inspect(other).config.decoder.rotary_tables == "bfloat16"


def test_n5_from_a_cpu_says_that_its_tables_may_have_been_others(tmp_path: Path) -> None:
    """The trainer changed them on the second of that generation's seven days."""
    checkpoint = write(tmp_path, "n5", Shape(stored=torch.float32))
    assert any("model.rotary_tables=float32" in notice for notice in inspect(checkpoint).notices)
    chosen = replace(checkpoint, constants=Constants(rotary_tables="float32"))
    assert not any("=float32" in notice for notice in inspect(chosen).notices)


SIDE_BRANCHES = {
    "mlp.router.gate": ({"transformer.h.0.mlp.router.gate.weight": torch.ones(2, 64)}, "mixture-of-experts"),
    "moe.router.gate": ({"transformer.h.0.moe.router.gate.weight": torch.ones(2, 64)}, "mixture-of-experts"),
    "engram": ({"bigram_lambdas": torch.ones(3), "bigram_embed.embed.weight": torch.ones(9, 64)}, "engram"),
    "ve each": ({"v0_lambdas": torch.ones(3)}, "branch of 16 January 2026"),
    "ve full": (
        {"v0_lambdas": torch.ones(3), "value_embed.weight": torch.ones(9, 32)},
        "branch of 16 January",
    ),
    "part of smear": ({"smear_lambda": torch.ones(1)}, "lacks backout_lambda, smear_gate.weight"),
}


@pytest.mark.parametrize(("tensors", "reason"), SIDE_BRANCHES.values(), ids=SIDE_BRANCHES)
def test_side_branches_are_refused_by_name(tensors: dict, reason: str, tmp_path: Path) -> None:
    checkpoint = change_tensors(write(tmp_path, "n4"), lambda state: state.update(tensors))
    with pytest.raises(ModelError, match=reason):
        inspect(checkpoint)


@pytest.mark.parametrize("name", ["v0_lambdas", "bigram_lambdas"])
def test_a_wrapper_does_not_hide_a_side_branch(name: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "n3")
    state = torch.load(checkpoint.path, weights_only=True) | {name: torch.ones(3)}
    torch.save({f"_orig_mod.model.{key}": tensor for key, tensor in state.items()}, checkpoint.path)
    with pytest.raises(ModelError, match="January 2026"):
        inspect(checkpoint)


def _wide_gates(state: dict) -> None:
    for name in [name for name in state if "ve_gate" in name]:
        state[name] = torch.ones(2, 48)


def _mixed_gates(state: dict) -> None:
    state["transformer.h.0.attn.ve_gate.weight"] = torch.ones(2, 32)


def _without_gates(state: dict) -> None:
    for name in [name for name in state if "ve_gate" in name]:
        del state[name]


def _other_layer(state: dict) -> None:
    state["value_embeds.1.weight"] = state.pop("value_embeds.0.weight")


def _biased(state: dict) -> None:
    state["transformer.h.0.attn.c_q.bias"] = torch.ones(64)


FORKS = {
    "wide gates": (_wide_gates, "a fork of nanochat: .* read 48 channels"),
    "mixed gates": (_mixed_gates, "read 12 and 32 channels"),
    "no gates": (_without_gates, "a fork of nanochat: it has value_embeds"),
    "other layers": (_other_layer, "lacks value_embeds.0.weight and has value_embeds.1.weight"),
    "biases": (_biased, "a fork of nanochat: .* with attention biases"),
    "few lambdas": (lambda state: state.update(resid_lambdas=torch.ones(2)), "resid_lambdas"),
}


@pytest.mark.parametrize(("change", "reason"), FORKS.values(), ids=FORKS)
def test_forks_are_refused_with_what_tells_them(change: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        inspect(change_tensors(write(tmp_path, "n6"), change))


def test_a_rl_meta_without_a_step_and_a_free_tag_load(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "n7")
    place = tmp_path / "chatrl_checkpoints" / "d26_feb2_fp8_ratio8.25"
    place.mkdir(parents=True)
    meta = {"model_config": json.loads(checkpoint.meta_path.read_text())["model_config"]}
    (place / "model_000466.pt").write_bytes(checkpoint.path.read_bytes())
    (place / "meta_000466.json").write_text(json.dumps(meta))
    found = locate.find(tmp_path, "rl")
    assert (found.tag, found.step) == ("d26_feb2_fp8_ratio8.25", 466)
    assert inspect(found).config.decoder.generation.name == "n7"


def test_models_says_the_generation_in_words_and_every_constant_with_its_origin() -> None:
    base = DATA / "n7_smear"
    shown = invoke("models", "--base-dir", base)
    assert "nanochat, March 2026: value embeddings, smear" in shown.stdout
    told = json.loads(invoke("models", "--base-dir", base, "--json").stdout)["models"][0]
    assert told["generation"] == "n7"
    assert told["constants"]["qk_scale"] == {"value": 1.2, "origin": "n7"}
    assert told["constants"]["sequence_len"] == {"value": 300, "origin": "the meta file"}
    assert told["constants"]["rotary_tables"] == {"value": "bfloat16", "origin": "the embedding's dtype"}


def test_a_setting_beats_recognition_from_the_command_line(tmp_path: Path) -> None:
    """A base 100 times smaller: other rotations, another answer."""
    args = ("--base-dir", DATA / "n7_smear", "--source", "base", "--temperature", "0", "--max-tokens", "8")
    plain = invoke("generate", *args, "--json", "Hello there")
    set_to = invoke("generate", *args, "--json", "Hello there", "--set", "model.rotary_base=1000")
    assert plain.exit_code == set_to.exit_code == 0, set_to.stderr
    assert json.loads(plain.stdout)["token_ids"] != json.loads(set_to.stdout)["token_ids"]


def test_what_a_plain_model_does_not_have_can_not_be_set() -> None:
    checkpoint = replace(Reference("text_swiglu").checkpoint(), constants=Constants(gate_scale=2.0))
    with pytest.raises(ModelError, match="gate_scale can't be set"):
        inspect(checkpoint)


def test_a_batch_that_was_begun_with_other_constants_is_not_gone_on_with(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"prompt": "Hello"}) + "\n")
    model = ("--base-dir", DATA / "n7_smear", "--source", "base", "--max-tokens", "2")
    args = ("generate", *model, "--input", rows, "--output", out)
    first = invoke(*args, "--set", "model.softcap=20")
    assert first.exit_code == 0, first.stderr
    again = invoke(*args)
    assert again.exit_code != 0
    assert "constants" in again.stderr


@pytest.mark.parametrize("case", ["n3_window", "n5_cap20", "n6_theta", "n7_smear"])
def test_the_command_line_says_the_recorded_tokens(case: str) -> None:
    reference = Reference(case)
    ids = reference.facts["prompts"]["raw"]
    text = Tokenizer.load(DATA / case / "tokenizer" / "tokenizer.pkl").decode(ids[1:])
    args = ["--base-dir", DATA / case, "--source", reference.source, "--prompt", text, "--raw", "--json"]
    args += ["--dtype", "float32", "--device", "cpu", "--temperature", "0", "--max-tokens", "24"]
    args += ["--set", "sampling.ignore_eos=true"]
    args += ["--set", f"model.rotary_tables={reference.facts['rotary_tables']}"]
    given = invoke("generate", *args)
    assert given.exit_code == 0, given.stderr
    assert json.loads(given.stdout)["token_ids"] == reference.greedy("raw/naive")
