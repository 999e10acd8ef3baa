"""Finding checkpoints: both directory spellings, tags, steps, paths, and what is said when there is none."""

import os
from pathlib import Path

import pytest

from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.choose import choose_checkpoint
from ghostvis_cli.errors import ModelError
from ghostvis_cli.profile import ModelSettings


def touch(base: Path, *names: str) -> None:
    for name in names:
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.mark.parametrize("directory", ["chatsft_checkpoints", "sft_checkpoints"])
def test_both_spellings_of_a_source_are_found(tmp_path: Path, directory: str) -> None:
    touch(tmp_path, f"{directory}/d32/model_000650.pt")
    assert locate.find(tmp_path, "sft").path == tmp_path / directory / "d32" / "model_000650.pt"


def test_the_codes_spelling_wins_over_the_readmes(tmp_path: Path) -> None:
    touch(tmp_path, "sft_checkpoints/d4/model_000001.pt", "chatsft_checkpoints/d4/model_000002.pt")
    assert locate.find(tmp_path, "sft", "d4").step == 2


def test_the_deepest_tag_is_chosen_and_a_plain_one_before_its_namesakes(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(f"base_checkpoints/{tag}/model_000001.pt" for tag in ("d4", "d32-old", "d32", "d20", "zzz")),
    )
    assert list(locate.tags(tmp_path, "base"))[:3] == ["d32", "d32-old", "d20"]
    assert locate.find(tmp_path, "base").tag == "d32"


def test_tags_without_a_depth_are_chosen_by_age(tmp_path: Path) -> None:
    touch(tmp_path, "base_checkpoints/old/model_000001.pt", "base_checkpoints/new/model_000001.pt")
    import os

    os.utime(tmp_path / "base_checkpoints" / "old", (1, 1))
    assert locate.find(tmp_path, "base").tag == "new"


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "base_checkpoints/d4/model_999999.pt", "base_checkpoints/d4/model_1000000.pt")
    assert locate.find(tmp_path, "base").step == 1_000_000


def test_a_step_may_be_named_and_other_files_are_ignored(tmp_path: Path) -> None:
    names = ("model_000001.pt", "model_000002.pt", "model_final.pt", "optim_000009.pt")
    touch(tmp_path, *(f"base_checkpoints/d4/{name}" for name in names))
    assert locate.find(tmp_path, "base", "d4", 1).step == 1
    assert locate.find(tmp_path, "base").step == 2


def test_what_is_missing_is_answered_with_what_is_there(tmp_path: Path) -> None:
    touch(tmp_path, "base_checkpoints/d4/model_000007.pt")
    with pytest.raises(ModelError, match="no sft checkpoint") as source:
        locate.find(tmp_path, "sft")
    assert "--source base --model-tag d4" in str(source.value.hint)
    with pytest.raises(ModelError, match="'d5'") as tag:
        locate.find(tmp_path, "base", "d5")
    assert "d4" in str(tag.value.hint)
    with pytest.raises(ModelError, match="no step 8") as step:
        locate.find(tmp_path, "base", "d4", 8)
    assert "7" in str(step.value.hint)
    with pytest.raises(ModelError, match="no source named 'tft'"):
        locate.find(tmp_path, "tft")


def test_a_file_and_a_flat_directory_are_taken_as_they_are(tmp_path: Path) -> None:
    touch(tmp_path, "download/model_000003.pt", "download/model_000005.pt", "download/tokenizer.pkl")
    by_file = locate.from_path(tmp_path / "download" / "model_000003.pt")
    assert (by_file.step, by_file.source, by_file.meta_path.name) == (3, None, "meta_000003.json")
    assert locate.from_path(tmp_path / "download").step == 5
    assert by_file.tokenizer_path == tmp_path / "download" / "tokenizer.pkl"


def test_a_file_in_its_training_place_knows_source_tag_and_tokenizer(tmp_path: Path) -> None:
    touch(tmp_path, "chatrl_checkpoints/d32/model_000499.pt", "tokenizer/tokenizer.pkl")
    found = locate.from_path(tmp_path / "chatrl_checkpoints" / "d32" / "model_000499.pt")
    assert (found.source, found.tag, found.step) == ("rl", "d32", 499)
    assert found.tokenizer_path == tmp_path / "tokenizer" / "tokenizer.pkl"


def test_a_directory_without_checkpoints_and_a_missing_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model_"):
        locate.from_path(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        locate.from_path(tmp_path / "nowhere.pt")


def test_deepspeed_shards_are_recognised(tmp_path: Path) -> None:
    touch(tmp_path, "base_checkpoints/d4/000100/mp_rank_00_model_states.pt", "base_checkpoints/d4/latest")
    with pytest.raises(ModelError, match="DeepSpeed") as refusal:
        locate.find(tmp_path, "base")
    assert "zero_to_fp32" in str(refusal.value.hint)


def test_a_missing_base_directory_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        locate.find(tmp_path / "nowhere", "base")
    assert not (tmp_path / "nowhere").exists()


def test_no_home_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # an account without an entry in passwd
    assert locate.default_base_dir() == Path(".cache/nanochat")


def shards(base: Path, *tags: str) -> None:
    for tag in tags:
        touch(base, f"{tag}/global_step100/mp_rank_00_model_states.pt", f"{tag}/latest")


def test_shards_of_the_largest_depth_do_not_stand_in_the_way(tmp_path: Path) -> None:
    shards(tmp_path, "chatsft_checkpoints/d48", "chatsft_checkpoints/d40")
    touch(tmp_path, "chatsft_checkpoints/d32/model_000650.pt")
    found, notices = choose_checkpoint(ModelSettings(base_dir=str(tmp_path)))
    assert (found.tag, found.step) == ("d32", 650)
    assert [Path(line.partition(" holds")[0]).name for line in notices] == ["d48", "d40"]
    with pytest.raises(ModelError, match="DeepSpeed"):
        choose_checkpoint(ModelSettings(base_dir=str(tmp_path), model_tag="d48"))


def test_shards_under_one_spelling_do_not_hide_checkpoints_under_the_other(tmp_path: Path) -> None:
    shards(tmp_path, "chatsft_checkpoints/d32")
    touch(tmp_path, "sft_checkpoints/d32/model_000650.pt")
    assert locate.find(tmp_path, "sft").path.parent.parent.name == "sft_checkpoints"


def test_a_directory_named_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    touch(tmp_path, "base_checkpoints/d8/model_000900.pt/data.pkl", "base_checkpoints/d4/model_000100.pt")
    assert locate.find(tmp_path, "base").tag == "d4"


def test_other_experiments_are_named_where_the_chosen_one_has_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NANOCHAT_EXPERIMENT", raising=False)
    monkeypatch.delenv("NANOCHAT_EXPERIMENTS_DIR", raising=False)
    touch(tmp_path / "experiments" / "wide", "d24/sft/model_000005.pt")
    with pytest.raises(ModelError) as caught:
        locate.find(tmp_path, "sft")
    assert caught.value.hint == "another experiment: NANOCHAT_EXPERIMENT=wide"
    monkeypatch.setenv("NANOCHAT_EXPERIMENT", "wide")
    assert locate.find(tmp_path, "sft").tag == "d24"


def test_an_experiment_of_july_2026_is_found_with_its_stages_and_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "experiments" / "default"
    touch(place, "tokenizer/tokenizer.pkl", "d12/base/model_000100.pt", "d12/sft/model_000020.pt")
    touch(tmp_path / "experiments" / "other", "d24_fp8 (second try)/rl/model_000005.pt")
    found = locate.find(tmp_path, "sft")
    assert (found.tag, found.step, found.path) == ("d12", 20, place / "d12" / "sft" / "model_000020.pt")
    assert found.tokenizer_path == place / "tokenizer" / "tokenizer.pkl"
    by_path = locate.from_path(found.path)
    assert (by_path.source, by_path.tag) == ("sft", "d12")
    monkeypatch.setenv("NANOCHAT_EXPERIMENT", "other")
    assert locate.find(tmp_path, "rl").tag == "d24_fp8 (second try)"
    monkeypatch.setenv("NANOCHAT_EXPERIMENTS_DIR", str(tmp_path / "experiments"))
    assert locate.find(tmp_path / "nowhere", "rl").step == 5
