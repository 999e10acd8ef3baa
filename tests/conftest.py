"""What several test folders share: where the recorded references are, and a clean environment."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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

    def checkpoint(self):
        from ghostvis_cli.checkpoint import locate

        return locate.find(self.base_dir, self.source)

    def load(self):
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


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees the developer's own profiles, checkpoints or colours."""
    empty = tmp_path_factory.getbasetemp() / "nobody"
    for name in ("NO_COLOR", "FORCE_COLOR", "GHOSTVIS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(empty / "nanochat"))
    monkeypatch.setenv("GHOSTVIS_CONFIG_DIR", str(empty / "config"))
