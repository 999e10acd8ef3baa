"""Models by name, from a hub of the tests' own: what is fetched, continued, found offline, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ghostvis_cli.checkpoint.hub import Reference
from ghostvis_cli.errors import UsageError
from tests.commands.processes import GHOSTVIS, PATIENCE_S
from tests.conftest import Reference as Recorded
from tests.convert.conversions import converted
from tests.hubs import COMMIT, Hub, Repository, running

pytest.importorskip("huggingface_hub")
NAME = "owner/nano-d4"
Done = subprocess.CompletedProcess[str]
ASK = ("generate", "Hi", "--temperature", "0", "--max-tokens", "4", "--json")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture
def flat(hub: Hub, tmp_path: Path) -> Path:
    """A repository as nanochat's are: all in one folder, with what only training needs."""
    folder = tmp_path / "flat"
    folder.mkdir()
    checkpoint = Recorded("text_relu2_nano1_pad").checkpoint()
    for step in (100, 20):
        shutil.copy(checkpoint.path, folder / f"model_{step:06d}.pt")
        shutil.copy(checkpoint.meta_path, folder / f"meta_{step:06d}.json")
        (folder / f"optim_{step:06d}_rank0.pt").write_bytes(b"of no use here")
    shutil.copy(checkpoint.tokenizer_path, folder)
    (folder / "token_bytes.pt").write_bytes(b"bytes")
    (folder / "README.md").write_text("a model")
    hub.repositories[NAME] = Repository(folder)
    return folder


def environment(hub: Hub, tmp_path: Path, **more: str) -> dict[str, str]:
    return os.environ | hub.env | {"HF_HOME": str(tmp_path / "hf")} | more


def run(hub: Hub, tmp_path: Path, *args: object, **env: str) -> Done:
    command = [GHOSTVIS, *map(str, args)]
    return subprocess.run(
        command, env=environment(hub, tmp_path, **env), capture_output=True, text=True, timeout=PATIENCE_S
    )


def listed(hub: Hub, tmp_path: Path, *args: str, **env: str) -> Done:
    """The cheapest command that needs all files of a checkpoint on the disk."""
    return run(hub, tmp_path, "convert", "--dry-run", "--json", "--hf", NAME, *args, **env)


# --- names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("o/n", ("o/n", "main", "")),
        ("hf://o/n", ("o/n", "main", "")),
        ("o/n@v1.0", ("o/n", "v1.0", "")),
        ("o/n@refs/pr/3:d32", ("o/n", "refs/pr/3", "d32")),
        ("karpathy/nanochat-d32:a/model_000650.pt", ("karpathy/nanochat-d32", "main", "a/model_000650.pt")),
    ],
)
def test_a_name_has_an_owner_and_may_have_a_revision_and_a_path(text: str, parts: tuple[str, ...]) -> None:
    found = Reference.parse(text)
    assert (found.repo, found.revision, found.path) == parts


@pytest.mark.parametrize(
    "text", ["", "gpt2", "o/n/x", "o/n@", "o/n:", "o/n:../x", "o/n:/etc", "o n/x", "https://h/o/n"]
)
def test_what_is_no_name_is_a_fault_of_usage(text: str) -> None:
    with pytest.raises(UsageError, match="names no model of a hub"):
        Reference.parse(text)


# --- what is fetched


def test_a_flat_repository_answers_like_its_files_and_is_fetched_once(
    hub: Hub, flat: Path, tmp_path: Path
) -> None:
    first = run(hub, tmp_path, *ASK, "--hf", NAME)
    assert first.returncode == 0, first.stderr
    assert f"downloading {NAME}: 1.20 MB in 4 files" in first.stderr
    needed = ["meta_000100.json", "model_000100.pt", "token_bytes.pt", "tokenizer.pkl"]
    assert sorted(hub.downloads()) == needed
    original = run(hub, tmp_path, *ASK, "--checkpoint-path", flat)
    answer, other = json.loads(first.stdout), json.loads(original.stdout)
    assert answer["token_ids"] == other["token_ids"]
    assert (answer["model"]["tag"], answer["model"]["step"]) == ("nano-d4", 100)
    again = run(hub, tmp_path, *ASK, "--checkpoint-path", f"hf://{NAME}")
    assert json.loads(again.stdout)["token_ids"] == answer["token_ids"] and again.stderr == ""
    assert len(hub.downloads()) == len(needed)


def test_a_step_a_revision_and_a_file_can_be_named(hub: Hub, flat: Path, tmp_path: Path) -> None:
    for args in (
        ("--step", "20"),
        ("--hf", f"{NAME}:model_000020.pt"),
        ("--hf", f"{NAME}@{COMMIT}:model_000020.pt"),
    ):
        done = listed(hub, tmp_path, *args)
        assert done.returncode == 0, done.stderr
    assert "model_000100.pt" not in hub.downloads() and hub.downloads().count("model_000020.pt") == 1
    missing = listed(hub, tmp_path, "--step", "7")
    assert (
        missing.returncode == 4 and f"no step 7 in {NAME}" in missing.stderr and "20, 100" in missing.stderr
    )


def test_a_base_directorys_layout_is_searched_by_source_and_tag(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(Recorded("vlm_clip_hf").base_dir, folder)
    hub.repositories[NAME] = Repository(folder)
    found = listed(hub, tmp_path)
    assert found.returncode == 0, found.stderr
    needed = ["meta_000650.json", "model_000650.pt", "token_bytes.pt", "tokenizer.pkl"]
    assert sorted(hub.downloads()) == needed
    refused = listed(hub, tmp_path, "--source", "rl")
    assert refused.returncode == 4 and f"no rl checkpoint under {NAME}" in refused.stderr
    assert "--source sft --model-tag" in refused.stderr


def test_a_converted_directory_is_fetched_whole_and_no_other_code_with_it(hub: Hub, tmp_path: Path) -> None:
    folder = converted(Recorded("n3_window").checkpoint(), tmp_path / "in" / "n3", max_shard_bytes=200_000)
    (folder / "setup.py").write_text("raise SystemExit('ran')")
    (folder / "pytorch_model.bin").write_bytes(b"a copy in another format")
    hub.repositories[NAME] = Repository(folder.parent)
    done = run(hub, tmp_path, *ASK, "--hf", f"{NAME}:n3")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["step"] == Recorded("n3_window").checkpoint().step
    assert not {"setup.py", "pytorch_model.bin"} & set(hub.downloads())
    hinted = run(hub, tmp_path, *ASK, "--hf", NAME)
    assert hinted.returncode == 4 and f"there is: --hf {NAME}:n3" in hinted.stderr


def test_a_profile_names_a_model_of_a_hub(hub: Hub, flat: Path, tmp_path: Path) -> None:
    for setting in (f"hf: {NAME}", f"checkpoint_path: hf://{NAME}"):
        profile = tmp_path / "project" / "ghostvis.yaml"
        profile.parent.mkdir(exist_ok=True)
        profile.write_text(f"profiles: {{default: {{model: {{{setting}}}}}}}")
        done = subprocess.run(
            [GHOSTVIS, "convert", "--dry-run", "--json"],
            env=environment(hub, tmp_path),
            cwd=profile.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    typed = run(hub, tmp_path, "profile", "show", "--hf", NAME)
    assert typed.returncode in (0, 2)  # only commands that run a model have the option


def test_models_lists_steps_and_fetches_nothing(hub: Hub, flat: Path, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "models", "--hf", NAME, "--json")
    found = json.loads(done.stdout)["models"]
    assert [(each["step"], each["path"]) for each in found] == [
        (100, "model_000100.pt"),
        (20, "model_000020.pt"),
    ]
    assert found[0]["size_bytes"] == (flat / "model_000100.pt").stat().st_size
    assert hub.downloads() == []
    assert "model_000100.pt" in run(hub, tmp_path, "models", "--hf", NAME).stdout


def test_names_that_lead_out_of_a_repository_are_passed_over(hub: Hub, flat: Path, tmp_path: Path) -> None:
    hub.repositories[NAME].listed = (
        "../../model_000900.pt",
        "/model_000900.pt",
        "a/../../x",
        "a\\..\\x",
        "a//b",
    )
    done = listed(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.parent.rglob("model_000900.pt"))


@pytest.mark.parametrize("name", ["a" * 300, "model_000100.pt/x"])
def test_a_list_of_files_that_no_folder_can_hold_is_refused(
    name: str, hub: Hub, flat: Path, tmp_path: Path
) -> None:
    hub.repositories[NAME].listed = (name,)
    done = listed(hub, tmp_path)
    assert done.returncode == 4 and "a file that no folder can hold" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_downloads_nothing(hub: Hub, flat: Path, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "doctor", "--hf", NAME, "--json")
    assert hub.downloads() == [] and hub.asked == []
    assert "is not in the cache" in done.stdout


# --- interrupted, offline


def weights(folder: Path, nbytes: int = 30_000_000) -> Path:
    """Makes the newest step's file a larger one, which nothing can load."""
    path = folder / "model_000100.pt"
    path.write_bytes(os.urandom(1_000_000) * (nbytes // 1_000_000))
    return path


def blob(tmp_path: Path) -> Path:
    (found,) = [path for path in (tmp_path / "hf" / "hub").rglob("blobs/*") if path.stat().st_size > 10**7]
    return found


def on_disk(tmp_path: Path) -> int:
    """Bytes of downloads that are not whole yet."""
    return sum(path.stat().st_size for path in (tmp_path / "hf").rglob("*.ghostvis-part"))


def test_a_download_that_was_killed_goes_on_where_it_stopped(hub: Hub, flat: Path, tmp_path: Path) -> None:
    content = weights(flat).read_bytes()
    for _ in range(3):
        before = on_disk(tmp_path)
        with hub.pausing_after(5_000_000):
            process = subprocess.Popen(
                [GHOSTVIS, "convert", "--dry-run", "--hf", NAME],
                env=environment(hub, tmp_path),
                stderr=subprocess.DEVNULL,
            )
            deadline = time.monotonic() + PATIENCE_S
            while on_disk(tmp_path) < before + 2_000_000 and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
    listed(hub, tmp_path)
    assert blob(tmp_path).read_bytes() == content
    begins = [int(asked[6:-1]) for _, path, asked in hub.asked if asked and "model_" in path]
    assert begins == sorted(set(begins)) and begins[-1] >= 3_000_000
    assert [path.name for path in blob(tmp_path).parent.iterdir() if "part" in path.name] == []


def test_a_connection_that_ends_is_made_again(hub: Hub, flat: Path, tmp_path: Path) -> None:
    content = weights(flat).read_bytes()
    hub.cut_after = lambda: 11_000_000
    listed(hub, tmp_path)
    assert blob(tmp_path).read_bytes() == content
    assert hub.sent_bytes < len(content) * 1.3


def test_a_hub_that_does_not_continue_is_read_from_the_beginning(
    hub: Hub, flat: Path, tmp_path: Path
) -> None:
    content = weights(flat).read_bytes()
    cuts = iter((11_000_000, None))
    hub.cut_after, hub.ranges = lambda: next(cuts, None), False
    listed(hub, tmp_path)
    assert blob(tmp_path).read_bytes() == content


def test_what_arrived_damaged_is_refused_and_fetched_anew(hub: Hub, flat: Path, tmp_path: Path) -> None:
    content = weights(flat).read_bytes()
    tag = hub.repositories[NAME].tag("model_000100.pt")
    part = tmp_path / "hf" / "hub" / "models--owner--nano-d4" / "blobs" / f"{tag}.ghostvis-part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"not the beginning of it")
    damaged = listed(hub, tmp_path)
    assert damaged.returncode == 5 and "arrived damaged" in damaged.stderr
    listed(hub, tmp_path)
    assert blob(tmp_path).read_bytes() == content


def test_what_is_cached_answers_offline_and_what_is_not_is_told(hub: Hub, flat: Path, tmp_path: Path) -> None:
    refused = listed(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert refused.returncode == 5
    assert f"HF_HUB_OFFLINE is set, and {NAME} is not in the cache" in refused.stderr
    assert listed(hub, tmp_path).returncode == 0
    hub.asked.clear()
    offline = listed(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and hub.asked == []
    assert f"HF_HUB_OFFLINE is set: taking {NAME} from the cache" in offline.stderr
    nobody = listed(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert nobody.returncode == 0 and "the hub can't be reached" in nobody.stderr
    hub.repositories[NAME].status = 503
    assert listed(hub, tmp_path).returncode == 0


# --- refusals, in one line each


def refusal(done: Done, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    line, *rest = done.stderr.strip().split("\n")
    assert line.startswith("ghostvis: error: ") and all(word in line for word in words), line
    assert len(rest) <= 1 and all(each.startswith("hint: ") for each in rest)


@pytest.mark.parametrize(
    ("status", "error", "code", "words"),
    [
        (401, None, 4, ("401",)),
        (403, None, 4, ("403",)),
        (403, "GatedRepo", 4, ("gated",)),
        (404, "RepoNotFound", 4, ("private",)),
        (429, None, 5, ("429",)),
        (500, None, 5, ("500", "not in the cache")),
    ],
)
def test_a_hubs_refusal_is_one_line_with_its_code(
    status: int, error: str | None, code: int, words: tuple[str, ...], hub: Hub, flat: Path, tmp_path: Path
) -> None:
    hub.repositories[NAME].status, hub.repositories[NAME].error = status, error
    refusal(run(hub, tmp_path, "models", "--hf", NAME, HF_TOKEN="hf_wrong"), code, *words)


def test_a_private_repository_is_read_with_the_environments_token(
    hub: Hub, flat: Path, tmp_path: Path
) -> None:
    hub.repositories[NAME].token = "hf_secret"
    without = run(hub, tmp_path, "models", "--hf", NAME)
    refusal(without, 4, NAME, "private")
    assert "HF_TOKEN" in without.stderr
    done = listed(hub, tmp_path, HF_TOKEN="hf_secret")
    assert done.returncode == 0 and "hf_secret" not in done.stderr + done.stdout


def test_an_unknown_revision_and_an_unknown_path_are_named(hub: Hub, flat: Path, tmp_path: Path) -> None:
    refusal(run(hub, tmp_path, "models", "--hf", f"{NAME}@v9"), 4, "no revision v9")
    refusal(run(hub, tmp_path, "generate", "Hi", "--hf", f"{NAME}:d99"), 4, "d99")


def test_a_model_that_is_larger_than_the_disk_is_not_begun(hub: Hub, flat: Path, tmp_path: Path) -> None:
    os.truncate(flat / "model_000100.pt", 8 * 2**40)
    done = listed(hub, tmp_path)
    refusal(done, 1, "takes 8,796 GB", "left")
    assert "HF_HUB_CACHE" in done.stderr and hub.downloads() == []


def test_a_cache_that_can_not_be_written_is_named(hub: Hub, flat: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = listed(hub, tmp_path, HF_HUB_CACHE=str(tmp_path / "file" / "hub"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and str(tmp_path / "file") in done.stderr


def test_without_the_extra_the_command_that_brings_it_is_told(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['huggingface_hub'] = None; from ghostvis_cli.cli.app import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "models", "--hf", NAME],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    refusal(done, 5, "not installed")
    assert "ghostvis-cli[hub]" in done.stderr
