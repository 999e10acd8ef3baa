"""SGLang in a process of ours: the local engine's answers, requests that end when they are left, and every bad end.

A start takes 20 s on a calm machine: one engine is asked everything, in the order of this file.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import pytest_asyncio

from ghostvis_cli import create_sglang_engine, demo
from ghostvis_cli.engines.base import GenerateRequest, Sampling, complete
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.errors import EngineError, ExitCode, InputError, RequestError
from ghostvis_cli.sglang.child import members
from ghostvis_cli.sglang.engine import SGLangEngine
from tests.engines.serving import eventually
from tests.sglang.asking import DEMO, GREEDY, ROWS, about_images, about_text, asked, directory, scenes_from
from tests.sglang.inprocess import MARK, PATIENCE_S, command, marked, profile_of

on_one_loop = pytest.mark.asyncio(loop_scope="module")
one_engine = pytest.mark.xdist_group("engine")
THREE = demo.BASE_DIR.parent / "three-shapes.jpg"
LONG = Sampling(max_tokens=9000, temperature=0, ignore_eos=True)  # half a minute at the very least
# Both compute in float32 and in different orders. Log probabilities of this model reach -30.
LOGPROB_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(DEMO, tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: Path) -> AsyncIterator[SGLangEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        async with await SGLangEngine.start(profile_of(model)) as started:
            yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local() -> AsyncIterator[LocalEngine]:
    async with await LocalEngine.load(DEMO, LocalSettings("cpu", threads=1)) as loaded:
        yield loaded


async def until(engine: SGLangEngine, condition: Callable[[dict[str, int]], bool]) -> None:
    """What the scheduler says of itself comes late; it has to come."""
    deadline_s = time.monotonic() + 60
    while not condition(await engine.load()):
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.05)


@one_engine
@on_one_loop
async def test_answers_ends_and_counts_are_the_local_engines(
    engine: SGLangEngine, local: LocalEngine
) -> None:
    requests = [*about_images(seed=21, images=4), *about_text()]
    requests += [
        replace(request, sampling=replace(GREEDY, ignore_eos=False, stop=(" and",))) for request in requests
    ]
    requests += [GenerateRequest(prompt=text, sampling=GREEDY) for text in ("", "The sky is", "<|bos|>")]
    given = await asyncio.gather(*(complete(engine, request) for request in requests))
    expected = await asyncio.gather(*(complete(local, request) for request in requests))
    for mine, theirs in zip(given, expected, strict=True):
        assert (mine.text, mine.token_ids, mine.finish_reason) == (
            theirs.text,
            theirs.token_ids,
            theirs.finish_reason,
        )
        assert replace(mine.usage, cached_tokens=0) == replace(theirs.usage, cached_tokens=0)
    assert {one.finish_reason for one in given} == {"stop", "length"}


@one_engine
@on_one_loop
async def test_what_is_known_of_the_model_is_what_the_local_engine_knows(
    engine: SGLangEngine, local: LocalEngine
) -> None:
    facts = ["device", "dtype", "trained_tokens", "image_tokens", "kv_token_bytes"]
    facts += ["layout", "source", "tag", "step", "model"]
    assert {name: getattr(engine.info, name) for name in facts} == {
        name: getattr(local.info, name) for name in facts
    }
    assert engine.info.kind == "sglang"


@one_engine
@on_one_loop
async def test_log_probabilities_are_the_models_own_whatever_the_temperature(
    engine: SGLangEngine, local: LocalEngine
) -> None:
    scene = next(scenes_from(22))
    request = asked(scene.questions[0], scene.image, max_tokens=1, logprobs=3)
    expected = (await complete(local, request)).logprobs[0]
    drawn = await complete(engine, replace(request, sampling=replace(request.sampling, temperature=2.0)))
    given = (await complete(engine, request)).logprobs[0]
    assert given.token_id == expected.token_id
    assert [id_ for id_, _ in given.top] == [id_ for id_, _ in expected.top]
    for found in (given.top, drawn.logprobs[0].top):
        assert [value for _, value in found] == pytest.approx(
            [value for _, value in expected.top], abs=LOGPROB_TOLERANCE
        )


@one_engine
@on_one_loop
async def test_a_second_question_about_an_image_finds_its_positions(engine: SGLangEngine) -> None:
    scene = next(scenes_from(23))
    first, second = [await complete(engine, asked(question, scene.image)) for question in scene.questions[:2]]
    assert (first.usage.cached_tokens or 0) < ROWS < (second.usage.cached_tokens or 0)


@one_engine
@on_one_loop
async def test_a_request_that_is_left_gives_its_positions_back(engine: SGLangEngine) -> None:
    request = replace(asked("Tell me everything."), sampling=LONG)
    async with aclosing(engine.generate(request)) as stream:
        await anext(stream)
        await until(engine, lambda load: load["num_running_reqs"] == 1)
    await until(engine, lambda load: load["num_running_reqs"] == 0)


@one_engine
@on_one_loop
async def test_cancelled_requests_leave_neither_the_batch_nor_the_queue_behind(engine: SGLangEngine) -> None:
    requests = [replace(asked(f"Number {n}"), sampling=LONG) for n in range(40)]
    tasks = [asyncio.create_task(complete(engine, request)) for request in requests]
    await until(engine, lambda load: load["num_running_reqs"] > 0 and load["num_waiting_reqs"] > 0)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(one) for one in ended} == {asyncio.CancelledError}
    await until(engine, lambda load: load["num_running_reqs"] + load["num_waiting_reqs"] == 0)


@one_engine
@on_one_loop
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"repetition_penalty": 3.0}, "penalty ends at 2"),
        ({"seed": 1, "temperature": 1.0}, "seed"),
    ],
    ids=["penalty", "seed"],
)
async def test_what_sglang_can_not_do_is_refused(
    engine: SGLangEngine, changes: dict[str, float], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        await complete(engine, asked("Hello", **changes))


@one_engine
@on_one_loop
async def test_a_prompt_that_fills_the_context_is_refused_by_sglang_and_others_go_on(
    engine: SGLangEngine,
) -> None:
    """SGLang keeps five positions behind a prompt, which is in no figure that anybody can ask for."""
    limit = engine.info.context_tokens
    assert limit is not None
    fits = GenerateRequest(prompt="a" * 10, sampling=replace(GREEDY, max_tokens=1))
    a_token = engine.tokenizer.encode(" a")
    assert len(a_token) == 1
    too_long = replace(fits, prompt=" a" * (limit - 2))  # with BOS and one new token
    with pytest.raises(InputError, match="SGLang"):
        await complete(engine, too_long)
    assert (await complete(engine, fits)).usage.completion_tokens == 1


@one_engine
@on_one_loop
async def test_a_penalty_that_counts_otherwise_is_told_once(engine: SGLangEngine) -> None:
    limit = engine.info.context_tokens
    for _ in range(2):  # too long to be run: SGLang compiles what a penalty needs, a minute on a busy CPU
        with pytest.raises(InputError):
            await complete(engine, asked("Hello", max_tokens=limit, repetition_penalty=1.3))
    assert [line for line in engine.info.notices if "penalty" in line] == [
        "SGLang's repetition penalty counts the answer's tokens, not the prompt's"
    ]


@one_engine
@on_one_loop
async def test_its_process_killed_ends_every_request_and_is_told_to_the_next(engine: SGLangEngine) -> None:
    request = replace(asked("Tell me everything."), sampling=LONG)
    tasks = [asyncio.create_task(complete(engine, request)) for _ in range(3)]
    await until(engine, lambda load: load["num_running_reqs"] == 3)
    group = engine._process.pid
    os.kill(group, signal.SIGKILL)
    for task in tasks:
        with pytest.raises(EngineError, match="SIGKILL"):
            await task
    with pytest.raises(EngineError, match="SIGKILL"):
        await complete(engine, asked("Hello"))
    assert not members(group)


# Starts that fail


@pytest.mark.xdist_group("starts")
async def test_a_start_that_takes_too_long_is_given_up_and_leaves_nobody(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, mark := uuid4().hex)
    with pytest.raises(EngineError, match=r"not ready after 0\.5 s"):
        await SGLangEngine.start(profile_of(model), deadline_s=0.5)
    assert not marked(mark)


@pytest.mark.xdist_group("starts")
async def test_an_argument_that_sglang_does_not_know_is_told_in_its_words(model: Path) -> None:
    with pytest.raises(EngineError, match="no-such-kernel"):
        await SGLangEngine.start(profile_of(model, attention_backend="no-such-kernel"))


@pytest.mark.xdist_group("starts")
async def test_a_plug_in_that_is_left_out_is_an_engine_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    with pytest.raises(EngineError, match="leaves the ghostvis plug-in out"):
        await SGLangEngine.start(profile_of(model))


# As a command


@pytest.mark.xdist_group("starts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_ends_while_sglang_starts_takes_it_along(model: Path, number: signal.Signals) -> None:
    """When the scheduler has been started and has set up nothing yet that would end it."""
    with command(model, "Hello") as running:
        eventually(lambda: running.find("multiprocessing.spawn") > 0, PATIENCE_S)
        running.process.send_signal(number)
        code = running.process.wait(PATIENCE_S)
        eventually(lambda: not running.left(), 20)
        assert code == {signal.SIGINT: ExitCode.INTERRUPTED}.get(number, -number)


@pytest.mark.xdist_group("commands")
def test_a_batch_is_answered_and_says_what_it_is_waiting_for(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    questions = ("What is in this picture?", "How many shapes are there?")
    rows.write_text("".join(json.dumps({"prompt": q, "images": [str(THREE)]}) + "\n" for q in questions))
    with command(model, "--input", str(rows), "--temperature", "0", "-v") as running:
        out, err = running.process.communicate(timeout=PATIENCE_S)
    assert running.process.returncode == 0, err
    assert len(out.splitlines()) == 2 and "blue square" in out and "three shapes" in out
    assert "starting SGLang" in err and "Load weight end" in err


@pytest.mark.xdist_group("commands")
@pytest.mark.parametrize("killed", ["sglang::scheduler", ""], ids=["the scheduler", "the command"])
def test_whichever_process_dies_all_end(model: Path, killed: str) -> None:
    sampling = ("--set", "sampling.ignore_eos=true", "--max-tokens", "9000", "--temperature", "0")
    with command(model, "What do you see?", *sampling, "--stream") as running:
        process = running.process
        assert process.stdout is not None and process.stdout.read(1)
        scheduler = running.find("sglang::scheduler")
        assert scheduler > 0
        os.kill(scheduler if killed else process.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=PATIENCE_S)
        eventually(lambda: not running.left(), 20)
        if killed:
            assert process.returncode == ExitCode.ENGINE
            assert "SGLang" in err.splitlines()[-2]


@pytest.mark.xdist_group("api")
def test_two_ranks_answer_through_the_python_api(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with create_sglang_engine(checkpoint_path=model, device="cpu", tensor_parallel_size=2) as engine:
        assert engine.info.kind == "sglang"
        questions = ["What is in this picture?", "How many shapes are there?"]
        texts = engine.generate(prompts=questions, images=THREE, max_tokens=40, temperature=0)
    assert "blue square" in texts[0] and "three" in texts[1]
