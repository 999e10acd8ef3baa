"""What shells, cron and systemd ask of a run: to end soon after a signal or a deadline, and to run once at a time.

No handler here raises: it ends the process at once, or where endings.py knows of something to unwind, has the work
stopped. Where that gets stuck (a thread that is joined, a pipe without a reader), the process ends GRACE_S later
all the same.
"""

import _thread
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ghostvis_cli import endings
from ghostvis_cli.endings import Ended, Ending
from ghostvis_cli.errors import DeadlineError, ExitCode, LockedError, UsageError

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    import typer

GRACE_S = 1.0  # longer than a step of a small model, and short for a person who waits
# `timeout` signals a process and then its group: one signal that comes twice is not a second one.
TWICE_S = 0.5
NOT_THE_JOB = ("timeout", "lock", "log_file", "quiet", "verbose", "color")  # they leave the work as it is


class _State:
    """The state of this process."""

    def __init__(self) -> None:
        self.is_ours = False
        self.endings = {
            int(signal.SIGINT): Ending(ExitCode.INTERRUPTED, "Ctrl-C"),
            int(signal.SIGTERM): Ending(ExitCode.TERMINATED, "SIGTERM"),
            int(signal.SIGHUP): Ending(ExitCode.HANGUP, "SIGHUP"),
        }
        self.first: tuple[Ending, float] | None = None  # what came, and when
        self.leaving = self.is_cut_short = False


_state = _State()


def own_process() -> None:
    """For the console script: signals, and whatever else ends a run early, end this process."""
    _state.is_ours = True
    endings.hurried_by(_end_within_grace)
    for number in _state.endings:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _on_signal)


def start(ctx: "typer.Context", *, timeout_s: float | None, lock: str | None, log_file: str | None) -> None:
    """Guard a command that answers and leaves, until its context closes. --log-file stays open to the very end."""
    from pathlib import Path

    from ghostvis_cli.cli import output

    if timeout_s is not None:
        ctx.with_resource(deadline(timeout_s))
    if log_file is not None:  # under the deadline: opening a pipe waits for its reader
        output.log_to(Path(log_file), ctx.command_path)
    if lock is not None:
        ctx.with_resource(locked(automatic_lock(ctx) if lock == "auto" else Path(lock)))


# --- ending soon


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End the run once `seconds` are over, whatever it is doing in Python by then."""
    error = DeadlineError(f"not done after {seconds:g} s (--timeout)", hint=f"--timeout {2 * seconds:g}")
    _state.endings[int(signal.SIGALRM)] = Ending(ExitCode.TIMEOUT, "--timeout", error)
    previous = signal.signal(signal.SIGALRM, _on_signal)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _on_signal(number: int, _frame: "FrameType | None") -> None:
    ending, now_s = _state.endings[number], time.monotonic()
    if not _state.is_ours:
        _stop_in_another_program(ending)
    elif _state.first is not None:
        if ending.error is None and now_s - _state.first[1] > TWICE_S:
            if _state.leaving:
                os._exit(ending.code)
            _end_at_once(ending)
    else:
        _state.first = ending, now_s
        if endings.is_free():
            _end_at_once(ending)
        elif not endings.ask_to_stop(ending):
            _end_within_grace(ending)


def _stop_in_another_program(ending: Ending) -> None:
    """Inside another program's process, such as a test's, a deadline may only stop the command."""
    if not endings.can_stop():
        raise Ended(ending)
    endings.ask_to_stop(ending)


def _end_at_once(ending: Ending) -> None:
    """Print the line, remove temporary files, end. For signal handlers: waits for no lock, never raises."""
    if _state.leaving:
        return
    _state.leaving = True
    try:
        if output := sys.modules.get("ghostvis_cli.cli.output"):
            output.last_words(ending.error)
            output.end_log(ending.code)
        endings.undo_all()
        if ending.code == ExitCode.INTERRUPTED:
            die_of_interrupt()
    finally:
        os._exit(ending.code)


def _end_within_grace(ending: Ending) -> None:
    """End the process after GRACE_S, in case unwinding gets stuck."""
    if _state.is_cut_short:
        return
    _state.is_cut_short = True
    if ending.code == ExitCode.INTERRUPTED and _in_front():
        # The grace ends in a thread, which can't do this. Nor does a second Ctrl-C wait for it so.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        # Not threading.Thread: its locks may be held by the very code that the signal interrupted.
        _thread.start_new_thread(_cut_short, (ending,))
    except RuntimeError:  # no room for a thread
        _end_at_once(ending)


def _cut_short(ending: Ending) -> None:
    time.sleep(GRACE_S)
    _end_at_once(ending)


def die_of_interrupt() -> None:
    """After a Ctrl-C typed at a terminal, end by the signal itself: only then does a shell stop its loop too.

    The shell reports 130 either way. Without a terminal in front of it the process exits with 130.
    """
    if _in_front():
        with suppress(ValueError):  # in a thread, to which the handler has left SIGINT so
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _in_front() -> bool:
    """Whether this process is in the terminal's foreground, and gets its Ctrl-C."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False


# --- once at a time


@contextmanager
def locked(path: "Path") -> Iterator[None]:
    """Hold a lock of the operating system on `path`: it goes with the process, however that ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser() raises without a home
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise LockedError(f"another run holds the lock {path}") from error
    except OSError as error:
        raise UsageError(f"--lock {path} can't be opened: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def automatic_lock(ctx: "typer.Context") -> "Path":
    """The lock file of this command with these options in this directory: one line of a crontab, one file."""
    from hashlib import sha256
    from pathlib import Path

    from ghostvis_cli.paths import state_dir

    job = [(name, value) for name, value in sorted(ctx.params.items()) if name not in NOT_THE_JOB]
    hint = "--lock FILE, or export GHOSTVIS_STATE_DIR=DIR"
    try:
        here = str(Path.cwd())
    except OSError as error:
        raise UsageError("--lock auto has no place: this directory is gone", hint=hint) from error
    key = repr((ctx.command_path, job, os.environ.get("GHOSTVIS_PROFILE"), here))
    if (state := state_dir()) is None:
        raise UsageError("--lock auto has no place: there is no home directory", hint=hint)
    directory = state / "locks"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        # No other place instead: two runs that lock different files do not keep each other out.
        raise UsageError(f"--lock auto has no place: {directory}: {error.strerror}", hint=hint) from error
    return directory / f"{ctx.info_name}-{sha256(key.encode()).hexdigest()[:16]}.lock"
