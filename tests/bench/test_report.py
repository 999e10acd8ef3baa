"""Reports on a terminal, as CSV and as files."""

import csv
import io
import json
import os
import resource
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ghostvis_cli.bench import schema
from ghostvis_cli.bench.files import check_place, save
from ghostvis_cli.bench.report import csv_text, lines, sparkline
from ghostvis_cli.bench.schema import Load
from ghostvis_cli.bench.units import digits, percent, seconds, shown, tick, title
from ghostvis_cli.errors import ExitCode, OutputError, UsageError
from tests.bench.reports import CARD, around, report
from tests.cli import invoke
from tests.commands.processes import GHOSTVIS
from tests.limits import limited

reported = partial(invoke, "bench", "report")
FIGURES = {"ttft_p50": 0.05, "requests_per_s": 12.5, "requests": 8.0, "cache_hit_rate": None}


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (96.0, ["96 of 120 output tokens were reasoning"]),
        (None, ["some of 120 output tokens were reasoning"]),
        (0.0, []),
    ],
)
def test_a_report_says_how_much_of_the_output_was_reasoning(figure: float | None, said: list[str]) -> None:
    made = report([{"requests": 12.0, "output_tokens": 120.0, "reasoning_tokens": figure}])
    told = [line for line in lines(made) if "reasoning" in line]
    assert told == [f"local at concurrency=1: {each}" for each in said]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (2.5e-5, "25.0 us"), (0.0123, "12.3 ms"), (1.0, "1.00 s"), (123.4, "123 s")],
)
def test_times_have_three_digits_and_a_unit_that_fits(value: float, text: str) -> None:
    assert seconds(value) == text


def test_figures_are_shown_in_their_units() -> None:
    assert shown("requests_per_s", 1234.5) == "1,234/s"
    assert shown("cache_hit_rate", 0.425) == "42.5 %"
    assert shown("peak_memory_bytes", 3_276_800) == "3.28 MB"
    assert shown("ttft_p95", None) == "not reported"
    assert (percent(0.0523), percent(-0.2), digits(1e6), tick(1.5), tick(2.0)) == (
        "+5.2 %", "-20.0 %", "1,000,000", "1.5 s", "2 s",
    )  # fmt: skip


def test_titles_name_the_statistic() -> None:
    assert title("ttft_p95") == "time to first token, p95"
    assert title("requests_per_s") == "requests"


def test_a_sparkline_goes_from_the_least_to_the_greatest() -> None:
    assert sparkline([1, 2, 8]) == "▁▂█"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([]) == ""


def test_the_table_tells_of_every_load_point_and_every_failure() -> None:
    loads = {Load(n): [FIGURES] * 3 for n in (1, 4)}
    text = "\n".join(lines(report(loads, failures={"timeout": 2}, notes=("beware",))))
    assert "local at concurrency=1: 3 runs, 24 requests answered, 6 failed (timeout)" in text
    assert "local at concurrency=4" in text
    assert text.endswith("note: beware")


def test_what_was_not_reported_has_no_row() -> None:
    text = "\n".join(lines(report([FIGURES])))
    assert "share of input tokens cached" not in text
    assert "time to first token" in text


def test_csv_has_a_row_for_each_run_and_nothing_where_nothing_was_reported() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(report([FIGURES, FIGURES])))))
    assert [row["repeat"] for row in rows] == ["0", "1"]
    assert (rows[0]["ttft_p50"], rows[0]["cache_hit_rate"]) == ("0.05", "")


def test_json_reads_back_as_it_was(tmp_path: Path) -> None:
    written = report(around(0.5, "ttft_p50"))
    save(written, tmp_path / "r.json")
    # Times keep microseconds.
    again = schema.read(tmp_path / "r.json")
    assert again.runs[3].figures["ttft_p50"] == pytest.approx(written.runs[3].figures["ttft_p50"], abs=1e-6)
    assert replace(again, runs=(), summaries=()) == replace(written, runs=(), summaries=())


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.json, \.csv, \.html or \.svg"):
        save(report([FIGURES]), tmp_path / "report.pdf")


@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("no/r.csv", "mkdir -p {}/no"),
        ("folder.json", "--output {}/folder.json/report.json"),
        ("folder", "--output {}/folder/report.json"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_with_what_helps(
    tmp_path: Path, place: str, hint: str
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=place) as refused:
        check_place(tmp_path / place)
    assert refused.value.hint == hint.format(tmp_path)


@pytest.mark.parametrize("name", ["r.json", "pipe"])
def test_a_fifo_gets_the_report_and_stays(tmp_path: Path, name: str) -> None:
    """Without an ending of its own it gets JSON."""
    os.mkfifo(tmp_path / name)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit((tmp_path / name).read_text)
        save(report([FIGURES]), tmp_path / name)
        assert json.loads(reading.result(60))["runs"] and (tmp_path / name).is_fifo()


def test_a_link_stays_and_the_report_is_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "r.csv").symlink_to("in/report")
    save(report([FIGURES]), tmp_path / "r.csv")
    assert (tmp_path / "r.csv").is_symlink()
    assert (tmp_path / "in" / "report").read_text() == csv_text(report([FIGURES]))


def test_a_link_into_no_folder_is_refused_before(tmp_path: Path) -> None:
    (tmp_path / "r.csv").symlink_to("no/r.csv")
    with pytest.raises(UsageError, match="can't be written"):
        check_place(tmp_path / "r.csv")


def test_the_command_makes_a_report_for_stdout_by_its_name(tmp_path: Path) -> None:
    save(report([FIGURES]), tmp_path / "r.json")
    command = [GHOSTVIS, "bench", "report", str(tmp_path / "r.json"), "--output", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout)["runs"], done.stderr


def test_an_ending_in_capitals_is_the_same_kind(tmp_path: Path) -> None:
    save(report([FIGURES]), tmp_path / "R.CSV")
    assert (tmp_path / "R.CSV").read_text() == csv_text(report([FIGURES]))


def test_a_name_that_would_be_too_long_while_it_is_written_is_refused_before(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the name is too long"):
        check_place(tmp_path / ("r" * 250 + ".json"))


@pytest.mark.parametrize("ending", ["json", "csv", "html"])
def test_half_a_character_in_a_command_costs_no_report(ending: str, tmp_path: Path) -> None:
    made = report(around(1.0, "ttft_p50"), card=replace(CARD, name="r\udcff"))
    save(made, tmp_path / f"r.{ending}")
    assert rb"r\udcff" in (tmp_path / f"r.{ending}").read_bytes()
    if ending == "json":
        assert schema.read(tmp_path / "r.json").runs[0].engine == "r\udcff"


def test_a_full_disk_leaves_the_older_report_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    save(report([FIGURES]), path)
    before = path.read_bytes()
    unwritten = pytest.raises(OutputError, match="can't be written")
    with limited(resource.RLIMIT_FSIZE, 100), unwritten as failure:
        save(report([FIGURES, FIGURES]), path)
    assert [each.name for each in tmp_path.iterdir()] == ["r.json"]
    assert path.read_bytes() == before
    assert failure.value.hint == "--output ELSEWHERE/r.json"


@pytest.mark.parametrize("content", [None, b"\x89PNG", b"[1]"])
def test_what_is_no_report_is_told_with_how_to_make_one(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "r.json").write_bytes(content)
    done = reported(tmp_path / "r.json")
    assert (done.exit_code, "hint: ghostvis bench --output report.json" in done.stderr) == (3, True)


def test_the_command_shows_a_report_again(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    save(report([FIGURES]), path)
    done = reported(path)
    assert (done.exit_code, "12.5/s" in done.stdout) == (0, True)


def test_the_command_makes_a_page_of_it(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    save(report([FIGURES]), path)
    assert reported(path, "--output", tmp_path / "r.html").exit_code == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("engines",), [], "report.engines is empty"),
        (("engines", 0, "name"), "another", "has no 'local'"),
        (("runs", 0, "duration_s"), 10**400, "no number of a measurement"),
        (("runs", 0, "figures", "ttft_p50"), float("nan"), "no number of a measurement"),
        (("runs", 0, "figures", "ttft_p50"), 1e-300, "no number of a measurement"),
        (("summaries", 0, "figures"), {"speed": None}, "no figure is called 'speed'"),
        (("extra",), {"prefix": {"pairs": []}}, "report.extra.prefix is not whole"),
        (("extra",), {"prefix": "x"}, "report.extra.prefix is not an object"),
    ],
)
@pytest.mark.parametrize("kind", ["terminal", "html"])
def test_a_report_that_cannot_be_ours_is_refused_by_what_is_wrong_with_it(
    tmp_path: Path, kind: str, path: tuple[Any, ...], value: object, said: str
) -> None:
    document = schema.to_json(report([FIGURES]))
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "r.json").write_text(json.dumps(document))
    done = reported(tmp_path / "r.json", *(("--output", tmp_path / "r.html") if kind == "html" else ()))
    assert (done.exit_code, said in done.stderr) == (3, True), done.stderr


def test_a_run_without_a_success_has_no_empty_table_and_says_nothing_of_caches() -> None:
    text = "\n".join(lines(report([{"requests": 0.0, "failed": 3.0}], failures={"engine": 3})))
    assert text == "local at concurrency=1: 1 run, 0 requests answered, 3 failed (engine)"


def test_a_report_without_a_run_is_not_shown_as_nothing(tmp_path: Path) -> None:
    save(replace(report([FIGURES]), runs=(), summaries=()), tmp_path / "r.json")
    done = reported(tmp_path / "r.json")
    assert (done.exit_code, done.stdout) == (ExitCode.INPUT, "")
    assert "nothing was measured in this report" in done.stderr


def test_charts_alone_are_one_drawing_that_needs_nothing_else(tmp_path: Path) -> None:
    save(report([FIGURES]), tmp_path / "r.svg")
    drawing = ElementTree.parse(tmp_path / "r.svg").getroot()
    assert drawing.tag.endswith("}svg")
    told = [element.text or "" for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert any("at least as fast" in text for text in told)
    height = int(drawing.attrib["viewBox"].split()[3])
    places = [
        float(element.attrib["transform"].split()[1].rstrip(")"))
        for element in drawing
        if element.attrib.get("transform", "").startswith("translate(16 ")
    ]
    assert places and sorted(places) == places and places[-1] < height
    assert "http" not in (tmp_path / "r.svg").read_text().replace("http://www.w3.org/2000/svg", "")
