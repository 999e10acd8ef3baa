"""The directory appears whole or not at all, and nothing of anybody else's is ever replaced."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ghostvis_cli import files
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.convert import run, staging
from ghostvis_cli.convert.plan import ConvertSettings, make_plan
from ghostvis_cli.errors import ModelError, OutputError, UsageError
from tests.conftest import Reference
from tests.convert.conversions import changed, converted


@pytest.fixture
def checkpoint():
    return Reference("text_swiglu").checkpoint()


def contents(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()}


def test_an_existing_directory_is_refused_without_force(checkpoint, tmp_path: Path) -> None:
    place = converted(checkpoint, tmp_path / "out")
    before = contents(place)
    with pytest.raises(UsageError, match="exists"):
        converted(checkpoint, place, dtype="bfloat16")
    assert contents(place) == before


def test_force_replaces_an_earlier_conversion_whole(checkpoint, tmp_path: Path) -> None:
    place = converted(checkpoint, tmp_path / "out", max_shard_bytes=300_000)
    converted(checkpoint, place, dtype="bfloat16", force=True)
    assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
    assert [file.name for file in place.glob("*.safetensors*")] == ["model.safetensors"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_force_never_replaces_a_directory_that_convert_did_not_make(checkpoint, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not a directory that ghostvis convert made"):
        converted(checkpoint, tmp_path, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("what", ["README.md", ".git", "model.safetensors"])
def test_force_never_removes_what_somebody_added(checkpoint, tmp_path: Path, what: str) -> None:
    """Under a name of ours too, where it is a directory."""
    place = converted(checkpoint, tmp_path / "out")
    (place / what).unlink(missing_ok=True)
    added = place / what / "HEAD" if what != "README.md" else place / what
    added.parent.mkdir(exist_ok=True)
    added.write_text("mine")
    with pytest.raises(UsageError, match=f"holds what ghostvis convert did not make.*: {what}$") as caught:
        converted(checkpoint, place, force=True)
    assert str(caught.value.hint).startswith(f"move it away: mv {place / what} ")
    assert added.read_text() == "mine"


def test_force_replaces_a_failed_conversion_only_without_what_somebody_added(
    checkpoint, tmp_path: Path
) -> None:
    (converted(checkpoint, tmp_path / "out").rename(tmp_path / "out.failed") / "notes").write_text("mine")
    with pytest.raises(UsageError, match=r"out.failed holds .*: notes$"):
        converted(checkpoint, tmp_path / "out")
    assert (tmp_path / "out.failed" / "notes").read_text() == "mine"


class Meanwhile(run.Progress):
    """Does something once, while the conversion is running."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(1)
        self.act: Callable[[], object] | None = act

    def wrote(self, nbytes: int) -> None:
        act, self.act = self.act, None
        if act is not None:
            act()


def convert_while(checkpoint: Checkpoint, place: Path, act: Callable[[], object], *, force: bool) -> None:
    plan = make_plan(checkpoint, ConvertSettings(verify=False, force=force))
    run.run(plan, place, Meanwhile(act))


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("what", ["directory", "empty directory", "file", "broken link"])
def test_what_appears_at_the_place_during_the_conversion_stays(
    checkpoint, tmp_path: Path, what: str, force: bool
) -> None:
    place = tmp_path / "out"

    def appear() -> None:
        if what == "file":
            place.write_text("mine")
        elif what == "broken link":
            place.symlink_to("nowhere")
        else:
            place.mkdir()
        if what == "directory":
            (place / "x").write_text("mine")

    with pytest.raises(UsageError, match="was made by somebody else during the conversion"):
        convert_while(checkpoint, place, appear, force=force)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (place.is_file(), place.is_symlink(), place.is_dir()) == (
        what == "file",
        what == "broken link",
        "directory" in what,
    )
    assert not place.is_dir() or [entry.name for entry in place.iterdir()] == ["x"] * (what == "directory")


@pytest.mark.parametrize("old_system", [True, False])
@pytest.mark.parametrize("what", ["an addition", "another conversion", "a file in an empty directory"])
def test_force_replaces_only_what_was_there_at_the_start(
    checkpoint, tmp_path: Path, what: str, old_system: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old_system:  # as one that knows neither call
        monkeypatch.setattr(files, "_rename", lambda a, b, flag: errno.ENOSYS)
    place = tmp_path / "out"
    place.mkdir() if "empty" in what else converted(checkpoint, place)

    def change() -> None:
        if what == "another conversion":
            converted(checkpoint, place, dtype="bfloat16", force=True)
        else:
            (place / "x").write_text("mine")

    with pytest.raises(UsageError, match="did not make" if what != "another conversion" else "somebody else"):
        convert_while(checkpoint, place, change, force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    if what == "another conversion":
        assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
    else:
        assert (place / "x").read_text() == "mine"


@pytest.mark.parametrize("old_system", [True, False])
def test_what_is_gone_at_the_end_need_not_be_replaced(
    checkpoint, tmp_path: Path, old_system: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old_system:
        monkeypatch.setattr(files, "_rename", lambda a, b, flag: errno.ENOSYS)
    place = converted(checkpoint, tmp_path / "out")
    convert_while(checkpoint, place, lambda: shutil.rmtree(place), force=True)
    converted(checkpoint, place, force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_was_replaced_by_a_killed_run_keeps_what_somebody_added(checkpoint, tmp_path: Path) -> None:
    """Killed between the exchange of names and the second look."""
    left = converted(checkpoint, tmp_path / "out").rename(tmp_path / ".out.converting-dead")
    (left / "x").write_text("mine")
    converted(checkpoint, tmp_path / "out")
    assert (left / "x").read_text() == "mine"


def test_a_failure_half_way_leaves_what_was_there(checkpoint, tmp_path: Path) -> None:
    place = converted(checkpoint, tmp_path / "out")
    before = contents(place)
    plan = make_plan(checkpoint, ConvertSettings(force=True, verify=False))
    progress = run.Progress(plan.weights_bytes)
    progress.cancelled.set()
    with pytest.raises(run.CancelledError):
        run.run(plan, place, progress)
    assert contents(place) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_cleared_away_and_a_running_ones_is_not(checkpoint, tmp_path: Path) -> None:
    for name in (".out.converting-dead", ".other place.converting-dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half of it")
    with staging.staged(tmp_path / "out", 0) as running:
        converted(checkpoint, tmp_path / "out")
        assert running.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_run_killed_between_two_renames_is_repaired_by_the_next(checkpoint, tmp_path: Path) -> None:
    """The way of systems that can't exchange two names at once."""
    place = converted(checkpoint, tmp_path / "out")
    place.rename(tmp_path / ".out.replaced")
    with staging.staged(place, 0):
        assert (place / "config.json").exists()


def test_a_disk_without_room_is_told_beforehand(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="GB free"), staging.staged(tmp_path / "out", 10**18):
        pass


def test_values_that_do_not_fit_the_dtype_are_refused_by_name(checkpoint, tmp_path: Path) -> None:
    def change(state):
        state["lm_head.weight"][3, 3] = 1e6

    with pytest.raises(ModelError, match=r"lm_head.weight holds values that are not finite as float16"):
        converted(changed(checkpoint, tmp_path / "in", change), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_shards_hold_every_tensor_once_and_keep_to_their_size(checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    one = load_file(converted(checkpoint, tmp_path / "one") / "model.safetensors")
    place = converted(checkpoint, tmp_path / "many", max_shard_bytes=300_000)
    index = json.loads((place / "model.safetensors.index.json").read_text())
    many = {name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert index["weight_map"].keys() == many.keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert all((one[name] == many[name]).all() for name in one)
    assert len(set(index["weight_map"].values())) > 2
    assert all(file.stat().st_size < 310_000 for file in place.glob("*.safetensors"))


def test_the_certificate_holds_the_hash_of_every_other_file(checkpoint, tmp_path: Path) -> None:
    from hashlib import sha256

    place = converted(checkpoint, tmp_path / "out")
    certificate = json.loads((place / "parity.json").read_text())
    actual = {file.name: sha256(file.read_bytes()).hexdigest() for file in place.iterdir()}
    actual.pop("parity.json")
    assert certificate["outputs"] == actual
    assert certificate["inputs"][str(checkpoint.path)] == sha256(checkpoint.path.read_bytes()).hexdigest()
