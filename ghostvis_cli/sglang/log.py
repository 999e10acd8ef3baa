"""SGLang's log: which lines to show, and which error to report when SGLang ends.

Its lines carry no level, and the cause of its end is often hundreds of lines back.
"""

import re
import signal
from dataclasses import dataclass

from ghostvis_cli.errors import (
    EngineError,
    GhostvisError,
    MemoryLimitError,
    ModelError,
    UsageError,
    printable,
)

LONGEST = 500  # characters of a line that is shown; the whole configuration is one line of 20 kB
# Milestones of a start, and requests other than probes.
NOTABLE = re.compile(
    r"Load weight (begin|end)|KV Cache is allocated|Capture .*cuda graph (begin|end)|ghostvis: vision part"
    r"|Gracefully exiting"
    r"|\"(POST|PUT|DELETE) /(?!health|freeze_gc)|Subprocess .* crashed|[Ww]atchdog timeout",
    re.IGNORECASE,
)
ERROR = re.compile(r"^(?:\[[^\]]*\] )?(?:[\w.]+\.)?((?:[A-Z]\w*)?(?:Error|Exception))(?:: (.+))?$")
# Consequences of an error elsewhere: pipes of a killed process, and a rank that is gone.
FOLLOWS = re.compile(
    r"BrokenPipeError|EOFError|ConnectionResetError|Connection (?:reset|closed) by peer"
    r"|scheduler died|Initialization failed|exited prematurely|Unexpected error in hooked function"
)
# A process of SGLang writes its traceback and ends. The first such error is the cause of all later ones.
DIES = re.compile(r"\w hit an exception: ")
RANK_KILLED = re.compile(r"scheduler died[^\n]*exit code: -9\)")
PREFIX = re.compile(r"\[\d{4}-")  # of a line outside a traceback
LESS_MEMORY = (
    "--gpu-memory-utilization 0.7, a smaller --context-length, or more GPUs: --tensor-parallel-size 2"
)


@dataclass(frozen=True)
class Fault:
    """A line of the log and what it means. `{0}` in a message is the pattern's first group.

    `follows`: other processes also write it after one has ended, and then it is not the cause.
    """

    pattern: str
    error: type[GhostvisError]
    message: str
    hint: str
    follows: bool = False


# In this order: causes before their consequences.
FAULTS = (
    Fault(r"ValueError: ghostvis: (.*)", UsageError, "{0}", "leave that option out"),
    Fault(
        r"(?:launch_server\.py|sglang serve|launch_server): error: (.+)",
        UsageError,
        "SGLang does not take these options: {0}",
        "python -m sglang.launch_server --help  lists them",
    ),
    Fault(
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        MemoryLimitError,
        "the weights leave no memory for keys and values",
        "--gpu-memory-utilization 0.95, more GPUs: --tensor-parallel-size 2, or a smaller --dtype",
    ),
    Fault(
        r"CUDA (?:error: )?out of memory|OutOfMemoryError|can't allocate memory|^MemoryError"
        r"|CUBLAS_STATUS_ALLOC_FAILED|[Cc]uda failure \d+ .?out of memory",
        MemoryLimitError,
        "SGLang ran out of memory",
        LESS_MEMORY,
    ),
    Fault(
        r"[Aa]ddress already in use|[Pp]ort (?:at )?\d* ?is already in use|(\w*port) at \d+ is not available",
        EngineError,
        "a port that SGLang needs was taken while it started",
        "--port 0 takes a free one",
    ),
    Fault(
        r"(?:Failed to (?:load|execute general) plugin|Ignore import error)[^:]*:? ?(.*ghostvis.*)",
        EngineError,
        "SGLang could not import the ghostvis plug-in ({0})",
        "pip install --force-reinstall --no-deps ghostvis-cli, then ghostvis doctor",
    ),
    Fault(
        r"does not recognize this architecture|not a registered model in the Transformers library"
        r"|Model architectures .* are not supported",
        EngineError,
        "SGLang started without the ghostvis plug-in and does not know the model",
        "pip install --force-reinstall --no-deps ghostvis-cli, then ghostvis doctor",
    ),
    Fault(
        r"((?:no|device) kernel image is (?:available|invalid)[^\n]*)",
        EngineError,
        "SGLang or torch has no code for this GPU: {0}",
        "nvidia-smi; install the torch and SGLang that are built for this GPU and driver",
    ),
    Fault(
        r"(invalid device ordinal|CUDA driver version is insufficient[^\n]*|No CUDA GPUs are available"
        r"|forward compatibility was attempted[^\n]*)",
        EngineError,
        "SGLang can't use the GPUs it was given: {0}",
        "nvidia-smi; CUDA_VISIBLE_DEVICES, --tensor-parallel-size and --data-parallel-size must agree with it",
    ),
    Fault(
        r"Error: [^\n]*?((?:Could not find nvcc|CUDA_HOME .*not set|nvcc.* not found|Ninja is required).*)",
        EngineError,
        "SGLang has to compile code for the GPU and can't: {0}",
        "install the CUDA toolkit and ninja, or --attention-backend triton",
    ),
    Fault(
        r"(NCCL error[^\n]*|nccl(?:System|Internal|UnhandledCuda|Remote)Error[^\n]*)",
        EngineError,
        "the GPUs can't reach each other through NCCL: {0}",
        "NCCL_DEBUG=INFO ghostvis serve -v ... tells why; NCCL_P2P_DISABLE=1, or --tensor-parallel-size 1",
        follows=True,
    ),
    Fault(
        r"(the directory (?:lacks|has a tensor)[^\n]*|SafetensorError: .*|.*error while deserializing header.*)",
        ModelError,
        "the converted model is damaged: {0}",
        "ghostvis convert --force --out DIR, or remove the cached directory",
    ),
)


class SGLangLog:
    """Reads the log line by line. Remembers its errors, and hides keys."""

    def __init__(self, *, secrets: tuple[str, ...] = ()) -> None:
        self._secrets = secrets
        self._dying = False  # within the first traceback of an ending process
        self._cause = self._last = ""
        self._rank_killed = False
        self._faults: dict[int, str] = {}  # rank in FAULTS -> its first group

    def feed(self, line: str) -> str:
        """Take in a line. Returns it as it may be shown."""
        for secret in self._secrets:
            line = line.replace(secret, "***")
        line = line.rstrip()
        self._note(line)
        for rank, fault in enumerate(FAULTS):
            if (match := re.search(fault.pattern, line)) and not (fault.follows and self._told):
                self._faults.setdefault(rank, next((text for text in match.groups() if text), ""))
        return line

    @property
    def _told(self) -> bool:
        """Whether a process has logged why it ends while others go on."""
        return bool(self._cause) and not self._dying

    def _note(self, line: str) -> None:
        self._rank_killed = self._rank_killed or RANK_KILLED.search(line) is not None
        if DIES.search(line):
            self._dying = not self._cause
        elif PREFIX.match(line):
            self._dying = False
        if not (found := ERROR.match(line)) or FOLLOWS.search(line):
            return
        self._last = ": ".join(part for part in found.groups() if part)
        if self._dying:
            self._cause = self._last

    def failure(self, code: int) -> GhostvisError:
        """The reason why a child ended with `code` (negative: a signal), as far as the log tells."""
        if self._faults:
            rank = min(self._faults)
            fault = FAULTS[rank]
            said = printable(self._faults[rank]) if self._faults[rank] else "see its log, -v"
            return fault.error(fault.message.format(said), hint=fault.hint)
        said = self._cause or self._last
        if (code == -signal.SIGKILL or self._rank_killed) and not said:  # after an error SGLang kills itself
            return EngineError(
                "SGLang was killed (SIGKILL), as the system does where memory runs out",
                hint=f"dmesg | tail  tells; {LESS_MEMORY}",
            )
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return EngineError(
            f"SGLang ended {how}{f': {printable(said)}' if said else ''}", hint="-v shows its whole log"
        )


def is_notable(line: str) -> bool:
    """Whether a line of SGLang's log should be shown: a warning, an error, a milestone."""
    return NOTABLE.search(line) is not None


def shortened(line: str) -> str:
    """The line, cut to what fits a terminal."""
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
