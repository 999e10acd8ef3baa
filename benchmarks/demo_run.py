"""Wall time and peak memory of `make demo`'s command, the second time it runs.

    python -m benchmarks.demo_run [--runs 7]

The command line is read from the Makefile. The first run compiles the modules and warms the disk cache, and is
not counted. Peak memory is the greatest resident set of that process, as the kernel counts it.
"""

import os
import shlex
import subprocess
import time
from pathlib import Path

from benchmarks.report import Spread, machine, parser_of

ROOT = Path(__file__).parents[1]


def demo_command() -> list[str]:
    """What `make demo` runs once the environment is there."""
    asked = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    *_, line = asked.stdout.replace("\\\n", " ").strip().splitlines()
    return shlex.split(line)


def run_once(command: list[str]) -> tuple[float, float, float]:
    """Seconds of wall time, seconds of user CPU and MiB at the peak of one run."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    started_s = time.perf_counter()
    with Path(os.devnull).open("w") as nowhere:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=nowhere, stderr=nowhere)
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started_s
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}")
    return wall_s, usage.ru_utime, usage.ru_maxrss / 1024


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    print(machine())
    command = demo_command()
    print(shlex.join(command))
    run_once(command)
    walls, users, peaks = zip(*(run_once(command) for _ in range(runs)), strict=True)
    print(f"wall {Spread.of(walls).show(2, ' s')}")
    print(f"user CPU {Spread.of(users).show(2, ' s')}")
    print(f"peak memory {Spread.of(peaks).show(0, ' MiB')}")


if __name__ == "__main__":
    main()
