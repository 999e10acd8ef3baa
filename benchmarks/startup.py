"""Processor time from typing a command to its help, against the budgets of the project.

    python -m benchmarks.startup [--runs 15]

User CPU of the whole process, not wall time, so that a busy machine disturbs it less. One run before the counted
ones compiles the modules and warms the disk cache. What is run are real processes of the `ghostvis` beside this
Python.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.report import Spread, machine, parser_of

GHOSTVIS = Path(sys.executable).with_name("ghostvis")


@dataclass(frozen=True)
class Start:
    name: str
    budget_ms: int
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def completing(line: str) -> dict[str, str]:
    return {"_GHOSTVIS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}


STARTS = (
    Start("--version", 40, ("--version",)),
    Start("--help", 100, ("--help",)),
    Start("generate --help", 150, ("generate", "--help")),
    Start("completion of a command", 100, env=completing("ghostvis ge")),
    Start("completion of an option", 100, env=completing("ghostvis generate --ma")),
)


def user_ms(command: Sequence[str], env: Mapping[str, str]) -> float:
    """User CPU of one run of `command`, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, check=True)
    return 1000 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    print(machine())
    bare = Start("python -c pass", 0)
    for start in (bare, *STARTS):
        command = [sys.executable, "-c", "pass"] if start is bare else [str(GHOSTVIS), *start.args]
        env = {**start.env, "PYTHONDONTWRITEBYTECODE": ""}
        user_ms(command, env)
        spread = Spread.of([user_ms(command, env) for _ in range(runs)])
        verdict = f"; budget {start.budget_ms} ms" if start.budget_ms else ""
        if start.budget_ms and spread.median > start.budget_ms:
            verdict += ", EXCEEDED"
        print(f"{start.name}: user CPU {spread.show(0, ' ms')}{verdict}", flush=True)


if __name__ == "__main__":
    main()
