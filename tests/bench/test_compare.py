"""bench compare: verdicts, refusals, checks, and what it writes."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ghostvis_cli.bench.checks import condition, judged
from ghostvis_cli.bench.compare import compare, pairings, sides
from ghostvis_cli.bench.compare_text import benchfmt, markdown, rows
from ghostvis_cli.bench.files import save
from ghostvis_cli.bench.schema import Load, Report
from ghostvis_cli.errors import InputError, UsageError
from tests.bench.reports import CARD, WORK, around, report
from tests.cli import invoke


def both(a: Report, b: Report, **options: Any) -> Any:
    ((first, second),) = pairings(sides({"a": a, "b": b}))
    return compare(first, second, **options)


def verdict(a: Report, b: Report, name: str = "ttft_p95") -> str:
    (found,) = both(a, b, metrics=[name]).findings
    return str(found.verdict)


def ttft(value: float, **more: Any) -> Report:
    return report(around(value, "ttft_p95"), **more)


compared = partial(invoke, "bench", "compare")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    a, b = tmp_path / "before.json", tmp_path / "after.json"
    save(ttft(1.0), a)
    save(ttft(1.2), b)
    return a, b


# --- verdicts


def test_a_latency_that_grew_is_worse_and_one_that_shrank_is_better() -> None:
    assert verdict(ttft(1.0), ttft(1.1)) == "worse"
    assert verdict(ttft(1.1), ttft(1.0)) == "better"


def test_more_throughput_is_better() -> None:
    a, b = (report(around(value, "requests_per_s")) for value in (10, 12))
    assert verdict(a, b, "requests_per_s") == "better"


def test_the_same_twice_is_no_evidence() -> None:
    assert verdict(ttft(1.0), ttft(1.0)) == "no evidence"


def test_what_is_neither_good_nor_bad_only_changes() -> None:
    a, b = (report(around(value, "input_tokens")) for value in (10, 12))
    assert verdict(a, b, "input_tokens") == "changed"


def test_one_run_of_each_is_too_few_to_tell() -> None:
    a, b = report([{"ttft_p95": 1.0}]), report([{"ttft_p95": 9.0}])
    found = both(a, b)
    assert found.findings[0].verdict == "too few repeats"
    assert any("--repeat 5" in note for note in found.notes)


def test_a_figure_that_is_zero_is_compared_by_its_difference() -> None:
    a = report(around(0.0, "cache_hit_rate"))
    b = report(around(0.9, "cache_hit_rate"))
    (found,) = both(a, b).findings
    assert (found.verdict, found.relative) == ("better", False)
    assert rows(both(a, b))[0][3] == "+90 %"


@pytest.mark.parametrize(("spread", "repeats"), [(0.02, 12), (0.2, 4), (0.2, 12)])
def test_where_runs_can_tell_little_a_note_says_how_little_and_what_would_help(
    spread: float, repeats: int
) -> None:
    slow, fast = (
        report([one | two for one, two in zip(*each, strict=True)])
        for each in (
            (around(v, "requests_per_s", spread, repeats), around(v, "e2e_p50", 0.01, repeats))
            for v in (1.0, 1.01)
        )
    )
    found = both(slow, fast)
    (change,) = (each.change for each in found.findings if each.metric == "requests_per_s")
    notes = [note for note in found.notes if note.startswith("these runs can't tell")]
    if spread == 0.02 or repeats == 4:  # they tell enough; they tell nothing, which another note says
        assert notes == []
        return
    reach = math.log((1 + change.high) / (1 + change.low)) / 2
    needed = math.ceil(12 * (reach / math.log(1.1)) ** 2 / 10) * 10
    assert notes == [
        f"these runs can't tell changes of requests_per_s below {100 * math.expm1(reach):.0f} %: for 10 %,"
        f" some {needed} repeats of each, in one interleaved run (bench --engines, --against)"
    ]


def test_runs_that_went_wrong_beyond_all_measure_are_still_compared() -> None:
    figures = [{"e2e_p50": 1e-17 if n < 6 else 1.0} for n in range(12)]
    assert both(report(figures), report(figures)).findings[0].verdict == "no evidence"


def test_repeats_that_nobody_would_make_are_not_advised() -> None:
    a, b = (report(around(value, "e2e_p50", 0.99)) for value in (1.0, 1.1))
    (note,) = [note for note in both(a, b).notes if note.startswith("these runs")]
    assert note.endswith("for 10 %, longer runs (--num-prompts) or a calmer machine")


def test_an_unsteady_machine_takes_small_changes_out_of_the_verdict() -> None:
    """The fixed work took 30 % longer during b: so may the engine's have, without its doing."""
    a, b = around(1.0, "ttft_p95"), around(1.2, "ttft_p95")
    slower_machine = report([each | {"fixed_work": 0.013} for each in b])
    machine = report([each | {"fixed_work": 0.010} for each in a])
    assert verdict(machine, slower_machine) == "no evidence"
    assert verdict(machine, report([each | {"fixed_work": 0.010} for each in b])) == "worse"
    assert any("speed varied by 30%" in note for note in both(machine, slower_machine).notes)


def test_a_metric_that_hardly_varied_was_not_at_the_mercy_of_a_machine_that_did() -> None:
    """The fixed work of either side takes up to twice as long, and that of b another half longer."""

    def made(middle: float, spread: float, slower: float) -> Report:
        figures = around(middle, "ttft_p95", spread)
        works = ({"fixed_work": slower * (0.010 + 0.010 * (n % 2))} for n in range(len(figures)))
        return report([each | work for each, work in zip(figures, works, strict=True)])

    assert verdict(made(1.0, 0.01, 1.0), made(1.1, 0.01, 1.5)) == "worse"
    assert verdict(made(1.0, 0.2, 1.0), made(1.5, 0.2, 1.5)) == "no evidence"


def test_a_server_elsewhere_is_not_judged_by_the_clients_machine() -> None:
    card = replace(CARD, kind="remote", device="remote", address="http://gpu-1:30000")
    a = report([each | {"fixed_work": 0.010} for each in around(1.0, "ttft_p95")], card=card)
    b = report([each | {"fixed_work": 0.013} for each in around(1.2, "ttft_p95")], card=card)
    assert verdict(a, b) == "worse"


def test_engines_of_one_run_are_paired_so_that_what_slows_both_hides_nothing() -> None:
    random = Random(0)
    levels = [random.uniform(1, 5) for _ in range(12)]
    one = report([{"ttft_p95": level} for level in levels])
    other = replace(CARD, name="remote")
    slow = report([{"ttft_p95": 1.05 * level} for level in levels], card=other)
    together = replace(one, engines=(CARD, other), runs=(*one.runs, *slow.runs))
    (found,) = compare(*sides({"both": together}), metrics=["ttft_p95"]).findings
    assert found.paired
    assert found.verdict == "worse"
    assert verdict(one, replace(slow, engines=(other,))) == "no evidence"  # made apart, nobody could tell


# --- refusals


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(WORK, seed=7), "workload.seed: 42 against 7"),
        (replace(WORK, settings={"prompt_len": 64}), "workload.settings.prompt_len: 128 against 64"),
        (replace(WORK, sampling={"max_tokens": 99}), "workload.sampling.max_tokens: 16 against 99"),
        (replace(WORK, sha256="other"), "workload: the rows differ"),
    ],
)
def test_unlike_workloads_are_refused_by_name(other: Any, named: str) -> None:
    with pytest.raises(InputError, match=named) as refusal:
        both(ttft(1.0), ttft(1.0, work=other))
    assert refusal.value.hint == "--force"


def test_every_difference_is_named_at_once() -> None:
    a = report({Load(1): around(1.0, "ttft_p95")})
    b = report(
        {Load(4): around(1.0, "ttft_p95")}, card=replace(CARD, model="other"), work=replace(WORK, rows=9)
    )
    with pytest.raises(InputError) as refusal:
        both(a, b)
    for line in ("workload.rows: 8 against 9", "load: concurrency=1 against concurrency=4", "model: demo"):
        assert line in refusal.value.message


def test_the_same_name_with_other_weights_is_another_model() -> None:
    a, b = (ttft(1.0, card=replace(CARD, model_hash=each)) for each in ("11", "22"))
    with pytest.raises(InputError, match="other weights"):
        both(a, b)


def test_more_repeats_of_the_same_rows_are_the_same_work() -> None:
    long = report(around(1.0, "ttft_p95", repeats=20), work=replace(WORK, sha256="of more rows"))
    assert verdict(ttft(1.0), long) == "no evidence"


def test_force_compares_all_the_same_and_says_so() -> None:
    found = both(ttft(1.0), ttft(1.2, work=replace(WORK, seed=7)), force=True)
    assert found.findings[0].verdict == "worse"
    assert "forced" in found.notes[0]


def test_another_engine_or_version_is_no_reason_to_refuse_but_is_told() -> None:
    found = both(ttft(1.0), ttft(1.0, card=replace(CARD, dtype="bfloat16")))
    assert "not the same dtype: float32 against bfloat16" in found.notes


def test_failed_requests_are_told() -> None:
    found = both(ttft(1.0), ttft(1.0, failures={"engine": 2}))
    assert any("24 requests failed" in note for note in found.notes)


def test_a_report_that_was_cut_short_is_called_so() -> None:
    assert "b was cut short (Ctrl-C)" in both(ttft(1.0), ttft(1.0, cut_short="Ctrl-C")).notes


def test_a_single_run_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(UsageError, match="nothing to compare among local"):
        pairings(sides({"a": ttft(1.0)}))


def test_reports_of_several_engines_are_compared_engine_by_engine() -> None:
    remote = replace(CARD, name="remote")
    several = replace(ttft(1.0), engines=(CARD, remote))
    found = pairings(sides({"a": several, "b": replace(several, notes=("later",))}))
    assert [(a.name, b.name) for a, b in found] == [("a:local", "b:local"), ("a:remote", "b:remote")]


# --- checks


def test_a_check_fails_on_evidence_beyond_its_limit_alone() -> None:
    check = condition("ttft_p95>+5%")
    assert judged(check, [both(ttft(1.0), ttft(1.1))]) == ["ttft_p95 at concurrency=1, b: +10.0 %"]
    assert judged(check, [both(ttft(1.0), ttft(1.03))]) == []
    assert judged(check, [both(ttft(1.0), ttft(0.8))]) == []
    noisy = report(around(1.1, "ttft_p95", spread=0.5)), report(around(1.0, "ttft_p95", spread=0.5))
    assert judged(check, [both(*noisy)]) == []


def test_a_drop_is_checked_with_less_than() -> None:
    a, b = (report(around(value, "requests_per_s")) for value in (10, 8))
    assert judged(condition("requests_per_s < -5 %"), [both(a, b)])


@pytest.mark.parametrize(
    "text", ["ttft_p95", "ttft_p95>5", "ttft_p95=+5%", "ttft_p95>+x%", f"ttft_p95>{'9' * 400}%"]
)
def test_a_condition_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="METRIC"):
        condition(text)


def test_a_mistyped_metric_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no metric named 'tftt_p95'") as refusal:
        condition("tftt_p95>+5%")
    assert refusal.value.hint == "ttft_p95"


def test_a_check_that_cannot_be_judged_is_an_error_not_a_pass() -> None:
    one = report([{"ttft_p95": 1.0}])
    with pytest.raises(InputError, match="can't be judged by 1 repeats"):
        judged(condition("ttft_p95>+5%"), [both(one, one)])
    with pytest.raises(InputError, match="not reported"):
        judged(condition("tpot_p50>+5%"), [both(ttft(1.0), ttft(1.0))])


# --- the command


def test_a_failed_check_ends_with_9(files: tuple[Path, Path]) -> None:
    done = compared(*files, "--fail-if", "ttft_p95>+5%")
    assert done.exit_code == 9
    assert "+20.0 %" in done.stderr
    assert "worse" in done.stdout


def test_a_check_that_held_ends_with_0(files: tuple[Path, Path]) -> None:
    assert compared(*files, "--fail-if", "ttft_p95>+25%").exit_code == 0


def test_what_a_check_could_not_rule_out_is_told(files: tuple[Path, Path]) -> None:
    done = compared(*files, "--fail-if", "ttft_p95>+20.1%")
    assert done.exit_code == 0
    assert "do not rule it out" in done.stderr


def test_a_check_may_name_a_figure_that_the_table_does_not_show(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, value in zip(paths, (1.0, 1.2), strict=True):
        save(report(around(value, "ttft_p90")), path)
    assert compared(*paths, "--fail-if", "ttft_p90>+5%").exit_code == 9


def test_json_holds_the_intervals(files: tuple[Path, Path]) -> None:
    done = json.loads(compared(*files, "--json").stdout)
    (found,) = done["comparisons"][0]["findings"]
    assert found["change"]["low"] < 0.2 < found["change"]["high"]
    assert found["verdict"] == "worse"


def test_json_says_null_where_nothing_is_known(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    save(report([{"ttft_p95": 1.0}]), path)
    found = json.loads(compared(path, path, "--json").stdout)["comparisons"][0]["findings"][0]
    assert found["change"]["low"] is None


def test_three_reports_are_compared_with_the_first(files: tuple[Path, Path]) -> None:
    done = json.loads(compared(*files, files[0], "--json").stdout)
    assert [each["findings"][0]["verdict"] for each in done["comparisons"]] == ["worse", "no evidence"]


def test_a_file_that_is_no_report_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    done = compared(path, path)
    assert (done.exit_code, str(path) in done.stderr) == (3, True)


def test_markdown_is_a_table_whose_cells_say_nothing_of_their_own() -> None:
    text = markdown([compare(*sides({"a|b": ttft(1.0), "*c*": ttft(1.2)}))])
    assert r"**\*c\*** against **a\|b**" in text
    assert "| **worse** |" in text


def test_markdown_keeps_a_note_and_a_name_on_one_line() -> None:
    cut = ttft(1.2, cut_short="a | b\n# gone")
    text = markdown([compare(*sides({"two\nlines": ttft(1.0), "b": cut}))])
    assert "**b** against **two lines**\n" in text
    assert "\n- b was cut short (a \\| b # gone)\n" in text


def test_benchmark_text_has_a_line_for_each_repeat_and_says_which_way_is_better() -> None:
    lines = benchfmt(sides({"a": ttft(0.5), "b": ttft(0.6)})).splitlines()
    assert lines[0] == "Unit ttft-p95-sec better=lower"
    assert lines.count("run: a") == lines.count("run: b") == 1
    found = [line.split() for line in lines if line.startswith("Benchmark")]
    assert len(found) == 24
    assert found[0] == ["BenchmarkText/concurrency=1", "1", "0.495", "ttft-p95-sec"]


def test_a_sweep_is_compared_load_by_load() -> None:
    loads = {Load(n): around(float(n), "ttft_p95") for n in (1, 2)}
    slow = {Load(1): around(1.0, "ttft_p95"), Load(2): around(3.0, "ttft_p95")}
    found = both(report(loads), report(slow)).findings
    assert [(each.load, each.verdict) for each in found] == [
        ("concurrency=1", "no evidence"),
        ("concurrency=2", "worse"),
    ]
