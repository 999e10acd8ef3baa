"""What shells, cron and systemd ask of a run: to end soon after a signal or a deadline, and to run once at a time.

What ends a run early is a SystemExit: asyncio swallows other exceptions in its callbacks, and nothing here catches
SystemExit but the top. Where unwinding gets stuck (a thread that is joined, a pipe that nobody reads), the process
ends GRACE_S later all the same.
"""

import _thread
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ghostvis_cli.errors import DeadlineError, ExitCode, GhostvisError, LockedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

    import typer

GRACE_S = 1.0  # longer than a step of a small model takes, short enough for whoever waits for the end
LAST_WORDS_S = 0.2
NOT_THE_JOB = (
    "timeout",
    "lock",
    "log_file",
    "quiet",
    "verbose",
    "color",
)  # options that leave the work as it is

_process_is_ours = False


class Terminated(SystemExit):
    """SIGTERM arrived."""

    def __init__(self) -> None:
        super().__init__(int(ExitCode.TERMINATED))


class ReaderGone(SystemExit):
    """Whoever read stdout has left."""

    def __init__(self) -> None:
        super().__init__(int(ExitCode.READER_GONE))


class DeadlinePassed(SystemExit):
    """--timeout is over; `error` is what to say about it."""

    def __init__(self, error: DeadlineError) -> None:
        super().__init__(int(error.code))
        self.error = error


def own_process() -> None:
    """For the console script: SIGTERM, and whatever else ends a run early, ends this process."""
    global _process_is_ours
    _process_is_ours = True
    signal.signal(signal.SIGTERM, _on_sigterm)


def start(ctx: "typer.Context", *, timeout_s: float | None, lock: str | None, log_file: str | None) -> None:
    """Guard a command that answers and leaves, until its context closes. --log-file stays open to the very end."""
    from pathlib import Path

    from ghostvis_cli.cli import output

    ctx.with_resource(_quick_interrupt())
    if timeout_s is not None:
        ctx.with_resource(deadline(timeout_s))
    if log_file is not None:  # under the deadline: opening a pipe waits for its reader
        output.log_to(Path(log_file), ctx.command_path)
    if lock is not None:
        ctx.with_resource(locked(automatic_lock(ctx) if lock == "auto" else Path(lock)))


# --- ending soon


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise DeadlinePassed in the main thread once `seconds` are over, whatever it is doing in Python by then."""
    error = DeadlineError(f"not done after {seconds:g} s (--timeout)", hint=f"--timeout {2 * seconds:g}")

    def on_alarm(_signal: int, _frame: "FrameType | None") -> None:
        end_within_grace(ExitCode.TIMEOUT, error)
        raise DeadlinePassed(error)

    with _handling(signal.SIGALRM, on_alarm):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def _quick_interrupt() -> Iterator[None]:
    """Ctrl-C ends the run even if a thread of a library is in the way."""

    def on_sigint(_signal: int, _frame: "FrameType | None") -> None:
        end_within_grace(ExitCode.INTERRUPTED)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends it at once
        raise KeyboardInterrupt

    with _handling(signal.SIGINT, on_sigint):
        yield


@contextmanager
def _handling(number: signal.Signals, handler: "Callable[[int, FrameType | None], None]") -> Iterator[None]:
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        if not _process_is_ours or signal.getsignal(number) is handler:
            # Else a Ctrl-C came and ends the process: its default action is what a slow end needs.
            signal.signal(number, previous)


def _on_sigterm(_signal: int, _frame: "FrameType | None") -> None:
    end_within_grace(ExitCode.TERMINATED)
    raise Terminated


def end_within_grace(code: int, error: GhostvisError | None = None) -> None:
    # Not threading.Thread: its locks may be held by the very code that the signal interrupted.
    if _process_is_ours:
        _thread.start_new_thread(_cut_short, (code, error))


def _cut_short(code: int, error: GhostvisError | None) -> None:
    from ghostvis_cli.cli import output

    time.sleep(GRACE_S)
    if error is not None and not output.was_told(error):
        _thread.start_new_thread(output.error, (error,))  # stdout or stderr may be what is stuck
        time.sleep(LAST_WORDS_S)
    output.end_log(code)
    if code == ExitCode.INTERRUPTED and _in_front():
        os.kill(os.getpid(), signal.SIGINT)  # whose default action the handler has put back
        time.sleep(LAST_WORDS_S)
    os._exit(code)


def die_of_interrupt() -> None:
    """After a Ctrl-C typed at a terminal, end by the signal itself: only then does a shell stop its loop too.

    The shell reports 130 either way. Without a terminal in front of it the process exits with 130.
    """
    if _in_front():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _in_front() -> bool:
    """Whether a terminal's Ctrl-C comes to this process."""
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
