"""Classifying and loading: every kind that is supported loads, every other is refused with its reason."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.header import read_header
from ghostvis_cli.checkpoint.load import inspect, load_model
from ghostvis_cli.errors import ModelError
from ghostvis_cli.model.vision import Vision
from tests.conftest import DATA, Reference

State = dict[str, torch.Tensor]


class Copy:
    """A recorded case that a test may change before loading it."""

    def __init__(self, case: str, source: str, tmp_path: Path) -> None:
        self.base_dir, self.source = tmp_path / case, source
        shutil.copytree(DATA / case, self.base_dir, ignore=shutil.ignore_patterns("reference*"))

    @property
    def checkpoint(self) -> locate.Checkpoint:
        return locate.find(self.base_dir, self.source)

    def change(self, change: Callable[[State], object]) -> "Copy":
        state = torch.load(self.checkpoint.path, weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, self.checkpoint.path)
        return self

    def meta(self, **config: object) -> "Copy":
        path = self.checkpoint.meta_path
        meta = json.loads(path.read_text())
        meta["model_config"] |= config
        meta["model_config"] = {
            key: value for key, value in meta["model_config"].items() if value != "absent"
        }
        path.write_text(json.dumps(meta))
        return self

    def refusal(self) -> ModelError:
        with pytest.raises(ModelError) as refused:
            load_model(self.checkpoint)
        assert str(self.base_dir) in refused.value.message
        return refused.value


@pytest.fixture
def swiglu(tmp_path: Path) -> Copy:
    return Copy("text_swiglu", "base", tmp_path)


@pytest.fixture
def vlm(tmp_path: Path) -> Copy:
    return Copy("vlm_clip_hf", "sft", tmp_path)


def rename(state: State, old: str, new: str) -> None:
    for key in [key for key in state if old in key]:
        state[key.replace(old, new)] = state.pop(key)


def vision(copy: Copy) -> Vision:
    found = load_model(copy.checkpoint).model.vision
    assert found is not None
    return found


def encoded(copy: Copy) -> torch.Tensor:
    """What the model makes of one image."""
    pixels = torch.linspace(-1, 1, 3 * 56 * 56).reshape(1, 3, 56, 56)
    with torch.inference_mode():
        return load_model(copy.checkpoint).model.encode_images(pixels)


def chat_logits(checkpoint: locate.Checkpoint) -> np.ndarray:
    reference = Reference("text_swiglu")
    decoder = load_model(checkpoint).model.decoder
    with torch.inference_mode():
        return decoder(decoder.embed(torch.tensor(reference.facts["prompts"]["chat"])[None]))[0].numpy()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"_fsdp_wrapped_module.model.{k}": v for k, v in s.items()},
        lambda s: {k.replace(".attn.", "._orig_mod.attn."): v for k, v in s.items()},
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "step": 3},
        lambda s: {re.sub(r"mlp\.c_(gate|up)", r"mlp.swiglu.\1", k): v for k, v in s.items()},
        lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()},
    ],
    ids=[
        "compiled",
        "ddp",
        "fsdp",
        "compiled inside",
        "under model",
        "under state_dict",
        "fused names",
        "parameters",
    ],
)
def test_wrapped_and_renamed_files_are_the_same_model(
    swiglu: Copy, change: Callable[[State], object]
) -> None:
    swiglu.change(change)
    recorded = Reference("text_swiglu").arrays["fp32/logits/chat"]
    assert np.abs(chat_logits(swiglu.checkpoint) - recorded).max() <= 1e-4


def test_a_name_that_begins_with_wrapper_letters_keeps_them() -> None:
    from ghostvis_cli.checkpoint.keys import clean_names

    assert list(clean_names({"_orig_mod.model.lm_head.weight": 1})) == ["lm_head.weight"]
    assert list(clean_names({"model.mlp.weight": 1})) == ["model.mlp.weight"]


def test_config_the_meta_lacks_is_read_off_the_tensors(swiglu: Copy) -> None:
    swiglu.meta(
        n_layer="absent", n_embd="absent", n_kv_head="absent", mlp_type="absent", intermediate_size="absent"
    )
    config = inspect(swiglu.checkpoint).config.decoder
    assert (config.n_layer, config.n_embd, config.n_kv_head, config.intermediate_size) == (4, 64, 2, 172)


def test_tensors_are_believed_over_the_meta_and_it_is_said(swiglu: Copy) -> None:
    swiglu.meta(n_layer=12, intermediate_size=999, unknown_key=[1, 2])
    loaded = load_model(swiglu.checkpoint)
    assert loaded.model.config.decoder.n_layer == 4
    assert any("n_layer = 12" in notice and "4" in notice for notice in loaded.notices)


def test_padded_vocabulary_rows_are_cut_off() -> None:
    reference = Reference("text_relu2_nano1_pad")
    loaded = reference.load()
    assert read_header(loaded.checkpoint.path)["lm_head.weight"].shape[0] == 1024
    assert loaded.model.decoder.lm_head.weight.shape[0] == loaded.model.config.decoder.vocab_size == 1000


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_head": "absent"}, "n_head"),
        ({"n_head": 3}, "3 heads do not divide"),
        ({"n_head": 16}, "does not fit the key projection"),
        ({"n_head": "4"}, "'4', not a positive whole number"),
        ({"vocab_size": 2000}, "2000 token ids"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"window_pattern": "SSSL"}, "sliding windows"),
    ],
)
def test_a_meta_that_can_not_be_right_is_refused(
    swiglu: Copy, changes: dict[str, object], reason: str
) -> None:
    assert reason in swiglu.meta(**changes).refusal().message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.update({"resid_lambdas": torch.ones(4)}), "a fork of nanochat"),
        (lambda s: s.update({"value_embeds.1.weight": torch.ones(4, 4)}), "a fork of nanochat"),
        (lambda s: s.update({"smear_lambda": torch.ones(1)}), "lacks backout_lambda, smear_gate.weight"),
        (lambda s: s.update({"extra.weight": torch.ones(1)}), "has extra.weight, which no known model uses"),
        (lambda s: s.pop("transformer.h.2.attn.c_k.weight"), "lacks transformer.h.2.attn.c_k.weight"),
        (lambda s: s["lm_head.weight"].view(-1).__setitem__(7, float("nan")), "lm_head.weight holds values"),
        (lambda s: s.update({"lm_head.weight": torch.ones(8, 64)}), "lm_head.weight has shape [8, 64]"),
        (
            lambda s: s.update({"transformer.h.1.mlp.c_gate.weight": torch.ones(7, 64)}),
            "transformer.h.1.mlp.c_gate.weight [7, 64] for [172, 64]",
        ),
        (
            lambda s: s | {"_orig_mod.lm_head.weight": s["lm_head.weight"]},
            "same tensor under two names: lm_head.weight",
        ),
        (
            lambda s: s.update({"lm_head.weight": s["lm_head.weight"].to(torch.int8)}),
            "lm_head.weight of int8",
        ),
        (lambda s: s.update({"transformer.h.99999999.attn.c_q.weight": torch.ones(1)}), "layer 4 is missing"),
        (lambda s: {"config": 1}, "not tensors: config"),
        (lambda s: {}, "holds no state dict"),
        (lambda s: {"model.embed_tokens.weight": torch.ones(2, 2)}, "not a GhostVis or nanochat"),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(
    swiglu: Copy, change: Callable[[State], object], reason: str
) -> None:
    def changed(state: State) -> object:
        result = change(state)
        return result if isinstance(result, dict) else None

    assert reason in swiglu.change(changed).refusal().message


def test_mixtures_of_experts_are_refused() -> None:
    with pytest.raises(ModelError, match="mixture-of-experts"):
        load_model(locate.find(DATA / "text_moe_top1", "base"))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(swiglu: Copy) -> None:
    swiglu.meta(vocab_size=1000)
    assert "1024 ids" in swiglu.refusal().message


def test_a_missing_meta_file_is_explained(swiglu: Copy) -> None:
    swiglu.checkpoint.meta_path.unlink()
    refusal = swiglu.refusal()
    assert "meta_021400.json is missing" in refusal.message
    assert '"n_head"' in str(refusal.hint)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"model_config": 3}'])
def test_a_broken_meta_file_is_refused(swiglu: Copy, content: bytes) -> None:
    swiglu.checkpoint.meta_path.write_bytes(content)
    swiglu.refusal()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("/tmp/ghostvis-was-here", "w"))  # type: ignore[return-value]


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(swiglu: Copy) -> None:
    path = swiglu.checkpoint.path
    torch.save({"transformer.wte.weight": torch.ones(2), "x": Evil()}, path)
    assert "could run code" in swiglu.refusal().message
    path.write_bytes(pickle.dumps(Evil()))
    swiglu.refusal()
    assert not Path("/tmp/ghostvis-was-here").exists()


def test_a_truncated_or_foreign_file_is_refused(swiglu: Copy) -> None:
    path = swiglu.checkpoint.path
    content = path.read_bytes()
    for size in (1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "damaged or incomplete" in swiglu.refusal().message
    path.write_bytes(b"not a model at all" * 100)
    swiglu.refusal()


def test_a_flipped_byte_is_refused_or_changes_the_one_value_it_belongs_to(swiglu: Copy) -> None:
    path = swiglu.checkpoint.path
    content, before = path.read_bytes(), load_model(swiglu.checkpoint).model.state_dict()
    size, changed, refused = len(content), [], 0
    for position in [
        *range(0, size, size // 20),
        *range(size - 500, size, 25),
    ]:  # the directory is at the end
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            after = load_model(swiglu.checkpoint).model.state_dict()
        except ModelError:
            refused += 1
        else:
            assert after.keys() == before.keys()
            changed.append(sum(int((after[name] != before[name]).sum()) for name in before))
    assert set(changed) <= {0, 1}
    assert sum(changed) >= 15 and refused >= 5  # three quarters of the file are weights


def test_vision_names_of_older_and_newer_transformers_are_the_same_tower(vlm: Copy) -> None:
    before = vision(vlm).state_dict()
    vlm.change(lambda s: rename(s, "encoder.vision_model.", "encoder."))
    after = vision(vlm).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stored_position_ids_and_the_unused_last_norm_do_not_matter(vlm: Copy) -> None:
    key = "vision_encoder.encoder.vision_model.embeddings.position_ids"
    before = encoded(vlm)
    vlm.change(lambda s: s.update({key: torch.zeros(1, 17, dtype=torch.int64)}))
    vlm.change(lambda s: [s[name].fill_(7) for name in s if "post_layernorm" in name] and s)
    assert torch.equal(encoded(vlm), before)


def test_average_pooling_is_believed_only_when_the_meta_says_so(vlm: Copy) -> None:
    def drop(state: State) -> None:
        for key in [key for key in state if key.startswith("vision_resampler")]:
            del state[key]

    vlm.change(drop)
    assert "no resampler" in vlm.refusal().message
    vlm.meta(vision_resampler_mode="avgpool", vision_num_tokens=5)
    model = load_model(vlm.checkpoint).model
    with torch.inference_mode():
        assert model.encode_images(torch.zeros(1, 3, 56, 56)).shape == (1, 5, 64)


def test_average_pooling_splits_the_row_sequence_as_specified() -> None:
    from ghostvis_cli.model.vision import AveragePool

    rows, wanted = torch.randn(1, 17, 6), 5
    pooled = AveragePool(wanted)(rows)
    for i in range(wanted):
        low, high = i * 17 // wanted, -(-(i + 1) * 17 // wanted)
        assert torch.allclose(pooled[0, i], rows[0, low:high].mean(0), atol=1e-6)


def test_the_towers_own_size_is_believed_over_the_meta(vlm: Copy) -> None:
    vlm.meta(vision_image_size=336)
    loaded = load_model(vlm.checkpoint)
    assert loaded.model.config.vision is not None and loaded.model.config.vision.tower.image_size == 56
    assert any("vision_image_size = 336" in notice for notice in loaded.notices)


def test_timm_names_make_a_tower_with_exact_gelu_and_a_last_norm(vlm: Copy) -> None:
    """The same weights under timm's names: only activation and last norm may differ."""

    def to_timm(state: State) -> State:
        root = "vision_encoder.encoder."
        theirs = {k.removeprefix(root + "vision_model."): v for k, v in state.items() if k.startswith(root)}
        ours = {k: v for k, v in state.items() if not k.startswith(root)}
        ours[f"{root}cls_token"] = theirs["embeddings.class_embedding"].reshape(1, 1, -1)
        ours[f"{root}pos_embed"] = theirs["embeddings.position_embedding.weight"][None]
        ours[f"{root}patch_embed.proj.weight"] = theirs["embeddings.patch_embedding.weight"]
        for kind in ("weight", "bias"):
            ours[f"{root}norm_pre.{kind}"] = theirs[f"pre_layrnorm.{kind}"]
            ours[f"{root}norm.{kind}"] = theirs[f"post_layernorm.{kind}"]
            for i in range(3):
                layer, block = f"encoder.layers.{i}", f"{root}blocks.{i}"
                qkv = [theirs[f"{layer}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
                ours[f"{block}.attn.qkv.{kind}"] = torch.cat(qkv)
                ours[f"{block}.attn.proj.{kind}"] = theirs[f"{layer}.self_attn.out_proj.{kind}"]
                for n in "12":
                    ours[f"{block}.norm{n}.{kind}"] = theirs[f"{layer}.layer_norm{n}.{kind}"]
                    ours[f"{block}.mlp.fc{n}.{kind}"] = theirs[f"{layer}.mlp.fc{n}.{kind}"]
        return ours

    clip, timm = vision(vlm).tower, vision(vlm.change(to_timm)).tower
    assert timm.config.family == "timm"
    from ghostvis_cli.model.vision import quick_gelu

    for block in timm.blocks:
        block.activation = quick_gelu  # type: ignore[assignment]
    pixels = torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        assert torch.allclose(timm(pixels), timm.norm_post(clip(pixels)), atol=1e-5)


def test_a_transposed_matrix_of_the_right_size_is_refused(swiglu: Copy) -> None:
    def transpose(state: State) -> None:
        for i in range(4):
            key = f"transformer.h.{i}.mlp.c_proj.weight"
            state[key] = state[key].t().contiguous()

    assert "mlp.c_proj.weight [172, 64] for [64, 172]" in swiglu.change(transpose).refusal().message


def test_query_and_key_of_exchanged_sizes_are_refused(swiglu: Copy) -> None:
    def exchange(state: State) -> None:
        q, k = "transformer.h.1.attn.c_q.weight", "transformer.h.1.attn.c_k.weight"
        state[q], state[k] = state[k], state[q]

    assert "attn.c_q.weight [32, 64] for [64, 64]" in swiglu.change(exchange).refusal().message


def test_unknown_settings_of_the_meta_are_named(swiglu: Copy) -> None:
    loaded = load_model(swiglu.meta(flux_capacitor=3, rope_theta=None).checkpoint)
    assert any("flux_capacitor" in notice for notice in loaded.notices)


def test_a_huge_sequence_length_sizes_no_table(swiglu: Copy) -> None:
    assert load_model(swiglu.meta(sequence_len=5_000_000).checkpoint).model.decoder.cos.size(0) <= 4096
    assert "more than any model's" in swiglu.meta(sequence_len=10**12).refusal().message


def test_a_pickle_that_asks_for_a_huge_memo_is_refused(tmp_path: Path) -> None:
    from ghostvis_cli.checkpoint import pickles

    content = b"\x80\x02K\x00r\x00\x00\x00\x7f."  # LONG_BINPUT 2130706432
    with pytest.raises(ModelError, match="more objects than it can hold"):
        pickles.load(content, pickle.Unpickler)


def test_a_tokenizer_is_found_beside_a_linked_file_and_one_directory_up(swiglu: Copy, tmp_path: Path) -> None:
    real = swiglu.checkpoint
    for place in ("tokenizer/tokenizer.pkl", "tokenizer.pkl"):
        snapshot = tmp_path / place.replace("/", "-")
        (snapshot / "sft").mkdir(parents=True)
        (snapshot / place).parent.mkdir(exist_ok=True)
        shutil.copy(real.tokenizer_path, snapshot / place)
        (snapshot / "sft" / real.path.name).symlink_to(real.path)
        (snapshot / "sft" / real.meta_path.name).symlink_to(real.meta_path)
        found = locate.from_path(snapshot / "sft" / real.path.name)
        assert found.tokenizer_path == snapshot / place


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_a_siglip_file_loads_with_its_unused_head(vlm: Copy, prefix: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    torch.manual_seed(0)
    theirs = transformers.SiglipVisionModel(config).eval()

    def replace_tower(state: State) -> State:
        kept = {k: v for k, v in state.items() if not k.startswith("vision_encoder.")}
        tower = {k.removeprefix("vision_model."): v for k, v in theirs.state_dict().items()}
        assert any(key.startswith("head.") for key in tower)
        return kept | {f"vision_encoder.encoder.{prefix}{k}": v.clone() for k, v in tower.items()}

    vlm.change(replace_tower)
    tower = vision(vlm).tower
    assert tower.config.family == "siglip"
    pixels = torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        assert (tower(pixels) - theirs(pixels).last_hidden_state).abs().max() <= 1e-5


def test_attention_with_as_many_key_heads_as_query_heads_and_no_bias_loads(swiglu: Copy) -> None:
    def widen(state: State) -> None:
        for key in [key for key in state if key.endswith(".bias")]:
            del state[key]
        for i in range(4):
            for name in ("c_k", "c_v"):
                key = f"transformer.h.{i}.attn.{name}.weight"
                state[key] = torch.cat([state[key], state[key]])

    config = load_model(swiglu.change(widen).meta(n_kv_head=4).checkpoint).model.config.decoder
    assert (config.n_kv_head, config.attention_bias) == (4, False)
