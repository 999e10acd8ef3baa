"""Does every command end as documented, whenever it is told to? --timeout, SIGTERM and SIGINT at random moments.

    python -m benchmarks.signal_trial [--tries 300] [--jobs 2] [--seed 0] [--commands generate,chat] [--early 0.2]

Each try starts a command as a process of its own and ends it at a moment drawn between its start and its first
answer; a share of the moments (--early) lies in the first 0.3 s, where Python itself starts. A try is good where
the code is the documented one (or 0, where the answer came first), stderr holds the deadline's lines or nothing,
and nothing was left in the directory that the command writes to.

Prints a table: how the tries ended, and the time from the signal to the end. What KeyboardInterrupt does in the
start of Python itself, before a line of this project has run, is counted apart. Exits with 1 if a try was not good.
"""

import os
import random
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.report import machine, parser_of

GHOSTVIS = Path(sys.executable).with_name("ghostvis")
ENDS = ("--timeout", "SIGTERM", "SIGINT")
CODES = {"--timeout": 124, "SIGTERM": 143, "SIGINT": 130}
DEADLINE = re.compile(r"ghostvis: error: not done after \S+ s \(--timeout\)\nhint: --timeout \S+\n")
EARLY_S = 0.3
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Command:
    """`ghostvis ARGS` in a directory of its own, in which it may leave `results` and nothing else."""

    args: tuple[str, ...]
    stdin: str = ""
    results: tuple[str, ...] = ()
    serves: bool = False  # it has no deadline, drains with code 0, and its first answer is that it is ready


MODEL = ("--source", "demo", "-q")
COMMANDS = {
    "generate": Command(("generate", *MODEL, "-t", "0", "Hi")),
    "chat": Command(("chat", *MODEL, "-t", "0"), stdin="Hi\n"),
    "serve": Command(("serve", "--engine", "local", "--port", "0", "--source", "demo"), serves=True),
    "convert": Command(("convert", *MODEL, "--out", "model"), results=("model", "model.failed")),
    "bench": Command(
        ("bench", *MODEL, "--num-prompts", "4", "--output-len", "8", "--output", "r.json"),
        results=("r.json",),
    ),
}


@dataclass(frozen=True)
class Try:
    """How one ended. `took_s` is from the signal, or from the deadline and Python's start, to the end."""

    outcome: str
    good: bool
    took_s: float
    moment_s: float
    said: str


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--tries", type=int, default=300, help="of each end of each command")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--early", type=float, default=0.2)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    options = parser.parse_args()
    # Started in the background we ignore SIGINT, and so would they; what is handled is reset for a new program.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dice = random.Random(options.seed)
    print(f"{machine()}; {options.tries} tries each, {options.jobs} at once, seed {options.seed}", flush=True)
    bad = 0
    with (
        tempfile.TemporaryDirectory(prefix="signal-trial-") as place,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        for name in options.commands.split(","):
            command = COMMANDS[name]
            whole_s = min(pool.map(calm, [command] * 2, [Path(place)] * 2))
            for end in ENDS:
                if command.serves and end == "--timeout":
                    continue
                moments = [moment(dice, whole_s, options.early) for _ in range(options.tries)]
                tries = list(pool.map(partial(attempt, command, end, Path(place)), moments))
                bad += report(name, end, whole_s, tries)
    return 1 if bad else 0


def moment(dice: random.Random, whole_s: float, early: float) -> float:
    return dice.uniform(0.001, EARLY_S if dice.random() < early else whole_s)


def calm(command: Command, place: Path) -> float:
    """Seconds to the first answer."""
    started_s = time.monotonic()
    with running(command, [], place) as (process, _):
        if command.serves:
            until_ready(process)
            process.terminate()
        process.communicate(timeout=PATIENCE_S)
    return time.monotonic() - started_s


def until_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stderr is not None
    while "ready after" not in (line := process.stderr.readline()):
        assert line, "the server ended"


def attempt(command: Command, end: str, place: Path, moment_s: float) -> Try:
    flags = ["--timeout", f"{moment_s:.4f}"] if end == "--timeout" else []
    with running(command, flags, place) as (process, folder):
        told_s = started_s = time.monotonic()
        if not flags:
            gone = exited(process, moment_s)
            told_s = time.monotonic()
            if not gone:
                process.send_signal(getattr(signal, end))
        out_err = process.communicate(timeout=PATIENCE_S)
        took_s = time.monotonic() - (started_s + moment_s if flags else told_s)
        left = sorted(entry.name for entry in folder.iterdir() if entry.name not in command.results)
    return judged(command, end, process.returncode, out_err[1], left, took_s, moment_s)


def exited(process: "subprocess.Popen[str]", within_s: float) -> bool:
    descriptor = os.pidfd_open(process.pid)
    try:
        return bool(select.select([descriptor], [], [], within_s)[0])
    finally:
        os.close(descriptor)


def judged(
    command: Command, end: str, code: int, said: str, left: list[str], took_s: float, moment_s: float
) -> Try:
    code = 128 - code if code < 0 else code  # as a shell has it
    outcome = str(code)
    quiet = not said or (code == CODES["--timeout"] == CODES[end] and bool(DEADLINE.fullmatch(said)))
    if command.serves:
        quiet = "Traceback" not in said and "error" not in said
    if code == CODES["--timeout"] and not said:
        quiet, outcome = False, f"{outcome} without its line"
    for sign, name in (("Traceback", "traceback"), ("terminate called", "abort"), ("Fatal", "fatal")):
        if sign in said:
            outcome += f" {name}"
    in_start = "KeyboardInterrupt" in said and "/ghostvis_cli/" not in said
    if in_start:
        outcome = "Python's start"
    if left:
        outcome += f" left {', '.join(left)}"
    good = in_start or (code in (0, CODES[end]) and quiet and not left)
    return Try(outcome, good, took_s, moment_s, said)


class running:  # noqa: N801 - a context manager
    """The process and its directory, both gone afterwards."""

    def __init__(self, command: Command, flags: list[str], place: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True)
        state = place / "state"
        self._process = subprocess.Popen(
            [str(GHOSTVIS), *command.args, *flags],
            cwd=self._folder.name,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GHOSTVIS_STATE_DIR": str(state), "GHOSTVIS_CONFIG_DIR": str(state)},
        )
        assert self._process.stdin is not None
        self._process.stdin.write(command.stdin)
        self._process.stdin.close()
        self._process.stdin = None

    def __enter__(self) -> "tuple[subprocess.Popen[str], Path]":
        return self._process, Path(self._folder.name)

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


def report(name: str, end: str, whole_s: float, tries: list[Try]) -> int:
    counts = Counter(each.outcome for each in tries)
    wanted = ("0", str(CODES[end])) if COMMANDS[name].serves else (str(CODES[end]),)
    ended = [each.took_s for each in tries if each.outcome in wanted]
    times = percentiles(ended) if ended else "-"
    print(
        f"{name:9} {end:10} start to answer {whole_s:5.1f} s; {dict(counts.most_common())}; {times}",
        flush=True,
    )
    bad = [each for each in tries if not each.good]
    for each in bad[:5]:
        print(
            f"  BAD at {each.moment_s:.3f} s: {each.outcome}\n    " + each.said.replace("\n", "\n    "),
            flush=True,
        )
    return len(bad)


def percentiles(times_s: list[float]) -> str:
    ordered = sorted(times_s)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return f"to the end p50 {at(0.5):.3f} s, p95 {at(0.95):.3f} s, max {ordered[-1]:.3f} s"


if __name__ == "__main__":
    sys.exit(main())
