"""The error tree and the exit codes: every failure a user can cause has a class, a code and a next step.

GhostvisError
├── UsageError        2   flags, profile
├── InputError        3   image, prompt, JSONL row
├── ModelError        4   checkpoint missing, damaged, unsafe, of an unsupported kind
├── EngineError       5   not reachable, not installed, not ready in time; likewise a program that we need
├── RequestError      6   the engine answered with an error, or cannot do what was asked
├── MemoryLimitError  7   out of memory; the hint says what to lower
├── CheckFailedError  9   a check said no, such as convert's comparison
├── LockedError      10   another run holds --lock
├── DeadlineError   124   --timeout passed
└── OutputError       1   stdout can't be written, as on a full disk: no bug, no traceback

A GhostvisError itself is a bug (1). Ctrl-C, SIGTERM and a reader that left are no errors: see cli/guard.py.
"""

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

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(GhostvisError):
    code = ExitCode.USAGE
    kind = "usage"


class InputError(GhostvisError):
    code = ExitCode.INPUT
    kind = "input"


class ContextLengthError(InputError):
    """Prompt and answer are more than the model has positions for."""


class ModelError(GhostvisError):
    code = ExitCode.MODEL
    kind = "checkpoint"


class EngineError(GhostvisError):
    code = ExitCode.ENGINE
    kind = "engine"


class RequestError(GhostvisError):
    code = ExitCode.REQUEST
    kind = "request"


class MemoryLimitError(GhostvisError):
    code = ExitCode.MEMORY
    kind = "memory"


class CheckFailedError(GhostvisError):
    code = ExitCode.CHECK_FAILED
    kind = "check"


class LockedError(GhostvisError):
    code = ExitCode.LOCKED
    kind = "locked"


class DeadlineError(GhostvisError):
    code = ExitCode.TIMEOUT
    kind = "timeout"


class OutputError(GhostvisError):
    code = ExitCode.BUG
    kind = "output"


def printable(name: str) -> str:
    """One line, at most 200 characters, nothing that a terminal would obey."""
    name = name if len(name) <= 200 else f"{name[:80]}...{name[-117:]}"
    return "".join(char if char.isprintable() else "?" for char in name) or "''"


def one_line(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return printable(" ".join(text.split()))
