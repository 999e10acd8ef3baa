"""What the wheel puts below share/: made of the commands' help, and fit for who reads it."""

import shutil
import subprocess

import pytest

from tools.shipped import SHARE, files

FILES = dict(files())


@pytest.mark.parametrize("name", FILES)
def test_man_page_and_completions_are_those_of_the_commands(name: str) -> None:
    assert (SHARE / name).read_text() == FILES[name], "make docs writes it"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_reads_its_completions_without_a_fault(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (name,) = [name for name in FILES if name.startswith(shell)]
    done = subprocess.run([shell, "-n", SHARE / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
