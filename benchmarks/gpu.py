"""The local engine on a CUDA device, in one command of a few minutes.

    python -m benchmarks.gpu [--rows decode,nanochat,batch,start] [--json gpu.json] [--repeats 5] [--sglang]

Random weights. decode and nanochat: a relu2 decoder of 1.9G parameters (d32) in bfloat16, greedy, 128 tokens
after a prompt of 32, 1, 8 and 32 requests at once: eager steps as they were, without cuDNN's attention, steps of
fixed shapes without graphs, with them (the default), and compiled besides; against reading the weights once a step.
nanochat is its published way of decoding, one sequence at a time. batch: a thousand rows of 64 + 64 tokens, every
fourth with an image, and start: `ghostvis generate` from nothing to the first token and to 500, on a d32 of 2.1G
that sees. With --sglang its engine in this process answers the same (--sglang-arguments, JSON, are SGLang's). Each
figure is in the file as soon as it is known.
"""

import argparse
import asyncio
import gc
import io
import json
import os
import random
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims import COMMAND
from benchmarks.decode import prompts, random_model
from benchmarks.nanochat import PublishedEngine
from benchmarks.random_model import MODELS, make
from benchmarks.report import Spread, machine
from ghostvis_cli import demo
from ghostvis_cli.checkpoint.load import LoadedModel
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.engines.base import Completion, Engine, GenerateRequest, Sampling, complete
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.engines.local.scheduler import Scheduler
from ghostvis_cli.images import EncodedImage, from_bytes
from ghostvis_cli.model.config import DecoderConfig
from ghostvis_cli.model.ghostvis import GhostVis
from ghostvis_cli.prompt import Message, Prompt

D32 = DecoderConfig(2048, 65536, 32, 16, 16, 2048, 8192, "relu2")
SMALL = DecoderConfig(1024, 1024, 4, 3, 1, 192, 512, "relu2")
NEW_TOKENS = 128
BATCHES = (1, 8, 32)
ROWS, IN_FLIGHT = 1000, 64
MET = 8  # prompts before the measured ones: of two or three sizes, each met twice before it has a graph
TOKENIZER = demo.BASE_DIR / "tokenizer" / "tokenizer.pkl"
# Seconds of warming up count among the compiled mode's: they are the compiler's.
MODES: dict[str, LocalSettings | None] = {
    "eager, as landed": None,
    "eager, no cuDNN": None,
    "fixed shapes": LocalSettings(max_batch=32, graphs="off"),
    "graphs": LocalSettings(max_batch=32),
    "graphs, compiled": LocalSettings(max_batch=32, compile=True),
}


@dataclass
class Book:
    """Every figure, printed and written at once."""

    file: Path
    repeats: int
    device: torch.device
    figures: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, values: list[float], unit: str, **more: Any) -> float:
        spread = Spread.of(values)
        self.figures[name] = {"median": spread.median, "values": values, "unit": unit} | more
        self.file.write_text(json.dumps(self.figures, indent=1))
        besides = "".join(f"; {key} {value}" for key, value in more.items())
        print(f"{name}: {spread.show(1, ' ' + unit)}{besides}", flush=True)
        return spread.median

    def repeat(self, measure: Callable[[], float]) -> list[float]:
        return [measure() for _ in range(self.repeats)]


# --- decoding


def modes(names: list[str], model: GhostVis) -> Iterator[tuple[str, LocalEngine]]:
    """Ways of decoding, on one model. The compiled one changes the model, and is the last."""
    loaded = LoadedModel(model, Tokenizer.load(TOKENIZER), Checkpoint(Path("random.pt")), ())
    for name, settings in MODES.items():
        if name not in names:
            continue
        engine = LocalEngine(loaded, settings or LocalSettings(max_batch=32))
        if settings is None:
            engine._scheduler = Scheduler(model, loaded.tokenizer)
            torch.backends.cuda.enable_cudnn_sdp(name == "eager, as landed")
        yield name, engine
        asyncio.run(engine.aclose())
        _free()


def of_ids(engine: LocalEngine, ids: list[list[int]], new_tokens: int) -> float:
    """Seconds until all are answered, asked at once. Rendering is not what is timed."""
    sampling = Sampling(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    rendered = iter([Prompt(tuple(each), (0,) * len(each)) for each in ids])
    engine._renderer._render = lambda request: (next(rendered), sampling)  # type: ignore[method-assign]

    async def run() -> list[Completion]:
        request = GenerateRequest(prompt="-", sampling=sampling)
        return list(await asyncio.gather(*(complete(engine, request) for _ in ids)))

    started = time.perf_counter()
    done = asyncio.run(run())
    took = time.perf_counter() - started
    assert all(len(one.token_ids) == new_tokens for one in done)
    return took


def decode(book: Book, model: GhostVis, names: list[str]) -> None:
    weights = sum(p.nbytes for p in model.parameters()) - model.decoder.wte.weight.nbytes
    copied = bandwidth(book.device)
    book.note("copy", [copied / 1e12], "TB/s", weights_gb=round(weights / 1e9, 2))
    book.note("bound of batch 1", [copied / weights], "tok/s")
    for name, engine in modes(names, model):
        for batch in BATCHES:
            try:
                warm_s = sum(of_ids(engine, prompts(batch), NEW_TOKENS) for _ in "12")
                speeds = book.repeat(lambda: batch * NEW_TOKENS / of_ids(engine, prompts(batch), NEW_TOKENS))  # noqa: B023
            except Exception:
                traceback.print_exc()
                break
            share = round(100 * sorted(speeds)[len(speeds) // 2] / batch * weights / copied)
            book.note(
                f"decode, {name}, batch {batch}",
                speeds,
                "tok/s",
                of_bound=f"{share} %",
                warm_s=round(warm_s, 2),
            )
        if name in ("eager, no cuDNN", "graphs", "graphs, compiled"):
            _ttft(book, engine, name)


def _ttft(book: Book, engine: LocalEngine, name: str) -> None:
    rng = random.Random(0)

    def first() -> float:
        return 1000 * of_ids(
            engine, [[rng.randrange(engine._config.decoder.vocab_size) for _ in range(1024)]], 1
        )

    for _ in "123":
        first()
    book.note(f"first token after 1,024, {name}", book.repeat(first), "ms")


def nanochat(book: Book, model: GhostVis, _names: list[str]) -> None:
    published = PublishedEngine(model.decoder)
    ids = prompts(1)[0]
    with torch.inference_mode():
        published.generate(ids, 16)

        def speed() -> float:
            started = time.perf_counter()
            assert len(published.generate(ids, NEW_TOKENS)) == NEW_TOKENS
            return NEW_TOKENS / (time.perf_counter() - started)

        book.note("decode, nanochat's Engine, batch 1", book.repeat(speed), "tok/s")


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large device copy reads and writes."""
    source = torch.zeros((2 if device.type == "cuda" else 1) * 2**28, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    _wait(device)
    started = time.perf_counter()
    for _ in range(20):
        target.copy_(source)
    _wait(device)
    return 20 * 2 * source.nbytes / (time.perf_counter() - started)


# --- the whole engine, on a model that sees


@contextmanager
def engines(checkpoint: Checkpoint, given: argparse.Namespace) -> Iterator[dict[str, Callable[[], Any]]]:
    """What opens each engine. They run one after the other: memory is one's own."""
    from ghostvis_cli.profile import EngineSettings, ModelSettings, Profile

    model = ModelSettings(checkpoint_path=str(checkpoint.path.parent))

    async def local() -> Engine:
        return LocalEngine.open(checkpoint, LocalSettings(device=given.device))

    async def sglang() -> Engine:
        from ghostvis_cli.sglang import engine as module

        arguments = module._arguments
        module._arguments = lambda *each: arguments(*each) | json.loads(given.sglang_arguments)
        return await module.SGLangEngine.start(Profile(engine=EngineSettings(kind="sglang"), model=model))

    yield {"local": local} | ({"SGLang": sglang} if given.sglang else {})


def words(count: int, seed: int) -> str:
    """Text of some `count` tokens of the demo's tokenizer that no other seed begins with."""
    rng, tokenizer = random.Random(seed), Tokenizer.load(TOKENIZER)
    text = ""
    while len(tokenizer.encode(text)) < count:
        text += " " + "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(3))
    return text.strip()


def image(seed: int) -> EncodedImage:
    from PIL import Image

    image = Image.effect_noise((64, 48), 90).convert("RGB").resize((512, 384))
    image.putpixel((0, 0), (seed % 256, seed // 256 % 256, 7))
    file = io.BytesIO()
    image.save(file, "JPEG")
    return from_bytes(file.getvalue(), f"image {seed}")


def row(index: int) -> GenerateRequest:
    images = [image(index)] if index % 4 == 0 else []
    sampling = Sampling(max_tokens=64, temperature=0, ignore_eos=True)
    return GenerateRequest((Message.of("user", words(56, index), images),), sampling=sampling)


async def whole(book: Book, name: str, open_engine: Callable[[], Any], count: int) -> None:
    """The time to the first token of a long prompt, and rows a second."""
    async with await open_engine() as engine:
        await _ttft_of_text(book, engine, name)
        in_flight = asyncio.Semaphore(engine.info.max_batch or IN_FLIGHT)

        async def one(request: GenerateRequest) -> Completion:
            async with in_flight:
                return await complete(engine, request)

        speeds = []
        for repeat in range(min(book.repeats, 3) + 1):
            size = count if repeat else count // 4
            rows = [row(repeat * count + index) for index in range(size)]
            started = time.perf_counter()
            await asyncio.gather(*(one(request) for request in rows))
            speeds.append(size / (time.perf_counter() - started))
        book.note(f"{count} rows, {name}", speeds[1:], "rows/s", in_flight=in_flight._value)


async def _ttft_of_text(book: Book, engine: Engine, name: str) -> None:
    once = Sampling(max_tokens=1, temperature=0, ignore_eos=True)
    firsts = []
    for seed in range(MET + book.repeats):
        request = GenerateRequest(prompt=words(1024, 10**6 + seed), sampling=once)
        started = time.perf_counter()
        done = await complete(engine, request)
        firsts.append(1000 * (time.perf_counter() - started))
    tokens = done.usage.prompt_tokens
    book.note(f"first token of the model that sees, {name}", firsts[MET:], "ms", prompt=tokens)


def batch(book: Book, checkpoint: Checkpoint, given: argparse.Namespace) -> None:
    with engines(checkpoint, given) as opened:
        for name, open_engine in opened.items():
            try:
                asyncio.run(whole(book, name, open_engine, given.count))
            except Exception:
                traceback.print_exc()
            _free()


def start(book: Book, checkpoint: Checkpoint, given: argparse.Namespace) -> None:
    """Wall seconds of the command: to the first byte of its answer, and to 500 tokens."""
    command = [*COMMAND, "generate", "--stream", "--temperature", "0", "--ignore-eos"]
    command += ["--checkpoint-path", str(checkpoint.path.parent), "--max-tokens", str(given.start_tokens)]
    command += ["--device", given.device, "--quiet", "a b c"]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"GHOSTVIS_CACHE_DIR": cache}
        for name, settings, times in (
            *(("graphs off", "graphs=off", 3), ("graphs", "graphs=met", 3)),
            *(("compiled, first time", "compile=true", 1), ("compiled, again", "compile=true", 2)),
        ):
            firsts, ends = [], []
            for _ in range(times):
                started = time.perf_counter()
                process = subprocess.Popen(
                    [*command, "--set", f"engine.{settings}"], stdout=subprocess.PIPE, env=environment
                )
                assert process.stdout is not None
                process.stdout.read(1)
                firsts.append(time.perf_counter() - started)
                process.stdout.read()
                if process.wait():
                    raise SystemExit(f"generate ended with {process.returncode}")
                ends.append(time.perf_counter() - started)
            book.note(f"start to first token, {name}", firsts, "s")
            book.note(f"start to {given.start_tokens} tokens, {name}", ends, "s")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="decode,nanochat,batch,start", help="decode,nanochat,batch,start")
    parser.add_argument("--modes", default="; ".join(MODES), help="of decode, with '; ' between them")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", type=int, default=ROWS, help="of the batch")
    parser.add_argument("--start-tokens", type=int, default=500)
    parser.add_argument("--model", type=Path, help="folder for the model that sees, which is used again")
    parser.add_argument("--sglang", action="store_true")
    parser.add_argument("--sglang-arguments", default="{}", metavar="JSON")
    parser.add_argument("--device", default="cuda", help="cpu: tiny models, to try the program itself")
    given = parser.parse_args()
    rows, tiny = given.rows.split(","), given.device == "cpu"
    book = Book(given.json, given.repeats, torch.device(given.device))
    card = "" if tiny else f", {torch.cuda.get_device_name()}"
    print(f"{machine()}{card}", flush=True)
    book.figures["machine"] = f"{machine()}{card}"
    if "decode" in rows or "nanochat" in rows:
        with ThreadPoolExecutor(1) as thread:
            model = thread.submit(_decoder, SMALL if tiny else D32, book.device).result()
        for name, measure in (("nanochat", nanochat), ("decode", decode)):
            if name in rows:
                measure(book, model, given.modes.split("; "))
        del model
        _free()
    if "batch" in rows or "start" in rows:
        with tempfile.TemporaryDirectory() as folder:
            place = given.model or Path(folder)
            checkpoint = made("tiny" if tiny else "d32", place / "model", given.device)
            for name, measure_whole in (("batch", batch), ("start", start)):
                if name in rows:
                    measure_whole(book, checkpoint, given)


def _decoder(config: DecoderConfig, device: torch.device) -> GhostVis:
    with torch.device(device):
        return random_model(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32)


def made(size: str, folder: Path, device: str) -> Checkpoint:
    from ghostvis_cli.checkpoint import locate

    if folder.exists():
        return locate.from_path(folder, None, folder)
    return make(MODELS[size], folder, device)


if __name__ == "__main__":
    main()
