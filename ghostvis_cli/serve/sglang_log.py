"""What SGLang writes: which lines are worth showing, and what went wrong in words that help.

SGLang's lines carry no level, and the cause of an end is often hundreds of lines before it.
"""

import re
import signal
from collections import deque
from dataclasses import dataclass

from ghostvis_cli.errors import (
    EngineError,
    GhostvisError,
    MemoryLimitError,
    ModelError,
    UsageError,
    printable,
)

TAIL_LINES = 400
LONGEST = 500  # characters of a line that is shown; the whole configuration is one line of 20 kB
# Milestones of a start, and requests but for the probes.
NOTABLE = re.compile(
    r"Load weight (begin|end)|KV Cache is allocated|Capture cuda graph (begin|end)|Gracefully exiting"
    r"|\"(POST|PUT|DELETE) /(?!health|freeze_gc)|Subprocess .* crashed|[Ww]atchdog timeout"
)
# Not what the children of a main process that was killed say when its pipes end.
LAST_ERROR = re.compile(
    r"^(?:\[[^\]]*\] )?(?:[\w.]+\.)?"
    r"((?!UserWarning|BrokenPipeError|EOFError|ConnectionResetError)(?:[A-Z]\w*)?(?:Error|Exception)): (.+)"
)
LESS_MEMORY = (
    "--gpu-memory-utilization 0.7, a smaller --context-length, or more GPUs: --tensor-parallel-size 2"
)


@dataclass(frozen=True)
class Fault:
    """A line of the log and what it means. `{0}` in a message is the pattern's first group."""

    pattern: re.Pattern[str]
    error: type[GhostvisError]
    message: str
    hint: str


def _fault(pattern: str, error: type[GhostvisError], message: str, hint: str) -> Fault:
    return Fault(re.compile(pattern), error, message, hint)


# In this order: causes before what follows from them.
FAULTS = (
    _fault(r"ValueError: ghostvis: (.*)", UsageError, "{0}", "leave that option out"),
    _fault(
        r"(?:launch_server\.py|sglang serve|launch_server): error: (.+)",
        UsageError,
        "SGLang does not take these options: {0}",
        "python -m sglang.launch_server --help  lists them",
    ),
    _fault(
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        MemoryLimitError,
        "the weights leave no memory for keys and values",
        "--gpu-memory-utilization 0.95, more GPUs: --tensor-parallel-size 2, or a smaller --dtype",
    ),
    _fault(
        r"CUDA out of memory|OutOfMemoryError|can't allocate memory|^MemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        MemoryLimitError,
        "SGLang ran out of memory",
        LESS_MEMORY,
    ),
    _fault(
        r"address already in use|[Pp]ort (?:at )?\d* ?is already in use|(\w*port) at \d+ is not available",
        EngineError,
        "a port that SGLang needs was taken while it started",
        "--port 0 takes a free one",
    ),
    _fault(
        r"(?:Failed to (?:load|execute general) plugin|Ignore import error)[^:]*:? ?(.*ghostvis.*)",
        EngineError,
        "SGLang could not import the ghostvis plug-in ({0})",
        "pip install --force-reinstall --no-deps ghostvis-cli, then ghostvis doctor",
    ),
    _fault(
        r"does not recognize this architecture|not a registered model in the Transformers library"
        r"|Model architectures .* are not supported",
        EngineError,
        "SGLang started without the ghostvis plug-in and does not know the model",
        "pip install --force-reinstall --no-deps ghostvis-cli, then ghostvis doctor",
    ),
    _fault(
        r"(the directory (?:lacks|has a tensor)[^\n]*|SafetensorError: .*|.*error while deserializing header.*)",
        ModelError,
        "the converted model is damaged: {0}",
        "ghostvis convert --force --out DIR, or remove the cached directory",
    ),
)


class SGLangLog:
    """The log as it comes. Keeps its end, never shows a key."""

    def __init__(self, *, secrets: tuple[str, ...] = ()) -> None:
        self._secrets = secrets
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._faults: dict[int, str] = {}  # rank in FAULTS -> its first group

    def feed(self, line: str) -> str:
        """A line in a form that may be shown."""
        for secret in self._secrets:
            line = line.replace(secret, "***")
        line = line.rstrip()
        self._tail.append(line)
        for rank, fault in enumerate(FAULTS):
            if match := fault.pattern.search(line):
                self._faults.setdefault(rank, next((text for text in match.groups() if text), ""))
        return line

    def failure(self, code: int) -> GhostvisError:
        """Why a child that ended with `code` (negative: a signal) did so, as far as the log tells."""
        if self._faults:
            rank = min(self._faults)
            fault = FAULTS[rank]
            said = printable(self._faults[rank]) if self._faults[rank] else "see its log, -v"
            return fault.error(fault.message.format(said), hint=fault.hint)
        last = next(
            (f": {m[1]}: {m[2]}" for line in reversed(self._tail) if (m := LAST_ERROR.match(line))), ""
        )
        if code == -signal.SIGKILL and not last:  # with an error it has killed itself
            return EngineError(
                "SGLang was killed (SIGKILL), as the system does where memory runs out",
                hint=f"dmesg | tail  tells; {LESS_MEMORY}",
            )
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return EngineError(
            f"SGLang ended {how}{printable(last) if last else ''}", hint="-v shows its whole log"
        )


def is_notable(line: str) -> bool:
    return NOTABLE.search(line) is not None


def shortened(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
