"""SGLang as an engine of this process: profiles for it, and what a process left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from ghostvis_cli.profile import EngineSettings, ModelSettings, Profile
from tests.sglang.servers import ENVIRONMENT

GHOSTVIS = Path(sys.executable).with_name("ghostvis")
PATIENCE_S = 300.0  # a start on a busy machine
MARK = "ENGINE_TEST"  # a variable that everything below one process inherits


def profile_of(model: Path, **engine: object) -> Profile:
    settings = EngineSettings(kind="sglang", device="cpu", **engine)  # type: ignore[arg-type]
    return Profile(engine=settings, model=ModelSettings(checkpoint_path=str(model)))


@contextmanager
def command(model: Path, *args: str, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """`ghostvis generate --engine sglang ARGS` with a mark of its own in the environment: `process.mark`."""
    mark = uuid4().hex
    process = subprocess.Popen(
        [
            *(sys.executable, str(GHOSTVIS), "generate", "--engine", "sglang", "--device", "cpu"),
            *("--checkpoint-path", str(model), *args),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT | {MARK: mark, **variables},
        start_new_session=True,
    )
    process.mark = mark  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        process.kill()
        for pid in marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def marked(mark: str, having: str = "") -> list[int]:
    """Living processes with this mark, of them those with such a command line or title."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            lives = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if lives and mark.encode() in (entry / "environ").read_bytes():
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if having in title:
                    found.append(int(entry.name))
    return found


def nobody(mark: str) -> Callable[[], bool]:
    return lambda: not marked(mark)
