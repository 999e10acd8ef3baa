"""Where configuration, state and cache lie, on each system."""

import os
import sys
from pathlib import Path

import pytest

from ghostvis_cli import paths
from ghostvis_cli.chat.store import SessionStore
from ghostvis_cli.doctor.machine import directories


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_doctor_names_the_directories_that_chat_and_convert_use(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ghostvis_cli.convert import cache

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("GHOSTVIS_CONFIG_DIR", "GHOSTVIS_STATE_DIR", "GHOSTVIS_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, _ in paths.PLACES.values():
        monkeypatch.delenv(name, raising=False)
    told = {finding.name: finding.message.split(" (made")[0] for finding in directories()}
    assert SessionStore.of_user().directory == Path(told["state"], "chats")
    assert cache.default_base() == Path(told["cache"], "converted")
    assert told["config"] == str(tmp_path / ".config/ghostvis")
    below_home = "Library/Caches" if system == "darwin" else ".cache"
    assert told["cache"] == str(tmp_path / below_home / "ghostvis")


@pytest.mark.parametrize("kind", paths.PLACES)
def test_a_variable_of_ours_beats_xdg_which_beats_the_home(kind: paths.Kind, tmp_path: Path) -> None:
    xdg, below_home = paths.PLACES[kind]
    env = {"HOME": str(tmp_path)}
    assert paths.directory(kind, env) == tmp_path / below_home / "ghostvis"
    assert paths.directory(kind, env | {xdg: "relative"}) == tmp_path / below_home / "ghostvis"
    env |= {xdg: "/xdg"}
    assert paths.directory(kind, env) == Path("/xdg/ghostvis")
    assert paths.directory(kind, env | {paths.variable(kind): "/own"}) == Path("/own")


def test_without_a_home_there_is_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # an account without an entry in passwd
    assert [paths.directory(kind, {}) for kind in paths.PLACES] == [None, None, None]
