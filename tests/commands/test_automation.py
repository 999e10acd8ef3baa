"""Every example of docs/automation.md, taken from the page and run."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ghostvis_cli import demo
from tests.commands.processes import GHOSTVIS, PATIENCE_S, environment, hanging, saying, scripted
from tests.conftest import DATA

PAGE = (Path(__file__).parents[2] / "docs" / "automation.md").read_text()
IMAGES = demo.BASE_DIR.parent


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """What the page calls /srv/ghostvis."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ghostvis").symlink_to(GHOSTVIS)
    shutil.copy(IMAGES / "three-shapes.jpg", tmp_path / "today.jpg")
    return tmp_path


def test_the_line_for_cron(site: Path) -> None:
    [example] = examples("crontab")
    comment, line = example.replace("/srv/ghostvis", str(site)).splitlines()
    assert comment.startswith("#")
    *when, command = line.split(" ", 5)
    assert len(when) == 5 and all(re.fullmatch(r"[\d*,/-]+", field) for field in when)
    assert "%" not in command
    home = site / "home"
    home.mkdir()
    as_cron = {"HOME": str(home), "LOGNAME": "ghostvis", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
    for runs in (1, 2):
        done = subprocess.run(
            ["/bin/sh", "-c", command], env=as_cron, input=b"", capture_output=True, cwd="/"
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")  # no mail
        records = [json.loads(record) for record in (site / "answers.jsonl").read_text().splitlines()]
        assert len(records) == runs and all(record["text"] for record in records)
    log = (site / "describe.log").read_text()
    assert log.count("started: ghostvis generate") == log.count("ended: code 0") == 2
    assert len(list((home / ".local/state/ghostvis/locks").iterdir())) == 1


def test_the_service_and_its_timer(site: Path) -> None:
    units = {}
    for example in examples("ini"):
        name = Path(example.splitlines()[0].removeprefix("# ")).name
        units[name] = site / name
        units[name].write_text(
            example.replace("/srv/ghostvis", str(site)).replace("User=ghostvis", "User=root")
        )
    service, timer = units["ghostvis-batch.service"], units["ghostvis-batch.timer"]
    if shutil.which("systemd-analyze"):
        checked = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", service, timer], capture_output=True, text=True
        )
        assert str(site) not in checked.stderr and checked.returncode == 0, checked.stderr
    parsed = configparser.RawConfigParser(strict=True)
    parsed.read([service, timer])
    assert parsed["Timer"]["OnCalendar"] and parsed["Install"]["WantedBy"] == "timers.target"
    rows = [{"id": f"row-{number}", "prompt": "Hello"} for number in range(3)]
    (site / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    unit = parsed["Service"]
    name, _, value = unit["Environment"].partition("=")
    env = {"PATH": "/usr/bin:/bin", name: value.replace("%S", str(site / "state"))}
    for _ in range(2):  # the second run finds everything done
        done = subprocess.run(
            shlex.split(unit["ExecStart"]), cwd=unit["WorkingDirectory"], env=env, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0
        answers = [json.loads(line) for line in (site / "answers.jsonl").read_text().splitlines()]
        assert sorted(answer["id"] for answer in answers) == ["row-0", "row-1", "row-2"]
    assert list((site / "state/ghostvis/locks").iterdir())


def test_the_shell_loop(site: Path) -> None:
    [script] = examples("bash")
    (site / "images").mkdir()
    (site / "descriptions").mkdir()
    shutil.copy(IMAGES / "red-circle.png", site / "images" / "1.png")
    (site / "images" / "2.png").write_text("no image")
    shutil.copy(IMAGES / "three-shapes.jpg", site / "images" / "3.jpg")
    (site / "descriptions" / "3.jpg.txt").write_text("has one")
    with scripted(hanging("Hel"), saying("A circle.")) as server:
        env = environment(GHOSTVIS_BASE_URL=server.url, TIMEOUT="2", PAUSE="0")
        run = subprocess.run(
            ["bash", "-c", script], cwd=site, env=env, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert len(server.posts) == 2  # one that did not end, and its repetition
    assert run.returncode == 0, run.stderr
    assert {file.name: file.read_text() for file in (site / "descriptions").iterdir()} == {
        "1.png.txt": "A circle.\n",
        "3.jpg.txt": "has one",
    }
    assert (site / "unusable.txt").read_text() == "images/2.png\n"
    assert run.stderr.count("ghostvis: error:") == 2


def test_the_shell_loop_stops_at_a_mistake_of_its_own(site: Path) -> None:
    [script] = examples("bash")
    (site / "images").mkdir()
    (site / "descriptions").mkdir()
    for number in (1, 2):
        shutil.copy(IMAGES / "red-circle.png", site / "images" / f"{number}.png")
    env = environment(GHOSTVIS_TEMPERATURE="warm", NANOCHAT_BASE_DIR=str(DATA / "text_swiglu"))
    run = subprocess.run(["bash", "-c", script], cwd=site, env=env, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.count("ghostvis: error:") == 1


def test_every_option_the_page_explains_exists() -> None:
    said = set(re.findall(r"--[a-z][a-z-]+", PAGE)) - {"--now"}  # systemctl's
    shown = subprocess.run(
        [GHOSTVIS, "generate", "--help"], env=os.environ, capture_output=True, text=True
    ).stdout
    assert not {option for option in said if not re.search(rf"{option}\b", shown)}
