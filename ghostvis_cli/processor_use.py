"""How busy the processes of a server on this machine are, by /proc: the thread that fills a core limits the server.

On Linux only, and for processes that this user may inspect; of others nothing is found, and nothing is said.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ghostvis_cli.addresses import is_here

PROC = Path("/proc")
LISTENING = "0A"  # in /proc/net/tcp
FULL = 0.9  # of a core: a thread that runs, or waits for a core, as long as this does nothing else
CROWD = 2.5  # cores of a main process whose work is one thread's
SHORTEST_S = 0.3
SCHEDULER, DETOKENIZER, WORKER, MAIN, OTHER = (
    "scheduler", "detokenizer", "tokenizer worker", "main process", "other",
)  # fmt: skip
TITLES = {
    "sglang::sched": SCHEDULER,
    "sglang::detok": DETOKENIZER,
    "sglang::token": WORKER,
    "sglang::": OTHER,
}
# What runs it: a module, or the script `sglang`; not what lies in a folder of that name, such as .venv-sglang.
SGLANG = re.compile(r"^sglang\.\w|^ghostvis_cli\.sglang\.|(^|/)sglang$|/sglang/launch_server\.py$")
REPLICAS = "replicas (docs/scaling.md)"
FIXES = {
    MAIN: f"-- --tokenizer-worker-num 4, or {REPLICAS}",
    WORKER: f"more of them (-- --tokenizer-worker-num 8), or {REPLICAS}",
    DETOKENIZER: "answers in larger pieces (-- --stream-interval 8)",
    SCHEDULER: f"a GPU or a smaller model; {REPLICAS}",
}
LOCAL_FIX = f"SGLang on a GPU, or {REPLICAS}"


@dataclass(frozen=True)
class Use:
    """A process's use of cores over a time: of all threads together, and of the busiest one."""

    pid: int
    role: str
    cores: float
    busiest: float
    is_sglang: bool
    one_thread: bool = False  # OMP_NUM_THREADS=1
    has_gpu: bool = False

    @property
    def has_many_threads(self) -> bool:
        return self.is_sglang and self.cores > CROWD and not self.one_thread

    @property
    def waits_so(self) -> bool:
        """Whether the process busies a core even when idle, or while it waits for a GPU."""
        return self.role == OTHER or (self.role == SCHEDULER and self.has_gpu)


@dataclass(frozen=True)
class Limit:
    """What keeps a server from answering more, and what helps."""

    message: str
    fix: str


class Watch:
    """The processes behind a port of this machine, from now on."""

    def __init__(self, port: int) -> None:
        self._pids = with_children(listeners(port))
        self._before, self._since_s = _times(self._pids), time.monotonic()

    @property
    def sees(self) -> bool:
        return bool(self._before)

    def uses(self) -> list[Use]:
        """The use of each process until now; empty where too little time has passed."""
        wall_s, after = time.monotonic() - self._since_s, _times(self._pids)
        if wall_s < SHORTEST_S:
            return []
        return [use for pid in self._pids if (use := _use(pid, self._before, after, wall_s)) is not None]


def limit(uses: Iterable[Use]) -> Limit | None:
    """The process that fills a core, if one does."""
    known = list(uses)
    for use in sorted(known, key=lambda each: each.busiest, reverse=True):
        who = f"the server's {use.role} ({use.pid})"
        if use.role == MAIN and use.has_many_threads:
            message = f"{who} takes {use.cores:.1f} cores for what one thread does"
            return Limit(message, "OMP_NUM_THREADS=1 in its environment")
        if use.busiest >= FULL and not use.waits_so:
            message = f"{who} fills a core: no request gets faster beside others"
            return Limit(message, _fix(use, known) if use.is_sglang else LOCAL_FIX)
    return None


def _fix(use: Use, beside: Sequence[Use]) -> str:
    """What helps a process. More tokenizer workers do not help a main process that only passes on their results."""
    if use.role == MAIN and any(other.role == WORKER for other in beside):
        return REPLICAS
    return FIXES[use.role]


def local_port(url: str) -> int | None:
    """The port of a server on this machine, as far as its address tells."""
    if not is_here(url):
        return None
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def listeners(port: int) -> list[int]:
    """Processes that listen on a port."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    found = []
    for process in PROC.glob("[0-9]*") if sockets else ():
        with suppress(OSError):  # gone, or another user's
            if any(str(entry.readlink()) in sockets for entry in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


def _inodes(port: int) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def with_children(pids: Iterable[int]) -> list[int]:
    """The processes with all of their descendants."""
    children: dict[int, list[int]] = {}
    for process in PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            # Fields after the name, which may hold anything: state, parent.
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(process.name))
    found = list(dict.fromkeys(pids))
    for pid in found:  # grows meanwhile
        found += [child for child in children.get(pid, ()) if child not in found]
    return found


def _use(
    pid: int,
    before: Mapping[int, Mapping[int, "_Spent"]],
    after: Mapping[int, Mapping[int, "_Spent"]],
    s: float,
) -> Use | None:
    if not before.get(pid) or not after.get(pid):
        return None
    nothing = _Spent(0.0, 0.0)
    spent = [now - before[pid].get(thread, nothing) for thread, now in after[pid].items()]
    role, is_sglang = _role(pid)
    busiest = max(each.ran_s + each.waited_s for each in spent) / s
    cores = sum(each.ran_s for each in spent) / s
    return Use(pid, role, cores, busiest, is_sglang, _one_thread(pid), _has_gpu(pid))


def _role(pid: int) -> tuple[str, bool]:
    with suppress(OSError):
        title = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
        for beginning, role in TITLES.items():
            if title.startswith(beginning):
                return role, True
        return MAIN, starts_sglang(title)
    return MAIN, False


def starts_sglang(command: str) -> bool:
    """Whether a command line, its words ended by NUL, starts SGLang."""
    return any(map(SGLANG.search, command.partition("\0--")[0].split("\0")))


def _one_thread(pid: int) -> bool:
    with suppress(OSError):
        return b"OMP_NUM_THREADS=1" in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    return False


def _has_gpu(pid: int) -> bool:
    with suppress(OSError):
        return any(
            str(entry.readlink()).startswith("/dev/nvidia") for entry in (PROC / str(pid) / "fd").iterdir()
        )
    return False


@dataclass(frozen=True)
class _Spent:
    """Seconds that a thread ran, and that it waited for a core."""

    ran_s: float
    waited_s: float

    def __sub__(self, other: "_Spent") -> "_Spent":
        return _Spent(self.ran_s - other.ran_s, self.waited_s - other.waited_s)


def _times(pids: Iterable[int]) -> dict[int, dict[int, _Spent]]:
    """Times of all threads, by process and thread."""
    found: dict[int, dict[int, _Spent]] = {}
    for pid in pids:
        with suppress(OSError):
            threads = {
                int(entry.name): _spent(Path(entry.path)) for entry in os.scandir(PROC / str(pid) / "task")
            }
            found[pid] = {thread: spent for thread, spent in threads.items() if spent is not None}
    return found


def _spent(thread: Path) -> _Spent | None:
    with suppress(OSError, ValueError):
        ran_ns, waited_ns, _ = map(int, (thread / "schedstat").read_text().split())
        return _Spent(ran_ns / 1e9, waited_ns / 1e9)
    with suppress(OSError, ValueError, IndexError):  # a kernel without schedstat
        fields = (thread / "stat").read_text().rpartition(")")[2].split()
        return _Spent((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 0.0)
    return None
