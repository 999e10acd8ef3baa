"""Two replicas behind the gateway: one image stays on one of them, and losing one loses no answer.

Both are real, and so is the gateway. The local engine's answers are the right ones: float32, exact numerics.
"""

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import pytest
from PIL import Image

from ghostvis_cli.engines.base import Completion, GenerateRequest, complete
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
from ghostvis_cli.errors import RequestError
from tests.engines.serving import eventually
from tests.sglang.asking import DEMO, ROWS, Scene, asked, directory, encoded, in_order, locally, scenes_from
from tests.sglang.gateways import gateway, healthy
from tests.sglang.servers import Server, serving

pytestmark = [pytest.mark.xdist_group("replicas"), pytest.mark.slow]

IMAGES, TOKENS = 6, 16
LONG_TOKENS = 512  # an answer that is certainly still being written when its replica is killed


@dataclass(frozen=True)
class Fleet:
    gateway: Server
    replicas: tuple[Server, ...]

    def answered(self) -> list[int]:
        """Requests that each replica has been sent."""
        return [
            replica.log.read_text(errors="replace").count('"POST /v1/chat/completions')
            for replica in self.replicas
        ]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    model = directory(DEMO, tmp_path_factory.mktemp("replicas"))
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        starting = [serving(model) for _ in range(2)]
        started = [pool.submit(stack.enter_context, server) for server in starting]
        replicas = tuple(start.result() for start in started)
        yield Fleet(stack.enter_context(gateway(replicas)), replicas)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """The first one is over a megabyte: without being told, the gateway would not keep it for a second try."""
    drawn = islice(scenes_from(23), IMAGES - 1)
    bands = [Image.effect_noise((800, 800), 80) for _ in "RGB"]
    loud = encoded(Image.merge("RGB", bands))
    assert len(loud.data) > 2**20
    return [Scene(loud, ("What is this?", "How many shapes are there?", "Is there a circle?")), *drawn]


@pytest.fixture(scope="module")
def requests(scenes: list[Scene]) -> list[GenerateRequest]:
    """Interleaved: no image comes twice in a row."""
    return [
        asked(scene.questions[number], scene.image, max_tokens=TOKENS)
        for number in range(3)
        for scene in scenes
    ]


@pytest.fixture(scope="module")
def right(requests: list[GenerateRequest]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in locally(DEMO, requests)]


def test_both_replicas_answer_and_each_image_is_computed_on_one_of_them_alone(
    fleet: Fleet, requests: list[GenerateRequest], right: list[tuple[int, ...]]
) -> None:
    answers = in_order(fleet.gateway, requests)
    assert [answer.token_ids for answer in answers] == right
    # Computed elsewhere as well, an image would be new there once more.
    cached = [answer.usage.cached_tokens or 0 for answer in answers]
    assert all(tokens < ROWS for tokens in cached[:IMAGES])
    assert all(tokens > ROWS for tokens in cached[IMAGES:])
    # Other words, other replica: 60 chances to meet the second one.
    in_order(fleet.gateway, [asked(f"Say {number}", max_tokens=1) for number in range(60)])
    assert all(fleet.answered())


async def test_a_replica_killed_under_load_costs_no_answer_its_rightness(
    fleet: Fleet, scenes: list[Scene], requests: list[GenerateRequest], right: list[tuple[int, ...]]
) -> None:
    settings = RemoteSettings(fleet.gateway.url)
    async with await RemoteEngine.connect(settings) as engine:
        assert engine.server.kind == "sglang"  # told through the gateway
        victim = await _replica_for(fleet, engine, requests[0])
        before = asyncio.create_task(_ask(engine, requests))
        with pytest.raises(RequestError):  # half an answer is never taken for a whole one
            await _killed_while_it_answers(fleet.replicas[victim], engine, scenes[0])
        after = await _ask(engine, requests)
        assert [answer.token_ids for answer in _whole(after)] == right  # the gateway asked the other one

        lost = []
        for number, answer in enumerate(await before):
            if isinstance(answer, Completion):
                assert answer.token_ids == right[number]
            else:
                lost.append(number)
        again = await _ask(engine, [requests[number] for number in lost])
        assert [answer.token_ids for answer in _whole(again)] == [right[number] for number in lost]

        survivor = 1 - victim
        taken = fleet.answered()[survivor]
        await _ask(engine, requests)
        assert fleet.answered()[survivor] == taken + len(requests)
    eventually(
        lambda: healthy(fleet.gateway) == 1, within_s=60
    )  # its health checks have noticed by now, or soon do


async def _replica_for(fleet: Fleet, engine: RemoteEngine, request: GenerateRequest) -> int:
    before = fleet.answered()
    await complete(engine, request)
    return next(number for number, count in enumerate(fleet.answered()) if count > before[number])


async def _killed_while_it_answers(replica: Server, engine: RemoteEngine, scene: Scene) -> None:
    pieces = 0
    async for _ in engine.generate(asked("Describe it.", scene.image, max_tokens=LONG_TOKENS)):
        pieces += 1
        if pieces == 3:
            os.killpg(replica.process.pid, signal.SIGKILL)


async def _ask(engine: RemoteEngine, requests: Sequence[GenerateRequest]) -> list[Completion | BaseException]:
    """All at once; a request that fails is an outcome, not the end."""
    return await asyncio.gather(*(complete(engine, request) for request in requests), return_exceptions=True)


def _whole(outcomes: Sequence[Completion | BaseException]) -> list[Completion]:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Completion)]
