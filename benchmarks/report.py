"""What every benchmark says about where it ran, and how it sums up repeated pairs."""

import argparse
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a program's own docstring."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def machine() -> str:
    """One line: processor, cores, Python and the versions that matter."""
    model = platform.processor() or platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    import os

    packages = " ".join(f"{name} {_version(name)}" for name in ("ghostvis-cli", "torch", "transformers"))
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of repeated measurements."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def show(self, digits: int = 2, unit: str = "") -> str:
        low, high = min(self.values), max(self.values)
        return f"{self.median:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f}, n={len(self.values)})"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"
