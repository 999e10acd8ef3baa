"""SGLang as an engine of this process: profiles for it, and what a process left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from ghostvis_cli.profile import EngineSettings, ModelSettings, Profile
from ghostvis_cli.sglang.child import members
from tests.sglang.servers import ENVIRONMENT

GHOSTVIS = Path(sys.executable).with_name("ghostvis")
PATIENCE_S = 300.0  # a start on a busy machine
MARK = "ENGINE_TEST"  # a variable that everything below one process inherits


def profile_of(model: Path, **engine: object) -> Profile:
    settings = EngineSettings(kind="sglang", device="cpu", **engine)  # type: ignore[arg-type]
    return Profile(engine=settings, model=ModelSettings(checkpoint_path=str(model)))


class Command:
    """`ghostvis generate --engine sglang ARGS` as a process, and all that it started."""

    def __init__(self, model: Path, *args: str) -> None:
        self._mark = uuid4().hex
        own = ("generate", "--engine", "sglang", "--device", "cpu", "--checkpoint-path", str(model))
        self.process = subprocess.Popen(
            [sys.executable, str(GHOSTVIS), *own, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT | {MARK: self._mark},
            start_new_session=True,
        )
        self._group = 0

    def find(self, title: str) -> int:
        """A process of SGLang's group whose command line has this in it; 0 where there is none yet."""
        self._group = self._group or next(iter(marked(self._mark, "ghostvis_cli.sglang.worker")), 0)
        found = (pid for pid in members(self._group) if title in _title(pid))
        return next(found, 0) if self._group else 0

    def left(self) -> list[str]:
        """What lives of it. SGLang's own processes overwrite their environment with a title, hence the group."""
        assert self._group
        return [_title(pid) for pid in {*members(self._group), *marked(self._mark)}]

    def end(self) -> None:
        self.process.kill()
        for pid in {*(members(self._group) if self._group else ()), *marked(self._mark)}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


@contextmanager
def command(model: Path, *args: str) -> Iterator[Command]:
    running = Command(model, *args)
    try:
        yield running
    finally:
        running.end()


def marked(mark: str, title: str = "") -> list[int]:
    """Living processes with this mark in their environment, of them those with such a command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            lives = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if lives and mark.encode() in (entry / "environ").read_bytes() and title in _title(entry.name):
                found.append(int(entry.name))
    return found


def _title(pid: int | str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
