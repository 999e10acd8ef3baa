"""`ghostvis bench` that does not come to its end: what was measured until then is kept, and is called a part."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ghostvis_cli.bench import schema
from ghostvis_cli.engines.fake import FakeEngine
from tests.engines.serving import PATIENCE_S, Recorder, eventually, running

GHOSTVIS = Path(sys.executable).with_name("ghostvis")
ASKED = ("--concurrency", "1", "--output-len", "2", "--prompt-len", "4", "--warm-up", "0")


def bench(folder: Path, *args: str) -> "subprocess.Popen[str]":
    pipe: Any = subprocess.PIPE
    return subprocess.Popen([GHOSTVIS, "bench", *args], cwd=folder, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_signal_leaves_a_report_of_what_was_measured(
    tmp_path: Path, number: int, code: int, name: str
) -> None:
    engine = Recorder()
    with running(engine) as server:
        args = ("--base-url", server.url, *ASKED, "--duration", "600", "--repeat", "2", "--output", "r.json")
        with bench(tmp_path, *args) as process:
            eventually(lambda: len(engine.requests) > 10)
            process.send_signal(number)
            _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, told
    report = schema.read(tmp_path / "r.json")
    assert report.cut_short == name
    assert report.notes[0] == f"CUT SHORT ({name}): 0 of 2 runs came to their end"
    assert (report.runs[0].figures["requests"] or 0) > 5
    assert "CUT SHORT" in told
    assert "time to first token" in told


def test_a_deadline_leaves_a_report_and_its_own_code(tmp_path: Path) -> None:
    with running(FakeEngine()) as server:
        args = ("--base-url", server.url, *ASKED, "--duration", "600", "--timeout", "5", "--output", "r.json")
        with bench(tmp_path, *args) as process:
            _, told = process.communicate(timeout=3 * PATIENCE_S)
    assert process.returncode == 124, told
    assert "not done after 5 s" in told
    assert schema.read(tmp_path / "r.json").cut_short == "--timeout"


def test_a_signal_before_anything_was_measured_leaves_an_older_report_alone(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("older")
    engine = Recorder()
    with running(engine) as server:
        asked = len(engine.requests)
        engine.delay_s = 600
        args = ("--base-url", server.url, *ASKED, "--output", "r.json")
        with bench(tmp_path, *args) as process:
            eventually(lambda: len(engine.requests) > asked)
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143, told
    assert (tmp_path / "r.json").read_text() == "older"


def test_a_proof_is_made_of_the_pairs_that_were_measured(tmp_path: Path) -> None:
    engine = Recorder()
    with running(engine) as server:
        args = ("prefix", "--base-url", server.url, "--pairs", "10000", "--text", "5", "--output", "r.json")
        with bench(tmp_path, *args) as process:
            eventually(lambda: len(engine.requests) > 40)
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143, told
    assert "tokens reused" in told
    report = schema.read(tmp_path / "r.json")
    assert report.cut_short == "SIGTERM"
    assert 6 <= len(report.extra["prefix"]["pairs"]) < 10000
