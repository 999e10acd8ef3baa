"""Checkpoints, conversations about images, and the same requests to the local engine and to a server."""

import asyncio
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from ghostvis_cli import demo
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.engines.base import Completion, Engine, GenerateRequest, Sampling, complete
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
from ghostvis_cli.images import EncodedImage, load_image
from ghostvis_cli.model.config import Layout
from ghostvis_cli.prompt import Message
from tests.sglang.servers import Server
from tools.train_demo import questions, scenes

DEMO = locate.find(demo.BASE_DIR, "sft", demo.MODEL_TAG)
ROWS = 64  # positions that an image takes in the demo model
TOKENS = 64
GREEDY = Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)


@dataclass(frozen=True)
class Scene:
    """An image that no other test has, and three questions about it."""

    image: EncodedImage
    questions: tuple[str, str, str]


def scenes_from(seed: int) -> Iterator[Scene]:
    rng = Random(seed)
    while True:
        scene = scenes.sample_scene(rng)
        asked = [questions.ask(scene, rng, kind).question for kind in ("caption", "count", None)]
        yield Scene(encoded(scenes.render(scene, rng)), (asked[0], asked[1], asked[2]))


def encoded(image: Image.Image) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, "PNG")
    return load_image(file.getvalue())


def asked(question: str, *images: EncodedImage, **changes: Any) -> GenerateRequest:
    return GenerateRequest((Message.of("user", question, images),), sampling=replace(GREEDY, **changes))


def conversation(*turns: tuple[str, Sequence[EncodedImage]] | str) -> GenerateRequest:
    """User turns, and the assistant's between them."""
    messages = [
        Message.of("assistant", turn) if isinstance(turn, str) else Message.of("user", *turn)
        for turn in turns
    ]
    return GenerateRequest(tuple(messages), sampling=GREEDY)


def about_images(seed: int, images: int) -> list[GenerateRequest]:
    """Three questions an image; several turns, later images, two and three in a turn, and none."""
    drawn = scenes_from(seed)
    many = [next(drawn) for _ in range(images)]
    a, b, c = (scene.image for scene in many[:3])
    return [
        *(asked(question, scene.image) for scene in many for question in scene.questions),
        asked("What is different?", a, b),
        asked("What is different?", b, a),
        asked("Is it the same picture?", a, a),
        asked("Which picture is the brightest?", c, a, b),
        conversation(("What is this?", [a]), "An image.", ("How many shapes are there?", [])),
        conversation(("What is this?", [a]), "An image.", ("And this?", [b])),
        conversation(("Hello!", []), "Hi.", ("What is this?", [a]), "An image.", ("And these?", [b, a])),
        asked("Who are you?"),
    ]


def about_text() -> list[GenerateRequest]:
    words = ("Hello.", "Why is the sky blue?", "1 2 3 4", "é 形 🙂", "a " * 150, "\n\n", "Say <|bos|>!")
    return [
        *(asked(text) for text in words),
        conversation(("Hello!", []), "Hi.", ("And then?", []), "Then.", ("Go on.", [])),
    ]


def locally(
    checkpoint: Checkpoint, requests: Sequence[GenerateRequest], layout: Layout | None = None
) -> list[Completion]:
    """The local engine's answers, each token with its two likeliest."""

    async def ask() -> list[Completion]:
        settings = LocalSettings(device="cpu", dtype="float32", layout=layout, threads=1)
        async with await LocalEngine.load(checkpoint, settings) as engine:
            return await _all(engine, [_with_logprobs(request) for request in requests])

    return asyncio.run(ask())


def remotely(server: Server, requests: Sequence[GenerateRequest]) -> list[Completion]:
    """The server's answers to requests that are there all at once."""

    async def ask() -> list[Completion]:
        async with await RemoteEngine.connect(RemoteSettings(server.url)) as engine:
            return await _all(engine, requests)

    return asyncio.run(ask())


def in_order(server: Server, requests: Sequence[GenerateRequest]) -> list[Completion]:
    """Each asked when the one before it has been answered, for tests of what is cached."""

    async def ask() -> list[Completion]:
        async with await RemoteEngine.connect(RemoteSettings(server.url)) as engine:
            return [await complete(engine, request) for request in requests]

    return asyncio.run(ask())


async def _all(engine: Engine, requests: Sequence[GenerateRequest]) -> list[Completion]:
    return await asyncio.gather(*(complete(engine, request) for request in requests))


def _with_logprobs(request: GenerateRequest) -> GenerateRequest:
    return replace(request, sampling=replace(request.sampling, logprobs=2))


def margins(given: Sequence[Completion], local: Sequence[Completion]) -> dict[int, float]:
    """Requests answered otherwise -> the local engine's margin between its two likeliest tokens where they part."""
    found = {}
    for number, (one, reference) in enumerate(zip(given, local, strict=True)):
        pairs = enumerate(zip(one.token_ids, reference.token_ids, strict=True))
        parted = next((at for at, (mine, theirs) in pairs if mine != theirs), None)
        if parted is not None:
            (_, first), (_, second) = reference.logprobs[parted].top
            found[number] = first - second
    return found


def directory(checkpoint: Checkpoint, place: Path, **settings: Any) -> Path:
    from tests.convert.conversions import converted

    return converted(checkpoint, place / "model", **settings)
