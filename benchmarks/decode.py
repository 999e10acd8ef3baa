"""Decoding speed of the local engine against transformers' `generate`, on the same weights.

    python -m benchmarks.decode [--repeats 5]

Random relu2 weights in NanoChatForCausalLM and in ours. Each repeat times both, one after the other, so that
a noisy machine disturbs both; what is reported is the ratio of the pair. Greedy, prompt of 32 tokens, a fixed
number of new tokens, no stop. Also: decoding as a share of what memory bandwidth allows, where the bound is
every weight but the embedding table read once a token, at the speed of a large float32 sum over the same bytes.
"""

import asyncio
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.nanochat import nanochat
from benchmarks.report import Spread, machine, parser_of
from ghostvis_cli import demo
from ghostvis_cli.checkpoint.load import LoadedModel
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.engines.base import GenerateRequest, Sampling, complete
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.engines.local.packing import pack
from ghostvis_cli.model.config import DecoderConfig, GhostVisConfig
from ghostvis_cli.model.ghostvis import GhostVis
from ghostvis_cli.prompt import Prompt

PROMPT_TOKENS = 32
SIZES = {
    "demo-sized": DecoderConfig(1024, 1024, 4, 3, 1, 192, 512, "relu2"),
    "186M": DecoderConfig(1024, 65536, 12, 6, 6, 768, 3072, "relu2"),
}


def random_model(config: DecoderConfig) -> GhostVis:
    torch.manual_seed(0)
    model = GhostVis(GhostVisConfig(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
    return model.eval().requires_grad_(False)


class Ours:
    """The whole engine: requests through the protocol, one event loop, one step thread."""

    def __init__(self, size: str, *, compiled: bool = False) -> None:
        # In a thread that ends: OpenMP slows every team down once there are more threads than cores.
        with ThreadPoolExecutor(1) as thread:
            model = thread.submit(random_model, SIZES[size]).result()
            self.weights_bytes = sum(p.nbytes for p in model.parameters()) - model.decoder.wte.weight.nbytes
            if not compiled:
                thread.submit(pack, model).result()
        tokenizer = Tokenizer.load(demo.BASE_DIR / "tokenizer" / "tokenizer.pkl")
        loaded = LoadedModel(model, tokenizer, Checkpoint(Path("random.pt")), ())
        self.engine = LocalEngine(loaded, LocalSettings("cpu", prefix_cache_mb=0, compile=compiled))

    def run(self, batch: int, new_tokens: int) -> float:
        """Seconds for all prompts at once. Rendering is replaced by ids: it is not what is timed."""
        sampling = Sampling(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        rendered = iter([Prompt(tuple(ids), (0,) * len(ids)) for ids in prompts(batch)])
        self.engine._renderer._render = lambda request: (next(rendered), sampling)  # type: ignore[method-assign]

        async def all_of_them() -> None:
            request = GenerateRequest(prompt="-", sampling=sampling)
            done = await asyncio.gather(*(complete(self.engine, request) for _ in range(batch)))
            assert all(len(one.token_ids) == new_tokens for one in done)

        started = time.perf_counter()
        asyncio.run(all_of_them())
        return time.perf_counter() - started


class OursCompiled(Ours):
    """With `engine.compile: true`: the seconds of compiling fall into the warm-up."""

    def __init__(self, size: str) -> None:
        super().__init__(size, compiled=True)


class Theirs:
    def __init__(self, size: str) -> None:
        self.model = nanochat(random_model(SIZES[size]).decoder)

    def run(self, batch: int, new_tokens: int) -> float:
        ids = torch.tensor(prompts(batch))
        started = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert out.shape[1] == PROMPT_TOKENS + new_tokens
        return time.perf_counter() - started


class Read:
    """Reads as many bytes as one token's weights: the bound of batch-1 decoding."""

    def __init__(self, weights_bytes: int) -> None:
        self.block = torch.ones(weights_bytes // 4)

    def run(self, batch: int, times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            self.block.sum()
        return time.perf_counter() - started


def prompts(batch: int) -> list[list[int]]:
    return [[300 + (7 * row + 11 * i) % 600 for i in range(PROMPT_TOKENS)] for row in range(batch)]


class Worker:
    """A measured thing in a process of its own, so that neither's threads disturb the other's turn."""

    def __init__(self, kind: type[Any], argument: Any) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.pool.submit(_build, kind, argument).result()

    def run(self, batch: int, new_tokens: int) -> float:
        return self.pool.submit(_run, batch, new_tokens).result()

    def ask(self, name: str) -> Any:
        return self.pool.submit(_ask, name).result()

    def close(self) -> None:
        self.pool.shutdown()


_measured: Any = None


def _build(kind: type[Any], argument: Any) -> None:
    global _measured
    _measured = kind(argument)


def _run(batch: int, new_tokens: int) -> float:
    return float(_measured.run(batch, new_tokens))


def _ask(name: str) -> Any:
    return getattr(_measured, name)


def compare(ours: Worker, theirs: Worker, batch: int, new_tokens: int, repeats: int) -> tuple[Spread, Spread]:
    """Our tokens/s, and how many times theirs that is, pair by pair."""
    for worker in (ours, theirs):
        worker.run(batch, new_tokens)
    pairs = [(ours.run(batch, new_tokens), theirs.run(batch, new_tokens)) for _ in range(repeats)]
    return Spread.of([batch * new_tokens / a for a, _ in pairs]), Spread.of([b / a for a, b in pairs])


def bandwidth_share(ours: Worker, new_tokens: int, repeats: int) -> tuple[Spread, Spread]:
    """GB/s of a plain read, and the share of that bound which batch-1 decoding reaches, pair by pair."""
    weights = ours.ask("weights_bytes")
    read = Worker(Read, weights)
    speeds, shares = [], []
    for _ in range(repeats):
        speeds.append(8 * weights / read.run(1, 8))
        token_s = (ours.run(1, 3 * new_tokens) - ours.run(1, new_tokens)) / (2 * new_tokens)
        shares.append(weights / token_s / speeds[-1])
    read.close()
    return Spread.of([speed / 1e9 for speed in speeds]), Spread.of([100 * share for share in shares])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    arguments = parser.parse_args()
    print(machine())
    for name in arguments.sizes:
        ours, theirs = Worker(Ours, name), Worker(Theirs, name)
        tokens = 192 if name == "demo-sized" else 32
        for batch in (1, 8):
            speed, ratio = compare(ours, theirs, batch, tokens, arguments.repeats)
            print(
                f"{name}, batch {batch}: {speed.show(0, ' tok/s')}; x transformers: {ratio.show()}",
                flush=True,
            )
        if name == "demo-sized":
            compiled = Worker(OursCompiled, name)
            for batch in (1, 8):
                speed, ratio = compare(compiled, theirs, batch, tokens, arguments.repeats)
                print(f"  compiled, batch {batch}: {speed.show(0, ' tok/s')}; x transformers: {ratio.show()}")
            compiled.close()
        theirs.close()
        if name != "demo-sized":
            speed, share = bandwidth_share(ours, tokens, arguments.repeats)
            print(
                f"{name}, batch 1: {share.show(0, ' %')} of the bound at {speed.show(1, ' GB/s')}", flush=True
            )
        ours.close()


if __name__ == "__main__":
    main()
