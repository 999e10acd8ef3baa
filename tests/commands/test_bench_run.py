"""`ghostvis bench` on the demo model and on real servers, as it is typed."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ghostvis_cli import create_sglang_engine
from ghostvis_cli.bench import schema
from ghostvis_cli.bench.job import Job, engine_profiles
from ghostvis_cli.bench.stats import REPEATS
from ghostvis_cli.engines.factory import make_engine
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.errors import ExitCode
from ghostvis_cli.profile import Profile, resolve
from ghostvis_cli.profile.settings import EngineSettings
from ghostvis_cli.serve.settings import Served
from tests.cli import invoke
from tests.engines.serving import PATIENCE_S, BreaksLater, Recorder, running

pytestmark = pytest.mark.usefixtures("here")
run = partial(invoke, "bench")
SMALL = ("--output-len", "4", "--prompt-len", "8", "--warm-up", "1")
DEMO = ("--source", "demo", *SMALL)


def reported(*args: str) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_seeds_spellings_run_bare_and_as_bench_run() -> None:
    for command in ((), ("run",)):
        result = run(*command, "--num-prompts", "3", *DEMO)
        assert (result.exit_code, result.stdout) == (0, ""), result.stderr
        assert "3 requests answered" in result.stderr
        assert "--ignore-eos" in result.stderr


def test_with_vision_every_prompt_has_an_image() -> None:
    report = reported("--num-prompts", "3", "--with-vision", *DEMO)
    figures = report["runs"][0]["figures"]
    assert figures["image_tokens"] == figures["image_tokens_computed"] == 3 * 64
    assert report["workload"]["images"] == 3


def test_ten_questions_to_an_image_compute_it_once() -> None:
    report = reported("--images", "2", "--questions", "5", "--concurrency", "1", *DEMO)
    figures = report["runs"][0]["figures"]
    assert (figures["image_tokens"], figures["image_tokens_computed"]) == (10 * 64, 2 * 64)


def test_answers_are_as_long_as_asked_for_unless_the_model_may_stop() -> None:
    long = reported("--num-prompts", "4", *DEMO)["runs"][0]
    assert long["figures"]["output_tokens"] == 4 * 4
    natural = reported("--num-prompts", "4", *DEMO, "--natural-stops", "--details", "--output-len", "64")[
        "runs"
    ][0]
    assert {each["finish_reason"] for each in natural["records"]} & {"stop"}


def test_a_report_holds_its_manifest_and_only_with_details_every_request(tmp_path: Path) -> None:
    plain = reported("--num-prompts", "3", *DEMO)
    assert plain["runs"][0]["records"] == []
    assert plain["manifest"]["command"].startswith("ghostvis")
    assert plain["manifest"]["versions"]["torch"]
    (card,) = plain["engines"]
    assert len(card["model_hash"]) == len(card["profile_hash"]) == 64
    result = run("--num-prompts", "3", *DEMO, "--details", "--repeat", "1", "--output", "report.json")
    assert result.exit_code == 0, result.stderr
    report = schema.read(tmp_path / "report.json")
    assert len(report.runs[0].records) == 3
    assert report.workload.sha256 == plain["workload"]["sha256"]


def test_a_sweep_with_repeats_is_a_run_of_each() -> None:
    report = reported("--num-prompts", "2", *DEMO, "--sweep", "concurrency=1,2,1", "--repeat", "2")
    assert [(each["load"]["concurrency"], each["repeat"]) for each in report["runs"]] == [
        (1, 0), (1, 1), (2, 0), (2, 1)
    ]  # fmt: skip
    assert [each["figures"]["ttft_p50"]["repeats"] for each in report["summaries"]] == [2, 2]


def test_a_report_to_be_compared_has_repeats_enough_to_tell_chance(tmp_path: Path) -> None:
    with running(FakeEngine()) as server:
        assert (
            run("--num-prompts", "2", *SMALL, "--base-url", server.url, "--output", "report.json").exit_code
            == 0
        )
    assert len(schema.read(tmp_path / "report.json").runs) == REPEATS


def test_a_server_is_measured_beside_the_local_engine() -> None:
    engine = Recorder()
    with running(engine) as server:
        report = reported(
            "--num-prompts",
            "3",
            *DEMO,
            "--engines",
            "local,remote",
            "--base-url",
            server.url,
            "--engine",
            "local",
        )
    assert [each["engine"] for each in report["runs"]] == ["local", "remote"]
    assert {each["base"] for each in report["extra"]["ratios"]} == {"local"}
    asked = engine.requests[1:]  # the server asks its engine once before it says that it is ready
    assert len(asked) == 3 + 1
    assert {(each.sampling.ignore_eos, each.sampling.temperature) for each in asked} == {(True, 0)}


@pytest.mark.parametrize("address", ["nonsense", "http://", "ftp://there", "http://me:pa55@there"])
def test_an_address_that_is_none_is_refused_by_the_name_of_its_option(address: str) -> None:
    result = run("--num-prompts", "1", *SMALL, "--against", address)
    assert (result.exit_code, result.stdout) == (ExitCode.USAGE, "")
    assert "error: --against: base_url " in result.stderr
    assert "hint: --against http://localhost:8000" in result.stderr
    assert "pa55" not in result.stderr


@pytest.mark.parametrize("option", ["--num-prompts", "--images", "--questions", "--warm-up"])
def test_more_than_memory_holds_is_refused_before_it_is_drawn(option: str) -> None:
    result = run(*DEMO, option, "1000001")
    assert (result.exit_code, option in result.stderr) == (ExitCode.USAGE, True)


def test_against_measures_any_server_and_names_it_by_its_address() -> None:
    with running(FakeEngine()) as server:
        report = reported("--num-prompts", "3", *SMALL, "--against", server.url)
    assert [each["engine"] for each in report["runs"]] == [server.url.removeprefix("http://")]


def test_a_model_that_is_not_measured_beside_a_server_is_refused() -> None:
    with running(FakeEngine()) as server:
        ask = ("--num-prompts", "1", *DEMO, "--against", server.url)
        refused = run(*ask)
        assert refused.exit_code == ExitCode.USAGE and "or --engines local" in refused.stderr
        assert run(*ask, "--engines", "local").exit_code == 0


def test_a_profiles_key_goes_to_no_other_server() -> None:
    engine = EngineSettings(base_url="http://here", api_key_env="MY_KEY", model="mine")
    found = engine_profiles(Job(against=("http://there:1",)), Profile(engine=engine))
    assert [each.engine.api_key_env for each in found.values()] == ["MY_KEY", None]
    assert found["there:1"].engine.model is None
    assert {each.engine.retries for each in found.values()} == {0}


def test_rows_of_ones_own_are_replayed(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "one two three", "max_tokens": 2}\n')
    with running(Recorder()) as server:
        report = reported("--input", "rows.jsonl", "--base-url", server.url, "--details", "--warm-up", "0")
    (record,) = report["runs"][0]["records"]
    assert (record["id"], record["completion_tokens"]) == ("a", 2)


def test_failures_give_code_8_and_a_server_that_only_fails_gives_its_own(tmp_path: Path) -> None:
    rows = [{"prompt": "one two three four", "max_tokens": tokens} for tokens in (1, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with running(BreaksLater()) as server:  # a single token comes before it breaks
        one_of_two = run("--input", "rows.jsonl", "--base-url", server.url, "--warm-up", "0")
        all_fail = run("--num-prompts", "3", *SMALL, "--base-url", server.url, "--warm-up", "0")
    assert (one_of_two.exit_code, all_fail.exit_code) == (ExitCode.PARTIAL, ExitCode.REQUEST)
    assert "1 requests answered, 1 failed (request)" in one_of_two.stderr
    assert "the model gave up" in all_fail.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--images", "3"], "--images and --questions go together"),
        (["--prompt-len", "many"], "is no length"),
        (["--slo", "fast"], "is no objective"),
        (["--sweep", "speed=1"], "no list of load points"),
        (["--output", "report.txt"], ".json, .csv, .html or .svg"),
        (["--output", "nowhere/report.json"], "no such folder"),
        (["--engines", "vllm"], "no engine is called 'vllm'"),
        (["--input", "rows.jsonl", "--with-vision"], "no place beside --input"),
        (["--num-prompts", "5", "compare", "a.json", "b.json"], "options go behind compare"),
        (["--duration", "0"], "above 0"),
        (["--duration", "nan"], "above 0"),
        (["--request-rate", "1e-300"], "--request-rate is a number above 0"),
        (["--seed", "9" * 30], "--seed"),
        (["--shared-prefix", "9" * 20], "--shared-prefix"),
        (["--ramp-up", "inf"], "--ramp-up is a number"),
        (["--prompt-len", "9" * 400], "is no length"),
        (["--output-len", "lognormal:128,1000"], "is no length"),
        (["--image-format", "gif"], "--image-format is one of"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == ExitCode.USAGE
    assert message in result.stderr
    assert "hint" in result.stderr or "--" in result.stderr


def test_the_python_api_measures_the_same_figures() -> None:
    with create_sglang_engine(source="demo") as engine:
        report = engine.benchmark(num_prompts=3, prompt_len=8, output_len=4, with_vision=True)
    figures = report.runs[0].figures
    assert (figures["requests"], figures["output_tokens"], figures["image_tokens"]) == (3, 12, 3 * 64)
    assert report.summaries[0].figures["ttft_p50"] is not None


async def demo_model() -> Served:
    return Served(await make_engine(resolve(None, flags={"model.source": "demo"}).profile), None)


def test_a_server_that_was_asked_the_same_before_is_told_of_and_how_to_ask_anew() -> None:
    with running(load=demo_model) as server:
        assert server.ready.wait(PATIENCE_S)
        ask = ("--with-vision", "--num-prompts", "4", *SMALL, "--base-url", server.url)
        assert not any("earlier measurement" in note for note in reported(*ask)["notes"])
        assert any("--seed 43 asks" in note for note in reported(*ask)["notes"])
        assert not any("earlier measurement" in note for note in reported(*ask, "--seed", "43")["notes"])


def test_rows_that_a_run_itself_asked_before_are_no_earlier_measurement() -> None:
    notes = reported("--num-prompts", "2", *DEMO, "--concurrency", "1", "--duration", "1")["notes"]
    assert not any("earlier measurement" in note for note in notes)
