"""What several test folders share: the recorded references, an environment of the tests' own, skips by reason."""

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.load import LoadedModel
    from ghostvis_cli.checkpoint.locate import Checkpoint

DATA = Path(__file__).parent / "data"
STAGES = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
SOURCE_OF = {"text_swiglu": "base", "text_relu2_nano1_pad": "base", "vlm_clip_hf": "sft"}


class Reference:
    """One recorded case: the checkpoint directory and what the reference implementation said about it."""

    def __init__(self, case: str | Path) -> None:
        self.case, self.base_dir = Path(case).name, DATA / case
        self.source = SOURCE_OF.get(self.case) or next(
            s for s in STAGES if (self.base_dir / STAGES[s]).is_dir()
        )
        self.facts: Mapping[str, Any] = json.loads((self.base_dir / "reference.json").read_text())
        self.arrays = np.load(self.base_dir / "reference.npz")

    def checkpoint(self) -> "Checkpoint":
        from ghostvis_cli.checkpoint import locate

        return locate.find(self.base_dir, self.source)

    def load(self) -> "LoadedModel":
        from ghostvis_cli.checkpoint.load import load_model

        return load_model(self.checkpoint())

    def greedy(self, name: str) -> list[int]:
        greedy = self.facts["greedy"]
        return greedy.get("fp32", greedy)[name]


@pytest.fixture(scope="session", params=["text_swiglu", "text_relu2_nano1_pad"])
def text_reference(request: pytest.FixtureRequest) -> Reference:
    return Reference(request.param)


@pytest.fixture(scope="session")
def vlm_reference() -> Reference:
    return Reference("vlm_clip_hf")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to be in, with a home, settings, state and caches of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("config", "state", "cache"):
        monkeypatch.setenv(f"GHOSTVIS_{name.upper()}_DIR", str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What a developer may have set for their own use of the program. Child processes must not see it either.
DEVELOPERS = re.compile(r"GHOSTVIS_.*|NANOCHAT_BASE_DIR|XDG_.*|NO_COLOR|FORCE_COLOR|.*_PROXY", re.IGNORECASE)


def pytest_configure(config: pytest.Config) -> None:
    """A home of the tests' own, before any module is imported: configuration, state and caches lie below it."""
    home = TemporaryDirectory(prefix="ghostvis-tests-")
    config.add_cleanup(home.cleanup)
    for name in filter(DEVELOPERS.fullmatch, list(os.environ)):
        del os.environ[name]
    os.environ["HOME"] = home.name
    _heed_signals()
    if find_spec("hypothesis"):
        from hypothesis import settings

        settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
        settings.load_profile("untimed")


def _heed_signals() -> None:
    """Under nohup, or in a script's background, signals come in ignored: child processes would inherit that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason to skip, since a skip is a promise that nobody checked."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, times in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {times}: {reason.removeprefix('Skipped: ')}")
