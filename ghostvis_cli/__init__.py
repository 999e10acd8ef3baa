"""GhostVis command-line toolkit: the public Python API, resolved on first use so that imports stay cheap."""

from ghostvis_cli.version import __version__ as __version__

TYPE_CHECKING = False  # typing takes milliseconds of every start
if TYPE_CHECKING:
    from typing import Any

    from ghostvis_cli.api import GhostVisSGLangEngine, create_sglang_engine

__all__ = ["GhostVisSGLangEngine", "__version__", "create_sglang_engine"]


def __getattr__(name: str) -> "Any":
    if name in ("GhostVisSGLangEngine", "create_sglang_engine"):
        from ghostvis_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
