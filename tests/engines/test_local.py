"""What only the local engine promises: recorded tokens, caches that change nothing, seeds, limits, clean exits."""

import asyncio
import random
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

import pytest
import torch
from PIL import Image

from ghostvis_cli import demo
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.engines import rendering
from ghostvis_cli.engines.base import Completion, GenerateRequest, Sampling, complete
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.engines.local.decode import SHAPES_COMPILED, Eager, Padded, one_step
from ghostvis_cli.engines.local.packing import PackedLinear, pack
from ghostvis_cli.engines.local.scheduler import Scheduler
from ghostvis_cli.engines.local.sequence import Sequence
from ghostvis_cli.errors import (
    EngineError,
    GhostvisError,
    InputError,
    MemoryLimitError,
    RequestError,
    UsageError,
)
from ghostvis_cli.images import load_image
from ghostvis_cli.prompt import Message, Prompt
from tests.conftest import Reference
from tests.engines.test_contract import ask
from tests.engines.tiny import IMAGE_TOKENS, TOKENIZER, tiny_model
from tests.pictures import an_image, encoded

CPU = LocalSettings(device="cpu")


@pytest.fixture
async def engine() -> AsyncIterator[LocalEngine]:
    async with LocalEngine(tiny_model(), CPU) as engine:
        yield engine


def run_ids(reference: Reference, ids: list[int], sampling: Sampling) -> list[int]:
    """Token ids in, token ids out, through the scheduler."""
    loaded = reference.load()
    scheduler = Scheduler(loaded.model, loaded.tokenizer)
    sequence = Sequence.start(Prompt(tuple(ids), (0,) * len(ids)), [], sampling, 0)
    with torch.inference_mode():
        scheduler.submit(sequence)
        while scheduler.busy:
            scheduler.step()
    return sequence.output


SETTINGS: dict[str, dict[str, Any]] = {
    "engine": {"temperature": 0.0},
    "engine_rep1.1": {"temperature": 0.0, "repetition_penalty": 1.1},
    "engine_t0.8_k20_seed42": {"temperature": 0.8, "top_k": 20, "top_p": 1.0, "seed": 42},
}
RECORDED = [
    (case, *name.split("/"))
    for case in ("text_swiglu", "text_relu2_nano1_pad")
    for name in Reference(case).facts["greedy"]["fp32"]
    if name.split("/")[1] in SETTINGS
]


@pytest.mark.parametrize(("case", "prompt", "name"), RECORDED)
def test_tokens_equal_the_recorded_ones(case: str, prompt: str, name: str) -> None:
    reference = Reference(case)
    recorded = reference.greedy(f"{prompt}/{name}")
    sampling = Sampling(max_tokens=len(recorded), ignore_eos=True, **SETTINGS[name])
    assert run_ids(reference, reference.facts["prompts"][prompt], sampling) == recorded


@pytest.mark.parametrize("layout", ["inline", "prepend", "prepend_slots", "prepend_literal"])
async def test_greedy_tokens_of_every_layout_equal_the_recorded_ones(
    vlm_reference: Reference, layout: Any
) -> None:
    recorded = vlm_reference.greedy(f"{layout}/kv")
    loaded = vlm_reference.load()
    ids = vlm_reference.facts["layouts"][layout]["ids"]
    start, end = (
        ids.index(TOKENIZER.special("<|user_start|>")) + 1,
        ids.index(TOKENIZER.special("<|user_end|>")),
    )
    question = loaded.tokenizer.decode(i for i in ids[start:end] if i != loaded.tokenizer.image_id)
    question = question.removeprefix("<|image|>").removeprefix("\n")
    image = load_image(vlm_reference.base_dir / "image.png")
    async with LocalEngine(loaded, LocalSettings(device="cpu", layout=layout)) as engine:
        done = await complete(engine, ask(question, image, max_tokens=len(recorded), ignore_eos=True))
    assert list(done.token_ids) == recorded


async def test_a_repeated_image_is_computed_once(engine: LocalEngine) -> None:
    red = an_image("red")
    first = await complete(engine, ask("what colour is it", red))
    second = await complete(engine, ask("how many are there", red))
    other = await complete(engine, ask("how many are there", an_image("blue")))
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens is not None and second.usage.cached_tokens >= IMAGE_TOKENS + 2
    assert other.usage.cached_tokens == 2  # BOS and user_start: another image shares no row


async def test_the_same_pixels_from_another_file_format_are_the_same_image(engine: LocalEngine) -> None:
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    files = [load_image(encoded(image, form)) for form in ("PNG", "BMP")]
    await complete(engine, ask("what", files[0]))
    again = await complete(engine, ask("what", files[1]))
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1


async def test_ten_questions_on_one_image_at_once_compute_its_rows_once(engine: LocalEngine) -> None:
    red = an_image("red")
    answers = await asyncio.gather(*(complete(engine, ask(f"question {i}", red)) for i in range(10)))
    cached = sorted(done.usage.cached_tokens or 0 for done in answers)
    assert cached[0] == 0
    assert all(count >= IMAGE_TOKENS + 2 for count in cached[1:])


async def test_caches_change_no_token() -> None:
    requests = [ask(f"tell me {i % 3}", an_image(("red", "blue")[i % 2]), max_tokens=20) for i in range(12)]
    async with LocalEngine(tiny_model(), LocalSettings(device="cpu", prefix_cache_mb=0)) as engine:
        without = [(await complete(engine, request)) for request in requests]
    async with LocalEngine(tiny_model(), CPU) as engine:
        with_cache = [(await complete(engine, request)) for request in requests]
    assert [done.token_ids for done in with_cache] == [done.token_ids for done in without]
    assert sum(done.usage.cached_tokens or 0 for done in without) == 0
    assert sum(done.usage.cached_tokens or 0 for done in with_cache) > 0


@pytest.mark.parametrize("prefill_tokens", [1, 3, 7, 512])
async def test_the_size_of_prefill_chunks_changes_no_token(prefill_tokens: int) -> None:
    async with LocalEngine(
        tiny_model(), LocalSettings(device="cpu", prefill_tokens=prefill_tokens)
    ) as engine:
        requests = [
            ask(f"tell me about {i}", an_image("red"), an_image("lime"), max_tokens=9) for i in range(4)
        ]
        answers = await asyncio.gather(*(complete(engine, request) for request in requests))
    async with LocalEngine(tiny_model(), LocalSettings(device="cpu", prefix_cache_mb=0)) as engine:
        alone = [await complete(engine, request) for request in requests]
    assert [done.token_ids for done in answers] == [done.token_ids for done in alone]


async def test_requests_that_join_leave_and_abort_at_random_disturb_nobody() -> None:
    """Rows move when others leave; whoever stays must not notice."""
    chance = random.Random(7)
    async with LocalEngine(
        tiny_model(), LocalSettings(device="cpu", max_batch=4, prefill_tokens=5)
    ) as engine:
        requests = [
            ask(f"number {i} " * chance.randint(1, 9), max_tokens=chance.randint(1, 40), ignore_eos=True)
            for i in range(24)
        ]
        alone = [await complete(engine, request) for request in requests]

        async def run(index: int) -> tuple[int, ...] | None:
            await asyncio.sleep(chance.random() * 0.02)
            if index % 5 == 0:
                async with aclosing(engine.generate(requests[index])) as stream:
                    async for _ in stream:
                        return None
            return (await complete(engine, requests[index])).token_ids

        together = await asyncio.gather(*(run(index) for index in range(len(requests))))
        for index, tokens in enumerate(together):
            assert tokens is None or tokens == alone[index].token_ids
        scheduler = engine._scheduler
        async with asyncio.timeout(10):
            while scheduler.busy:  # noqa: ASYNC110 - the last aborts are the step thread's to carry out
                await asyncio.sleep(0.001)
        assert (scheduler.running, scheduler.prefilling, list(scheduler.waiting), engine._owners) == (
            [],
            None,
            [],
            {},
        )


async def test_one_seed_gives_one_answer_whatever_else_runs(engine: LocalEngine) -> None:
    request = ask("tell me", temperature=1.0, seed=11, max_tokens=20)
    others = [ask(f"other {i}", temperature=1.0, max_tokens=20) for i in range(5)]
    alone = await complete(engine, request)
    mixed = (await asyncio.gather(complete(engine, request), *(complete(engine, other) for other in others)))[
        0
    ]
    assert mixed.token_ids == alone.token_ids


async def test_without_a_seed_answers_differ(engine: LocalEngine) -> None:
    answers = {
        (await complete(engine, ask("tell me", temperature=1.5, top_k=0, top_p=1.0))).token_ids
        for _ in range(5)
    }
    assert len(answers) > 1


async def test_logprobs_are_those_of_the_model(engine: LocalEngine) -> None:
    done = await complete(engine, ask("tell me", logprobs=3, max_tokens=4, ignore_eos=True))
    assert len(done.logprobs) == 4
    for token, entry in zip(done.token_ids, done.logprobs, strict=True):
        assert entry.token_id == token == entry.top[0][0]
        assert entry.logprob == entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
        assert entry.logprob < 0


async def test_the_least_recently_used_prefix_goes_first() -> None:
    async with LocalEngine(tiny_model(), LocalSettings(device="cpu", prefix_cache_mb=1)) as engine:
        for i in range(60):
            await complete(engine, ask(f"{i} " * 60, max_tokens=2))
        prefixes = engine._scheduler.prefixes
        assert 0 < prefixes.nbytes <= 1024**2
        assert len(prefixes.entries) < 60
        again = await complete(engine, ask("59 " * 60, max_tokens=2))
        assert again.usage.cached_tokens == again.usage.prompt_tokens - 1


async def test_a_conversation_reuses_its_earlier_turns(engine: LocalEngine) -> None:
    red = an_image("red")
    turns = [Message.of("user", "what is it", [red])]
    first = await complete(
        engine, GenerateRequest(tuple(turns), sampling=Sampling(temperature=0, max_tokens=5))
    )
    turns += [Message.of("assistant", first.text), Message.of("user", "and where")]
    second = await complete(
        engine, GenerateRequest(tuple(turns), sampling=Sampling(temperature=0, max_tokens=5))
    )
    assert (second.usage.cached_tokens or 0) >= first.usage.prompt_tokens


async def test_an_image_for_a_text_model_is_refused() -> None:
    async with LocalEngine(tiny_model(vision=False), CPU) as engine:
        with pytest.raises(RequestError, match="text only"):
            await complete(engine, ask("what is it", an_image("red")))


async def test_the_context_limit_is_explained_with_numbers_and_a_flag_to_type(engine: LocalEngine) -> None:
    with pytest.raises(InputError, match=r"make 7\d\d, the model has 640 positions") as refused:
        await complete(engine, ask("hi", an_image("red"), max_tokens=700))
    assert "--max-tokens 6" in str(refused.value.hint)
    with pytest.raises(InputError) as too_long:
        await complete(engine, ask("word " * 700))
    assert too_long.value.hint == "shorten the prompt"


async def test_running_out_of_memory_fails_the_requests_and_not_the_engine(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler.rows, "reserve", no_room)
        with pytest.raises(MemoryLimitError) as failed:
            await complete(engine, ask("hello"))
        assert "--max-tokens" in str(failed.value.hint)
    assert (await complete(engine, ask("hello"))).token_ids


async def test_who_stops_waiting_for_a_model_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    loading = asyncio.create_task(LocalEngine.load(locate.find(demo.BASE_DIR, "sft", None, None), CPU))
    await asyncio.sleep(0)
    (thread,) = (each for each in threading.enumerate() if each.name == "ghostvis-load")
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await asyncio.to_thread(thread.join)
    assert not errors


async def test_closing_tells_those_who_wait() -> None:
    engine = LocalEngine(tiny_model(), CPU)
    waiting = asyncio.create_task(complete(engine, ask("a b c", max_tokens=600, ignore_eos=True)))
    await asyncio.sleep(0.01)
    await engine.aclose()
    with pytest.raises(EngineError, match="closed"):
        await waiting


async def test_a_failing_step_is_reported_and_the_next_request_works(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler.model.decoder, "trunk", lambda *_: 1 / 0)
        with pytest.raises(GhostvisError, match="ZeroDivisionError"):
            await complete(engine, ask("hello"))
    assert (await complete(engine, ask("hello"))).token_ids


@pytest.mark.parametrize(("device", "dtype"), [("gpu", "auto"), ("cuda:99", "auto"), ("cpu", "int8")])
def test_a_device_or_dtype_that_is_not_there_is_a_usage_error(device: str, dtype: str) -> None:
    checkpoint = Reference("text_swiglu").checkpoint()
    with pytest.raises(UsageError):
        LocalEngine.open(checkpoint, LocalSettings(device=device, dtype=dtype))


async def test_a_file_without_a_record_of_its_layout_says_which_one_is_taken(
    vlm_reference: Reference,
) -> None:
    async with LocalEngine(vlm_reference.load(), CPU) as engine:
        assert engine.info.layout == "prepend_slots"
        assert any("does not record its layout" in notice for notice in engine.info.notices)


async def test_bfloat16_on_a_cpu_stays_close_to_the_recorded_outputs(text_reference: Reference) -> None:
    from ghostvis_cli.checkpoint.load import load_model

    decoder = load_model(text_reference.checkpoint(), dtype=torch.bfloat16).model.decoder
    ids = torch.tensor(text_reference.facts["prompts"]["chat"])[None]
    with torch.inference_mode():
        ours = decoder(decoder.embed(ids))[0]
    recorded = torch.from_numpy(text_reference.arrays["bf16/logits/chat"].astype("float32"))
    assert (ours - recorded).abs().max() <= 0.35


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
async def test_compiled_decoding_changes_no_token() -> None:
    """The built-in model, whose matrices are large enough to be packed where nothing is compiled."""
    checkpoint = locate.find(demo.BASE_DIR, "sft", demo.MODEL_TAG)
    requests = [
        ask(question, an_image("red"), max_tokens=6) for question in ("What is it?", "How many are there?")
    ]
    answers = []
    for compile_it in (False, True):
        settings = LocalSettings(device="cpu", compile=compile_it)
        async with await LocalEngine.load(checkpoint, settings) as engine:
            done = await asyncio.gather(*(complete(engine, request) for request in requests))
            answers.append([one.token_ids for one in done])
            limits: Future[int] = Future()
            engine._inbox.put(lambda: limits.set_result(torch._dynamo.config.cache_size_limit))  # noqa: B023
            limit = await asyncio.wrap_future(limits)
    assert answers[0] == answers[1]
    assert limit == SHAPES_COMPILED  # in the thread that compiles


def padded(decoder):
    """The padding alone, without a compiler behind it."""
    return Padded(decoder, one_step)


@pytest.mark.parametrize("prefill_tokens", [9, 64, 512])
def test_padded_rows_disturb_neither_neighbours_nor_the_prompt_being_read(prefill_tokens: int) -> None:
    def run(decode: Callable[[Any], Any]) -> list[list[int]]:
        loaded = tiny_model()
        scheduler = Scheduler(
            loaded.model,
            TOKENIZER,
            prefill_tokens=prefill_tokens,
            prefix_cache_bytes=0,
            decode=decode(loaded.model.decoder),
        )
        sequences = [
            Sequence.start(
                Prompt(tuple(range(40, 60 + 70 * i)), (0,) * (20 + 70 * i)),  # the last are beyond the tables
                [],
                Sampling(max_tokens=10 + 5 * i, temperature=0, ignore_eos=True),
                0,
            )
            for i in range(7)
        ]
        with torch.inference_mode():
            for sequence in sequences:
                scheduler.submit(sequence)
            while scheduler.busy:
                scheduler.step()
        return [sequence.output for sequence in sequences]

    assert run(padded) == run(Eager)


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (1, 200)])
@pytest.mark.parametrize("shape", [(130, 128), (640, 512)], ids=["small", "large"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_matrix_multiplies_like_the_plain_one(
    rows: tuple[int, ...], shape: tuple[int, int], bias: bool
) -> None:
    plain = torch.nn.Linear(shape[1], shape[0], bias=bias)
    model = torch.nn.Sequential(plain)
    pack(model)
    assert isinstance(model[0], PackedLinear)
    x = torch.randn(*rows, shape[1])
    with torch.inference_mode():
        assert (model(x) - plain(x)).abs().max() <= 1e-5


async def until_idle(engine: LocalEngine) -> None:
    """Wait until the step thread has nothing left; a request that goes on by itself takes far longer."""
    async with asyncio.timeout(2):
        while engine._scheduler.busy:  # noqa: ASYNC110 - the step thread sets no event
            await asyncio.sleep(0.001)


async def ended(*waiting: "asyncio.Task[object]") -> list[object]:
    """What became of requests that must not hang."""
    async with asyncio.timeout(60):
        return await asyncio.gather(*waiting, return_exceptions=True)


async def test_an_abort_that_fails_ends_the_others_and_not_the_engine(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row moves into the gap, and there is no memory for that."""

    def no_room(*_: object) -> None:
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patch:
        async with aclosing(engine.generate(ask("first", max_tokens=600, ignore_eos=True))) as first:
            await anext(first)
            second = engine.generate(ask("second", max_tokens=600, ignore_eos=True))
            await anext(second)
            patch.setattr(engine._scheduler.rows, "copy", no_room)
        with pytest.raises(MemoryLimitError, match="can't allocate memory"):
            async with asyncio.timeout(60):
                async for _ in second:
                    pass
    assert (await complete(engine, ask("hello"))).token_ids


async def test_whatever_ends_the_step_thread_ends_every_request_with_its_reason(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = engine.generate(ask("go on", max_tokens=600, ignore_eos=True))
    await anext(stream)

    def end() -> None:
        raise SystemExit("of a library")

    monkeypatch.setattr(engine._scheduler, "step", end)
    running = [asyncio.create_task(complete(engine, ask(f"{n}"))) for n in range(3)]

    async def rest() -> None:
        async for _ in stream:
            pass

    results = await ended(asyncio.create_task(rest()), *running)
    assert ["SystemExit: of a library" in str(result) for result in results] == [True] * 4
    engine._thread.join()
    [later] = await ended(asyncio.create_task(complete(engine, ask("hello"))))
    assert isinstance(later, GhostvisError) and "SystemExit: of a library" in str(later)
    assert engine._owners == {}


async def test_no_memory_to_start_afresh_is_not_the_end_of_the_engine(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "_decode", no_room)
        patch.setattr(engine._scheduler.rows, "reset", no_room)
        [failed] = await ended(asyncio.create_task(complete(engine, ask("hello"))))
    assert isinstance(failed, MemoryLimitError)
    assert (await complete(engine, ask("hello"))).token_ids


async def test_closing_while_a_long_text_is_split_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(tiny_model(), CPU)
    splitting, go_on, split = threading.Event(), threading.Event(), engine._renderer._render

    def long(request: GenerateRequest) -> tuple[Prompt, Sampling]:
        splitting.set()
        go_on.wait(60)
        return split(request)

    monkeypatch.setattr(rendering, "LONG_TEXT", 0)
    monkeypatch.setattr(engine._renderer, "_render", long)
    waiting = asyncio.create_task(complete(engine, ask("a long text")))
    await asyncio.to_thread(splitting.wait, 60)
    await engine.aclose()
    go_on.set()
    [closed] = await ended(waiting)
    assert isinstance(closed, EngineError) and "closed" in closed.message


async def test_each_of_very_many_that_find_no_memory_is_told_so(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More at once than Python calls functions within each other."""
    all_wait = threading.Event()

    def no_room(*_: object) -> None:
        all_wait.wait(60)
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler.rows, "reserve", no_room)
        waiting = [asyncio.create_task(complete(engine, ask("hello"))) for _ in range(1500)]
        while len(engine._owners) < len(waiting):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        all_wait.set()
        kinds = {type(result) for result in await ended(*waiting)}
    assert kinds == {MemoryLimitError}
    assert (await complete(engine, ask("hello"))).token_ids


async def test_a_shared_beginning_that_cannot_be_copied_fails_one_request_alone(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await complete(engine, ask("hello there"))

    def no_room(*_: object) -> None:
        raise RuntimeError("can't allocate memory")

    stream = engine.generate(ask("other words", max_tokens=200, ignore_eos=True))
    await anext(stream)
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler.rows, "copy", no_room)
        patch.setattr(engine._scheduler.rows, "copy_in", no_room)
        [failed] = await ended(asyncio.create_task(complete(engine, ask("hello there"))))
    assert isinstance(failed, MemoryLimitError)
    tokens = [chunk.token_ids async for chunk in stream]
    assert len(tokens) == 199


async def test_an_abandoned_request_stops_long_before_its_end(engine: LocalEngine) -> None:
    async with aclosing(engine.generate(ask("go on", max_tokens=600, ignore_eos=True))) as stream:
        await anext(stream)
    started = engine._scheduler.running[:]
    await until_idle(engine)
    assert all(len(sequence.output) < 300 for sequence in started)
    assert engine._owners == {}


async def test_a_request_that_fails_alone_leaves_its_neighbours_alone(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ghostvis_cli.engines.local import scheduler

    expected = await complete(engine, ask("a quiet neighbour", max_tokens=30, ignore_eos=True))

    def unlucky_one(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(scheduler, "logprob", unlucky_one)
    unlucky = ask("unlucky", logprobs=1)
    short = ask("short", max_tokens=1)
    results = await asyncio.gather(
        *(
            complete(engine, request)
            for request in (ask("a quiet neighbour", max_tokens=30, ignore_eos=True), unlucky, short)
        ),
        return_exceptions=True,
    )
    quiet, failed, ended = results
    assert isinstance(quiet, Completion) and quiet.token_ids == expected.token_ids
    assert isinstance(failed, GhostvisError)
    assert isinstance(ended, Completion) and ended.finish_reason in ("length", "stop")


async def test_the_coldest_temperatures_are_greedy(engine: LocalEngine) -> None:
    greedy = await complete(engine, ask("tell me"))
    for temperature in (1e-45, 1e-30, 1e-9):
        assert (await complete(engine, ask("tell me", temperature=temperature))).token_ids == greedy.token_ids


async def test_an_image_forgotten_before_its_turn_came_is_still_seen() -> None:
    colors = [(i, 255 - i, 7 * i % 256) for i in range(200)]
    async with LocalEngine(
        tiny_model(), LocalSettings(device="cpu", prefix_cache_mb=0, max_batch=2)
    ) as engine:
        first = ask("what", an_image(colors[0]), max_tokens=1)
        expected = await complete(engine, first)
        requests = [*(ask("what", an_image(color), max_tokens=1) for color in colors[1:]), first]
        done = await asyncio.gather(*(complete(engine, request) for request in requests))
    assert done[-1].token_ids == expected.token_ids


async def test_closing_while_an_image_is_prepared_ends_the_request() -> None:
    engine = LocalEngine(tiny_model(), CPU)
    waiting = asyncio.create_task(complete(engine, ask("what", an_image("red", (3000, 3000)))))
    await asyncio.sleep(0.002)
    await engine.aclose()
    with pytest.raises(EngineError, match="closed"):
        async with asyncio.timeout(5):
            await waiting


async def test_no_room_to_remember_a_prefix_is_no_ones_failure(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(engine._scheduler.rows, "copy_out", no_room)
    assert (await complete(engine, ask("hello"))).token_ids
    async with aclosing(engine.generate(ask("hello", max_tokens=500, ignore_eos=True))) as stream:
        await anext(stream)
    await until_idle(engine)
    assert (await complete(engine, ask("again"))).usage.cached_tokens == 0


async def test_shared_beginnings_of_live_and_finished_sequences_change_no_token() -> None:
    """Requests that overlap in many ways, some of them abandoned, against an engine that shares nothing."""
    chance = random.Random(3)
    words = ["one two", "one two three", "one", "four five six", "four five", "four"]
    requests = [
        ask(
            f"{chance.choice(words)} {chance.choice(words)} {chance.choice(words)}",
            max_tokens=chance.randint(1, 25),
            ignore_eos=True,
        )
        for _ in range(40)
    ]
    async with LocalEngine(
        tiny_model(), LocalSettings(device="cpu", prefix_cache_mb=0, max_batch=1)
    ) as plain:
        expected = [(await complete(plain, request)).token_ids for request in requests]
    async with LocalEngine(
        tiny_model(), LocalSettings(device="cpu", max_batch=5, prefill_tokens=7)
    ) as engine:

        async def run(index: int) -> tuple[int, ...] | None:
            if index % 7 == 3:
                async with aclosing(engine.generate(requests[index])) as stream:
                    await anext(stream)
                return None
            return (await complete(engine, requests[index])).token_ids

        got = await asyncio.gather(*(run(index) for index in range(len(requests))))
        turns = list(requests[0].messages)
        first = await complete(engine, requests[0])
        turns += [Message.of("assistant", first.text), Message.of("user", "and then")]
        follow_up = GenerateRequest(
            tuple(turns), sampling=Sampling(temperature=0, max_tokens=20, ignore_eos=True)
        )
        with_cache = await complete(engine, follow_up)
    assert all(tokens is None or tokens == expected[index] for index, tokens in enumerate(got))
    async with LocalEngine(tiny_model(), LocalSettings(device="cpu", prefix_cache_mb=0)) as plain:
        assert (await complete(plain, follow_up)).token_ids == with_cache.token_ids


async def test_memory_follows_what_is_used_not_what_is_allowed(engine: LocalEngine) -> None:
    async with aclosing(engine.generate(ask("hi", max_tokens=600, ignore_eos=True))) as stream:
        await anext(stream)
        assert engine._scheduler.rows.cache.capacity == 256
