"""Our figures beside those of `sglang.benchmark.serving`: one server, the same prompts, runs in turn.

    .venv-sglang/bin/python -m benchmarks.bench_against_sglang [--rounds N] [--prompts N] [--concurrency N]

Target: throughput, TTFT, TPOT and end-to-end within 3 % of each other, at the median of the rounds. Both send the
same rows to the same real SGLang server on this machine's CPU, so many in flight, greedy, to full length. It
forgets its keys and values before each run, and every other round begins with the other client. With --known the
server is one whose every token comes at a known time: what is left is the difference of the clients. Minutes.
Where SGLang is not installed it says how to get it.
"""

import argparse
import asyncio
import io
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import synthetic
from benchmarks.report import Spread, machine
from ghostvis_cli.bench.lengths import Length
from ghostvis_cli.bench.run import Plan, Progress, Target, measure
from ghostvis_cli.bench.schema import Load
from ghostvis_cli.bench.workload import Spec, Workload, drawn
from ghostvis_cli.engines.base import Sampling
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings

WITHIN = 0.03
KNOWN = synthetic.Times(first_s=0.05, gap_s=0.01)
# Ours, theirs, and what theirs is multiplied by to be in our unit.
FIGURES = (
    ("requests_per_s", "request_throughput", 1.0),
    ("output_tokens_per_s", "output_throughput", 1.0),
    ("ttft_mean", "mean_ttft_ms", 1e-3),
    ("ttft_p50", "median_ttft_ms", 1e-3),
    ("tpot_mean", "mean_tpot_ms", 1e-3),
    ("tpot_p50", "median_tpot_ms", 1e-3),
    ("e2e_mean", "mean_e2e_latency_ms", 1e-3),
    ("e2e_p50", "median_e2e_latency_ms", 1e-3),
)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--known", action="store_true", help="a server of known times in place of SGLang")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    options = parser.parse_args()
    if find_spec("sglang") is None:
        print(
            "SGLang is not installed here: make sglang, then"
            " .venv-sglang/bin/python -m benchmarks.bench_against_sglang"
        )
        return 0
    print(f"{machine()}; {options}")
    with tempfile.TemporaryDirectory() as folder:
        model = _converted(Path(folder) / "model")
        if options.known:
            with synthetic.serving(KNOWN) as url:
                return _compare(*_measured(options, url, model, lambda: None))
        from tests.sglang.servers import serving

        with serving(model) as server:
            return _compare(*_measured(options, server.url, model, server.forget))


def _measured(
    options: argparse.Namespace, url: str, model: Path, forget: Callable[[], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures of each round, ours and theirs. The first round warms everything up and is not among them."""
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for round_ in range(options.rounds + 1):
        work = _workload(options, round_)
        for name in ("ours", "theirs") if round_ % 2 else ("theirs", "ours"):
            forget()
            if name == "ours":
                ours.append(_ours(url, work, options.concurrency))
            else:
                theirs.append(_theirs(url, model, work, options, model.parent))
    return ours[1:], theirs[1:]


def _compare(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> int:
    missed = 0
    for name, their_name, unit in FIGURES:
        mine, other = (
            Spread.of([run[name] for run in ours]),
            Spread.of([run[their_name] * unit for run in theirs]),
        )
        pairs = Spread.of([a / b for a, b in zip(mine.values, other.values, strict=True)])
        off = mine.median / other.median - 1
        missed += abs(off) > WITHIN
        print(
            f"{name}: {mine.show(4)} ours, {other.show(4)} theirs; medians {off:+.1%}, pairs {pairs.show(3)}"
            f"{'  MISSED' if abs(off) > WITHIN else ''}"
        )
    return int(bool(missed))


def _converted(directory: Path) -> Path:
    """The built-in model as SGLang loads it."""
    command = [sys.executable, "-c", "from ghostvis_cli.cli.app import main; main()", "convert"]
    command += ["--source", "demo", "--out", str(directory)]
    subprocess.run([*command, "--dtype", "float32", "--no-verify"], check=True, stdout=subprocess.DEVNULL)
    return directory


def _workload(options: argparse.Namespace, seed: int) -> Workload:
    spec = Spec(
        seed, options.prompts, Length("fixed", options.prompt_len), Length("fixed", options.output_len)
    )
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, ignore_eos=True)
    return drawn(spec, sampling, rounds=1, warm_up=0)


def _ours(url: str, work: Workload, concurrency: int) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        async with await RemoteEngine.connect(RemoteSettings(url, retries=0)) as engine:
            target = Target("ours", engine)
            (found,) = await measure([target], work, Plan((Load(concurrency),)), Progress())
            assert not found.failures, found.notes
            return dict(found.figures)

    return asyncio.run(run())


def _theirs(
    url: str, model: Path, work: Workload, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    rows, result = folder / "rows.jsonl", folder / "result.jsonl"
    (items,) = work.rounds
    lines = [
        {
            "messages": [{"role": "user", "content": item.request().messages[-1].text}],
            "max_tokens": options.output_len,
        }
        for item in items
    ]
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result.unlink(missing_ok=True)
    host, _, port = url.removeprefix("http://").partition(":")
    command = ["--backend", "sglang-oai-chat", "--host", host, "--port", port, "--model", str(model)]
    command += ["--dataset-name", "openai", "--dataset-path", str(rows), "--num-prompts", str(len(items))]
    command += ["--request-rate", "inf", "--max-concurrency", str(options.concurrency)]
    command += ["--warmup-requests", "0", "--disable-tqdm", "--output-file", str(result)]
    _run_theirs(command)
    found: dict[str, Any] = json.loads(result.read_text().splitlines()[-1])
    assert found["completed"] == len(items)
    return found


def _run_theirs(command: list[str]) -> None:
    """In this process: their imports take longer than a run."""
    # Needed for a data set that is not used here; SGLang itself does without.
    stand_in: Any = types.ModuleType("datasets")
    stand_in.load_dataset = None
    sys.modules.setdefault("datasets", stand_in)
    from sglang.benchmark.serving import cli_main

    sys.argv, kept = ["sglang.benchmark.serving", *command], sys.argv
    try:
        with redirect_stdout(io.StringIO()):
            cli_main()
    finally:
        sys.argv = kept


if __name__ == "__main__":
    sys.exit(main())
