"""The limit that `ulimit -v` sets. Native libraries that reach it end the process, so what can't fit is refused."""

import os
import resource
from contextlib import suppress
from pathlib import Path

from ghostvis_cli import sizes
from ghostvis_cli.errors import MemoryLimitError

TORCH_BYTES = 800 * 10**6  # that the libraries of a CPU build take, and a little to work in
M_ARENA_MAX = -8  # of glibc
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def spare() -> None:
    """One thread for each library: more take their share of the space, and OpenMP exits where none is left."""
    if _limit() is None:
        return
    for name in THREADS:
        os.environ.setdefault(name, "1")
    with suppress(OSError, AttributeError):  # another C library
        import ctypes

        # One heap for all threads, each of which reserves 64 MiB otherwise.
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def require_for_torch() -> None:
    """MemoryLimitError where its libraries do not fit."""
    limit = _limit()
    if limit is None:
        return
    with suppress(OSError):  # no /proc
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if limit - taken < TORCH_BYTES:
            left = f"{sizes.shown(limit - taken)} of address space are left"
            raise MemoryLimitError(
                f"out of memory: {left}, and torch needs more than {sizes.shown(TORCH_BYTES)}",
                hint="ulimit -v unlimited, or --base-url of a server elsewhere",
            )


def _limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit
