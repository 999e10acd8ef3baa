"""What the tests' own conftest promises: no test depends on the developer's settings, and every skip is counted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "GHOSTVIS_BASE_URL": "http://127.0.0.1:9",
    "GHOSTVIS_STOP": "a",
    "NANOCHAT_BASE_DIR": "/mnt/theirs",
    "XDG_CONFIG_HOME": "/mnt/theirs",
    "XDG_STATE_HOME": "/mnt/theirs",
    "XDG_CACHE_HOME": "/mnt/theirs",
    **dict.fromkeys(("HTTPS_PROXY", "http_proxy", "All_Proxy", "NO_PROXY"), "http://127.0.0.1:9"),
}
SHOWN = """
import os, subprocess, sys
from pathlib import Path

import pytest

def seen():
    command = [sys.executable, "-c", "import os, pathlib; print(pathlib.Path.home(), *os.environ)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

@pytest.fixture(scope="session")
def early():
    return seen()

def test_what_a_process_sees(early):
    for home, *names in (early, seen()):
        assert Path(home) == Path.home() != Path("/mnt/theirs")
        assert not {*names} & {*SETTINGS}

@pytest.mark.parametrize("case", range(3))
def test_on_a_device(case):
    pytest.skip("needs a device")

@pytest.mark.skip(reason="needs a gateway")
def test_behind_a_gateway(): ...

def test_with_a_library():
    pytest.importorskip("no_such_library")
"""


@pytest.fixture(scope="module", params=["in one process", "in two"])
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The words of pytest over the tests above, started by a developer with settings of their own."""
    file = tmp_path_factory.mktemp("tests") / "test_shown.py"
    file.write_text(f"SETTINGS = {[*SETTINGS]}\n{SHOWN}")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "pyproject.toml",
        "-p",
        "tests.conftest",
        str(file),
    ]
    env = os.environ | SETTINGS | {"HOME": "/mnt/theirs"}
    workers = ["-n", "2"] if request.param == "in two" else []
    done = subprocess.run([*command, *workers], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_test_and_no_process_of_a_test_sees_the_developers_settings(said: str) -> None:
    assert "1 passed" in said


def test_skips_are_counted_by_their_reason(said: str) -> None:
    counted = [line for line in said.splitlines() if line.startswith("skipped ")]
    assert counted == [
        "skipped 1: could not import 'no_such_library': No module named 'no_such_library'",
        "skipped 3: needs a device",
        "skipped 1: needs a gateway",
    ]
