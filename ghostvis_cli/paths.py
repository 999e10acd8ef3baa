"""Paths as people type them, and the directories that are ours: configuration, state and cache."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["config", "state", "cache"]
# Variable of the XDG specification, and the place below the home directory without it. What people edit or
# copy between machines lies in the same place on macOS; what may be deleted lies where macOS keeps it.
PLACES: Mapping[Kind, tuple[str, str]] = {
    "config": ("XDG_CONFIG_HOME", ".config"),
    "state": ("XDG_STATE_HOME", ".local/state"),
    "cache": ("XDG_CACHE_HOME", ".cache"),
}
ON_MACOS: Mapping[Kind, str] = {"cache": "Library/Caches"}


def expanded(path: str | os.PathLike[str]) -> Path:
    """`~` and `~user` made into directories; left as they are where there is no such home (pathlib raises)."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def is_file(path: str) -> bool:
    """Whether a file has that name, `~` included; False too for what can be no name."""
    try:
        return expanded(path).is_file()
    except (OSError, ValueError):
        return False


def home(env: Mapping[str, str] = os.environ) -> Path | None:
    """The home directory; None where there is none, as under some services."""
    found = Path(env.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111 - Path.home() raises without one
    return found if found.is_absolute() else None


def config_dir(env: Mapping[str, str] = os.environ) -> Path | None:
    """GHOSTVIS_CONFIG_DIR, $XDG_CONFIG_HOME/ghostvis, ~/.config/ghostvis; None where there is no home."""
    return directory("config", env)


def state_dir(env: Mapping[str, str] = os.environ) -> Path | None:
    """GHOSTVIS_STATE_DIR, $XDG_STATE_HOME/ghostvis, ~/.local/state/ghostvis; None where there is no home."""
    return directory("state", env)


def cache_dir(env: Mapping[str, str] = os.environ) -> Path | None:
    """GHOSTVIS_CACHE_DIR, $XDG_CACHE_HOME/ghostvis, ~/.cache/ghostvis (macOS: ~/Library/Caches/ghostvis)."""
    return directory("cache", env)


def directory(kind: Kind, env: Mapping[str, str] = os.environ) -> Path | None:
    """Our directory of one kind, from our variable, XDG's or the home; None without a home."""
    if own := env.get(variable(kind)):
        return expanded(own)
    xdg, below_home = PLACES[kind]
    if (chosen := Path(env.get(xdg, ""))).is_absolute():  # the specification ignores other values
        return chosen / "ghostvis"
    if sys.platform == "darwin":
        below_home = ON_MACOS.get(kind, below_home)
    return where / below_home / "ghostvis" if (where := home(env)) else None


def variable(kind: Kind) -> str:
    """The environment variable that moves this directory."""
    return f"GHOSTVIS_{kind.upper()}_DIR"
