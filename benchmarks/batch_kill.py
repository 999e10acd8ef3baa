"""Is a batch crash-safe? Kill one with SIGKILL at random moments until it is done, and compare it with a calm run.

    python -m benchmarks.batch_kill [--rows 1000] [--kills 20] [--seed 0]

Greedy, on the built-in model, every fourth row with a picture. Every fifth kill falls in a start, the others
after the first new record. Prints the counts and a verdict, and exits with 1 if a single row is missing,
doubled or different. Timing, cached tokens and the order of rows are not compared: they may differ.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Spread, machine
from ghostvis_cli import demo

PICTURES = ("three-shapes.jpg", "red-circle.png", "two-circles-striped.png", "cross-and-diamond.jpg")
QUESTIONS = ("What is in this picture?", "How many shapes are there?", "Who are you?", "What is the color?")
START_KILL_EVERY = 5  # of the kills: one that falls before the first record, while the model is loaded
COMMAND = (sys.executable, "-c", "from ghostvis_cli.cli.app import main; main()", "generate")


@dataclass(frozen=True)
class Calm:
    """An undisturbed run: what it wrote, and how long it took to its first record and to its end."""

    records: list[dict[str, Any]]
    start_s: float
    total_s: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batch-kill-") as directory:
        rows = Path(directory, "rows.jsonl")
        write_rows(rows, options.rows)
        shutil.copytree(demo.BASE_DIR, rows.with_name("base"))  # the run may outlive an update of the package
        calm = undisturbed(rows, rows.with_name("calm.jsonl"))
        print(f"{machine()}; {options.rows} rows, seed {options.seed}")
        print(f"undisturbed: first record after {calm.start_s:.1f} s, end after {calm.total_s:.1f} s")
        killed = rows.with_name("killed.jsonl")
        counts, repairs = kill_until_done(rows, killed, calm, options.kills, random.Random(options.seed))
        starts = sum(before == after for before, after in zip([0, *counts], counts, strict=False))
        print(f"{len(counts)} kills, {starts} of them before a new record; rows recorded at each: {counts}")
        gains = [float(after - before) for before, after in zip([0, *counts], counts, strict=False)]
        print(f"rows won between kills: {Spread.of(gains).show(0)}; torn lines repaired: {repairs}")
        return verdict(calm.records, read(killed), options.rows)


def write_rows(path: Path, count: int) -> None:
    folder = Path(demo.__file__).parent
    with path.open("w") as file:
        for number in range(count):
            row: dict[str, Any] = {"id": f"row-{number}", "prompt": QUESTIONS[number // 4 % len(QUESTIONS)]}
            row["max_tokens"] = 8 + number % 25  # as many lengths as make rows end out of order
            if number % 4 == 0:
                row["images"] = [str(folder / PICTURES[number // 4 % len(PICTURES)])]
            file.write(json.dumps(row) + "\n")


def start(rows: Path, output: Path) -> "subprocess.Popen[str]":
    model = ["--base-dir", str(rows.with_name("base")), "--source", "sft", "--temperature", "0"]
    command = [*COMMAND, *model, "--input", str(rows), "--output", str(output)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def undisturbed(rows: Path, output: Path) -> Calm:
    began = time.perf_counter()
    process = start(rows, output)
    while size(output) == 0 and process.poll() is None:
        time.sleep(0.01)
    first = time.perf_counter()
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"the undisturbed run ended with {process.returncode}: {said}")
    return Calm(read(output), first - began, time.perf_counter() - began)


def kill_until_done(
    rows: Path, output: Path, calm: Calm, kills: int, dice: random.Random
) -> tuple[list[int], int]:
    """Rows recorded after each kill, and how many torn lines the next starts repaired."""
    counts: list[int] = []
    repairs = 0
    while True:
        before, process = size(output), start(rows, output)
        if len(counts) < kills:
            if len(counts) % START_KILL_EVERY == 0:
                time.sleep(dice.uniform(0, 0.8 * calm.start_s))
            else:
                while size(output) <= before and process.poll() is None:
                    time.sleep(0.002)
                time.sleep(dice.uniform(0, (calm.total_s - calm.start_s) / kills))
            process.kill()
        _, said = process.communicate()
        repairs += "was cut off" in said
        if process.returncode >= 0:
            if process.returncode or len(counts) < kills:
                raise SystemExit(f"ended with {process.returncode} after {len(counts)} kills: {said}")
            return counts, repairs
        counts.append(lines(output))


def verdict(calm: list[dict[str, Any]], killed: list[dict[str, Any]], rows: int) -> int:
    expected = {record["index"]: record for record in calm}
    found = [record["index"] for record in killed]
    missing, doubled = rows - len(set(found)), len(found) - len(set(found))
    different = sum(answer(record) != answer(expected[record["index"]]) for record in killed)
    print(f"rows: {len(found)}; missing: {missing}, doubled: {doubled}, different: {different}")
    good = not (missing or doubled or different)
    print("every row exactly once, as in the undisturbed run" if good else "NOT crash-safe")
    return 0 if good else 1


def answer(record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in every run."""
    usage = {name: value for name, value in record["usage"].items() if name != "cached_tokens"}
    rest = {name: value for name, value in record.items() if name not in ("timing", "usage")}
    return {**rest, "usage": usage}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
