"""bench prefix: pairs on real engines, and every way in which server and clock may disagree."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from ghostvis_cli.bench.prefix import Pair, Round, Settings, as_extra, flusher, judged, prove
from ghostvis_cli.bench.report import prefix_lines, prefix_section
from ghostvis_cli.engines.base import Chunk, GenerateRequest
from ghostvis_cli.engines.factory import make_engine
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.errors import InputError, RequestError, UsageError
from ghostvis_cli.profile import resolve
from tests.bench.reports import report
from tests.cli import invoke
from tests.engines.serving import running

prefix = partial(invoke, "bench", "prefix")
SMALL = Settings(pairs=6, questions=3, warm_up=1, image_size=(64, 48))


def pairs(warm_s: float, *, reused: int | None, cold_s: float = 0.1, count: int = 10) -> list[Pair]:
    """Pairs whose times vary by a few percent."""
    return [
        Pair(
            cold_s=cold_s * (1 + 0.01 * (n % 5)),
            warm_s=warm_s * (1 + 0.01 * ((3 * n) % 5)),
            cold_cached=None if reused is None else 2,
            warm_cached=None if reused is None else 2 + reused,
            prompt_tokens=100,
            image_tokens=64,
        )
        for n in range(count)
    ]


class Recorder(FakeEngine):
    """Keeps what it was asked, and says that it saw cached tokens from the second question to an image on."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[GenerateRequest] = []
        self.known: set[str] = set()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.asked.append(request)
        digest = request.messages[0].images[0].digest
        cached = 2 + 4 * (digest in self.known)
        self.known.add(digest)
        async for chunk in super().generate(request):
            yield replace(chunk, usage=replace(chunk.usage, cached_tokens=cached)) if chunk.usage else chunk


# --- what is asked


async def test_every_pair_is_a_new_image_and_two_questions_about_it() -> None:
    engine = Recorder()
    await prove(engine, replace(SMALL, questions=2))
    digests = [request.messages[0].images[0].digest for request in engine.asked]
    assert digests[0::2] == digests[1::2]
    assert len(set(digests)) == len(digests) // 2
    texts = [request.messages[0].text for request in engine.asked]
    assert len(set(texts)) == len(texts)


async def test_cold_and_warm_questions_are_equally_long() -> None:
    engine = Recorder()
    await prove(engine, replace(SMALL, questions=2))
    words = [len(request.messages[0].text.split("?")[0].split(".")[0].split()) for request in engine.asked]
    assert len(set(words)) == 1


async def test_the_same_seed_asks_the_same() -> None:
    first, second = Recorder(), Recorder()
    for engine in (first, second):
        await prove(engine, SMALL)
    assert [r.messages[0].text for r in first.asked] == [r.messages[0].text for r in second.asked]


async def test_a_flush_comes_between_warm_and_flushed() -> None:
    engine, flushed_after = Recorder(), []

    async def flush() -> None:
        flushed_after.append(len(engine.asked))

    proof = await prove(engine, replace(SMALL, warm_up=0), flush)
    assert flushed_after == [2, 5, 8, 11, 14, 17]
    assert all(pair.flushed_s is not None for pair in proof.pairs)


async def test_only_sglang_can_be_flushed() -> None:
    with pytest.raises(UsageError, match="only an SGLang server"):
        flusher(FakeEngine())


def test_pairs_too_few_for_an_interval_are_refused() -> None:
    with pytest.raises(UsageError, match="5 pairs show nothing"):
        Settings(pairs=5)


async def test_an_engine_that_counts_nothing_is_no_witness() -> None:
    class Silent(FakeEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            async for chunk in super().generate(request):
                yield replace(chunk, usage=None)

    with pytest.raises(RequestError, match="counts no tokens"):
        await prove(Silent(), SMALL)


# --- the verdict


def test_cached_tokens_and_saved_time_are_a_proof() -> None:
    proof = judged(pairs(0.03, reused=64), [])
    assert proof.witness == "agree"
    assert proof.verdict.startswith("the cache works: the server reports 64 of 100 prompt tokens reused")


def test_cached_tokens_without_saved_time_are_a_contradiction() -> None:
    proof = judged(pairs(0.1, reused=64), [])
    assert proof.witness == "disagree"
    assert "cached tokens that save no time" in proof.verdict
    assert any("not faster" in doubt for doubt in proof.doubts)


def test_saved_time_without_cached_tokens_is_one_too() -> None:
    proof = judged(pairs(0.03, reused=0), [])
    assert (proof.witness, "embeddings" in proof.verdict) == ("disagree", True)


def test_neither_is_agreement_on_no_cache() -> None:
    proof = judged(pairs(0.1, reused=0), [])
    assert (proof.witness, proof.verdict.startswith("nothing was reused")) == ("agree", True)


@pytest.mark.parametrize("warm_s", [0.03, 0.1])
def test_a_server_that_does_not_report_leaves_the_clock_alone(warm_s: float) -> None:
    proof = judged(pairs(warm_s, reused=None), [])
    assert proof.witness == "unknown"
    assert "--enable-cache-report" in proof.verdict


def test_an_image_the_server_knew_before_is_no_cold_one() -> None:
    known = [replace(pair, cold_cached=66) for pair in pairs(0.03, reused=64)]
    assert "10 of 10 cold images were in the cache already: take another --seed" in judged(known, []).doubts


def test_the_saving_is_the_median_over_pairs_within_its_interval() -> None:
    proof = judged(pairs(0.05, reused=64), [])
    assert proof.saved.low <= proof.saved.estimate <= proof.saved.high
    assert proof.saved.estimate == pytest.approx(0.5, abs=0.03)  # times vary by up to 4 %


# --- ten questions, one image


def test_memory_is_tokens_times_the_models_bytes_per_token() -> None:
    round_ = Round("one by one", 10, 640, 64, kv_token_bytes=5120)
    assert (round_.ratio, round_.kv_bytes(round_.asked), round_.kv_bytes(round_.computed)) == (
        10,
        3276800,
        327680,
    )


def test_what_is_not_known_is_not_shown_as_zero() -> None:
    round_ = Round("one by one", 10, 640, None, kv_token_bytes=None)
    assert (round_.ratio, round_.kv_bytes(640)) == (None, None)


async def test_of_questions_sent_at_once_any_may_be_the_one_that_computed_the_image() -> None:
    class LastComputes(Recorder):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            self.asked.append(request)
            same = sum(
                each.messages[0].images[0].digest == request.messages[0].images[0].digest
                for each in self.asked
            )
            async for chunk in FakeEngine.generate(self, request):
                cached = 2 if same == 3 else 6  # an image is 4 tokens here
                yield (
                    replace(chunk, usage=replace(chunk.usage, cached_tokens=cached)) if chunk.usage else chunk
                )

    proof = await prove(LastComputes(), SMALL)
    assert [(each.asked, each.computed) for each in proof.rounds] == [(12, 4), (12, 4)]


# --- real engines


async def demo() -> Any:
    return await make_engine(resolve(None, flags={"model.source": "demo", "engine.kind": "local"}).profile)


async def test_the_demo_model_reuses_an_image_whole() -> None:
    async with await demo() as engine:
        proof = await prove(engine, SMALL)
    assert all(pair.reused is not None and pair.reused >= 64 for pair in proof.pairs)
    assert [(each.asked, each.computed) for each in proof.rounds] == [(192, 64), (192, 64)]
    # 2 x layers x key-value heads x head size x 4 bytes, of the demo's configuration.
    assert engine.info.kv_token_bytes == 5120


async def test_without_its_cache_the_demo_model_reuses_nothing() -> None:
    flags = {"model.source": "demo", "engine.kind": "local", "engine.prefix_cache_mb": 0}
    async with await make_engine(resolve(None, flags=flags).profile) as engine:
        proof = await prove(engine, SMALL)
    assert proof.reused == 0
    assert proof.rounds[0].computed == 192


async def test_a_text_can_stand_in_for_the_image() -> None:
    async with await demo() as engine:
        proof = await prove(engine, replace(SMALL, text=100))
    assert all(pair.reused is not None and pair.reused >= 100 for pair in proof.pairs)
    assert proof.rounds == ()


def test_our_own_server_is_proven_over_http_and_tells_its_bytes_per_token() -> None:
    engine = asyncio.run(demo())
    with running(engine, load=None) as server:
        done = prefix(
            "--base-url", server.url, "--pairs", "6", "--questions", "3", "--image-size", "64x48", "--json"
        )
    proof = json.loads(done.stdout)["extra"]["prefix"]
    assert proof["reused"] >= 64
    assert proof["rounds"][0]["kv_token_bytes"] == 5120
    assert done.exit_code == (9 if proof["witness"] == "disagree" else 0)
    asyncio.run(engine.aclose())


# --- what is shown


class Claims(FakeEngine):
    """Reports an image it has seen before as cached, and takes its time over it."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[str] = set()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        digests = {image.digest for message in request.messages for image in message.images}
        warm = bool(digests & self.known)
        self.known |= digests
        await asyncio.sleep(0.03 * warm)
        async for chunk in super().generate(request):
            cached = 8 * warm
            yield replace(chunk, usage=replace(chunk.usage, cached_tokens=cached)) if chunk.usage else chunk


def test_a_contradiction_is_loud_even_where_all_else_is_quiet_and_ends_with_9() -> None:
    with running(Claims()) as server:
        done = prefix("--base-url", server.url, "--pairs", "10", "--questions", "2", "--quiet")
    assert done.exit_code == 9
    assert done.stderr.startswith("ghostvis: SERVER AND CLOCK DISAGREE: the server reports 8 of")


def test_the_table_says_not_reported_and_not_known() -> None:
    proof = judged(pairs(0.03, reused=None), [Round("one by one", 10, 640, None, None)])
    text = "\n".join(prefix_lines(as_extra(proof, Settings())))
    assert text.count("not reported") == 4  # cold, warm, computed, ratio
    assert text.count("not known") == 2


@pytest.mark.parametrize("change", [{"flushed_s": 0.1}, {"cold_s": 0.0}])
def test_a_report_whose_pairs_are_not_of_one_kind_is_refused(change: dict[str, float]) -> None:
    proof = as_extra(judged(pairs(0.03, reused=64), []), {})
    proof["pairs"][0].update(change)
    with pytest.raises(InputError, match="pairs lack times"):
        prefix_section(report([], extra={"prefix": proof}))


async def test_a_server_that_tells_no_image_tokens_has_computed_none_that_are_known() -> None:
    class CountsNoImages(Recorder):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            async for chunk in super().generate(request):
                usage = replace(chunk.usage, image_tokens=0) if chunk.usage else None
                yield replace(chunk, usage=usage)

    engine = CountsNoImages()
    engine.info = replace(engine.info, image_tokens=0)
    proof = await prove(engine, SMALL)
    assert [(each.asked, each.computed, each.ratio) for each in proof.rounds] == [(None, None, None)] * 2
    (row,) = [line for line in prefix_lines(as_extra(proof, SMALL)) if "one by one" in line]
    assert row.split("  ", 2)[2].count("not reported") == 3
    assert "the server does not say how many tokens an image takes" in proof.doubts


@pytest.mark.parametrize(
    "words", [("--image-size", "64,32"), ("--image-size", "0x9"), ("--pairs", "2"), ("--text", "9" * 11)]
)
def test_senseless_options_are_refused(words: tuple[str, ...]) -> None:
    assert prefix(*words).exit_code == 2
