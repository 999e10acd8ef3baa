"""Paths as people type them."""

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """`~` and `~user` made into directories; left as they are where there is no such home (pathlib raises)."""
    return Path(os.path.expanduser(path))  # noqa: PTH111
