"""What the SGLang plug-in's caches save, on the real SGLang and the built-in model.

    .venv-sglang/bin/python -m benchmarks.sglang_plugin [--repeats 5] [--rounds 5]

Processor: CPU time of this process to turn a request with one image into ids, pixels and an identity, for a
image never seen and for one seen before, in the same data: URL. Target: seen at most 1/10 of never seen.

Server: requests/s of three servers on the built-in model, scheduled by lpm as under `ghostvis serve`; ten questions
an image, answers of 16 tokens, 8 requests in flight, images new in every round: with every cache; without the
radix cache; and without any, which is --disable-radix-cache, SGLANG_VLM_CACHE_SIZE_MB=0 and none of ours. They take
turns, in another order every round; what is reported is the ratio of each round. The first round is a warm-up. With
it, image positions asked for and computed, and positions in the pool while ten answers about an image are under
way.

Equality: greedy tokens of the served model that are the local engine's, over 64 tokens, `exact` and `fast`.
"""

import asyncio
import base64
import gc
import io
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from benchmarks.report import Spread, machine, parser_of
from ghostvis_cli.engines.base import GenerateRequest, complete
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
from tests.sglang.asking import (
    DEMO,
    ROWS,
    about_images,
    asked,
    directory,
    encoded,
    locally,
    margins,
    remotely,
)
from tests.sglang.servers import Server, serving
from tests.sglang.test_cache import kv_positions
from tools.train_demo import scenes

TARGET = 0.1
WORKERS, IMAGES, QUESTIONS, ANSWER = 8, 4, 10, 16


# The processor


def processor(place: Path) -> Any:
    """The plug-in's own, as SGLang's tokenizer process makes it."""
    from ghostvis_cli.sglang.plugin import register

    register()
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_tokenizer
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer
    from transformers import AutoConfig

    from ghostvis_cli.sglang.plugin.processors.images import GhostVisMultimodalProcessor

    args = ServerArgs(model_path=str(place), device="cpu", dtype="float32")
    set_global_server_args_for_tokenizer(args)
    return GhostVisMultimodalProcessor(
        AutoConfig.from_pretrained(place), args, get_tokenizer(str(place)), "default"
    )


@dataclass(frozen=True)
class Kind:
    name: str
    size: tuple[int, int]
    form: str

    def draw(self, rng: Random) -> str:
        """A data: URL of an image with shapes, and grain as a camera's has."""
        image = scenes.render(scenes.sample_scene(rng), rng, self.size, jpeg=False)
        if self.form == "JPEG":
            noise = Image.effect_noise(self.size, 20).convert("RGB")
            image = Image.blend(image, noise, 0.1)
        file = io.BytesIO()
        image.save(file, self.form, quality=90)
        return f"data:image/{self.form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


KINDS = (
    Kind("PNG, 320 x 320", (320, 320), "PNG"),
    Kind("JPEG, 640 x 480", (640, 480), "JPEG"),
    Kind("JPEG, 4000 x 3000", (4000, 3000), "JPEG"),
)


@dataclass
class Request:
    """The fields of SGLang's request that a processor reads."""

    video_data: None = None
    mm_hashes: None = None
    mm_content_hashes: None = None


async def cpu_ms(ours: Any, ids: list[int], urls: Sequence[str]) -> float:
    """Of this process, its threads included, for one request."""
    gc.collect()
    before = time.process_time()
    for url in urls:
        await ours.process_mm_data_async(image_data=[url], input_text=ids, request_obj=Request())
    return 1000 * (time.process_time() - before) / len(urls)


def measure_processor(place: Path, repeats: int) -> None:
    ours = processor(place)
    ids = ours._tokenizer.encode("<|bos|><|user_start|><|image|>What is in this picture?<|user_end|>")

    async def measure(kind: Kind, rng: Random) -> list[tuple[float, float]]:
        found = []
        for _ in range(repeats + 1):
            urls = [kind.draw(rng) for _ in range(4 if kind.size[0] > 1000 else 20)]
            found.append((await cpu_ms(ours, ids, urls), await cpu_ms(ours, ids, urls)))
        return found[1:]  # the first is a warm-up

    for kind in KINDS:
        pairs = asyncio.run(measure(kind, Random(7)))
        first, again = (Spread.of(column) for column in zip(*pairs, strict=True))
        ratio = Spread.of([b / a for a, b in pairs])
        missed = "" if ratio.median <= TARGET else ", MISSED"
        print(f"{kind.name}: first sight {first.show(2, ' ms')}, again {again.show(3, ' ms')};", end=" ")
        print(f"ratio {ratio.show(3)}, target <= {TARGET}{missed}", flush=True)


# The server


@dataclass(frozen=True)
class Caches:
    name: str
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


LPM = ("--schedule-policy", "lpm")
NONE_OF_OURS = ("GHOSTVIS_PICTURE_CACHE_MB", "0")
CACHES = (
    Caches("all caches"),
    Caches("no radix cache", ("--disable-radix-cache",)),
    Caches("none", ("--disable-radix-cache",), (NONE_OF_OURS, ("SGLANG_VLM_CACHE_SIZE_MB", "0"))),
)


@dataclass(frozen=True)
class Round:
    """Requests/s, and positions of images: asked for, and not taken from the prefix cache."""

    rate: float
    asked: int
    computed: int


def workload(seed: int, size: tuple[int, int]) -> list[GenerateRequest]:
    """Ten questions in a row on each image."""
    rng = Random(seed)
    requests = []
    for _ in range(IMAGES):
        image = encoded(scenes.render(scenes.sample_scene(rng), rng, size))
        requests += [
            asked(f"{number} shapes, or how many?", image, max_tokens=ANSWER) for number in range(QUESTIONS)
        ]
    return requests


def run_round(server: Server, requests: Sequence[GenerateRequest]) -> Round:
    async def work(engine: RemoteEngine, left: Iterator[GenerateRequest]) -> list[Any]:
        return [(await complete(engine, request)).usage for request in left]

    async def ask() -> Round:
        left = iter(requests)
        async with await RemoteEngine.connect(RemoteSettings(server.url)) as engine:
            started = time.perf_counter()
            done = await asyncio.gather(*(work(engine, left) for _ in range(WORKERS)))
            seconds = time.perf_counter() - started
        usages = [usage for part in done for usage in part]
        known = sum(min(max((usage.cached_tokens or 0) - 2, 0), ROWS) for usage in usages)
        total = sum(usage.image_tokens for usage in usages)
        return Round(len(usages) / seconds, total, total - known)

    return asyncio.run(ask())


def measure_server(place: Path, rounds: int, size: tuple[int, int]) -> None:
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serving(place, *LPM, *caches.flags, **dict(caches.environment)))
            for caches in CACHES
        ]
        orders = itertools.cycle(itertools.permutations(range(len(CACHES))))
        found: list[dict[int, Round]] = []
        for number in range(rounds + 1):
            requests = workload(1000 * size[0] + number, size)
            found.append({index: run_round(servers[index], requests) for index in next(orders)})
        for index, caches in enumerate(CACHES):
            rates = Spread.of([one[index].rate for one in found[1:]])
            ratio = Spread.of([one[index].rate / one[len(CACHES) - 1].rate for one in found[1:]])
            positions = {(one[index].asked, one[index].computed) for one in found[1:]}
            print(
                f"{size[0]} x {size[1]}, {caches.name}: {rates.show(1, '/s')}, {ratio.show(2)} times none;",
                end=" ",
            )
            print(f"image positions (asked, computed) {sorted(positions)}", flush=True)
        for index in (0, 1):
            held = Spread.of([kv_positions(servers[index]) for _ in range(rounds)])
            print(f"{CACHES[index].name}: ten answers hold {held.show(0)} positions", flush=True)


# Equality


def measure_equality(place: Path) -> None:
    requests = about_images(seed=1, images=20)
    expected = locally(DEMO, requests)
    for numerics in ("exact", "fast"):
        with serving(place, GHOSTVIS_NUMERICS=numerics) as server:
            given = remotely(server, requests)
        parted = margins(given, expected)
        worst = f", at margins of at most {max(parted.values()):.4f}" if parted else ""
        print(
            f"{numerics}: {len(requests) - len(parted)} of {len(requests)} answers equal over 64 tokens{worst}"
        )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if find_spec("sglang") is None:
        print("SGLang is not installed here: .venv-sglang/bin/python -m benchmarks.sglang_plugin")
        return
    print(machine(), flush=True)
    with TemporaryDirectory() as folder:
        place = directory(DEMO, Path(folder))
        measure_processor(place, given.repeats)
        for size in ((320, 320), (2000, 1500)):
            measure_server(place, given.rounds, size)
        measure_equality(place)


if __name__ == "__main__":
    main()
