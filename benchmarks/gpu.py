"""Decoding speed of the local engine on a CUDA device, and what its memory bandwidth would allow.

    python -m benchmarks.gpu

Random relu2 weights of 186M and 1.9G (d32) parameters in bfloat16, greedy, 128 new tokens after a prompt of 32.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.decode import PROMPT_TOKENS, prompts, random_model
from benchmarks.report import Spread, machine
from ghostvis_cli import demo
from ghostvis_cli.checkpoint.load import LoadedModel
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.engines.base import GenerateRequest, Sampling, complete
from ghostvis_cli.engines.local import LocalEngine
from ghostvis_cli.model.config import DecoderConfig
from ghostvis_cli.prompt import Prompt

SIZES = {
    "186M": DecoderConfig(1024, 65536, 12, 6, 6, 768, 3072, "relu2"),
    "d32, 1.9G": DecoderConfig(2048, 65536, 32, 16, 16, 2048, 8192, "relu2"),
}
NEW_TOKENS = 128


async def measure(engine: LocalEngine, batch: int) -> float:
    """Tokens a second of a batch, all requests at once."""
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    request = GenerateRequest(prompt="-", sampling=sampling)
    rendered = iter([Prompt(tuple(ids), (0,) * PROMPT_TOKENS) for ids in prompts(batch)])
    engine._renderer._render = lambda request: (next(rendered), sampling)  # type: ignore[method-assign]
    started = time.perf_counter()
    await asyncio.gather(*(complete(engine, request) for _ in range(batch)))
    return batch * NEW_TOKENS / (time.perf_counter() - started)


def bandwidth() -> float:
    """Bytes a second that a large device copy reads and writes."""
    source = torch.empty(2 * 1024**3, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        target.copy_(source)
    torch.cuda.synchronize()
    return 20 * 2 * source.numel() / (time.perf_counter() - started)


def main() -> None:
    tokenizer = Tokenizer.load(demo.BASE_DIR / "tokenizer" / "tokenizer.pkl")
    copied = bandwidth()
    print(f"{machine()}, {torch.cuda.get_device_name()}, copies at {copied / 1e12:.2f} TB/s", flush=True)
    for name, config in SIZES.items():
        with ThreadPoolExecutor(1) as thread:
            model = thread.submit(random_model, config).result().to("cuda", torch.bfloat16)
        weights = sum(p.nbytes for p in model.parameters()) - model.decoder.wte.weight.nbytes
        engine = LocalEngine(LoadedModel(model, tokenizer, Checkpoint(Path("random.pt")), ()))
        for batch in (1, 8, 32):
            asyncio.run(measure(engine, batch))
            speed = Spread.of([asyncio.run(measure(engine, batch)) for _ in range(5)])
            share = 100 * speed.median / batch * weights / copied
            print(f"{name}, batch {batch}: {speed.show(0, ' tok/s')}; {share:.0f} % of the bound", flush=True)
        asyncio.run(engine.aclose())


if __name__ == "__main__":
    main()
