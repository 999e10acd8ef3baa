"""The local engine: PyTorch in this process. Small, and the reference for every other engine."""

from ghostvis_cli.engines.local.engine import LocalEngine, LocalSettings

__all__ = ["LocalEngine", "LocalSettings"]
