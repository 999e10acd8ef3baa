"""`ghostvis doctor` about converted directories: what their certificates vouch for, and what they do not."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from ghostvis_cli.convert import cache
from ghostvis_cli.doctor.finding import Finding
from tests.cli import invoke as run
from tests.conftest import Reference
from tests.convert.conversions import converted

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted and verified."""
    place = tmp_path_factory.mktemp("original") / "made"
    return converted(Reference("text_swiglu").checkpoint(), place, verify=True, by_layer=True)


@pytest.fixture
def place(original: Path, tmp_path: Path) -> Path:
    """A copy, so that a test may change it."""
    return Path(shutil.copytree(original, tmp_path / "a place"))


def findings(*args: object) -> list[Finding]:
    done = run("doctor", "--no-run", "--json", *args)
    return [Finding(**each) for each in json.loads(done.stdout)["findings"]]


def about(directory: Path, *args: object) -> list[Finding]:
    found = findings("--checkpoint-path", directory, "--engine", "sglang", *args)
    assert not [each for each in found if each.area == "checkpoints" and each.status == "error"]
    return [each for each in found if each.area == "converted"]


def edit(directory: Path, **changes: object) -> None:
    path = directory / "parity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_directory_that_is_as_it_was_verified_is_well(place: Path) -> None:
    (found,) = about(place)
    assert (found.name, found.status) == ("chosen", "ok")
    assert str(place) in found.message


def test_a_changed_file_is_named_and_the_fix_makes_the_directory_anew(place: Path) -> None:
    (place / "generation_config.json").write_text("{}")
    (found,) = about(place)
    assert found.status == "warning"
    assert found.message == f"{place} was changed since it was converted: generation_config.json"
    assert found.fix is not None
    command = shlex.split(found.fix)
    assert command[0] == "ghostvis"
    assert run(*command[1:]).exit_code == 0
    assert [each.status for each in about(place)] == ["ok"]


def test_a_file_that_is_gone_counts_as_changed(place: Path) -> None:
    (place / "model.safetensors").unlink()
    (found,) = about(place)
    assert found.message.endswith("converted: model.safetensors")


def test_a_directory_that_was_never_verified_is_told_apart_from_one_that_failed(place: Path) -> None:
    edit(place, verification={"skipped": True})
    (skipped,) = about(place)
    edit(place, verification={"skipped": False, "passed": False})
    (failed,) = about(place)
    assert (skipped.status, skipped.message) == ("warning", f"{place} was never verified")
    assert skipped.fix is not None
    assert "--dtype float32 --force --out" in skipped.fix
    assert failed.status == "warning"
    assert "failed its verification" in failed.message
    assert failed.fix is not None
    assert str(place / "parity.json") in failed.fix


def test_each_fault_is_a_finding_of_its_own(place: Path) -> None:
    edit(place, verification={"skipped": True})
    (place / "config.json").write_text("{}")
    assert [each.message.partition(": ")[0] for each in about(place)] == [
        f"{place} was changed since it was converted",
        f"{place} was never verified",
    ]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"outputs": 1}', '{"outputs": {}, "verification": 3, "source": []}']
)
def test_a_certificate_that_makes_no_sense_is_a_warning_too(place: Path, content: str) -> None:
    (place / "parity.json").write_text(content)
    (found,) = about(place)
    assert found.status == "warning"
    assert found.fix is not None
    assert found.fix.startswith("ghostvis convert CHECKPOINT")


def test_cached_directories_are_looked_at_whatever_is_chosen(tmp_path: Path) -> None:
    checkpoint = Reference("text_swiglu").checkpoint()
    whole = cache.converted(checkpoint, "float32", None, report=print)
    harmed = cache.converted(checkpoint, "bfloat16", None, report=print)
    (harmed / "config.json").write_text("{}")
    (whole.parent / ".left-over").mkdir()
    found = [each for each in findings("--source", "demo") if each.area == "converted"]
    assert {each.name for each in found} == {"cached"}
    assert {each.status: each.message.split()[0] for each in found} == {
        "ok": str(whole),
        "warning": str(harmed),
    }


def test_the_chosen_one_is_looked_at_once_though_it_lies_in_the_cache() -> None:
    entry = cache.converted(Reference("text_swiglu").checkpoint(), "float32", None, report=print)
    assert [each.name for each in about(entry)] == ["chosen"]


def test_the_local_engine_can_run_it(place: Path) -> None:
    found = findings("--checkpoint-path", place, "--engine", "local")
    assert [each for each in found if each.status == "error"] == []
    (chosen,) = [each for each in found if (each.area, each.name) == ("checkpoints", "chosen")]
    assert chosen.message.startswith(f"{place}: text swiglu")
