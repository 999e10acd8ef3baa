"""The report as a picture: drawn by the real Chromium, and what happens where that is missing, fails or hangs."""

import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ghostvis_cli.bench import schema
from ghostvis_cli.bench.files import check_place_to_measure, save_measured
from ghostvis_cli.bench.html import page
from ghostvis_cli.bench.png import HIGHEST, SCALE, VARIABLE, WIDTH, browser, picture
from ghostvis_cli.bench.schema import Load, Report
from ghostvis_cli.cli.app import build
from ghostvis_cli.errors import EngineError, ExitCode, OutputError, UsageError
from tests.bench.reports import around, report
from tests.bench.test_html import FIGURES, proof, sweep

PAPER = (252, 252, 250)
BLUE, ORANGE = (37, 99, 201), (194, 87, 12)  # the first two series, in light colours
# Holds a pipe open, as do its children, until all of them are gone.
# Up once it was asked something: a Ctrl-C before leaves a browser to its pipes, which end.
HANGS = 'exec 9>"$PIPE"; head -c 1 <&3 >/dev/null; sleep 600 & echo up >&9; sleep 600'
BROKEN = 'echo "browser: error while loading shared libraries: libnss3.so" >&2; exit 127'

Program = Callable[[str], Path]


@pytest.fixture
def chromium() -> str:
    try:
        return browser()
    except EngineError:
        pytest.skip("no Chromium here: apt-get install chromium")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """A script that is the browser from now on."""

    def made(script: str) -> Path:
        path = tmp_path / "bin/browser"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv(VARIABLE, str(path))
        return path

    return made


def pixels(png: bytes) -> tuple[int, int, set[Any]]:
    """Width, height and every colour."""
    from PIL import Image

    drawn = Image.open(io.BytesIO(png)).convert("RGB")
    return *drawn.size, {colour for _, colour in drawn.getcolors(1 << 24) or []}


# --- drawn


@pytest.mark.parametrize("made", [sweep, proof])
def test_a_picture_holds_the_whole_page_and_nothing_below_it(
    chromium: str, made: Callable[[], Report]
) -> None:
    from PIL import Image, ImageChops

    png = picture(page(made()))
    width, height, colours = pixels(png)
    assert width == WIDTH * SCALE
    assert {PAPER, BLUE, ORANGE} <= colours
    drawn = Image.open(io.BytesIO(png)).convert("RGB")
    box = ImageChops.difference(drawn, Image.new("RGB", drawn.size, PAPER)).getbbox()
    # Below the last line lies the page's own margin, 64 of its pixels, and less than a line.
    assert box is not None and 64 * SCALE <= height - box[3] < 84 * SCALE


def test_a_picture_is_light_on_a_dark_desktop(chromium: str, program: Program) -> None:
    light = picture(page(sweep()))
    program(f'exec "{chromium}" --force-dark-mode "$@"')
    assert picture(page(sweep())) == light


def test_what_is_folded_is_open_in_a_picture(chromium: str) -> None:
    made = replace(report([FIGURES]), notes=tuple("abcdefgh"))
    unfolded, folded = page(made), page(made).replace("details", "section")
    assert pixels(picture(unfolded))[1] == pytest.approx(pixels(picture(folded))[1], rel=0.05)
    assert pixels(picture(unfolded))[1] > pixels(picture(page(report([{}]))))[1]


def test_so_many_load_points_that_they_do_not_fit_stay_folded_and_sharp(chromium: str) -> None:
    loads = {Load(n): [FIGURES] * 3 for n in range(1, 41)}
    width, height, _ = pixels(picture(page(report(loads))))
    assert (width, height <= HIGHEST) == (WIDTH * SCALE, True)


def test_a_page_beyond_what_a_browser_draws_is_made_smaller(chromium: str) -> None:
    width, height, colours = pixels(picture('<div style="height:40000px;background:#2563c9">'))
    assert width == pytest.approx(WIDTH * HIGHEST / 40_000, rel=0.01)
    assert colours >= {BLUE}
    assert height == pytest.approx(HIGHEST, abs=2)  # whole pixels


def test_the_command_makes_a_picture_of_a_report(chromium: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(schema.to_text(report(around(0.5, "ttft_p50"))))
    words = ["bench", "report", str(tmp_path / "r.json"), "--output", str(tmp_path / "r.png")]
    done = CliRunner().invoke(build(), words, prog_name="ghostvis")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["r.json", "r.png"]


def test_a_browser_leaves_nothing_behind(
    chromium: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:  # short: Chromium makes a socket in it
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.setattr("tempfile.tempdir", None)
        save_measured(sweep(), tmp_path / "r.png", print)
        assert not [*Path(temporary).iterdir()]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["home", "r.png"]
    assert not [*home.iterdir()]


# --- not drawn


def test_a_browser_is_found_by_any_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chrome = tmp_path / "google-chrome"
    chrome.write_text("#!/bin/sh\n")
    chrome.chmod(0o755)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert browser() == str(chrome)


@pytest.mark.parametrize("command", [["bench"], ["bench", "prefix"]])
def test_without_a_browser_nothing_is_measured(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "nowhere")
    words = [*command, "--source", "demo", "--output", str(tmp_path / "r.png")]
    done = CliRunner().invoke(build(), words, prog_name="ghostvis")
    assert done.exit_code == ExitCode.ENGINE
    assert "names no program: nowhere\nhint: --output report.html" in done.stderr
    assert "answered" not in done.stderr and not [*tmp_path.iterdir()]


def test_a_browser_that_fails_after_the_measuring_takes_no_figure_along(
    tmp_path: Path, program: Program
) -> None:
    program(BROKEN)
    place = tmp_path / "r.png"
    words = ["bench", "--source", "demo", "--num-prompts", "2", "--output-len", "2", "--warm-up", "0"]
    done = CliRunner().invoke(
        build(), [*words, "--repeat", "1", "--output", str(place)], prog_name="ghostvis"
    )
    assert done.exit_code == ExitCode.ENGINE
    assert "2 requests answered" in done.stderr
    assert "libnss3.so; the report is in" in done.stderr
    assert f"hint: ghostvis bench report {place}.json --output {place}" in done.stderr
    assert len(schema.read(tmp_path / "r.png.json").runs[0].records) == 2
    assert not place.exists()


@pytest.mark.parametrize("answer", ["[1]", "<html>", r'{"id": 1}', r'{"id": 1, "result": null}'])
def test_a_program_that_is_no_browser_and_answers_is_an_error_with_a_next_step(
    answer: str, program: Program
) -> None:
    program(f"printf '%s\\000' '{answer}' >&4; sleep 600")
    with pytest.raises(EngineError, match="does not answer as Chromium does") as failure:
        picture("")
    assert "--output report.html" in str(failure.value.hint)


def test_a_folder_where_the_report_would_lie_beside_is_told_before_the_measuring(
    tmp_path: Path, program: Program
) -> None:
    program("")
    (tmp_path / "r.png.json").mkdir()
    with pytest.raises(UsageError, match=r"r\.png\.json: that is a folder"):
        check_place_to_measure(tmp_path / "r.png")


def test_a_report_that_a_failed_browser_left_is_not_measured_over(tmp_path: Path, program: Program) -> None:
    program(BROKEN)
    with pytest.raises(EngineError, match="the report is in"):
        save_measured(sweep(), tmp_path / "r.png", print)
    with pytest.raises(UsageError, match=r"r\.png\.json holds an earlier report"):
        check_place_to_measure(tmp_path / "r.png")


def test_a_picture_cut_short_says_where_the_report_is(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(html: str) -> bytes:
        raise KeyboardInterrupt

    program("")
    monkeypatch.setattr("ghostvis_cli.bench.png.picture", interrupted)
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        save_measured(sweep(), tmp_path / "r.png", told.append)
    assert told == [f"the report is in {tmp_path / 'r.png.json'}"]
    assert (tmp_path / "r.png.json").read_text() == schema.to_text(sweep())


def test_an_older_picture_stays_whole_where_a_browser_fails(tmp_path: Path, program: Program) -> None:
    program(BROKEN)
    (tmp_path / "r.png").write_bytes(b"older")
    with pytest.raises(EngineError, match="libnss3"):
        save_measured(sweep(), tmp_path / "r.png", print)
    assert (tmp_path / "r.png").read_bytes() == b"older"


def test_a_browser_that_hangs_is_ended_with_all_its_processes(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setenv("PIPE", str(pipe))
    program(HANGS)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(end, True)
    with os.fdopen(end) as held:
        with pytest.raises(EngineError, match=r"did not draw the page within 1 s"):
            picture(page(sweep()) * 20, limit_s=1)  # more than a pipe holds
        assert held.read() == "up\n"  # to its end: nobody has it open


def test_ctrl_c_ends_the_browser_with_all_its_processes(tmp_path: Path, program: Program) -> None:
    pipe, temporary = tmp_path / "pipe", tmp_path / "tmp"
    os.mkfifo(pipe)
    temporary.mkdir()
    env = os.environ | {"PIPE": str(pipe), "TMPDIR": str(temporary), VARIABLE: str(program(HANGS))}
    code = "from ghostvis_cli.bench.png import picture; picture('')"
    with subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True) as ours:
        with pipe.open() as held:
            assert held.readline() == "up\n"
            ours.send_signal(signal.SIGINT)
            assert held.read() == ""
        assert "KeyboardInterrupt" in ours.communicate()[1]
    assert not [*temporary.iterdir()]


def test_no_room_for_the_browser_is_an_error_with_a_next_step(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(BROKEN)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(OutputError, match="gone"):
        picture("")
