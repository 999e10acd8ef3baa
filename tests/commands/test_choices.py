"""What was chosen, and where: flag over environment over profile, a model over the demo, nothing lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ghostvis_cli import create_sglang_engine, demo
from ghostvis_cli.cli import app, options
from ghostvis_cli.cli.registry import COMMANDS
from ghostvis_cli.errors import ModelError, UsageError
from ghostvis_cli.profile import resolve
from ghostvis_cli.profile.readers import READ_BY
from ghostvis_cli.profile.settings import keys
from tests.cli import invoke as run
from tests.commands.processes import at, saying, scripted
from tests.conftest import DATA

pytestmark = pytest.mark.usefixtures("here")
BASE = DATA / "text_swiglu"  # holds a checkpoint of the source base, and none of sft


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


# --- what the chosen engine does not read


def test_the_table_of_readers_has_every_setting() -> None:
    assert set(READ_BY) == set(keys())


NOT_READ = {
    "local, memory of a GPU": ["generate", "hi", "--engine", "local", "--gpu-memory-utilization", "0.5"],
    "local, ranks": ["generate", "hi", "--tensor-parallel-size", "2"],
    "chat": ["chat", "--set", "engine.context_length=512"],
    "batch": ["generate", "--input", "rows.jsonl", "--set", "engine.attention_backend=fa3"],
    "bench": ["bench", "--tensor-parallel-size", "2"],
    "bench prefix": ["bench", "prefix", "--base-url", "http://127.0.0.1:9", "--dtype", "float32"],
    "bench, only a server": ["bench", "--against", "http://127.0.0.1:9", "--source", "sft"],
    "serve": ["serve", "--engine", "local", "--data-parallel-size", "2"],
    "serve, as a client": ["serve", "--engine", "local", "--set", "engine.retries=9"],
    "remote, source": ["generate", "hi", "--base-url", "http://127.0.0.1:9", "--source", "sft"],
    "remote, layout": ["generate", "hi", "--base-url", "http://127.0.0.1:9", "--layout", "inline"],
    "remote, device": ["generate", "hi", "--base-url", "http://127.0.0.1:9", "--device", "cpu"],
    "both typed": ["generate", "hi", "--engine", "local", "--base-url", "http://127.0.0.1:9"],
}


@pytest.mark.parametrize("case", NOT_READ)
def test_a_typed_option_that_the_engine_does_not_read_is_a_usage_error_with_a_hint(case: str) -> None:
    Path("rows.jsonl").write_text('{"id": 1, "prompt": "hi"}\n')
    done = run(*NOT_READ[case], input="")
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    *_, error, hint = done.stderr.splitlines()
    assert "not read" in error and hint.startswith("hint: leave out -")


@pytest.mark.parametrize(
    ("variable", "args"),
    [
        ("GHOSTVIS_LAYOUT=inline", ["generate", "hi", "--base-url", "http://127.0.0.1:9"]),
        ("GHOSTVIS_CONTEXT_LENGTH=512", ["generate", "hi"]),
        ("GHOSTVIS_CONTEXT_LENGTH=512", ["bench"]),
        ("GHOSTVIS_SCHEDULE_POLICY=fcfs", ["serve", "--engine", "local"]),
    ],
)
def test_a_variable_that_the_engine_does_not_read_is_one_too(
    variable: str, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, value = variable.split("=")
    monkeypatch.setenv(name, value)
    done = run(*args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"does not read {name}" in done.stderr and f"unset {name}" in done.stderr


def test_a_server_and_a_checkpoint_in_the_environment_contradict_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GHOSTVIS_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("GHOSTVIS_SOURCE", "demo")
    done = run("generate", "hi")
    assert done.exit_code == 2 and "hint: unset GHOSTVIS_SOURCE; or --engine local" in done.stderr
    assert run("generate", "hi", "--engine", "local", "--max-tokens", "1").exit_code == 0


def test_what_a_profile_sets_in_vain_is_a_notice() -> None:
    Path("ghostvis.yaml").write_text(
        "profiles:\n  default:\n    engine: {gpu_memory_utilization: 0.5, tensor_parallel_size: 2}\n"
    )
    done = run("generate", "hi", "--max-tokens", "1")
    assert done.exit_code == 0
    assert "the local engine does not read engine.tensor_parallel_size (ghostvis.yaml:3" in done.stderr


def test_a_value_that_is_the_default_asks_for_nothing() -> None:
    with scripted(saying("yes")) as server:
        done = run("generate", "hi", *at(server), "--dtype", "auto", "--layout", "auto", "--device", "auto")
    assert done.exit_code == 0 and "read" not in done.stderr


@pytest.mark.parametrize("place", ["environment", "profile"])
@pytest.mark.parametrize(
    "typed", [["--source", "demo"], ["--engine", "local"], ["--set", "model.source=demo"]]
)
def test_a_typed_model_beats_a_configured_server(
    typed: list[str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "environment":
        monkeypatch.setenv("GHOSTVIS_BASE_URL", "http://127.0.0.1:9")
        told = "GHOSTVIS_BASE_URL is not used"
    else:
        Path("ghostvis.yaml").write_text(
            "profiles: {default: {engine: {kind: remote, base_url: 'http://127.0.0.1:9'}}}"
        )
        told = "engine.base_url (ghostvis.yaml:1 (profile default)) is not used"
    done = run("generate", "hi", *typed, "--json", "--max-tokens", "1")
    assert (done.exit_code, json.loads(done.stdout)["model"]["source"]) == (0, "demo")
    assert f"{told}: {typed[0]}" in done.stderr


def test_a_typed_server_beats_a_configured_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOSTVIS_CHECKPOINT_PATH", "/nowhere.pt")
    with scripted(saying("yes")) as server:
        done = run("generate", "hi", *at(server))
    assert (done.exit_code, done.stdout) == (0, "yes\n")
    assert "GHOSTVIS_CHECKPOINT_PATH is not used: --base-url decides" in done.stderr


def test_a_variable_takes_no_profiles_server_away(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("ghostvis.yaml").write_text("profiles: {default: {engine: {base_url: 'http://127.0.0.1:9'}}}")
    monkeypatch.setenv("GHOSTVIS_BASE_DIR", str(BASE))
    done = run("generate", "hi")
    assert done.exit_code == 2 and "a remote engine does not read GHOSTVIS_BASE_DIR" in done.stderr


def test_several_engines_are_measured_with_a_server_and_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(saying("yes")) as server:
        monkeypatch.setenv("GHOSTVIS_BASE_URL", server.url)
        load = ("--num-prompts", "1", "--warm-up", "0", "--output-len", "1")
        done = run("bench", "--engines", "local,remote", "--source", "demo", *load)
    assert done.exit_code == 0, done.output


def test_the_api_refuses_what_its_engine_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="does not read --dtype"):
        create_sglang_engine(base_url="http://127.0.0.1:9", dtype="float32")
    monkeypatch.setenv("GHOSTVIS_BASE_URL", "http://127.0.0.1:9")
    with create_sglang_engine(source="demo") as engine:
        assert engine.info.source == "demo"
        assert any("GHOSTVIS_BASE_URL is not used" in line for line in engine.info.notices)


def test_doctor_finds_what_is_not_read() -> None:
    done = run("doctor", "--no-run", "--base-url", "http://127.0.0.1:9", "--dtype", "float32")
    assert done.exit_code == 9 and "a remote engine does not read --dtype" in done.stdout


def test_a_profile_switched_to_in_a_chat_is_told_of_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(saying("yes")) as server:
        Path("ghostvis.yaml").write_text(
            f"profiles: {{far: {{engine: {{base_url: '{server.url}'}}, model: {{source: sft}}}}}}"
        )
        done = run("chat", "--source", "demo", input="/profile far\nhi\n")
    assert done.exit_code == 0, done.output
    assert "a remote engine does not read model.source (ghostvis.yaml:1 (profile far))" in done.stderr


def test_variables_of_serve_and_its_plug_in_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADMIN_API_KEY", "ALLOWED_IMAGE_HOSTS", "NUMERICS", "PICTURE_CACHE_MB"):
        monkeypatch.setenv(f"GHOSTVIS_{name}", "1")
    monkeypatch.setenv("GHOSTVIS_NUMERIC", "1")
    assert [line for line in resolve().notices if "means nothing" in line] == [
        "the environment variable 'GHOSTVIS_NUMERIC' means nothing here (did you mean GHOSTVIS_NUMERICS?)"
    ]


@pytest.mark.parametrize("flag", ["--raw", "--stats", "--no-history", "--no-preview"])
def test_what_is_for_the_terminal_alone_is_refused_beside_the_page(flag: str) -> None:
    done = run("chat", "--web", flag, "--source", "demo")
    assert (done.exit_code, f"{flag} is for the terminal" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("typed", [("--port", "0"), ("--host", "::1"), ("--open",)])
def test_what_is_for_the_page_alone_is_refused_without_it(typed: tuple[str, ...]) -> None:
    done = run("chat", *typed, "--source", "demo")
    assert (done.exit_code, f"{typed[0]} is for the page" in done.stderr) == (2, True), done.stderr
