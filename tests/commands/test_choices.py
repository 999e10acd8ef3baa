"""What was chosen, and where: flag over environment over profile, a model over the demo, nothing lost."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner, Result

from ghostvis_cli import create_sglang_engine, demo
from ghostvis_cli.cli import app, options
from ghostvis_cli.cli.registry import COMMANDS
from ghostvis_cli.errors import ModelError
from tests.commands.processes import at, saying, scripted
from tests.conftest import DATA

BASE = DATA / "text_swiglu"  # holds a checkpoint of the source base, and none of sft


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GHOSTVIS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GHOSTVIS_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("GHOSTVIS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("GHOSTVIS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)


def run(*args: str, **more: Any) -> Result:
    return CliRunner().invoke(app.build(), [*args], prog_name="ghostvis", **more)


def contexts(typed: list[str]) -> list[Any]:
    """Each command, and each of its own commands, as parsed from `typed`."""
    group: Any = typer.main.get_command(app.build())
    top = [group.get_command(None, command.name) for command in COMMANDS]
    every = [each for one in top for each in (one, *getattr(one, "commands", {}).values())]
    return [each.make_context(each.name, list(typed), resilient_parsing=True) for each in every]


# --- typed and not typed


def test_no_option_of_any_command_counts_as_typed_unless_it_was() -> None:
    parsed = contexts([])
    assert len(parsed) > 10
    assert [options.flags(ctx) for ctx in parsed] == [{}] * len(parsed)


@pytest.mark.parametrize("place", ["environment", "profile", "--set"])
@pytest.mark.parametrize("command", ["generate", "chat", "batch"])
def test_a_configured_stop_reaches_the_engine(
    command: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: tuple[str, ...] = ()
    match place:
        case "environment":
            monkeypatch.setenv("GHOSTVIS_STOP", '["a", "b"]')
        case "profile":
            Path("ghostvis.yaml").write_text("profiles: {default: {sampling: {stop: [a, b]}}}")
        case _:
            more = ("--set", 'sampling.stop=["a", "b"]')
    Path("rows.jsonl").write_text('{"id": 1, "prompt": "hi"}\n')
    words = {"generate": ["generate", "hi"], "chat": ["chat"], "batch": ["generate", "--input", "rows.jsonl"]}
    with scripted(saying("yes")) as server:
        done = run(*words[command], *at(server), *more, input="hi\n" if command == "chat" else None)
        assert done.exit_code == 0, done.output
        assert server.posts[0].json["stop"] == ["a", "b"]
        run("generate", "hi", *at(server), *more, "--stop", "typed")
        assert server.posts[-1].json["stop"] == ["typed"]


def test_the_api_keeps_a_configured_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOSTVIS_STOP", "one")
    with scripted(saying("yes")) as server, create_sglang_engine(base_url=server.url) as engine:
        engine.generate("hi")
        engine.generate("hi", stop=["two"])
        assert [post.json["stop"] for post in server.posts] == [["one"], ["two"]]


# --- the demo never stands in for a model that was chosen

RUNS = {
    "generate": ["generate", "Hi", "-q"],
    "batch": ["generate", "--input", "rows.jsonl"],
    "chat": ["chat"],
    "bench": ["bench", "--num-prompts", "1"],
    "bench prefix": ["bench", "prefix", "--pairs", "6"],
    "serve": ["serve", "--engine", "local", "--port", "0"],
    "convert": ["convert", "--dry-run"],
    "models": ["models"],
}
MISSING = {
    "NANOCHAT_BASE_DIR": ({"NANOCHAT_BASE_DIR": "/mnt/not-mounted"}, ""),
    "GHOSTVIS_BASE_DIR": ({"GHOSTVIS_BASE_DIR": "/mnt/not-mounted"}, ""),
    "profile": ({}, "profiles: {default: {model: {base_dir: not-mounted}}}"),
}


@pytest.mark.parametrize("chosen", MISSING)
@pytest.mark.parametrize("command", RUNS)
def test_a_base_directory_that_was_chosen_and_is_not_there_is_code_4(
    command: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, profile = MISSING[chosen]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if profile:
        Path("ghostvis.yaml").write_text(profile)
    Path("rows.jsonl").write_text('{"id": 1, "prompt": "hi"}\n')
    done = run(*RUNS[command], input="hi\n" if command == "chat" else None)
    assert done.exit_code == 4, done.output
    assert "not-mounted" in done.stderr and "demo model" not in done.stderr


def test_doctor_fails_where_the_chosen_base_directory_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "/mnt/not-mounted")
    done = run("doctor", "--no-run")
    assert done.exit_code == 9
    assert "FAIL  checkpoints  chosen" in done.stdout and "demo model answers" not in done.stdout


@pytest.mark.parametrize(
    ("name", "value"), [("MODEL_TAG", "d32"), ("STEP", "5"), ("SOURCE", "rl"), ("TOKENIZER_PATH", "t.pkl")]
)
def test_whatever_was_chosen_of_a_model_keeps_the_demo_away(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"GHOSTVIS_{name}", value)
    assert run("generate", "Hi").exit_code == 4


def test_a_base_directory_with_other_sources_lists_them_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home/.cache").mkdir(parents=True)
    (tmp_path / "home/.cache/nanochat").symlink_to(BASE)
    done = run("generate", "Hi")
    assert (done.exit_code, done.stdout) == (4, "")
    assert "--source base --model-tag d4" in done.stderr
    with pytest.raises(ModelError, match="no sft checkpoint"):
        create_sglang_engine()


@pytest.mark.parametrize("kind", ["empty", "a link that leads nowhere"])
def test_the_usual_base_directory_is_not_replaced_by_the_demo(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "home/.cache/nanochat"
    base.parent.mkdir(parents=True)
    base.mkdir() if kind == "empty" else base.symlink_to("/mnt/not-mounted")
    done = run("generate", "Hi", "-q")
    assert (done.exit_code, done.stdout) == (4, "")
    assert "--source demo" in done.stderr


@pytest.mark.parametrize(
    "how",
    [
        [],
        ["--source", "demo"],
        ["-p", "demo"],
        ["--checkpoint-path", str(next(demo.BASE_DIR.rglob("model_*.pt")))],
    ],
)
def test_records_call_the_demo_by_its_name(how: list[str]) -> None:
    done = run("generate", "Hi", "--json", "--max-tokens", "1", *how)
    assert json.loads(done.stdout)["model"]["source"] == "demo"
    assert ("the built-in demo model answers" in done.stderr) == (not how)


def test_a_converted_demo_is_known_as_the_demo(tmp_path: Path) -> None:
    done = run("convert", "--source", "demo", "--out", "out", "--no-verify", "--json")
    assert json.loads(done.stdout)["parity"]["source"]["source"] == "demo"


# --- models


def test_models_lists_what_the_profile_and_the_environment_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOSTVIS_BASE_DIR", str(BASE))
    assert [each["source"] for each in json.loads(run("models", "--json").stdout)["models"]] == [
        "base",
        "demo",
    ]
