"""What the GhostVis documents promise of RadixAttention, measured: `ghostvis bench` on two real SGLang servers.

    .venv-sglang/bin/python -m benchmarks.claims [demo|DIRECTORY] [--against URL ...] [-- SGLANG FLAGS]

Two servers of one model, with the radix cache and with --disable-radix-cache, take turns in each repeat: questions
about images (1, 4 and 10 an image, shuffled), the same without images, and a system prompt that all share.
Then the local engine and, with --against, other servers beside the first. What is printed is the median rate of
each, and the ratio of the repeats with its 95 % interval. Reports stay in --reports, for `ghostvis bench compare`.
Some 20 minutes on two cores. Where SGLang is not installed it says how to get it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.report import Spread, machine, parser_of

COMMAND = [sys.executable, "-c", "from ghostvis_cli.cli.app import main; main()"]
SHARED_TOKENS = 512
FIGURES = ("requests_per_s", "ttft_p50", "e2e_p50")


@dataclass(frozen=True)
class Amount:
    """How much is asked: requests of a run, in flight, runs, tokens of an answer."""

    requests: int = 40
    concurrency: int = 8
    repeats: int = 12
    output: int = 16

    def options(self) -> list[str]:
        wanted = {"concurrency": self.concurrency, "repeat": self.repeats, "output-len": self.output}
        return [word for name, value in wanted.items() for word in (f"--{name}", str(value))]

    def images(self, questions: int) -> list[str]:
        return ["--images", str(max(1, self.requests // questions)), "--questions", str(questions)]

    def texts(self) -> list[str]:
        return ["--num-prompts", str(self.requests)]


@contextmanager
def server(model: Sequence[str], log: Path, *options: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """`ghostvis serve` over SGLang on a free port; its URL once it is ready."""
    argv = [*COMMAND, "serve", "--engine", "sglang", *model, "--port", "0", "--json", "--log-file", str(log)]
    process = subprocess.Popen([*argv, *options, "--", *flags], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server ended with code {process.wait()}:\n{log.read_text()[-3000:]}")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait()


def bench(report: Path, *options: str) -> dict[str, Any]:
    """One `ghostvis bench`: its report."""
    subprocess.run([*COMMAND, "bench", *options, "--output", str(report), "--quiet"], check=True)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def show(name: str, report: dict[str, Any], ours: str, other: str) -> None:
    """Rates, ratios to the first engine, and where there are images, how many of their tokens were computed."""
    rates = ", ".join(f"{label} {_spread(report, label, 'requests_per_s')}/s" for label in _engines(report))
    print(f"{name}: {rates}", flush=True)
    for each in report["extra"]["ratios"]:
        if each["figure"] in FIGURES:
            print(
                f"    {other} to {ours}, {each['figure']}: {each['value']:.2f}"
                f" ({each['low'] or 0:.2f} to {each['high'] or 0:.2f})",
                flush=True,
            )
    for label in _engines(report):
        asked, computed = (
            sum(run["figures"][figure] or 0 for run in report["runs"] if run["engine"] == label)
            for figure in ("image_tokens", "image_tokens_computed")
        )
        if asked:
            print(f"    {label}: {asked:.0f} image tokens asked for, {computed:.0f} computed", flush=True)


def _engines(report: dict[str, Any]) -> list[str]:
    return [engine["name"] for engine in report["engines"]]


def _spread(report: dict[str, Any], engine: str, figure: str) -> str:
    values = [run["figures"][figure] for run in report["runs"] if run["engine"] == engine]
    return Spread.of(values).show(1)


def measure_caches(cached: str, uncached: str, amount: Amount, reports: Path, only: str = "") -> None:
    """Each row has a seed of its own: images of the row before are known to both servers."""
    shared = [*amount.texts(), "--shared-prefix", str(SHARED_TOKENS)]
    rows = {f"{n} questions an image": amount.images(n) for n in (1, 4, 10)}
    rows |= {"text": amount.texts(), f"text behind {SHARED_TOKENS} shared tokens": shared}
    for seed, (name, options) in enumerate(rows.items(), start=amount.concurrency * 100):
        if only in name:
            options += ["--base-url", uncached, "--against", cached, "--seed", str(seed), *amount.options()]
            report = bench(reports / f"{amount.concurrency}-{name.replace(' ', '-')}.json", *options)
            show(name, report, "no radix cache", "radix cache")


def measure_engines(
    cached: str, model: Sequence[str], against: Sequence[str], amount: Amount, reports: Path, only: str = ""
) -> None:
    """The local engine and SGLang, and other servers, which know text alone."""
    rows = {"engines, images": [*amount.texts(), "--with-vision"], "engines, text": amount.texts()}
    for name, options in rows.items():
        if only in name:
            options += ["--engines", "local,remote", "--base-url", cached, *model, *amount.options()]
            show(name, bench(reports / f"{name.replace(', ', '-')}.json", *options), "local", "SGLang")
    for number, url in enumerate(against):
        servers = ["--base-url", cached, "--against", url]
        report = bench(reports / f"against-{number}.json", *servers, *amount.texts(), *amount.options())
        show(f"text, {url}", report, "SGLang", url)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("model", nargs="?", default="demo", help="demo, or a checkpoint directory")
    parser.add_argument("--against", action="append", default=[], metavar="URL")
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose names hold these words")
    parser.add_argument("--requests", type=int, default=Amount.requests)
    parser.add_argument("--concurrency", type=int, default=Amount.concurrency)
    parser.add_argument("--repeats", type=int, default=Amount.repeats)
    parser.add_argument("--reports", type=Path, help="folder for the reports")
    split = [*sys.argv, "--"].index("--")
    given, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if find_spec("sglang") is None:
        print("SGLang is not installed here: make sglang, then .venv-sglang/bin/python -m benchmarks.claims")
        return 0
    print(f"{machine()}; {given}", flush=True)
    amount = Amount(given.requests, given.concurrency, given.repeats)
    model = ["--source", "demo"] if given.model == "demo" else ["--checkpoint-path", given.model]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        reports = given.reports or place
        reports.mkdir(parents=True, exist_ok=True)
        with server(model, place / "cached.log", flags=flags) as cached:
            with server(model, place / "none.log", flags=[*flags, "--disable-radix-cache"]) as uncached:
                measure_caches(cached, uncached, amount, reports, given.only)
            measure_engines(cached, model, given.against, amount, reports, given.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
