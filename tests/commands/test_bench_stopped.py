"""`ghostvis bench` that does not come to its end: what was measured until then is kept, and is called a part."""

import signal
from functools import partial
from pathlib import Path

import pytest

from ghostvis_cli.bench import schema
from ghostvis_cli.engines.fake import FakeEngine
from tests.commands import processes
from tests.engines.serving import Recorder, eventually, running

bench = partial(processes.running, "bench")
ASKED = (
    "--concurrency",
    "1",
    "--output-len",
    "2",
    "--prompt-len",
    "4",
    "--warm-up",
    "0",
    "--output",
    "r.json",
)


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_signal_leaves_a_report_of_what_was_measured(
    tmp_path: Path, number: signal.Signals, code: int, name: str
) -> None:
    engine = Recorder()
    args = (*ASKED, "--duration", "600", "--repeat", "2")
    with running(engine) as server, bench("--base-url", server.url, *args, cwd=tmp_path) as process:
        eventually(lambda: len(engine.requests) > 10)
        ended = process.send(number)
    assert ended.code == code, ended.err
    report = schema.read(tmp_path / "r.json")
    assert report.cut_short == name
    assert report.notes[0] == f"CUT SHORT ({name}): 0 of 2 runs came to their end"
    assert (report.runs[0].figures["requests"] or 0) > 5
    assert "CUT SHORT" in ended.err
    assert "time to first token" in ended.err


def test_a_deadline_leaves_a_report_and_its_own_code(tmp_path: Path) -> None:
    args = (*ASKED, "--duration", "600", "--timeout", "5")
    with running(FakeEngine()) as server, bench("--base-url", server.url, *args, cwd=tmp_path) as process:
        ended = process.end()
    assert ended.code == 124, ended.err
    assert "not done after 5 s" in ended.err
    assert schema.read(tmp_path / "r.json").cut_short == "--timeout"


def test_a_signal_before_anything_was_measured_leaves_an_older_report_alone(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("older")
    engine = Recorder()
    with running(engine) as server:
        asked = len(engine.requests)
        engine.delay_s = 600
        with bench("--base-url", server.url, *ASKED, cwd=tmp_path) as process:
            eventually(lambda: len(engine.requests) > asked)
            ended = process.send(signal.SIGTERM)
    assert ended.code == 143, ended.err
    assert (tmp_path / "r.json").read_text() == "older"


def test_a_proof_is_made_of_the_pairs_that_were_measured(tmp_path: Path) -> None:
    engine = Recorder()
    args = ("prefix", "--pairs", "10000", "--text", "5", "--output", "r.json")
    with running(engine) as server, bench(*args, "--base-url", server.url, cwd=tmp_path) as process:
        eventually(lambda: len(engine.requests) > 40)
        ended = process.send(signal.SIGTERM)
    assert ended.code == 143, ended.err
    assert "tokens reused" in ended.err
    report = schema.read(tmp_path / "r.json")
    assert report.cut_short == "SIGTERM"
    assert 6 <= len(report.extra["prefix"]["pairs"]) < 10000
