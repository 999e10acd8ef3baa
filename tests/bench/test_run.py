"""Load and its records, on a clock that knows no noise: every figure is what arithmetic says."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace

import pytest

from ghostvis_cli.bench.lengths import Sizes
from ghostvis_cli.bench.run import GIVE_UP, Plan, Progress, Target, measure
from ghostvis_cli.bench.schema import Load, Run
from ghostvis_cli.bench.workload import Gallery
from ghostvis_cli.engines.base import Chunk, GenerateRequest
from ghostvis_cli.errors import EngineError, GhostvisError, RequestError
from ghostvis_cli.images import EncodedImage
from tests.bench.virtual import TimedEngine, measured, run, workload

EXACT = pytest.approx  # the clock adds floats up: 1e-6 of a value is rounding, and far below any timing


def one(load: Load, engine: TimedEngine, requests: int = 12, tokens: str = "16", **plan: float) -> Run:
    (found,) = measured(Plan((load,), **plan), workload(requests, tokens), engine)  # type: ignore[arg-type]
    return found


def test_every_latency_of_a_closed_loop_is_the_schedules() -> None:
    figures = one(Load(4), TimedEngine(first_s=0.05, gap_s=0.01)).figures
    for statistic in ("mean", "p50", "p90", "p95", "p99", "max"):
        assert figures[f"ttft_{statistic}"] == EXACT(0.05)
        assert figures[f"tpot_{statistic}"] == EXACT(0.01)
        assert figures[f"itl_token_{statistic}"] == EXACT(0.01)
        assert figures[f"itl_chunk_{statistic}"] == EXACT(0.01)
        assert figures[f"e2e_{statistic}"] == EXACT(0.2)
    for base in ("ttft", "tpot", "itl_token", "itl_chunk", "e2e"):
        assert figures[f"{base}_sd"] == EXACT(0, abs=1e-9)


def test_every_rate_of_a_closed_loop_is_the_schedules() -> None:
    figures = one(Load(4), TimedEngine(first_s=0.05, gap_s=0.01)).figures
    assert figures["duration"] == EXACT(3 * 0.2)  # 12 requests, 4 at a time
    assert figures["requests_per_s"] == EXACT(12 / 0.6)
    assert figures["output_tokens_per_s"] == EXACT(12 * 16 / 0.6)
    assert figures["input_tokens_per_s"] == EXACT(12 * 7 / 0.6)
    assert figures["mean_concurrency"] == EXACT(4)


def test_chunks_of_several_tokens_have_a_latency_of_their_own() -> None:
    figures = one(Load(1), TimedEngine(first_s=0.1, gap_s=0.01, tokens_per_chunk=4)).figures
    assert figures["itl_chunk_p50"] == EXACT(0.04)
    assert figures["itl_token_p50"] == EXACT(0.01)
    assert figures["tpot_p50"] == EXACT(0.12 / 15)  # the last chunk begins with token 12


def test_tokens_that_a_server_does_not_name_are_not_made_up() -> None:
    engine = TimedEngine(tokens_per_chunk=4, names_ids=False)
    figures = one(Load(1), engine).figures
    assert figures["itl_token_p50"] is None
    assert figures["itl_chunk_p50"] == EXACT(0.04)
    assert one(Load(1), TimedEngine(names_ids=False)).figures["itl_token_p50"] == EXACT(0.01)


@pytest.mark.parametrize("names_ids", [True, False])
@pytest.mark.parametrize("thinks", [0, 14, 16])
def test_a_token_of_reasoning_is_a_token(thinks: int, names_ids: bool) -> None:
    found = one(Load(2), TimedEngine(first_s=0.05, gap_s=0.01, thinks=thinks, names_ids=names_ids))
    for name in ("tpot_p50", "itl_token_p50", "itl_chunk_p50"):
        assert found.figures[name] == EXACT(0.01)
    assert found.figures["ttft_p50"] == EXACT(0.05)
    assert found.figures["reasoning_tokens"] == 12 * thinks


def test_reasoning_that_can_not_be_told_in_tokens_is_not_reported() -> None:
    engine = TimedEngine(thinks=8, tokens_per_chunk=4, names_ids=False)
    assert one(Load(1), engine).figures["reasoning_tokens"] is None


def test_reasoning_that_is_never_sent_is_no_part_of_the_time_per_token() -> None:
    found = one(Load(1), TimedEngine(first_s=0.5, gap_s=0.01, hides=40))
    for name in ("tpot_p50", "itl_token_p50"):
        assert found.figures[name] == EXACT(0.01)
    assert found.figures["reasoning_tokens"] == 12 * 40
    unsent = "480 reasoning tokens were never sent, so ttft holds the time that they took"
    assert found.notes == (f"a at concurrency=1: {unsent}",)


def test_a_server_that_counts_no_tokens_has_no_token_rates() -> None:
    figures = one(Load(1), TimedEngine(counts_tokens=False)).figures
    assert figures["requests_per_s"] == EXACT(1 / 0.2)
    assert [figures[name] for name in ("output_tokens_per_s", "cached_tokens", "tpot_p50")] == [None] * 3


def test_a_closed_loop_keeps_as_many_in_flight_as_it_says() -> None:
    engine = TimedEngine()
    one(Load(5), engine, requests=23)
    assert (engine.most_running, len(engine.sent)) == (5, 23)


def test_an_open_loop_sends_on_schedule_however_slow_the_server() -> None:
    engine = TimedEngine(first_s=60.0)
    found = one(Load(None, 10.0, "constant"), engine, requests=50)
    starts = [at for at, _ in engine.sent]
    assert [at - starts[0] for at in starts] == EXACT([n / 10 for n in range(50)])
    assert engine.most_running == 50
    assert found.figures["send_lag_max"] == EXACT(0, abs=1e-9)


def test_a_stall_is_charged_to_everybody_who_came_during_it() -> None:
    engine = TimedEngine(first_s=0.05, gap_s=0.0, stall=(1.0, 3.0))
    figures = one(Load(None, 100.0, "constant"), engine, requests=400, tokens="1").figures
    waits = sorted(3.0 - n / 100 if 1.0 <= n / 100 + 0.05 < 3.0 else 0.05 for n in range(400))
    assert figures["ttft_max"] == EXACT(waits[-1])
    assert figures["ttft_p99"] == EXACT(waits[395] + 0.01 * (waits[396] - waits[395]))
    assert figures["ttft_p50"] == EXACT((waits[199] + waits[200]) / 2)


def test_a_limit_of_requests_in_flight_counts_as_waiting_in_an_open_loop() -> None:
    engine = TimedEngine(first_s=1.0, gap_s=0.0)
    found = one(Load(1, 2.0, "constant"), engine, requests=4, tokens="1")
    assert engine.most_running == 1
    assert [record.finished_s - record.scheduled_s for record in found.records] == EXACT([1.0, 1.5, 2.0, 2.5])
    assert found.figures["send_lag_max"] == EXACT(1.5)


def test_a_ramp_brings_clients_in_one_after_the_other() -> None:
    engine = TimedEngine(first_s=100.0)
    one(Load(4, ramp_up_s=8.0), engine, requests=4)
    starts = [at for at, _ in engine.sent]
    assert [at - starts[0] for at in starts] == EXACT([0.0, 2.0, 4.0, 6.0])


def test_a_duration_ends_the_sending_and_not_the_answers() -> None:
    engine = TimedEngine(first_s=0.1, gap_s=0.0)
    found = one(Load(2), engine, requests=3, tokens="1", duration_s=1.05)
    assert len(engine.sent) == 2 * 11
    assert found.figures["failed"] == 0


def test_rows_that_ran_more_than_once_are_told_in_the_same_words_however_often() -> None:
    for load in (Load(2), Load(3)):
        runs = [one(load, TimedEngine(), requests=3, duration_s=each) for each in (5.0, 9.0)]
        assert len(runs[0].records) != len(runs[1].records)
        first, second = ([note for note in found.notes if "more than once" in note] for found in runs)
        assert (
            first
            == second
            == [f"a at {load.name}: the 3 rows of a run were asked more than once, and a cache may know them"]
        )


def test_warm_up_is_sent_first_and_counted_nowhere() -> None:
    engine = TimedEngine()
    work = workload(6, warm_up=3)
    (found,) = measured(Plan((Load(2),)), work, engine)
    assert [request for _, request in engine.sent[:3]] == [item.request() for item in work.warm_up]
    assert (len(engine.sent), found.figures["requests"]) == (9, 6)


def test_a_warm_up_that_fails_altogether_ends_the_benchmark_with_its_error() -> None:
    engine = TimedEngine(failing=lambda request: EngineError("gone"))
    with pytest.raises(EngineError, match="gone"):
        measured(Plan((Load(2),)), workload(6, warm_up=3), engine)
    assert len(engine.sent) == 3


def test_failures_are_counted_by_kind_and_are_in_no_latency() -> None:
    kinds: dict[str, GhostvisError] = {
        "0-1": RequestError("no"),
        "0-3": RequestError("no"),
        "0-4": EngineError("gone"),
    }
    work = workload(6)
    errors = {work.rounds[0][int(name[2:])].request().messages: error for name, error in kinds.items()}

    def failing(request: GenerateRequest) -> Exception | None:
        return errors.get(request.messages)

    (found,) = measured(Plan((Load(1),)), work, TimedEngine(failing=failing))
    assert found.failures == {"request": 2, "engine": 1}
    assert (found.figures["requests"], found.figures["failed"]) == (3, 3)
    assert found.figures["e2e_max"] == EXACT(0.2)
    assert "request 0-1 failed: no" in found.notes[0]


def test_engines_take_turns_and_get_the_same_rows() -> None:
    a, b = TimedEngine(), TimedEngine(first_s=0.1)
    runs = measured(Plan((Load(1), Load(2)), repeats=2), workload(4, rounds=4), a, b)
    assert [(run.engine, run.load.concurrency, run.repeat) for run in runs] == [
        ("a", 1, 0), ("b", 1, 0), ("b", 1, 1), ("a", 1, 1), ("a", 2, 0), ("b", 2, 0), ("b", 2, 1), ("a", 2, 1),
    ]  # fmt: skip
    assert [request for _, request in a.sent] == [request for _, request in b.sent]
    assert len({request.messages for _, request in a.sent}) == 16  # no run repeats another's prompts


def test_a_client_behind_its_schedule_says_so() -> None:
    class Clogging(TimedEngine):
        """Stops the loop for its caller, as a client does that has too much to do."""

        def generate(self, request: GenerateRequest) -> object:  # type: ignore[override]
            import asyncio

            loop = asyncio.get_running_loop()
            loop._jumping.clock_s += 0.2  # type: ignore[attr-defined]
            return super().generate(request)

    found = one(Load(None, 10.0, "constant"), Clogging(), requests=20)
    assert any("THE CLIENT WAS THE BOTTLENECK" in note for note in found.notes)
    assert not one(Load(None, 10.0, "constant"), TimedEngine(), requests=20).notes


def test_runs_that_ended_outlive_an_error_that_ends_the_benchmark() -> None:
    """The warm-up of the second load finds the server gone."""
    work = workload(4, rounds=2, warm_up=2)

    def gone_later(request: GenerateRequest) -> Exception | None:
        return EngineError("gone") if len(engine.sent) > 6 else None

    engine = TimedEngine(failing=gone_later)
    runs: list[Run] = []
    with pytest.raises(EngineError, match="gone"):
        run(measure([Target("a", engine)], work, Plan((Load(1), Load(2))), Progress(), runs))
    assert [(each.load, each.figures["requests"], each.cut_short) for each in runs] == [(Load(1), 4, False)]


def test_a_run_that_is_cancelled_keeps_the_requests_that_had_ended() -> None:
    runs: list[Run] = []

    async def cancelled() -> None:
        plan = Plan((Load(2),))
        task = asyncio.ensure_future(
            measure([Target("a", TimedEngine())], workload(20), plan, Progress(), runs)
        )
        await asyncio.sleep(0.7)  # of the virtual clock: three answers of 0.2 s by each of two clients
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    run(cancelled())
    (found,) = runs
    assert (found.figures["requests"], found.figures["failed"], found.cut_short) == (6, 0, True)
    assert found.figures["e2e_max"] == EXACT(0.2)


@pytest.mark.parametrize("load", [Load(2), Load(None, 100.0, "constant"), Load(2, 100.0, "constant")])
def test_a_bug_is_raised_at_once_and_loses_no_request_that_had_ended(load: Load) -> None:
    def failing(request: GenerateRequest) -> Exception | None:
        return ValueError("a bug") if len(engine.sent) >= 100 else None

    engine, runs = TimedEngine(first_s=0.05, failing=failing), list[Run]()
    with pytest.raises(ValueError, match="a bug"):
        run(measure([Target("a", engine)], workload(200), Plan((load,)), Progress(), runs))
    (found,) = runs
    assert found.cut_short and engine.running == 0
    in_flight = engine.most_running if load.concurrency is None else load.concurrency
    assert len(engine.sent) - in_flight - 1 <= len(found.records) < len(engine.sent) < 200


@pytest.mark.parametrize("load", [Load(2), Load(None, 100.0, "constant")])
def test_a_request_that_the_engine_cancels_itself_has_failed(load: Load) -> None:
    def failing(request: GenerateRequest) -> BaseException | None:
        return asyncio.CancelledError() if len(engine.sent) > 4 else None

    engine = TimedEngine(first_s=0.0, failing=failing)
    found = one(load, engine, requests=8)
    assert (len(engine.sent), len(found.records)) == (8, 8)
    assert found.failures["engine"] >= 4 and "nobody had asked for" in found.notes[0]


def test_an_answer_that_just_stops_has_failed() -> None:
    class Stopping(TimedEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            async with aclosing(super().generate(request)) as stream:
                yield await anext(stream)

    assert one(Load(2), Stopping(), requests=8).failures == {"request": 8}


class Slow(Gallery):
    """An image that takes a while to get ready, on the virtual clock."""

    def fresh(self, url: str) -> EncodedImage:
        asyncio.get_running_loop()._jumping.clock_s += 0.02  # type: ignore[attr-defined]
        return super().fresh(url)


@pytest.mark.parametrize("load", [Load(2), Load(None, 10.0, "constant")])
def test_a_request_is_made_ready_before_its_time(load: Load) -> None:
    gallery = Slow()
    work = workload(8, with_vision=True, image_size=Sizes(choices=((32, 32),)))
    for url, image in work.gallery.items():
        gallery.add(url, image)
    work = replace(
        work,
        gallery=gallery,
        rounds=tuple(tuple(replace(i, gallery=gallery) for i in r) for r in work.rounds),
    )
    engine = TimedEngine(first_s=0.05)
    (found,) = measured(Plan((load,)), work, engine)
    assert found.figures["ttft_max"] == EXACT(0.05)
    assert found.figures["send_lag_max"] == EXACT(0, abs=1e-9)
    sent = [image for _, request in engine.sent for message in request.messages for image in message.images]
    assert [image.encoded for image in sent] == [b64encode(image.data) for image in sent] and len(sent) == 8


def test_no_more_images_are_kept_encoded_than_a_run_sends() -> None:
    work = workload(4, rounds=2, with_vision=True, image_size=Sizes(choices=((32, 32),)))
    measured(Plan((Load(1),), repeats=2), work, TimedEngine())
    kept = [
        [work.gallery.fresh(url).encoded for item in items for url in item.sources] for items in work.rounds
    ]
    assert kept[0] == [None] * 4 and None not in kept[1]


@pytest.mark.parametrize("load", [Load(2), Load(None, 100.0, "constant")])
def test_a_server_that_is_gone_for_good_ends_the_benchmark(load: Load) -> None:
    engine = TimedEngine(failing=lambda request: EngineError("gone"))
    runs: list[Run] = []
    plan = Plan((load,), duration_s=1e6)
    with pytest.raises(EngineError, match="gone"):
        run(measure([Target("a", engine)], workload(8), plan, Progress(), runs))
    (found,) = runs
    assert found.cut_short
    assert GIVE_UP <= found.failures["engine"] < GIVE_UP + 20  # those in flight


def test_a_server_that_refuses_a_request_is_not_gone() -> None:
    engine = TimedEngine(failing=lambda request: RequestError("no"))
    found = one(Load(2), engine, requests=8, duration_s=100.0)
    assert found.failures["request"] > 3 * GIVE_UP
