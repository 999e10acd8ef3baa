"""The local engine's fast paths on a CUDA device: graphs, varlen attention, packed prompts, steps begun early."""

import asyncio
import io
import random
from typing import Any

import pytest
import torch

from ghostvis_cli import demo
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.load import load_model
from ghostvis_cli.engines.base import Completion, GenerateRequest, complete
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.engines.local.decode import Padded
from ghostvis_cli.images import EncodedImage, from_bytes, load_image
from ghostvis_cli.model.decoder import Varlen
from tests.engines.test_contract import ask
from tests.engines.test_local_generations import run
from tests.engines.test_local_graphs import alone, crowd, flash_on_cpu
from tests.engines.tiny import tiny_model
from tests.nanochat import VOCABULARY, Shape, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CHECKPOINT = locate.find(demo.BASE_DIR, "sft", demo.MODEL_TAG)
QUESTIONS = ("What is in this picture?", "How many shapes are there?", "What color is the background?")


def images(count: int = 20) -> list[EncodedImage]:
    """The examples, and scenes of coloured shapes."""
    from PIL import Image, ImageDraw

    rng, colors = random.Random(5), ("red", "blue", "green", "yellow", "white", "black")
    made = [load_image(path) for path in demo.EXAMPLES]
    while len(made) < count:
        back, front, other = rng.sample(colors, 3)
        image = Image.new("RGB", (200, 150), back)
        draw = ImageDraw.Draw(image)
        x, y = rng.randrange(10, 90), rng.randrange(10, 60)
        draw.ellipse([x, y, x + 50, y + 50], fill=front)
        draw.rectangle([x + 55, y, x + 95, y + 40], fill=other)
        file = io.BytesIO()
        image.save(file, "PNG")
        made.append(from_bytes(file.getvalue(), "a scene"))
    return made[:count]


def sixty() -> list[GenerateRequest]:
    return [ask(question, image, max_tokens=40) for image in images() for question in QUESTIONS]


async def answers(requests: list[GenerateRequest], *, together: bool = False, **settings: Any) -> list[Any]:
    async with await LocalEngine.load(CHECKPOINT, LocalSettings(**settings)) as engine:
        if together:
            done: list[Completion] = list(
                await asyncio.gather(*(complete(engine, request) for request in requests))
            )
        else:
            done = [await complete(engine, request) for request in requests]
        decode = engine._scheduler.decode
        if settings["device"] == "cuda" and settings.get("graphs") != "off":
            assert isinstance(decode, Padded) and decode.graphs is not None
            assert len(decode.graphs) and not decode.graphs.failed
    return [one.token_ids for one in done]


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["as many", "grouped"])
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("new", [[1, 1, 1, 1], [5, 1, 130, 64]], ids=["one each", "several"])
def test_varlen_attention_is_what_its_definition_says(
    heads: tuple[int, int], window: int | None, new: list[int]
) -> None:
    H, K = heads
    generator = torch.Generator("cuda").manual_seed(0)
    keys, values = (
        torch.randn(6, 300, K, 64, device="cuda", dtype=torch.bfloat16, generator=generator).transpose(1, 2)
        for _ in "kv"
    )
    q = torch.randn(sum(new), H, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
    used = [5, 40, 200, 300]
    starts = torch.tensor([0, *new], device="cuda").cumsum(0).int()
    places = torch.arange(1, 6, device="cuda").int() * 300  # rows 1 to 4
    lengths = torch.tensor(used, device="cuda").int()
    nothing = torch.empty(0, device="cuda", dtype=torch.int64)
    varlen = Varlen(nothing, nothing, starts, places, lengths, max(new))
    ours = varlen.attend(q, keys, values, window, 0.125)
    flat = [x.transpose(1, 2).flatten(0, 1).float().cpu() for x in (keys, values)]
    numbers: tuple[Any, ...] = (*flat, starts.cpu(), places.cpu(), max(new), 300, 0.0, True, False)
    expected = flash_on_cpu(
        q.float().cpu(),
        *numbers,
        scale=0.125,
        window_size_left=window,
        seqused_k=lengths.cpu(),
    )[0]
    assert (ours.float().cpu() - expected).abs().max() < 0.02  # bfloat16's own rounding of numbers up to 4


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 20}], ids=["greedy", "drawn"])
def test_float32_crowds_get_the_cpus_tokens(sampling: dict[str, Any]) -> None:
    sequences = crowd(40, **sampling)
    expected = alone(tiny_model(vision=False), sequences)
    model = tiny_model(vision=False)
    model.model.to("cuda")
    engine = LocalEngine(model, LocalSettings(max_batch=16))
    with torch.inference_mode():
        assert run(engine._scheduler, *sequences) == expected
    assert engine._scheduler.ahead and isinstance(engine._scheduler.decode, Padded)


@pytest.mark.parametrize("name", ["n3", "n5", "n6", "n7"])
def test_float32_crowds_of_every_generation_get_the_cpus_tokens(name: str, tmp_path: Any) -> None:
    checkpoint = write(tmp_path, name, Shape(seq=40, layers=2))
    sequences = crowd(20, 1, vocabulary=VOCABULARY)
    expected = alone(load_model(checkpoint), sequences)
    engine = LocalEngine(load_model(checkpoint, device="cuda"), LocalSettings(max_batch=8, prefill_tokens=50))
    with torch.inference_mode():
        assert run(engine._scheduler, *sequences) == expected


@pytest.mark.parametrize("name", ["n3", "n7"])
def test_bfloat16_graphs_of_later_generations_equal_the_same_steps_without(name: str, tmp_path: Any) -> None:
    checkpoint = write(tmp_path, name, Shape(seq=40, layers=2))
    given = []
    for graphs in ("off", "met"):
        loaded = load_model(checkpoint, device="cuda", dtype=torch.bfloat16)
        engine = LocalEngine(loaded, LocalSettings(max_batch=8, graphs=graphs))
        assert engine._scheduler.rows.varlen
        with torch.inference_mode():
            given.append(run(engine._scheduler, *crowd(20, 1, vocabulary=VOCABULARY)))
    assert given[0] == given[1]


async def test_bfloat16_graphs_answer_sixty_questions_as_the_same_steps_without() -> None:
    eager = await answers(sixty(), device="cuda", graphs="off")
    assert await answers(sixty(), device="cuda") == eager
    assert await answers(sixty(), device="cuda", graphs="start", max_batch=4) == eager


async def test_float32_answers_sixty_questions_as_the_cpu_alone_and_together() -> None:
    on_cpu = await answers(sixty(), device="cpu")
    assert await answers(sixty(), device="cuda", dtype="float32") == on_cpu
    assert await answers(sixty(), device="cuda", dtype="float32", together=True) == on_cpu


async def test_bfloat16_together_answers_nearly_as_alone() -> None:
    one_by_one = await answers(sixty(), device="cuda")
    together = await answers(sixty(), device="cuda", together=True)
    same = sum(a == b for a, b in zip(one_by_one, together, strict=True))
    assert same >= 54  # matrices times several rows round otherwise: near ties may fall the other way


async def test_compiled_layers_answer_nearly_as_plain_ones() -> None:
    plain = await answers(sixty()[:12], device="cuda")
    compiled = await answers(sixty()[:12], device="cuda", compile=True)
    assert sum(a == b for a, b in zip(plain, compiled, strict=True)) >= 10


async def test_draws_of_a_seed_are_the_cpus() -> None:
    requests = [ask("Hello", temperature=0.8, seed=seed, max_tokens=20) for seed in range(8)]
    on_cpu = await answers(requests, device="cpu")
    assert await answers(requests, device="cuda", dtype="float32", together=True) == on_cpu


async def test_a_cuda_engine_keeps_cudnn_out_of_attention_and_its_cache_between_requests() -> None:
    async with await LocalEngine.load(CHECKPOINT, LocalSettings(device="cuda")) as engine:
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        await complete(engine, ask("Hello"))
        cache = engine._scheduler.rows.cache
        await complete(engine, ask("Hello again"))
        assert engine._scheduler.rows.cache is cache
        assert engine.info.max_batch is not None and engine.info.max_batch >= 32
