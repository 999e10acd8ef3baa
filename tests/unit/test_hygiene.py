"""What a start costs and imports, and that the tables of commands and packages match the disk."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ghostvis_cli.cli.registry import COMMANDS
from tests.engines.serving import running

ROOT = Path(__file__).parents[2]
GHOSTVIS = str(Path(sys.executable).with_name("ghostvis"))
TOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
PACKAGING = TOOLS["setuptools"]
HEAVY = {
    *("torch", "sglang", "transformers", "PIL", "prompt_toolkit", "httpx2", "pydantic"),
    *("numpy", "yaml", "rich", "starlette", "uvicorn", "tiktoken", "tokenizers", "safetensors"),
    *("llguidance", "filelock", "packaging", "prometheus_client", "openai", "click"),
    *("huggingface_hub", "tqdm"),
}
NAMES = [command.name for command in COMMANDS]


def completing(line: str) -> dict[str, str]:
    """What a shell sets to ask for completions of the last word of `line`."""
    return {"_GHOSTVIS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}


STARTS = {
    "--version": (["--version"], {}),
    "--help": (["--help"], {}),
    "completion": ([], completing("ghostvis ge")),
    "completion of options": ([], completing("ghostvis generate --ma")),
    **{f"{name} --help": ([name, "--help"], {}) for name in NAMES},
}


def started(args: list[str], env: dict[str, str], *python: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, GHOSTVIS, *args]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True)


def imported(start: str) -> set[str]:
    args, env = STARTS[start]
    names = set(re.findall(r"^import '(\S+)' #", started(args, env, "-v").stderr, re.MULTILINE))
    assert "ghostvis_cli.cli.app" in names
    return names


@pytest.mark.parametrize("start", STARTS)
def test_a_start_imports_nothing_heavy_and_no_command_but_its_own(start: str) -> None:
    names = imported(start)
    assert not HEAVY & {name.partition(".")[0] for name in names}
    commands = {name for name in names if name.startswith("ghostvis_cli.commands.")}
    name = "generate" if start == "completion of options" else start.removesuffix(" --help")
    # bench_prefix is a part of bench.
    own = {each.rpartition(".")[2].partition("_")[0] for each in commands}
    assert own == {c.module for c in COMMANDS if c.name == name}


def test_only_openais_bodies_cost_the_import_of_pydantic(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    openai = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "two"}}
    with running() as server:
        ask = ["generate", "--base-url", server.url]
        for row, needed in (({"prompt": "one"}, False), (openai, True)):
            rows.write_text(json.dumps(row))
            done = started([*ask, "--input", str(rows)], {}, "-v")
            assert json.loads(done.stdout)["finish_reason"] == "stop"
            assert ("import 'pydantic'" in done.stderr) == needed
        assert "import 'pydantic'" not in started([*ask, "Hello"], {}, "-v").stderr


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ghostvis ", NAMES),
        ("ghostvis ge", ["generate"]),
        ("ghostvis profile s", ["show"]),
        ("ghostvis generate --lo", ["--logprobs", "--lock", "--log-file"]),
        ("ghostvis nonsense --", []),
    ],
)
def test_a_shell_completes_commands_and_their_options(line: str, offered: list[str]) -> None:
    done = started([], completing(line))
    assert (sorted(done.stdout.split()), done.stderr) == (sorted(offered), "")


def test_every_command_of_the_table_is_a_module_and_every_module_is_in_the_table() -> None:
    names = {file.stem for file in (ROOT / "commands").glob("*.py")} - {"__init__"}
    on_disk = {name for name in names if "_" not in name}  # bench_prefix is a part of bench
    assert {command.module for command in COMMANDS} == on_disk
    assert len(set(NAMES)) == len(NAMES)


def test_only_the_one_writer_replaces_files() -> None:
    """A log, a journal and shards of weights are streams, opened where they are written."""
    others = re.compile(r"write_text|write_bytes|os\.(rename|replace)\(|mkstemp|NamedTemporaryFile")
    sources = [*(ROOT / "ghostvis_cli").rglob("*.py"), *(ROOT / "commands").glob("*.py")]
    found = {file.name for file in sources if others.search(file.read_text())}
    assert found == set()


def test_the_list_of_packages_is_what_is_on_the_disk() -> None:
    mapped = {path: name for name, path in PACKAGING["package-dir"].items()}
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "ghostvis_cli").rglob("*.py")}
    folders |= {Path(path) for path in mapped}
    found = {mapped.get(str(folder), ".".join(folder.parts)) for folder in folders}
    assert sorted(found) == PACKAGING["packages"]


def test_the_type_checker_reads_every_folder_of_code() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    assert {Path(line).parts[0] for line in listed.stdout.splitlines()} == set(TOOLS["mypy"]["files"])


def test_every_file_that_is_no_module_is_package_data() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "ghostvis_cli", "profiles"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    covered = {
        file
        for package, patterns in PACKAGING["package-data"].items()
        for pattern in patterns
        for file in _folder(package).glob(pattern)
    }
    files = {ROOT / line for line in listed.stdout.splitlines()}
    assert not {file for file in files if file.suffix != ".py" and file.is_file()} - covered


def _folder(package: str) -> Path:
    return ROOT / PACKAGING["package-dir"].get(package, package.replace(".", "/"))
