"""`ghostvis profile`, as people and scripts call it."""

import json
from functools import partial
from pathlib import Path

import pytest

from tests.cli import invoke

SECRET = "sk-abcdefghijklmnop"
pytestmark = pytest.mark.usefixtures("here")
run = partial(invoke, "profile")


def write(text: str) -> None:
    Path("ghostvis.yaml").write_text(text)


def test_list_names_every_profile_with_its_place_and_use() -> None:
    write("profiles:\n  lab: {description: The lab}\n  demo: {description: Ours}\n  bad: {nonsense: 1}\n")
    result = run("list")
    assert result.exit_code == 0
    lines = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert lines[:3] == [
        ["NAME", "WHERE", "DESCRIPTION"],
        ["lab", "ghostvis.yaml", "The lab"],
        ["demo", "ghostvis.yaml", "Ours"],
    ]
    assert ["bad", "ghostvis.yaml", "not usable: ghostvis profile validate"] in lines
    assert ["demo", "built-in", "(hidden by the one above) The built-in demo model"] in lines


def test_list_as_json_marks_what_is_hidden() -> None:
    write("profiles:\n  demo: {description: Ours}\n")
    record = json.loads(run("list", "--json").stdout)
    assert record["schema_version"] == 1
    assert [(each["place"], each["hidden"]) for each in record["profiles"] if each["name"] == "demo"] == [
        ("project", False),
        ("built-in", True),
    ]


def test_show_prints_what_a_run_would_get_and_where_each_value_is_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GHOSTVIS_TOP_P", "0.5")
    result = run("show", "remote", "--origin", "--set", "sampling.top_k=3")
    assert result.exit_code == 0
    lines = {line.split("#")[0].strip(): line.rpartition("  # ")[2] for line in result.stdout.splitlines()}
    assert lines["kind: remote"] == "built-in profile remote"
    assert lines["top_p: 0.5"] == "environment GHOSTVIS_TOP_P"
    assert lines["top_k: 3"] == "flag --set"
    assert lines["max_tokens: 100"] == "default"


def test_show_without_a_name_shows_the_profile_a_run_here_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(run("show", "--json").stdout)["name"] == "default"
    monkeypatch.setenv("GHOSTVIS_PROFILE", "demo")
    record = json.loads(run("show", "--json").stdout)
    assert record["name"] == "demo" and record["settings"]["model"]["source"] == "demo"
    assert record["origins"]["model.source"] == "built-in profile demo"
    assert json.loads(run("show", "--json", "-p", "remote").stdout)["name"] == "remote"


def test_show_never_prints_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOSTVIS_API_KEY", SECRET)
    for args in (
        ["--origin"],
        ["--json"],
        ["--set", f"system=Bearer {SECRET}"],
        ["--set", f"engine.api_key={SECRET}"],
    ):
        result = run("show", "remote", *args)
        assert "abcdefgh" not in result.stdout + result.stderr


def test_show_refuses_two_names() -> None:
    result = run("show", "demo", "-p", "remote")
    assert result.exit_code == 2 and "named twice" in result.stderr


def test_notices_go_to_stderr_and_can_be_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOSTVIS_TOPK", "3")
    assert "did you mean GHOSTVIS_TOP_K?" in run("show").stderr
    assert run("show", "--quiet").stderr == ""


def test_the_project_file_is_named_with_v(here: Path) -> None:
    write("profiles: {default: {system: hi}}")
    assert f"settings from {here / 'ghostvis.yaml'}" in run("show", "-v").stderr


def test_path_prints_a_profiles_file_or_the_directory(here: Path) -> None:
    assert run("path").stdout == f"{here / 'config' / 'profiles'}\n"
    assert Path(run("path", "demo").stdout.strip()).name == "demo.yaml"
    write("profiles: {lab: {}}")
    assert run("path", "lab").stdout == f"{here / 'ghostvis.yaml'}\n"
    result = run("path", "lob")
    assert result.exit_code == 2 and "did you mean lab?" in result.stderr


def test_validate_is_silent_on_stdout_and_0_when_all_is_well() -> None:
    result = run("validate")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no faults in 4 profiles" in result.stderr


def test_validate_lists_every_fault_and_exits_with_2() -> None:
    write("profiles:\n  a: {sampling: {top_q: 1}}\n  b: {sytem: hi}\n")
    result = run("validate")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "2 faults in the settings:" in result.stderr
    assert "ghostvis.yaml:2: profiles.a.sampling.top_q: unknown key (did you mean top_p?)\n" in result.stderr
    assert "ghostvis.yaml:3: profiles.b.sytem: unknown key (did you mean system?)\n" in result.stderr


def test_validate_takes_one_file_and_tells_scripts_in_json() -> None:
    Path("one.yaml").write_text("sampling: {top_p: 2}")
    result = run("validate", "one.yaml", "--json")
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == error["code"] == 2
    assert error["message"] == "one.yaml:1: sampling.top_p: is 2, outside 1e-09 to 1"
    Path("one.yaml").write_text("sampling: {top_p: 0.2}")
    assert [
        each["name"] for each in json.loads(run("validate", "one.yaml", "--json").stdout)["profiles"]
    ] == ["one"]


def test_init_prints_the_path_of_a_profile_that_show_then_knows(here: Path) -> None:
    result = run("init", "lab", "--extends", "remote")
    assert result.stdout == f"{here / 'config' / 'profiles' / 'lab.yaml'}\n"
    assert "base_url: http://localhost:30000" in run("show", "lab").stdout
    again = run("init", "lab")
    assert again.exit_code == 2 and "is there already" in again.stderr and "--force" in again.stderr
    assert run("init", "lab", "--force").exit_code == 0
    assert run("validate").exit_code == 0


def test_init_for_a_project_writes_ghostvis_yaml_here() -> None:
    assert run("init", "lab", "--project").exit_code == 0
    assert "lab" in run("list").stdout and Path("ghostvis.yaml").exists()


def test_help_names_the_subcommands() -> None:
    help_text = run("--help").stdout
    assert all(name in help_text for name in ("list", "show", "path", "validate", "init"))
