"""The engine protocol's promises, asked of every engine."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

import pytest

from ghostvis_cli.engines.base import Engine, GenerateRequest, Sampling, complete
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
from ghostvis_cli.errors import GhostvisError, InputError, RequestError
from ghostvis_cli.images import EncodedImage
from ghostvis_cli.prompt import Message
from tests.engines.serving import running
from tests.engines.tiny import tiny_model
from tests.pictures import an_image

InWork = Callable[[], Awaitable[bool]]  # whether the engine works on any request, by its own account
Start = Callable[[], AbstractAsyncContextManager[tuple[Engine, InWork]]]


@asynccontextmanager
async def fake() -> AsyncIterator[tuple[Engine, InWork]]:
    async with FakeEngine(delay_s=0.005, context_tokens=640) as engine:

        async def in_work() -> bool:
            return engine.running > 0

        yield engine, in_work


@asynccontextmanager
async def local() -> AsyncIterator[tuple[Engine, InWork]]:
    async with LocalEngine(tiny_model(), LocalSettings(device="cpu")) as engine:

        async def in_work() -> bool:
            return engine._scheduler.busy

        yield engine, in_work


def remote(behind: Start) -> Start:
    """The remote engine against the local server, over a real socket, with another engine behind it."""

    @asynccontextmanager
    async def start() -> AsyncIterator[tuple[Engine, InWork]]:
        async with behind() as (served, in_work):
            with running(served, vocabulary=served.tokenizer) as server:
                async with await RemoteEngine.connect(RemoteSettings(server.url, retries=0)) as engine:
                    yield engine, in_work

    return start


ENGINES = {"fake": fake, "local": local, "remote-fake": remote(fake), "remote-local": remote(local)}


@pytest.fixture(params=ENGINES)
async def started(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Engine, InWork]]:
    async with ENGINES[request.param]() as both:
        yield both


@pytest.fixture
def engine(started: tuple[Engine, InWork]) -> Engine:
    return started[0]


@pytest.fixture
def in_work(started: tuple[Engine, InWork]) -> InWork:
    return started[1]


def ask(text: str, *images: EncodedImage, **sampling: object) -> GenerateRequest:
    settings = Sampling(**{"temperature": 0.0, "max_tokens": 12, **sampling})  # type: ignore[arg-type]
    return GenerateRequest((Message.of("user", text, images),), sampling=settings)


LONG = ask("a b c " * 80, max_tokens=300, ignore_eos=True)


async def test_the_last_chunk_and_no_other_has_a_reason_and_the_usage(engine: Engine) -> None:
    chunks = [chunk async for chunk in engine.generate(ask("one two three"))]
    assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == sum(len(chunk.token_ids) for chunk in chunks)
    assert usage.prompt_tokens > 0


async def test_max_tokens_ends_an_answer_with_length(engine: Engine) -> None:
    done = await complete(engine, ask("one two three four five six", max_tokens=2, ignore_eos=True))
    assert (done.finish_reason, done.usage.completion_tokens, len(done.token_ids)) == ("length", 2, 2)


GRAMMARS: list[dict[str, str]] = [
    {"json_schema": '{"type": "array", "items": {"enum": ["a", 7]}, "minItems": 2, "maxItems": 3}'},
    {"regex": "(red|blue) [0-9]{3}"},
]


@pytest.mark.parametrize("grammar", GRAMMARS, ids=str)
async def test_an_answer_fits_its_grammar_or_the_request_is_refused(
    engine: Engine, grammar: dict[str, str]
) -> None:
    hot = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "max_tokens": 40}
    requests = [ask(f"question {n}", **hot, **grammar) for n in range(4)]
    try:
        answers = await asyncio.gather(*(complete(engine, request) for request in requests))
    except (InputError, RequestError) as refused:
        assert "the fake engine follows no grammar" in refused.message
        return
    for done in answers:
        assert done.finish_reason == "stop"
        if "regex" in grammar:
            assert re.fullmatch(grammar["regex"], done.text)
        else:
            found = json.loads(done.text)
            assert 2 <= len(found) <= 3 and set(found) <= {"a", 7}
    short = await complete(engine, ask("question", **grammar, max_tokens=1))
    assert short.finish_reason == "length"


async def test_an_image_takes_the_tokens_that_info_says(engine: Engine) -> None:
    done = await complete(engine, ask("what is it", an_image("red"), an_image("blue")))
    assert done.usage.image_tokens == 2 * engine.info.image_tokens > 0


async def test_requests_run_at_the_same_time_and_answer_as_if_alone(engine: Engine) -> None:
    requests = [
        ask(f"question number {i}", an_image(c)) for i, c in enumerate(("red", "lime", "blue", "gray") * 3)
    ]
    alone = [await complete(engine, request) for request in requests]
    together = await asyncio.gather(*(complete(engine, request) for request in requests))
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]
    assert [done.text for done in together] == [done.text for done in alone]


async def aborted(engine: Engine, in_work: InWork) -> None:
    """Wait until the engine works on nothing. A long answer that goes on to its end outlasts these short ones."""
    for _ in range(10):
        await complete(engine, ask("one two", max_tokens=2, ignore_eos=True))
        if not await in_work():
            return
    raise AssertionError("the engine still works on the answer")


async def test_an_answer_can_be_left_in_the_middle_and_others_go_on(engine: Engine, in_work: InWork) -> None:
    async with aclosing(engine.generate(LONG)) as stream:
        await anext(stream)
    await aborted(engine, in_work)
    request = ask("a b c d e f g h", max_tokens=8, ignore_eos=True)
    expected = await complete(engine, request)
    other = asyncio.create_task(complete(engine, request))
    async with aclosing(engine.generate(request)) as stream:
        async for _ in stream:
            break
    assert (await other).token_ids == expected.token_ids
    assert (await complete(engine, request)).token_ids == expected.token_ids


async def test_cancelling_a_task_ends_its_request(engine: Engine, in_work: InWork) -> None:
    task = asyncio.create_task(complete(engine, LONG))
    while not await in_work():
        assert not task.done()
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await aborted(engine, in_work)


async def test_what_does_not_fit_is_refused_with_the_arithmetic(engine: Engine) -> None:
    limit = engine.info.context_tokens
    assert limit is not None
    with pytest.raises(GhostvisError, match=str(limit)) as refused:
        await complete(engine, ask("hello", max_tokens=limit))
    # A server answers with its own error; what this process knows itself is an input error.
    assert isinstance(refused.value, RequestError if engine.info.kind == "remote" else InputError)


async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(engine: Engine) -> None:
    whole = (await complete(engine, ask("alpha beta gamma delta", ignore_eos=True))).text
    stop = whole[len(whole) // 2 :][:3]
    cut = await complete(engine, ask("alpha beta gamma delta", ignore_eos=True, stop=(stop,)))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


async def test_a_closed_engine_refuses(engine: Engine) -> None:
    await engine.aclose()
    with pytest.raises(GhostvisError, match="closed"):
        await complete(engine, ask("hello"))
