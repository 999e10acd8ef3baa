"""SGLang in its states on one machine, side by side: requests/s, time to the first token, and whose processor time.

    python -m benchmarks.gpu_sglang [--model d32|d32-text|demo|tiny|tiny-text] [--states A,B] [-- SGLANG FLAGS]

One server a state, all started at once and measured in turns: each row has a seed of its own, so that every image
is new to every server, and --clients processes ask, so that they are not what is measured. Ratios are to the first
state, with their 95 % interval. Below each rate: processor time for a request, of the main process with its threads
and of each other kind of process, and how busy the busiest thread was. Then answers: each state against the local
engine, and against the first state. d32 is a vision model of the real sizes (2.1 billion parameters, CLIP ViT-L/14
at 224 pixels), d32-text its decoder; weights are random.
"""

import argparse
import asyncio
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from benchmarks.claims import COMMAND
from benchmarks.clients import WARM_UP, Clients, Load, Result, clients
from benchmarks.random_model import MODELS, make
from benchmarks.report import Spread, machine, parser_of
from benchmarks.sglang_soak import soak
from ghostvis_cli import demo
from ghostvis_cli.bench.stats import paired_shift
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.engines.base import Completion, GenerateRequest, complete
from ghostvis_cli.images import EncodedImage, load_image
from ghostvis_cli.processor_use import (
    DETOKENIZER,
    FULL,
    MAIN,
    SCHEDULER,
    SHORTEST_S,
    WORKER,
    Use,
    Watch,
    limit,
)
from ghostvis_cli.prompt import Message
from ghostvis_cli.sampling import Sampling

ROLES = (MAIN, WORKER, DETOKENIZER, SCHEDULER)
QUESTIONS = ("What is in this picture?", "How many shapes are there?", "Where is the red one?")
NEW_TOKENS = 32
READY_S = 400
# Room for several servers on one device; their starts then do not have to take turns. Those that are not asked keep
# no core busy. Fewer graphs start sooner.
SHARED = ("--max-total-tokens", "24576", "--sleep-on-idle", "--cuda-graph-max-bs-decode", "64")


@dataclass(frozen=True)
class State:
    """What differs from `ghostvis serve` as it is. `plain`: SGLang's own command, without our plug-in."""

    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()  # of ghostvis serve
    flags: tuple[str, ...] = ()  # of SGLang
    plain: bool = False


EAGER = ("--disable-prefill-cuda-graph", "--stream-interval", "1")
NO_CACHES = {"GHOSTVIS_PICTURE_CACHE_MB": "0", "SGLANG_VLM_CACHE_SIZE_MB": "0"}
CROWD = {"OMP_NUM_THREADS": str(os.cpu_count())}
TUNED = (
    *("--cuda-graph-backend-prefill", "full", "--stream-interval", "4", "--schedule-policy", "lpm"),
    *("--enable-metrics", "--enable-cache-report"),
)
ONE_WORKER = ("--tokenizer-worker-num", "1")
STATES = {
    "no cuDNN": State(CROWD | {"GHOSTVIS_VISION_GRAPHS": "0"}, flags=EAGER),
    "graphs": State(CROWD, flags=("--stream-interval", "1")),
    "one thread": State(flags=("--stream-interval", "1")),
    "now": State(),
    "breakable": State(flags=("--cuda-graph-backend-prefill", "breakable")),
    "no caches": State(NO_CACHES, flags=("--disable-radix-cache",)),
    "1 worker": State(flags=ONE_WORKER),
    "tp 2": State(options=("--tensor-parallel-size", "2")),
    "tp 2 nccl": State(options=("--tensor-parallel-size", "2"), flags=("--disable-custom-all-reduce",)),
    "dp 2": State(options=("--data-parallel-size", "2")),
    "stock": State({"SGLANG_PLUGINS": "none"}, plain=True),
    "stock tuned": State({"SGLANG_PLUGINS": "none", "OMP_NUM_THREADS": "1"}, flags=TUNED, plain=True),
}


@dataclass(frozen=True)
class Row:
    """A workload. Without questions it is text of so many words, of which its prompt has some more tokens."""

    questions: int = 0
    size: str = "512x384"
    output: int = 16
    concurrency: int = 32
    words: int = 128

    @property
    def name(self) -> str:
        about = (
            f"{self.questions} questions an image, {self.size}"
            if self.questions
            else f"text of {self.words} words"
        )
        return f"{about}, {self.output} tokens, {self.concurrency} in flight"

    def load(self, seed: int, requests: int, temperature: float) -> Load:
        count = requests if self.concurrency > 1 else max(4, requests // 10)
        width, height = map(int, self.size.split("x"))
        return Load(
            seed,
            count,
            self.concurrency,
            self.questions,
            (width, height),
            self.words,
            self.output,
            temperature,
        )


IMAGES = (
    Row(1),
    Row(4),
    Row(10),
    Row(1, "2000x1500"),
    Row(10, "2000x1500"),
    Row(10, output=100),
    Row(1, concurrency=1),
)
TEXTS = (Row(), Row(output=100), Row(concurrency=1))


@dataclass(frozen=True)
class Server:
    state: str
    url: str

    @property
    def port(self) -> int:
        return int(urlsplit(self.url).netloc.rpartition(":")[2])


# --- servers


def states_of(given: argparse.Namespace) -> dict[str, State]:
    """The known ones, those of --add, and with --before that of an older checkout."""
    found = dict(STATES)
    for text in given.add:
        name, _, flags = text.partition("=")
        found[name] = State(flags=tuple(flags.split()))
    if given.before is not None:
        path = f"{given.before.resolve()}:{os.environ.get('PYTHONPATH', '')}"
        found["before"] = State({"PYTHONPATH": path, "PYTHONSAFEPATH": "1"})
    return found


@contextmanager
def serving(
    model: Path, states: Mapping[str, State], flags: Sequence[str], logs: Path
) -> Iterator[list[Server]]:
    """One server a state, started together, each ready. States that do not start are told and left out."""
    with ExitStack() as stack:
        starting = [
            (name, stack.enter_context(_started(model, name, state, flags, logs)))
            for name, state in states.items()
        ]
        servers = [
            Server(state, url) for state, out in starting if (url := _url(state, out, logs)) is not None
        ]
        if not servers:
            raise SystemExit("no server started")
        yield servers


@contextmanager
def _started(model: Path, name: str, state: State, flags: Sequence[str], logs: Path) -> Iterator[IO[str]]:
    """Its stdout, which will be one line."""
    log = logs / f"{name.replace(' ', '-')}.log"
    if state.plain:
        argv = _plain(model, [*flags, *state.flags], log)
    else:
        serve = ["serve", "--engine", "sglang", "--checkpoint-path", str(model), "--port", "0", "--json"]
        argv = [*COMMAND, *serve, "--log-file", str(log), "--ready-timeout", str(READY_S)]
        argv += [*state.options, "--", *flags, *state.flags]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=os.environ | state.environment)
    try:
        assert process.stdout is not None
        yield process.stdout
    finally:
        process.terminate()
        process.wait()


def _plain(model: Path, flags: Sequence[str], log: Path) -> list[str]:
    """A script that runs SGLang's own server and says its address once it is ready."""
    from ghostvis_cli.serve.listen import free_port
    from ghostvis_cli.serve.settings import ServerSettings

    port = free_port(ServerSettings(port=0))
    server = [
        sys.executable,
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(model),
        "--port",
        str(port),
        *flags,
    ]
    script = f"""
import json, signal, subprocess, sys, time, urllib.request
process = subprocess.Popen({server!r}, stdout=open({str(log)!r}, "wb"), stderr=subprocess.STDOUT)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
try:
    while process.poll() is None:
        try:
            urllib.request.urlopen("http://127.0.0.1:{port}/health")
            break
        except OSError:
            time.sleep(1)
    print(json.dumps({{"url": "http://127.0.0.1:{port}"}}), flush=True)
    process.wait()
finally:
    process.terminate()
    process.wait()
"""
    return [sys.executable, "-c", script]


def _url(state: str, out: IO[str], logs: Path) -> str | None:
    line = out.readline()
    if line and "url" in (said := json.loads(line)):
        return str(said["url"])
    log = logs / f"{state.replace(' ', '-')}.log"
    end = log.read_text(errors="replace")[-3000:] if log.exists() else line
    print(f"the server in the state {state!r} ended:\n{end}", flush=True)
    return None


# --- rates


def measure(
    servers: Sequence[Server], row: Row, seed: int, given: argparse.Namespace, asking: Clients
) -> None:
    """One row: the states in turn, each asked the same that nobody asked before."""
    asking.prepare(row.load(seed, given.requests, given.temperature), given.repeats)
    for server in servers:
        asking.run(server.url, WARM_UP)
    runs: dict[str, list[Run]] = {server.state: [] for server in servers}
    for number in range(given.repeats):
        for server in [*servers[number % len(servers) :], *servers[: number % len(servers)]]:
            watch = Watch(server.port)
            result = asking.run(server.url, number)
            runs[server.state].append(Run(result, watch.uses()))
    print(f"\n{row.name}", flush=True)
    for server in servers:
        for line in told(server.state, runs[server.state], runs[servers[0].state]):
            print(line, flush=True)


@dataclass(frozen=True)
class Run:
    result: Result
    uses: Sequence[Use]

    def spent_ms(self, role: str) -> float:
        """Of processor time for a request."""
        cores = sum(use.cores for use in self.uses if use.role == role)
        return 1000 * cores * (self.result.ended_s - self.result.begun_s) / max(1, len(self.result.whole_s))

    def busiest(self, role: str) -> float:
        """Share of a core that the busiest thread of such a process had or waited for."""
        return max((use.busiest for use in self.uses if use.role == role), default=0.0)


def told(state: str, runs: Sequence[Run], first: Sequence[Run]) -> Iterator[str]:
    """A state's line, and what is to be known about its runs."""
    rates = Spread.of([run.result.rate for run in runs])
    ttft = statistics.median(run.result.first_ms for run in runs)
    whole = statistics.median(run.result.whole_ms for run in runs)
    spent = ", ".join(
        f"{role} {statistics.median(run.spent_ms(role) for run in runs):.2f} ms "
        f"({statistics.median(run.busiest(role) for run in runs):.0%})"
        for role in ROLES
        if any(run.busiest(role) for run in runs)
    )
    line = f"  {state:<12} {rates.show(1)} requests/s, TTFT {ttft:.1f} ms, whole {whole:.1f} ms"
    if runs is not first and all(run.result.rate for run in (*first, *runs)):
        changes = [math.log(b.result.rate / a.result.rate) for a, b in zip(first, runs, strict=True)]
        ratio = paired_shift(changes)
        line += "; {:.2f} times the first ({:.2f} to {:.2f})".format(
            *(math.exp(value) for value in (ratio.estimate, ratio.low, ratio.high))
        )
    yield line
    yield f"    a request takes {spent}"
    if failed := {what: times for run in runs for what, times in run.result.failed.items()}:
        yield f"    failed: {failed}"
    if (busy := max(run.result.busy for run in runs)) > FULL:
        yield f"    a client process was {busy:.0%} busy: more of them (--clients)"
    limits = [found.message for run in runs if (found := limit(run.uses)) is not None]
    if limits:
        yield f"    in {len(limits)} of {len(runs)} runs {limits[-1]}"


@contextmanager
def profiled(server: Server, name: str, place: Path) -> Iterator[None]:
    """py-spy on each of the server's processes: where the lock is held and what the scheduler does."""
    spies = []
    for use in _seen(server):
        out = place / f"{name}-{use.role.split()[0]}-{use.pid}.txt"
        kind = ["--gil"] if use.role == MAIN else []
        command = [
            "py-spy",
            "record",
            "--nonblocking",
            "--format",
            "raw",
            "--rate",
            "200",
            *kind,
            "--duration",
            "60",
        ]
        spies.append(
            subprocess.Popen(
                [*command, "--output", str(out), "--pid", str(use.pid)], stderr=subprocess.DEVNULL
            )
        )
    try:
        yield
    finally:
        for spy in spies:
            spy.send_signal(signal.SIGINT)
            spy.wait()


def _seen(server: Server) -> list[Use]:
    watch = Watch(server.port)
    time.sleep(SHORTEST_S)
    return watch.uses()


# --- answers


def requests(sees: bool) -> list[GenerateRequest]:
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=5)
    images = [[load_image(path)] for path in sorted(demo.BASE_DIR.parent.glob("*.*g"))] if sees else [[]]
    asked = [Message.of("user", question, images) for images in images for question in QUESTIONS]
    return [GenerateRequest((message,), sampling=sampling) for message in asked]


async def local_answers(
    checkpoint: Checkpoint, asked: Sequence[GenerateRequest], device: str
) -> list[Completion]:
    from ghostvis_cli.engines.local import LocalEngine, LocalSettings

    async with await LocalEngine.load(checkpoint, LocalSettings(device=device, dtype="bfloat16")) as engine:
        return [await complete(engine, request) for request in asked]


def served_answer(url: str, request: GenerateRequest, ids: Sequence[int]) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities by SGLang's own route, from the very ids that the local engine was given."""
    import httpx2

    images: Sequence[EncodedImage] = request.messages[0].images
    body = {
        "input_ids": list(ids),
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
    }
    if images:
        body["image_data"] = [image.data_url() for image in images]
    answer = httpx2.post(f"{url}/generate", json=body, timeout=300).raise_for_status().json()
    tokens = answer["meta_info"]["output_token_logprobs"]
    return [token[1] for token in tokens], [token[0] for token in tokens]


def compare(servers: Sequence[Server], checkpoint: Checkpoint, device: str, *, sees: bool) -> None:
    """Of every state: tokens until it leaves the local engine's answer, and how close the choice was there."""
    from ghostvis_cli.checkpoint.tokenizer import Tokenizer
    from ghostvis_cli.prompt import VISION_ROW, render_for_reply

    tokenizer, asked = Tokenizer.load(checkpoint.tokenizer_path), requests(sees)
    known = asyncio.run(local_answers(checkpoint, asked, device))
    rendered = [render_for_reply(one.messages, tokenizer, "inline", 1).ids for one in asked]
    # One row: the plug-in makes 64 of a mark.
    prompts = [[tokenizer.image_id if id_ == VISION_ROW else id_ for id_ in ids] for ids in rendered]
    print(f"\nanswers of {NEW_TOKENS} tokens to {len(asked)} questions", flush=True)
    of_first: list[list[int]] = []
    for server in servers:
        served = [served_answer(server.url, *each) for each in zip(asked, prompts, strict=True)]  # type: ignore[arg-type]
        of_first = of_first or [tokens for tokens, _ in served]
        same = sum(tokens == first for (tokens, _), first in zip(served, of_first, strict=True))
        print(
            f"  {server.state:<12} {same} equal to the first state's; {agreement(known, served)}", flush=True
        )


def agreement(known: Sequence[Completion], served: Sequence[tuple[list[int], list[float]]]) -> str:
    """Tokens until the first difference, and log-probabilities until there, where both saw the same text."""
    equal, alike, differences, margins = 0, 0, [0.0], []
    for reference, (tokens, logprobs) in zip(known, served, strict=True):
        pairs = list(zip(reference.token_ids, tokens, strict=True))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        equal, alike = equal + (same == len(pairs)), alike + same
        differences += [abs(reference.logprobs[i].logprob - logprobs[i]) for i in range(same)]
        if same < len(pairs):
            best, second, *_ = sorted((p for _, p in reference.logprobs[same].top), reverse=True)
            margins.append(best - second)
    return (
        f"{equal} equal to the local engine's, {alike} tokens before a difference; |logprob difference| max "
        f"{max(differences):.3f}; margin where they part: {', '.join(f'{m:.3f}' for m in margins) or '-'}"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", choices=("demo", *MODELS), default="d32")
    parser.add_argument("--states", default="now,no caches", help=", ".join(STATES))
    parser.add_argument(
        "--add", action="append", default=[], metavar="NAME=FLAGS", help="a state with these of SGLang"
    )
    parser.add_argument("--before", type=Path, metavar="DIR", help="an older checkout: the state `before`")
    parser.add_argument("--rows", default="all", help="numbers of rows, from 0; none for the answers alone")
    parser.add_argument("--requests", type=int, default=320, help="of a run")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--clients", type=int, default=4, help="processes that ask")
    parser.add_argument(
        "--temperature", type=float, default=Sampling().temperature, help="0: the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6 * 100, help="of the first row")
    parser.add_argument(
        "--profile", default="", help="rows to measure again in the first state, under py-spy"
    )
    parser.add_argument(
        "--soak", type=float, default=0, metavar="SECONDS", help="sglang_soak on the first state"
    )
    parser.add_argument("--no-answers", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--reports", type=Path, help="folder for reports, logs and the model, which is used again"
    )
    split = [*sys.argv, "--"].index("--")
    given, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the servers too
    print(f"{machine()}{_gpu()}; {given}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = given.reports or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        checkpoint, directory = model(given, place)
        states = {name: states_of(given)[name] for name in map(str.strip, given.states.split(","))}
        shared = (*SHARED[: 3 if given.device == "cpu" else None], *flags)
        started_s = time.monotonic()
        with serving(directory, states, shared, place) as servers, clients(given.clients) as asking:
            print(f"{len(servers)} servers ready after {time.monotonic() - started_s:.0f} s", flush=True)
            rows = TEXTS if given.model.endswith("-text") else (*IMAGES, *TEXTS)
            numbers = {"all": list(range(len(rows))), "none": []}.get(given.rows)
            chosen = map(int, given.rows.split(",")) if numbers is None else numbers
            for number in chosen:
                measure(servers, rows[number], given.seed + number, given, asking)
            for number in map(int, given.profile.split(",")) if given.profile else ():
                with profiled(servers[0], f"profile-{number}", place):
                    measure(servers[:1], rows[number], given.seed + 50 + number, given, asking)
            if given.soak:
                asyncio.run(soak(servers[0].url, given.soak))
            if not given.no_answers:
                compare(servers, checkpoint, given.device, sees=not given.model.endswith("-text"))


def model(given: argparse.Namespace, place: Path) -> tuple[Checkpoint, Path]:
    """The checkpoint, and what it converts to."""
    folder, directory = place / given.model, place / f"{given.model}-converted"
    if given.model == "demo":
        checkpoint = locate.find(demo.BASE_DIR, "sft", None, None)
    elif folder.exists():
        checkpoint = locate.from_path(folder, None, folder)
    else:
        checkpoint = make(MODELS[given.model], folder, given.device)
    if not directory.exists():
        convert = ["convert", str(checkpoint.path), "--out", str(directory), "--no-verify", "--quiet"]
        subprocess.run([*COMMAND, *convert], check=True)
    return checkpoint, directory


def _gpu() -> str:
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


if __name__ == "__main__":
    main()
