"""Figures from records, against arithmetic done by hand."""

from dataclasses import replace

import pytest

from ghostvis_cli.bench import metrics
from ghostvis_cli.bench.ratios import ratios
from ghostvis_cli.bench.schema import Load, Record, Run, from_json, metric, to_json
from ghostvis_cli.errors import UsageError
from tests.bench.reports import CARD
from tests.bench.virtual import TimedEngine, measured, workload


def record(**changes: object) -> Record:
    usual = {
        "id": "1", "scheduled_s": 1.0, "sent_s": 1.1, "first_token_s": 1.5, "finished_s": 2.5,
        "chunk_s": (1.5, 1.7, 2.5), "chunk_tokens": (1, 2, 2), "prompt_tokens": 10, "completion_tokens": 5,
        "cached_tokens": 4,
    }  # fmt: skip
    return Record(**(usual | changes))  # type: ignore[arg-type]


def test_latencies_count_from_the_schedule_and_not_from_the_sending() -> None:
    one = record()
    assert (metrics.ttft(one), metrics.e2e(one)) == (0.5, 1.5)
    assert metrics.tpot(one) == 1.0 / 4
    assert metrics.figures([one])["send_lag_p50"] == pytest.approx(0.1)


def test_a_chunk_of_several_tokens_shares_its_gap_out() -> None:
    assert list(metrics.chunk_gaps(record())) == pytest.approx([0.2, 0.8])
    assert list(metrics.token_gaps(record())) == pytest.approx([0.1, 0.1, 0.4, 0.4])


def test_token_gaps_need_counts_that_add_up() -> None:
    assert list(metrics.token_gaps(record(chunk_tokens=(1, 1, 1)))) == []
    assert list(metrics.token_gaps(record(chunk_tokens=(0, 0, 0), completion_tokens=3))) == pytest.approx(
        [0.2, 0.8]
    )


def test_an_answer_of_one_token_has_no_time_per_further_token() -> None:
    assert metrics.tpot(record(completion_tokens=1)) is None


def test_spread_is_what_numpy_says() -> None:
    import numpy as np

    values = [5.0, 1.0, 4.0, 9.0, 2.0, 2.5, 7.0]
    found = metrics.spread(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["sd"] == pytest.approx(np.std(values))
    assert [found[f"p{q}"] for q in (50, 90, 95, 99)] == pytest.approx(
        np.percentile(values, [50, 90, 95, 99])
    )
    assert found["max"] == 9.0


def test_cached_tokens_that_one_answer_does_not_report_are_not_reported() -> None:
    figures = metrics.figures([record(), record(cached_tokens=None)])
    assert (figures["cached_tokens"], figures["cache_hit_rate"]) == (None, None)
    assert metrics.figures([record(), record(cached_tokens=0)])["cache_hit_rate"] == 0.2


def test_the_text_before_an_image_is_not_taken_for_pixels() -> None:
    new = record(cached_tokens=6, image_tokens=64, images=1)
    seen = record(cached_tokens=70, image_tokens=64, images=1, images_seen=1)
    partly = record(cached_tokens=38, image_tokens=64, images=1, images_seen=1)
    assert metrics.image_tokens_computed([new, seen]) == 64
    assert metrics.image_tokens_computed([new, seen, partly]) == 64 + 32
    assert metrics.image_tokens_computed([new, record(image_tokens=64, cached_tokens=None)]) is None


def test_a_new_image_that_another_request_computed_first_counts_as_cached() -> None:
    def cached(tokens: int, seen: int) -> Record:
        return record(cached_tokens=tokens, image_tokens=64, images=1, images_seen=seen)

    overtaken = [cached(67, 0), cached(3, 1), cached(3, 0), cached(67, 1)]
    assert metrics.image_tokens_computed(overtaken) == 2 * 64
    assert metrics.image_tokens_computed([cached(67, 0), cached(3, 1)]) == 64


def test_the_first_request_of_all_does_not_make_a_shared_text_look_like_images() -> None:
    first, *others = (record(cached_tokens=n, image_tokens=64, images=1) for n in (0, 500, 500))
    assert metrics.image_tokens_computed([first, *others]) == 3 * 64


def test_what_caches_saved_is_told_and_what_is_not_reported_is_called_so() -> None:
    def told(*records: Record) -> str:
        run = Run("local", Load(2), 0, "", 1.0, metrics.figures(records))
        return metrics.reuse(metrics.summarise([run])[0])

    new = record(cached_tokens=0, image_tokens=64, images=1)
    seen = record(cached_tokens=64, image_tokens=64, images=1, images_seen=1, prompt_tokens=90)
    assert told(new, seen) == (
        "local at concurrency=2: 128 image tokens asked for, 64 computed; 64.0% of the input was cached"
    )
    unknown = record(cached_tokens=None, image_tokens=64, images=1)
    assert told(unknown) == (
        "local at concurrency=2: 64 image tokens asked for, computed: not reported; cached tokens: not reported"
    )


def test_goodput_counts_who_met_every_objective() -> None:
    slo = metrics.parse_slo("ttft=500ms, tpot=0.25s")
    assert slo == {"ttft": 0.5, "tpot": 0.25}
    records = [record(), record(first_token_s=1.6), record(error="request"), record(completion_tokens=1)]
    figures = metrics.figures(records, slo)
    assert figures["goodput_share"] == 0.5
    assert figures["goodput_per_s"] == pytest.approx(2 / 1.5)


def test_an_objective_that_no_report_could_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="is no objective"):
        metrics.parse_slo(f"ttft={'9' * 400}s")


@pytest.mark.parametrize(
    "text", ["ttft", "ttft=200", "speed=1s", "ttft=ms", "", "ttft=1.2.3s", "ttft=.ms", "e2e=0s"]
)
def test_an_objective_without_a_metric_and_a_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no objective"):
        metrics.parse_slo(text)


def test_a_run_without_a_success_has_counts_and_no_latencies() -> None:
    figures = metrics.figures([record(error="engine", first_token_s=None)])
    assert (figures["failed"], figures["requests"], figures["ttft_p50"]) == (1, 0, None)
    assert metrics.figures([])["requests"] == 0


def test_every_figure_has_a_meaning() -> None:
    names = metrics.figures([record()], {"ttft": 1.0})
    assert all(metric(name).title for name in names)


def test_repeats_give_an_interval_around_their_mean_and_one_run_gives_none() -> None:
    found = metrics.estimate([1.0, 2.0, 3.0])
    assert found is not None and found.low is not None and found.high is not None
    assert found.value == 2.0
    assert 1.0 <= found.low < 2.0 < found.high <= 3.0
    alone = metrics.estimate([1.0])
    assert alone is not None and (alone.low, alone.high) == (None, None)
    assert metrics.estimate([1.0, None]) is None


def test_ratios_say_how_often_the_first_engine_goes_into_the_others() -> None:
    from ghostvis_cli.bench.run import Plan

    slow, fast = TimedEngine(first_s=0.2, gap_s=0.02), TimedEngine(first_s=0.1, gap_s=0.01)
    found = ratios(measured(Plan((Load(2),), repeats=2), workload(6, rounds=2), slow, fast))
    values = {each["figure"]: each["value"] for each in found}
    assert values["requests_per_s"] == pytest.approx(2)
    assert values["ttft_p50"] == pytest.approx(0.5)


def test_ratios_pair_the_repeats_that_both_engines_ended() -> None:
    def run(engine: str, repeat: int, rate: float) -> Run:
        return Run(engine, Load(1), repeat, "", 1.0, {"requests_per_s": rate})

    (found,) = ratios([run("a", 0, 10.0), run("b", 0, 20.0), run("b", 1, 60.0)])
    assert (found["value"], found["repeats"]) == (pytest.approx(2), 1)


def test_a_run_comes_back_from_json_as_it_was() -> None:
    from ghostvis_cli.bench.machine import Watch
    from ghostvis_cli.bench.run import Plan
    from ghostvis_cli.bench.schema import Report

    work = workload(3)
    runs: list[Run] = measured(Plan((Load(2),)), work, TimedEngine())
    report = Report(
        Watch("x", 1).manifest(),
        work.summary,
        (replace(CARD, name="a"),),
        tuple(runs),
        metrics.summarise(runs),
    )
    once = to_json(report)
    assert to_json(from_json(once)) == once
