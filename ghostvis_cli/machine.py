"""How much memory this process may take."""

from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    total_bytes: int
    available_bytes: int


def read_memory() -> Memory | None:
    """What this process may still take: the machine's, or its container's where that is less."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {
            name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)
        }
        machine = Memory(sizes["MemTotal"], sizes["MemAvailable"])
    except (OSError, ValueError, KeyError, IndexError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # ValueError where it is "max"
        used = int((group / "memory.current").read_text()) - _reclaimable(group / "memory.stat")
    except (OSError, ValueError):
        return machine
    return Memory(min(machine.total_bytes, limit), max(0, min(machine.available_bytes, limit - used)))


def _reclaimable(stat: Path) -> int:
    """Bytes of cached files, which count as used and are given up when memory is needed."""
    rows = (line.split() for line in stat.read_text().splitlines())
    return next((int(row[1]) for row in rows if row[0] == "inactive_file"), 0)
