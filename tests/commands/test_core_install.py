"""The wheel in an environment of its own, without extras: what a remote client gets from `pip install`."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from ghostvis_cli import demo
from ghostvis_cli.cli.registry import COMMANDS
from tests.commands.processes import environment
from tests.engines.serving import running

ROOT = Path(__file__).parents[2]
SOURCES = ("ghostvis_cli", "commands", "profiles", "share", "pyproject.toml", "README.md", "LICENSE")
PACKAGING = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
RED = Path(demo.__file__).with_name("red-circle.png")
NO_INDEX = re.compile(
    r"NewConnection|NameResolution|ProxyError|ConnectTimeout|ReadTimeout|Network is unreach|SSLError"
)
INSTALL_S = 180.0  # on a busy machine and with an empty cache; some 15 s otherwise

pytestmark = pytest.mark.slow


def pip(*args: str | Path) -> None:
    """Skips the test, with pip's words, where there is no package index to install from."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, args), "--retries", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    if done.returncode and (reason := NO_INDEX.search(done.stdout + done.stderr)):
        pytest.skip(f"no package index can be reached: {reason[0]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a folder `build` in the tree, left by an earlier build, would lend its files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, copy = ROOT / name, folder / "source" / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    pip("wheel", "--no-deps", "--wheel-dir", folder, folder / "source")
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a clean virtual environment that holds the wheel and what it cannot do without."""
    folder = tmp_path_factory.mktemp("core") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip("--python", folder / "bin" / "python", "install", "-c", ROOT / "constraints.txt", wheel)
    return folder


def ghostvis(installed: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = environment(PATH=f"{installed / 'bin'}:/usr/bin:/bin", PYTHONPATH=None)
    command = [str(installed / "bin" / "ghostvis"), *args]
    return subprocess.run(
        command, cwd=installed, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_the_wheel_holds_every_file_of_every_package_and_nothing_else(wheel: Path) -> None:
    expected = set()
    for package in PACKAGING["packages"]:
        folder = Path(*package.split("."))
        source = ROOT / PACKAGING["package-dir"].get(package, folder)
        found = [path for path in source.iterdir() if path.is_file() and path.name[0] != "."]
        if package == "ghostvis_cli.demo":
            found += [path for path in (source / "base").rglob("*") if path.is_file()]
        expected |= {str(folder / path.relative_to(source)) for path in found}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = {name.partition(".data/data/")[2] for name in inside if ".data/data/" in name}
    assert data == {str(path.relative_to(ROOT)) for path in (ROOT / "share").rglob("*") if path.is_file()}
    names = {name for name in inside if ".data/" not in name}
    assert names == expected
    kinds = (
        "ghostvis_cli/py.typed",
        "ghostvis_cli/profiles/default.yaml",
        "ghostvis_cli/demo/red-circle.png",
    )
    assert names.issuperset(kinds) and any(name.endswith(".pt") for name in names)


def test_without_extras_no_framework_is_on_disk(installed: Path) -> None:
    [packages] = installed.glob("lib/python*/site-packages")
    names = {path.name for path in packages.iterdir()}
    assert names.isdisjoint(
        {"torch", "numpy", "transformers", "safetensors", "starlette", "openai", "sglang"}
    )
    assert "ghostvis_cli" in names


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--help"], "generate"),
        (["--version"], "ghostvis"),
        *(([command.name, "--help"], "Options:") for command in COMMANDS),
        (["profile", "list"], "sglang"),
        (["profile", "show", "remote"], "base_url"),
        (["profile", "validate"], ""),
    ],
    ids=str,
)
def test_without_extras_what_runs_no_model_works(args: list[str], words: str, installed: Path) -> None:
    done = ghostvis(installed, *args)
    assert (done.returncode, words in done.stdout) == (0, True), done.stderr


def test_without_extras_a_server_is_asked_about_an_image(installed: Path) -> None:
    with running() as server:
        done = ghostvis(installed, "generate", "--base-url", server.url, "-i", str(RED), "What is it?")
    assert (done.returncode, done.stdout.strip()) == (0, "What is it?"), done.stderr


@pytest.mark.parametrize("command", [["generate", "hi"], ["serve", "--port", "0"]], ids=" ".join)
def test_without_extras_a_model_here_is_refused_with_what_to_install(
    command: list[str], installed: Path
) -> None:
    done = ghostvis(installed, *command, "--engine", "local", "--source", "demo")
    assert done.returncode == 5 and "Traceback" not in done.stderr
    assert "pip install 'ghostvis-cli[" in done.stderr
