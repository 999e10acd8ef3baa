"""Is a batch crash-safe? Kill one with SIGKILL at random moments until it is done, and compare it with a calm run.

    python -m benchmarks.batch_kill [--rows 500] [--kills 30] [--server-kills 10] [--seed 0]

Greedy, on the built-in model, every fourth row with an image. Every fifth kill falls in a start, the others
after the first new record. Then the same rows are sent to a `ghostvis serve`, and it is the server that is killed
and started again on its port; the batch is started again, with --retry-errors, whenever it gave up.

Prints the counts and a verdict, and exits with 1 if a single row is missing, doubled or different. Timing, cached
tokens and the order of rows are not compared: they may differ. Of the batch that went through the server, text and
token ids are also compared with those of the model in the batch's own process.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx2

from benchmarks.report import Spread, machine, parser_of
from ghostvis_cli import demo

IMAGES = ("three-shapes.jpg", "red-circle.png", "two-circles-striped.png", "cross-and-diamond.jpg")
QUESTIONS = ("What is in this picture?", "How many shapes are there?", "Who are you?", "What is the color?")
START_KILL_EVERY = 5  # of the kills: one that may fall while a model is loaded
CONCURRENCY = 8  # so that a run of few rows takes long enough to be killed many times
COMMAND = (sys.executable, "-c", "from ghostvis_cli.cli.app import main; main()")


@dataclass(frozen=True)
class Calm:
    """An undisturbed run: what it wrote, and how long it took to its first record and to its end."""

    records: list[dict[str, Any]]
    start_s: float
    total_s: float


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--server-kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    print(f"{machine()}; {options.rows} rows, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="batch-kill-") as directory:
        rows = Path(directory, "rows.jsonl")
        write_rows(rows, options.rows)
        shutil.copytree(demo.BASE_DIR, rows.with_name("base"))  # the run may outlive an update of the package
        calm = undisturbed(rows, "calm", model(rows))
        good = [
            batch_killed(rows, calm, options.kills, dice),
            server_killed(rows, calm, options.server_kills, dice),
        ]
    return 0 if all(good) else 1


def batch_killed(rows: Path, calm: Calm, kills: int, dice: random.Random) -> bool:
    killed = rows.with_name("killed.jsonl")
    counts, repairs = kill_until_done(rows, killed, calm, kills, dice)
    starts = sum(before == after for before, after in zip([0, *counts], counts, strict=False))
    print(f"{len(counts)} kills, {starts} of them before a new record; rows recorded at each: {counts}")
    gains = [float(after - before) for before, after in zip([0, *counts], counts, strict=False)]
    print(f"rows won between kills: {Spread.of(gains).show(0)}; torn lines repaired: {repairs}")
    return verdict(calm.records, read(killed))


def server_killed(rows: Path, local: Calm, kills: int, dice: random.Random) -> bool:
    killed = rows.with_name("server-killed.jsonl")
    with Server(rows) as server:
        calm = undisturbed(rows, "calm-served", server.options())
        codes, counts = kill_server_until_done(rows, killed, server, calm, kills, dice)
    print(f"{kills} kills of the server; rows recorded at each, failed ones included: {counts}")
    print(f"how the batch ended, each time: {codes}")
    texts = {record["index"]: (record["text"], record["token_ids"]) for record in local.records}
    same = all(texts[record["index"]] == (record["text"], record["token_ids"]) for record in read(killed))
    print(f"texts and token ids {'as' if same else 'NOT as'} without a server")
    return verdict(calm.records, read(killed)) and same


def write_rows(path: Path, count: int) -> None:
    folder = Path(demo.__file__).parent
    with path.open("w") as file:
        for number in range(count):
            row: dict[str, Any] = {"id": f"row-{number}", "prompt": QUESTIONS[number // 4 % len(QUESTIONS)]}
            row["max_tokens"] = 8 + number % 25  # as many lengths as make rows end out of order
            if number % 4 == 0:
                row["images"] = [str(folder / IMAGES[number // 4 % len(IMAGES)])]
            file.write(json.dumps(row) + "\n")


def model(rows: Path) -> list[str]:
    return ["--engine", "local", "--base-dir", str(rows.with_name("base")), "--source", "sft"]


def start(rows: Path, output: Path, engine: list[str]) -> "subprocess.Popen[str]":
    files = ["--input", str(rows), "--output", str(output), "--concurrency", str(CONCURRENCY)]
    command = [*COMMAND, "generate", *engine, "--temperature", "0", *files]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


class Server:
    """A `ghostvis serve` that can be killed and comes back on the same port."""

    def __init__(self, rows: Path) -> None:
        self._rows = rows
        self._process, self.url = self._start("0")

    def options(self) -> list[str]:
        return ["--base-url", self.url, "--retry-errors"]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def start_again(self) -> None:
        self._process, _ = self._start(self.url.rpartition(":")[2])

    def until_ready(self) -> None:
        while True:
            with suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/readyz", trust_env=False).status_code == 200:
                    return
            time.sleep(0.05)

    def _start(self, port: str) -> "tuple[subprocess.Popen[str], str]":
        command = [*COMMAND, "serve", *model(self._rows), "--port", port, "--quiet"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    def __enter__(self) -> Self:
        self.until_ready()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def undisturbed(rows: Path, name: str, engine: list[str]) -> Calm:
    output = rows.with_name(f"{name}.jsonl")
    began = time.perf_counter()
    process = start(rows, output, engine)
    while size(output) == 0 and process.poll() is None:
        time.sleep(0.01)
    first = time.perf_counter()
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"the undisturbed run ended with {process.returncode}: {said}")
    calm = Calm(read(output), first - began, time.perf_counter() - began)
    print(f"{name}: first record after {calm.start_s:.1f} s, end after {calm.total_s:.1f} s", flush=True)
    return calm


def kill_until_done(
    rows: Path, output: Path, calm: Calm, kills: int, dice: random.Random
) -> tuple[list[int], int]:
    """Rows recorded after each kill, and how many torn lines the next starts repaired."""
    counts: list[int] = []
    repairs = 0
    while True:
        before, process = size(output), start(rows, output, model(rows))
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


def kill_server_until_done(
    rows: Path, output: Path, server: Server, calm: Calm, kills: int, dice: random.Random
) -> tuple[dict[int, int], list[int]]:
    """How often the batch ended with which code, and the rows recorded when each kill fell."""
    codes, counts = Counter[int](), list[int]()
    process = start(rows, output, server.options())
    while process.poll() is None or process.returncode or len(counts) < kills:
        if process.poll() is not None:
            if not process.returncode:
                raise SystemExit(f"done after {len(counts)} of {kills} kills: more --rows are needed")
            codes[process.returncode] += 1
            server.until_ready()
            process = start(rows, output, server.options())
            time.sleep(calm.start_s)
        if len(counts) == kills:
            time.sleep(0.05)
            continue
        if len(counts) % START_KILL_EVERY:
            server.until_ready()
        time.sleep(dice.uniform(0, (calm.total_s - calm.start_s) / kills))
        if process.poll() is None:  # a batch that has given up is started again first
            counts.append(lines(output))
            server.kill()
            server.start_again()
    codes[process.returncode] += 1
    return dict(codes), counts


def verdict(calm: list[dict[str, Any]], killed: list[dict[str, Any]]) -> bool:
    expected = {record["index"]: record for record in calm}
    found = [record["index"] for record in killed]
    missing, doubled = len(calm) - len(set(found)), len(found) - len(set(found))
    different = sum(answer(record) != answer(expected[record["index"]]) for record in killed)
    print(f"rows: {len(found)}; missing: {missing}, doubled: {doubled}, different: {different}")
    good = not (missing or doubled or different)
    print("every row exactly once, as in the undisturbed run" if good else "NOT crash-safe", flush=True)
    return good


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
