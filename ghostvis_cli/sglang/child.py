"""SGLang as a child: its process group, its log, and a watcher that ends it even where we are killed.

SGLang is a main process with schedulers, a detokenizer and workers below it, all in one process group. When we get
SIGKILL they must end too, also while they still import and have no handling of their own.
"""

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from ghostvis_cli import scratch
from ghostvis_cli.endings import undone, unwinding
from ghostvis_cli.paths import cache_dir

# Waits for a line, sent once the watcher knows it, before it starts SGLang. Ends without one, as when we are dead.
WAITS = 'read -r _ && exec "$@"'
# The end of its stdin without a line means that we died: then it does what `end` does.
WATCHES = r"""read -r _ || {
    left=$(for process in /proc/[0-9]*; do
        read -r line < "$process/stat" && set -- ${line##*)} && [ "$3" = "$0" ] &&
            { cat "$process/maps"; ls -l "$process/fd"; } | grep -Eo '/dev/shm/(SHARED)[^ ]*'
    done 2>/dev/null)
    kill -s KILL -- "-$0"
    rm -rf -- "$1" $left
}"""
# Names in /dev/shm of SGLang, Python's multiprocessing, torch and NCCL, which leave them when killed.
SHARED = ("sglang_loads_", "sgl_shm_", "multi_tokenizer_args_", "sem.mp-", "psm_", "torch_", "nccl-")
LOOK_S, GONE_LOOKS = 0.02, 500  # 10 s from SIGKILL to the end: freeing a GPU's memory takes time
LAST_WORDS_S = 2.0
CHUNK = 65_536


class Child:
    """A running SGLang. `end` ends its processes and removes its files."""

    def __init__(
        self, process: Process, watcher: Process, log: int, on_line: Callable[[str], None], minding: ExitStack
    ) -> None:
        self._process, self._watcher, self._log, self._minding = process, watcher, log, minding
        self._reading = asyncio.create_task(self._read(on_line))
        self._ended = False
        self._shared: set[Path] = set()
        minding.enter_context(undone(self.kill))

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        env: Mapping[str, str],
        on_line: Callable[[str], None],
        pass_fds: Sequence[int] = (),
        folder: Path | None = None,
    ) -> "Child":
        """`folder` is for its temporary files: a scratch folder of the caller's, by default one of its own."""
        with ExitStack() as stack:
            stack.enter_context(unwinding())
            folder = folder or stack.enter_context(scratch.folder())
            # torch keeps compiled code among temporary files, and it is worth keeping.
            kept = {"TORCHINDUCTOR_CACHE_DIR": str((cache_dir() or folder) / "torchinductor")}
            env = {**kept, **env, "TMPDIR": str(folder)}
            process, log = await _started(argv, env, pass_fds)
            watcher = await asyncio.create_subprocess_exec(
                "/bin/sh",
                "-c",
                WATCHES.replace("SHARED", "|".join(SHARED)),
                str(process.pid),
                str(folder),
                stdin=PIPE,
                stdout=DEVNULL,
                stderr=DEVNULL,
                start_new_session=True,
            )
            await _tell(process)
            return cls(process, watcher, log, on_line, stack.pop_all())

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The main process's exit code; a signal's number, negative."""
        return await self._process.wait()

    def terminate(self) -> None:
        """Ask it to finish its requests. Signals the main process alone: a scheduler's end counts as a crash."""
        self.note_shared_memory()
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def note_shared_memory(self) -> None:
        """Remember its shared memory, to remove at the end. For when it runs, since it may end by itself."""
        self._shared |= shared_memory(self.pid)

    def kill(self) -> None:
        """Kill the whole group at once. Safe in a signal handler."""
        if not self._ended:  # else the id may belong to another process by now
            self.note_shared_memory()
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            for left in self._shared:
                left.unlink(missing_ok=True)

    async def end(self) -> int:
        """Kill what is left, read the rest of its log, wait for all to end; the exit code."""
        self.kill()
        code = await self._process.wait()
        if self._ended:
            return code
        await asyncio.wait((self._reading,), timeout=LAST_WORDS_S)
        self._reading.cancel()
        for _ in range(GONE_LOOKS):
            if not members(self.pid):
                break
            await asyncio.sleep(LOOK_S)
        self._ended = True
        self._minding.close()
        await _tell(self._watcher)
        await self._watcher.wait()
        return code

    async def _read(self, on_line: Callable[[str], None]) -> None:
        stream, begun = asyncio.StreamReader(), b""
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(self._log, "rb", buffering=0)
        )
        try:
            while piece := await stream.read(CHUNK):
                *lines, begun = (begun + piece).split(b"\n")
                for line in lines:
                    on_line(line.decode(errors="replace"))
            if begun:
                on_line(begun.decode(errors="replace"))
        finally:
            transport.close()


async def _started(
    argv: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int]
) -> tuple[Process, int]:
    """The process, which waits for its line, and the reading end of its log."""
    # A pipe that asyncio knows nothing of: it would report the process's end only after the pipe's, which
    # whatever the process leaves behind may hold open.
    log, written = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            WAITS,
            "sglang",
            *argv,
            stdin=PIPE,
            stdout=written,
            stderr=STDOUT,
            env=env,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    except BaseException:
        os.close(log)
        raise
    finally:
        os.close(written)
    return process, log


async def _tell(process: Process) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(b"\n")
        await process.stdin.drain()
        process.stdin.close()


def shared_memory(group: int) -> set[Path]:
    """Files in /dev/shm, of the kinds that get left there, that processes of a group have open or mapped."""
    found: set[str] = set()
    for pid in members(group):
        with suppress(OSError):
            found |= {line.split(maxsplit=5)[-1].split()[0] for line in _lines_with_shm(pid)}
            found |= {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    prefixes = tuple(f"/dev/shm/{kind}" for kind in SHARED)
    return {Path(name.removesuffix(" (deleted)")) for name in found if name.startswith(prefixes)}


def _lines_with_shm(pid: int) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm/" in line]


def members(group: int) -> list[int]:
    """The live processes of a group, without zombies, which only wait for their parents to reap them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            # Fields after the name, which may hold anything: state, parent, group.
            state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(entry.name))
    return found
