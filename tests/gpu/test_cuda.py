"""The local engine on a CUDA device: bfloat16 by default, the same answers, batches equal to single runs."""

import asyncio

import pytest
import torch

from ghostvis_cli import demo
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.engines.base import Completion, complete
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.images import load_image
from tests.engines.test_contract import ask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CHECKPOINT = locate.find(demo.BASE_DIR, "sft", demo.MODEL_TAG)
QUESTIONS = ("What is in this picture?", "How many shapes are there?", "What color is the background?")


async def answers(device: str, dtype: str, *, together: bool) -> list[Completion]:
    images = [load_image(path) for path in demo.EXAMPLES]
    requests = [ask(question, image, max_tokens=40) for image in images for question in QUESTIONS]
    async with await LocalEngine.load(CHECKPOINT, LocalSettings(device=device, dtype=dtype)) as engine:
        if together:
            return list(await asyncio.gather(*(complete(engine, request) for request in requests)))
        return [await complete(engine, request) for request in requests]


async def test_float32_on_cuda_gives_the_cpus_tokens() -> None:
    on_cpu = await answers("cpu", "float32", together=False)
    on_cuda = await answers("cuda", "float32", together=False)
    assert [done.token_ids for done in on_cuda] == [done.token_ids for done in on_cpu]


async def test_bfloat16_batches_answer_like_float32() -> None:
    exact = await answers("cuda", "float32", together=True)
    rounded = await answers("cuda", "auto", together=True)
    same = sum(a.text == b.text for a, b in zip(exact, rounded, strict=True))
    assert same >= len(exact) - 1  # one near tie may fall the other way in bfloat16


async def test_cuda_means_bfloat16_unless_told_otherwise() -> None:
    async with await LocalEngine.load(CHECKPOINT, LocalSettings(device="cuda")) as engine:
        assert (engine.info.device, engine.info.dtype) == ("cuda:0", "bfloat16")
        assert (await complete(engine, ask("Hello", temperature=0.8, seed=3))).text
