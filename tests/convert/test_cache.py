"""A checkpoint is converted once; what is found in the cache is what would be made again."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from ghostvis_cli.checkpoint import locate
from ghostvis_cli.convert import cache, run, sources, staging
from ghostvis_cli.convert.directory import is_converted
from ghostvis_cli.convert.hashes import KnownHashes
from ghostvis_cli.convert.plan import WeightsDtype
from ghostvis_cli.errors import ModelError, OutputError
from ghostvis_cli.profile import ModelSettings
from tests.conftest import Reference
from tests.convert.conversions import converted


@pytest.fixture
def checkpoint(tmp_path: Path):
    """A copy, so that a test may change it."""
    original = Reference("text_swiglu").checkpoint()
    folder = tmp_path / "in"
    folder.mkdir()
    for path in (original.path, original.meta_path, original.tokenizer_path):
        shutil.copy(path, folder / path.name)
    return locate.from_path(folder)


class Listener(list[str]):
    """What was reported."""

    def __call__(self, line: str) -> None:
        self.append(line)

    def said(self, words: str) -> bool:
        return any(words in line for line in self)


def entries(base: Path) -> list[str]:
    return sorted(entry.name for entry in base.iterdir() if entry.is_dir())


def test_the_second_run_finds_what_the_first_made(checkpoint, tmp_path: Path) -> None:
    first, second = Listener(), Listener()
    place = cache.converted(checkpoint, "float32", None, report=first, base=tmp_path / "cache")
    made = (place / "model.safetensors").stat()
    assert cache.converted(checkpoint, "float32", None, report=second, base=tmp_path / "cache") == place
    assert (place / "model.safetensors").stat() == made
    assert first.said("converting")
    assert second == []
    assert json.loads((place / "parity.json").read_text())["verification"]["passed"]


@pytest.mark.parametrize("what", ["dtype", "weights", "meta", "tokenizer"])
def test_another_dtype_or_another_content_is_another_entry(checkpoint, tmp_path: Path, what: str) -> None:
    base = tmp_path / "cache"
    cache.converted(checkpoint, "float32", None, report=Listener(), base=base)
    dtype: WeightsDtype = "bfloat16" if what == "dtype" else "float32"
    if what == "meta":
        meta = json.loads(checkpoint.meta_path.read_text())
        checkpoint.meta_path.write_text(json.dumps(meta | {"note": "another"}))
    elif what != "dtype":
        path = checkpoint.path if what == "weights" else checkpoint.tokenizer_path
        path.write_bytes(path.read_bytes())  # the same content, at another time: the same entry
        os.utime(path, (1, 1))
    cache.converted(checkpoint, dtype, None, report=Listener(), base=base)
    assert len(entries(base)) == (2 if what in ("dtype", "meta") else 1)


TAKING_PART = (
    *(
        "convert/run.py",
        "convert/tokenizer.py",
        "convert/verify.py",
        "checkpoint/keys.py",
        "checkpoint/load.py",
    ),
    *("model/config.py", "model/preprocess.py", "model/vision.py", "hf/model.py", "prompt.py"),
)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        *((name, True) for name in TAKING_PART),
        *((name, False) for name in ("convert/cache.py", "serve/routes.py", "chat/repl.py", "__init__.py")),
    ],
)
def test_another_code_of_what_makes_a_directory_is_another_entry(
    tmp_path: Path, name: str, counts: bool
) -> None:
    copy = shutil.copytree(
        sources.PACKAGE, tmp_path / "ghostvis_cli", ignore=shutil.ignore_patterns("demo", "*.pyc")
    )
    before = sources.digest(copy)
    with (copy / name).open("a") as file:
        file.write("# a mended fault\n")
    assert (sources.digest(copy) != before) is counts


@pytest.mark.parametrize("name", ["text_swiglu", "vlm_clip_hf"])
def test_every_module_that_runs_in_a_conversion_counts(tmp_path: Path, name: str) -> None:
    code = (
        "import sys; from pathlib import Path; from ghostvis_cli.checkpoint import locate;"
        "from ghostvis_cli.convert import run; from ghostvis_cli.convert.plan import ConvertSettings, make_plan;"
        f"checkpoint = locate.from_path(Path({str(Reference(name).checkpoint().path)!r}));"
        "plan = make_plan(checkpoint, ConvertSettings());"
        f"run.run(plan, Path({str(tmp_path / 'out')!r}), run.Progress(1));"
        "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('ghostvis_cli.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    ran = {Path(file) for file in done.stdout.split() if not file.endswith("__init__.py")}
    assert len(ran) > 20
    assert ran - set(sources.sources()) == set()


def test_a_damaged_entry_is_made_again(checkpoint, tmp_path: Path) -> None:
    base, listener = tmp_path / "cache", Listener()
    place = cache.converted(checkpoint, "float32", None, report=Listener(), base=base)
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(b"\0" * len(whole))
    cache.converted(checkpoint, "float32", None, report=listener, base=base)
    assert listener.said("was changed since it was converted (model.safetensors)")
    assert (place / "model.safetensors").read_bytes() == whole


def test_a_run_waits_for_the_one_that_converts_and_says_so(checkpoint, tmp_path: Path) -> None:
    base, listener = tmp_path / "cache", Listener()
    place = cache.converted(checkpoint, "float32", None, report=Listener(), base=base)
    with FileLock(place.with_name(f".{place.name}.lock")):
        waiting = threading.Thread(
            target=cache.converted,
            args=(checkpoint, "float32", None),
            kwargs={"report": listener, "base": base},
        )
        waiting.start()
        while not listener.said("another run is converting"):
            assert waiting.is_alive()
            time.sleep(0.01)
    waiting.join(60)
    assert not waiting.is_alive()
    assert not listener.said("once")


def test_a_killed_conversion_leaves_nothing_that_would_be_used(checkpoint, tmp_path: Path) -> None:
    """Killed while its files are being written; the next run converts, and clears the rest away."""
    base = tmp_path / "cache"
    code = (
        "import os; from pathlib import Path; from ghostvis_cli.checkpoint import locate;"
        "from ghostvis_cli.convert import cache, run;"
        "run.Progress.wrote = lambda self, nbytes: os.kill(os.getpid(), 9);"
        f"cache.converted(locate.from_path(Path({str(checkpoint.path.parent)!r})), 'float32', None,"
        f" report=print, base=Path({str(base)!r}))"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert killed.returncode == -9
    assert all(entry.startswith(".") for entry in entries(base))
    left = [entry for entry in base.iterdir() if entry.is_dir()]
    place = cache.converted(checkpoint, "float32", None, report=Listener(), base=base)
    assert entries(base) == [place.name]
    for directory in left:  # of another checkpoint: gone as well, where nothing has to be converted
        directory.with_name(f".x{directory.name}").mkdir()
    assert cache.converted(checkpoint, "float32", None, report=Listener(), base=base) == place
    assert left and entries(base) == [place.name]


def test_what_is_missing_of_a_checkpoint_is_told_as_ever(checkpoint, tmp_path: Path) -> None:
    checkpoint.meta_path.unlink()
    with pytest.raises(ModelError, match="meta"):
        cache.converted(checkpoint, "float32", None, report=Listener(), base=tmp_path / "cache")


def test_a_full_disk_is_told_with_the_cache_to_empty(
    checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SMALL_FILES_BYTES", 10**18)  # more than any disk has
    with pytest.raises(OutputError, match="GB free") as caught:
        cache.converted(checkpoint, "float32", None, report=Listener(), base=tmp_path / "cache")
    assert "GHOSTVIS_CACHE_DIR" in str(caught.value.hint)


def test_a_converted_directory_is_used_as_it_is(
    checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GHOSTVIS_CACHE_DIR", str(tmp_path / "cache"))
    listener = Listener()
    place = converted(checkpoint, tmp_path / "mine")
    named = ModelSettings(checkpoint_path=str(place))
    assert cache.for_model(named, "bfloat16", report=listener) == place
    assert listener.said("is not verified")
    assert not listener.said("changed")
    (place / "generation_config.json").write_text("{}")
    cache.for_model(named, "bfloat16", report=listener)
    assert listener.said("was changed since it was converted: generation_config.json")
    (place / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model\.safetensors"):
        cache.for_model(named, "bfloat16", report=listener)


def test_a_directory_of_another_layout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOSTVIS_CACHE_DIR", str(tmp_path / "cache"))
    place = converted(Reference("vlm_clip_hf").checkpoint(), tmp_path / "mine", layout="inline")
    with pytest.raises(ModelError, match="converted for the layout inline"):
        cache.for_model(
            ModelSettings(checkpoint_path=str(place), layout="prepend"), "float32", report=Listener()
        )


def test_a_file_is_hashed_once_and_again_when_it_changed(tmp_path: Path) -> None:
    path, index = tmp_path / "weights", tmp_path / "hashes.json"
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    known = KnownHashes(index, Listener())
    first = known.of(path)
    known.save()
    again = KnownHashes(index, Listener())
    assert again.of(path) == first
    path.write_bytes(b"two")
    os.utime(path, (1, 1))  # the time as before: the inode's own time tells
    assert again.of(path) != first


def test_a_damaged_index_costs_time_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "hashes.json").write_text("[half a li")
    (tmp_path / "weights").write_bytes(b"one")
    assert len(KnownHashes(tmp_path / "hashes.json", Listener()).of(tmp_path / "weights")) == 64


def test_nothing_half_written_counts_as_an_entry(tmp_path: Path) -> None:
    with staging.staged(tmp_path / "entry", 0) as directory:
        (directory / "config.json").write_text("{}")
        assert not is_converted(tmp_path / "entry")
