"""Directories in Hugging Face's format for the local engine: the same answers, and no trust in the files."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghostvis_cli import demo
from ghostvis_cli.checkpoint import load, locate
from ghostvis_cli.checkpoint.fingerprint import fingerprint
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.errors import ModelError
from ghostvis_cli.model.config import LAYOUTS
from tests.cli import invoke as run
from tests.conftest import Reference
from tests.convert.conversions import converted

transformers = pytest.importorskip("transformers")
CASES = (
    *("text_swiglu", "text_relu2_nano1_pad", "vlm_clip_hf"),
    *("n3_window", "n5_cap20", "n6_theta", "n7_smear"),
)


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A checkpoint and what it was converted to, in many files."""
    checkpoint = Reference(request.param).checkpoint()
    place = tmp_path_factory.mktemp("converted") / request.param
    return checkpoint, converted(checkpoint, place, max_shard_bytes=200_000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(Reference("text_swiglu").checkpoint(), tmp_path_factory.mktemp("made") / "made")


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy, so that a test may change it."""
    return Path(shutil.copytree(made, tmp_path / "a place"))


# --- the same answers


def test_logits_and_greedy_tokens_are_those_of_the_checkpoint(pair: tuple[Checkpoint, Path]) -> None:
    checkpoint, place = pair
    ours, theirs = load.load_model(checkpoint), load.load_model(locate.from_path(place))
    ids = torch.arange(3, 60)[None] % ours.model.config.decoder.vocab_size
    with torch.inference_mode():
        logits, others = (each.model.decoder(each.model.decoder.embed(ids)) for each in (ours, theirs))
    # The conversion's own tolerance: swiglu's embedding was normalised before, and sums are cut elsewhere.
    assert (logits - others).abs().max() < 1e-4
    assert torch.equal(logits.argmax(-1), others.argmax(-1))
    assert (
        ours.tokenizer.ranks == theirs.tokenizer.ranks
        and ours.tokenizer.specials == theirs.tokenizer.specials
    )


def test_what_it_is_and_what_it_came_from_is_read_off_the_directory(pair: tuple[Checkpoint, Path]) -> None:
    checkpoint, place = pair
    found = locate.from_path(place)
    assert (found.source, found.tag, found.step) == (checkpoint.source, checkpoint.tag, checkpoint.step)
    ours, theirs = load.inspect(checkpoint), load.inspect(found)
    assert theirs.kind == ours.kind
    assert theirs.config.vision == ours.config.vision
    for name in (
        "sequence_len",
        "windows",
        "rope_theta",
        "softcap",
        "qk_scale",
        "gate_scale",
        "rotary_tables",
    ):
        assert getattr(theirs.config.decoder, name) == getattr(ours.config.decoder, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_are_seen_in_every_layout_as_before_conversion(layout: Any, tmp_path: Path) -> None:
    checkpoint = Reference("vlm_clip_hf").checkpoint()
    place = converted(checkpoint, tmp_path / "made", layout=layout)
    image = Reference("vlm_clip_hf").base_dir / "image.png"
    ask = ("generate", "What is this?", "-i", image, "--temperature", "0", "--max-tokens", "12", "--json")
    before = run(*ask, "--checkpoint-path", checkpoint.path, "--layout", layout)
    after = run(*ask, "--checkpoint-path", place)
    assert after.exit_code == 0, after.stderr
    was, now = json.loads(before.stdout), json.loads(after.stdout)
    assert now["token_ids"] == was["token_ids"] and now["usage"] == was["usage"]
    assert now["model"]["layout"] == layout and now["model"]["path"] == str(place)


def test_a_nanochat_model_that_transformers_saved_answers_as_transformers_does(tmp_path: Path) -> None:
    """Without a certificate and any key of ours, tokenizer by transformers' own class."""
    config = transformers.NanoChatConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(5)
    model = transformers.NanoChatForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    place = tmp_path / "theirs"
    model.save_pretrained(place, max_shard_size="100KB")
    assert (place / "model.safetensors.index.json").exists()
    tokenizer_of(Reference("text_swiglu").checkpoint(), tmp_path / "t").save_pretrained(place)
    loaded = load.load_model(locate.from_path(place))
    assert loaded.model.config.decoder.sequence_len == 256
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        ours = loaded.model.decoder(loaded.model.decoder.embed(ids))
        theirs = model(ids).logits
    assert (ours - theirs).abs().max() < 0.05  # training's rotary tables are rounded, transformers' are not
    told = run("generate", "Hello", "--checkpoint-path", place, "--temperature", "0", "--max-tokens", "4")
    assert told.exit_code == 0, told.stderr


def tokenizer_of(checkpoint: Checkpoint, folder: Path) -> Any:
    converted(checkpoint, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_tied_embeddings_are_used_twice(place: Path) -> None:
    (place / "parity.json").unlink()
    state = load_file(place / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, place / "model.safetensors")
    twice = load.load_model(locate.from_path(place)).model.state_dict()
    del state["lm_head.weight"]
    save_file(state, place / "model.safetensors")
    edit(place / "config.json", tie_word_embeddings=True)
    once = load.load_model(locate.from_path(place)).model.state_dict()
    assert all(torch.equal(once[name], twice[name]) for name in twice)


# --- commands


def test_models_lists_directories_and_flat_folders_by_their_path(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "a directory")
    original = Reference("text_relu2_nano1_pad").checkpoint()
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (original.path, original.meta_path, original.tokenizer_path):
        shutil.copy(path, flat)
    listed = json.loads(run("models", "--base-dir", tmp_path, "--json").stdout)["models"]
    found = {each["path"]: each for each in listed}
    directory, file = found[str(tmp_path / "a directory")], found[str(flat / original.path.name)]
    assert (directory["format"], directory["kind"], directory["error"]) == (
        "huggingface",
        "text swiglu",
        None,
    )
    assert directory["size_bytes"] == (made / "model.safetensors").stat().st_size
    assert (file["format"], file["kind"], file["error"]) == ("torch", "text relu2", None)
    assert str(flat) in run("models", "--base-dir", tmp_path).stdout
    answer = run("generate", "Hi", "--checkpoint-path", flat, "--max-tokens", "2", "--temperature", "0")
    assert answer.exit_code == 0, answer.stderr


def test_constants_and_steps_of_a_directory_are_its_own(place: Path) -> None:
    done = run("generate", "Hi", "--checkpoint-path", place, "--set", "model.softcap=20")
    assert done.exit_code == 4 and "softcap can't be set any more" in done.stderr
    step = locate.from_path(place).step
    assert locate.from_path(place, step).step == step
    with pytest.raises(ModelError, match="--step 7 means nothing"):
        locate.from_path(place, 7)


def test_converting_a_directory_is_refused_with_what_to_do(place: Path, tmp_path: Path) -> None:
    done = run("convert", place, "--out", tmp_path / "again")
    assert done.exit_code == 4 and "in Hugging Face's format already" in done.stderr


def test_a_fingerprint_follows_the_content_and_not_the_place(made: Path, place: Path) -> None:
    assert fingerprint(locate.from_path(place)) == fingerprint(locate.from_path(made))
    content = bytearray((place / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (place / "model.safetensors").write_bytes(content)
    assert fingerprint(locate.from_path(place)) != fingerprint(locate.from_path(made))


# --- files that nobody should trust


def test_the_code_in_a_directory_is_never_run(tmp_path: Path) -> None:
    place = converted(Reference("n3_window").checkpoint(), tmp_path / "made")
    (place / "modeling_ghostvis.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load.load_model(locate.from_path(place))
    assert not (tmp_path / "ran").exists()


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(**entry: object) -> bytes:
    return raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}, bytes(8))


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(64),
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "no JSON": raw(b"{" * 100),
    "nested without end": raw(b"[" * 100_000),
    "a list": raw([]),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [2]}}),
    "beyond the end": one(shape=[200], data_offsets=[0, 800]),
    "a gap": one(data_offsets=[4, 12]),
    "too short for its shape": one(shape=[4]),
    "negative": one(shape=[-2], data_offsets=[0, -8]),
    "huge": one(shape=[2**62, 2**62], data_offsets=[0, 2**126]),
    "quantised": one(dtype="F8_E4M3", shape=[8]),
    "a string for a shape": one(shape="22"),
    "a number for a tensor": raw({"a": 1}),
    "more bytes than tensors": raw({}, bytes(8)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_weights_are_refused_in_one_line(name: str, place: Path) -> None:
    (place / "model.safetensors").write_bytes(DAMAGED[name])
    with pytest.raises(ModelError, match=r"model\.safetensors") as refusal:
        load.inspect(locate.from_path(place))
    assert "\n" not in refusal.value.message


def test_weights_that_were_cut_off_are_refused(place: Path) -> None:
    content = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(content[:-1000])
    done = run("generate", "Hi", "--checkpoint-path", place)
    assert done.exit_code == 4 and "incomplete" in done.stderr


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 3]
)
def test_an_index_names_files_beside_it_only(name: object, place: Path) -> None:
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ModelError, match="no safetensors file beside it"):
        load.inspect(locate.from_path(place))


def test_an_index_that_does_not_fit_its_files_is_refused(place: Path) -> None:
    index = {"weight_map": {"not.there": "model.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not where it says"):
        load.inspect(locate.from_path(place))


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "another family": ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    "a stock Qwen3": ({"final_logit_softcapping": ...}, "no final_logit_softcapping"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised"),
    "other layers": ({"num_hidden_layers": 3}, "does not fit"),
    "a huge number": ({"num_hidden_layers": 10**30}, "not a whole number"),
    "a true number": ({"num_attention_heads": True}, "not a whole number"),
    "heads that do not divide": ({"num_attention_heads": 3}, "do not divide"),
    "another head size": ({"head_dim": 128}, "do not divide"),
    "stretched positions": ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "stretched"),
    "a base that is none": ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta"),
    "another norm": ({"rms_norm_eps": 0.01}, "rms_norm_eps"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "a sliding window": ({"use_sliding_window": True}, "sliding window"),
    "a class that is no list": ({"text_config": 3, "architectures": 5}, "not a model of nanochat's family"),
    "no table": ({"text_config": 3}, "not a model of nanochat's family"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_the_decoder_can_not_be_is_refused_by_name(name: str, place: Path) -> None:
    changes, message = CONFIGS[name]
    edit(place / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load.inspect(locate.from_path(place))


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "trained norms": (lambda state: state["model.norm.weight"].mul_(1.5), "model.norm.weight is not all 1"),
    "a tensor too few": (lambda state: state.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj"),
    "a tensor too many": (lambda state: state.update(extra=torch.ones(3)), "extra"),
    "another shape": (lambda state: state.update({"lm_head.weight": torch.ones(3, 64)}), "lm_head"),
    "not finite": (lambda state: state["lm_head.weight"].fill_(torch.nan), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_do_not_fit_are_named_as_the_file_names_them(name: str, place: Path) -> None:
    change, message = CHANGES[name]
    state = load_file(place / "model.safetensors")
    change(state)
    save_file(state, place / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load.load_model(locate.from_path(place))


TOKENIZERS: dict[str, tuple[dict[str, object], str]] = {
    "no merges": ({"model": {"type": "BPE", "vocab": {}}}, "no byte-level BPE"),
    "a unigram": ({"model": {"type": "Unigram"}}, "Unigram"),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "changes text"),
    "by words": ({"pre_tokenizer": {"type": "Whitespace"}}, "no byte-level BPE"),
    "no specials": ({"added_tokens": []}, "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_would_make_other_ids_is_refused(name: str, place: Path) -> None:
    changes, message = TOKENIZERS[name]
    edit(place / "tokenizer.json", **changes)
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(place / "tokenizer.json")


def test_merges_in_another_order_are_refused(place: Path) -> None:
    model = json.loads((place / "tokenizer.json").read_text())["model"]
    edit(place / "tokenizer.json", model=model | {"merges": model["merges"][::-1]})
    with pytest.raises(ModelError, match="merges are not those of its token ids"):
        Tokenizer.load(place / "tokenizer.json")


def test_the_demo_is_its_own_after_conversion_too(tmp_path: Path) -> None:
    done = run("convert", "--source", "demo", "--dtype", "float32", "--no-verify", "--out", tmp_path / "demo")
    assert done.exit_code == 0, done.stderr
    image = Path(demo.__file__).parent / "three-shapes.jpg"
    ask = ("generate", "What is in this image?", "--temperature", "0", "--image", image)
    assert run(*ask, "--checkpoint-path", tmp_path / "demo").stdout == run(*ask, "--source", "demo").stdout
