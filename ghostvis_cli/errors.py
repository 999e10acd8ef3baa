"""The error tree and the exit codes: every failure a user can cause has a class, a code and a next step.

A GhostvisError itself is a bug (1). Ctrl-C, SIGTERM and a reader that left are no errors: see cli/guard.py.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What the process tells its parent. The whole table is the contract of docs/exit-codes.md."""

    OK = 0
    BUG = 1
    USAGE = 2
    INPUT = 3
    MODEL = 4
    ENGINE = 5
    REQUEST = 6
    MEMORY = 7
    PARTIAL = 8
    CHECK_FAILED = 9
    LOCKED = 10
    TIMEOUT = 124
    HANGUP = 129
    INTERRUPTED = 130
    READER_GONE = 141
    TERMINATED = 143


class GhostvisError(Exception):
    """Something a person can put right. `message` says what happened to what, `hint` can be typed."""

    code: ClassVar[ExitCode] = ExitCode.BUG
    kind: ClassVar[str] = "error"

    def __init_subclass__(cls, *, code: ExitCode | None = None, kind: str | None = None) -> None:
        cls.code, cls.kind = code or cls.code, kind or cls.kind

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def record(self) -> dict[str, int | str | None]:
        """As JSON records have it."""
        return {"code": int(self.code), "kind": self.kind, "message": self.message, "hint": self.hint}


class UsageError(GhostvisError, code=ExitCode.USAGE, kind="usage"):
    """Options, arguments or a profile that can't be used."""


class InputError(GhostvisError, code=ExitCode.INPUT, kind="input"):
    """An image, a prompt or a row that can't be used."""


class ContextLengthError(InputError):
    """Prompt and answer are more than the model has positions for."""


class ModelError(GhostvisError, code=ExitCode.MODEL, kind="checkpoint"):
    """A checkpoint that is missing, damaged, unsafe or of an unsupported kind."""


class EngineError(GhostvisError, code=ExitCode.ENGINE, kind="engine"):
    """An engine or a program that is not reachable, not installed or not ready in time."""


class RequestError(GhostvisError, code=ExitCode.REQUEST, kind="request"):
    """The engine answered with an error, or can't do what was asked."""


class MemoryLimitError(GhostvisError, code=ExitCode.MEMORY, kind="memory"):
    """Out of memory or of what else the system limits; the hint says what to change."""


class CheckFailedError(GhostvisError, code=ExitCode.CHECK_FAILED, kind="check"):
    """A check said no, such as the comparison of convert."""


class LockedError(GhostvisError, code=ExitCode.LOCKED, kind="locked"):
    """Another run holds --lock."""


class DeadlineError(GhostvisError, code=ExitCode.TIMEOUT, kind="timeout"):
    """--timeout has passed."""


class OutputError(GhostvisError, code=ExitCode.BUG, kind="output"):
    """What was to be written could not be, as on a full disk: no bug, no traceback."""


@contextmanager
def installed(what: str, extras: str) -> Iterator[None]:
    """Around what imports packages of an extra: EngineError says which is missing, and how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EngineError(
            f"{what} needs {error.name}, which is not installed", hint=f"pip install 'ghostvis-cli[{extras}]'"
        ) from error


LOWER = (
    "fewer or smaller requests at once, a lower --max-tokens, --dtype bfloat16, or a higher limit (ulimit -v)"
)
# What Python, torch, CUDA, the C++ library and the system's loader say of it.
NO_MEMORY = (
    "allocate memory",
    "out of memory",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment from shared object",
)
NOT_MEMORY = ("static TLS", "not permitted")  # of a loader that had enough


def limit_reached(error: BaseException, hint: str = LOWER) -> MemoryLimitError | None:
    """Running out of memory or of open files, in whichever of its many forms; None for any other error."""
    if isinstance(error, MemoryLimitError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return MemoryLimitError("too many files are open for the system's limit", hint="ulimit -n 1024")
    said = _about_memory(error)
    in_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, GhostvisError) or not (said or in_system or isinstance(error, MemoryError)):
        return None
    return MemoryLimitError(f"out of memory: {printable(said)}" if said else "out of memory", hint=hint)


def _about_memory(error: BaseException) -> str | None:
    """The line of its message that says so."""
    lines = [line.strip() for line in str(error).splitlines() if any(sign in line for sign in NO_MEMORY)]
    return next((line for line in lines if not any(sign in line for sign in NOT_MEMORY)), None)


def printable(name: str) -> str:
    """One line, at most 200 characters, nothing that a terminal would obey."""
    name = name if len(name) <= 200 else f"{name[:80]}...{name[-117:]}"
    return "".join(char if char.isprintable() else "?" for char in name) or "''"


def one_line(error: BaseException) -> str:
    """What an exception says, on one line that a terminal can show."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return printable(" ".join(text.split()))
