"""Profiles: the order of the layers, the origin of every value, strictness, places, secrets, the schema."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostvis_cli.checkpoint.locate import SOURCE_DIRS
from ghostvis_cli.engines.base import Sampling
from ghostvis_cli.errors import UsageError
from ghostvis_cli.image_limits import ImageLimits
from ghostvis_cli.profile import EngineSettings, ModelSettings, Resolved, read_api_key, redact, resolve
from ghostvis_cli.profile.document import Document, compose
from ghostvis_cli.profile.files import Library, Origin, Value
from ghostvis_cli.profile.manage import begin, validate
from ghostvis_cli.profile.resolve import merge
from ghostvis_cli.profile.schema import as_text, schema
from ghostvis_cli.profile.settings import keys
from ghostvis_cli.profile.show import as_record, as_yaml, scalar, starter
from ghostvis_cli.profile.values import from_node, from_text

ROOT = Path(__file__).parents[2]
needs_no_root = pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")


class Place:
    """A project directory and a user directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.project = directory / "project"
        self.user = directory / "config" / "profiles"
        self.project.mkdir()
        self.user.mkdir(parents=True)
        self.env = {"GHOSTVIS_CONFIG_DIR": str(directory / "config")}

    def write(self, text: str) -> None:
        (self.project / "ghostvis.yaml").write_text(text)

    def write_user(self, name: str, text: str) -> None:
        (self.user / f"{name}.yaml").write_text(text)

    def resolve(self, name: str | None = None, env: Mapping[str, str] = {}, **options: object) -> Resolved:
        return resolve(name, env={**self.env, **env}, cwd=self.project, **options)  # type: ignore[arg-type]

    def faults(self, name: str | None = None, env: Mapping[str, str] = {}, **options: object) -> list[str]:
        with pytest.raises(UsageError) as caught:
            self.resolve(name, env, **options)
        lines = caught.value.message.splitlines()
        if len(lines) > 1:
            assert lines[0] == f"{len(lines) - 1} faults in the settings:"
        return lines[1:] if len(lines) > 1 else lines

    def fault_of(self, body: str) -> str:
        """The one fault of a user's profile with these lines."""
        self.write_user("lab", body)
        (fault,) = self.faults("lab")
        return fault.removeprefix(f"{self.user / 'lab.yaml'}:")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- the order


def test_without_anything_set_every_value_is_the_dataclasses_default(place: Place) -> None:
    resolved = place.resolve()
    assert resolved.profile.engine == EngineSettings()
    assert resolved.profile.model == ModelSettings()
    assert resolved.profile.sampling == Sampling()
    assert resolved.profile.images == ImageLimits()
    assert {str(origin) for origin in resolved.origins.values()} == {"default"}
    assert resolved.notices == () and resolved.files == ()


def test_a_flag_beats_set_beats_environment_beats_profile_beats_default(place: Place) -> None:
    place.write(
        "profiles:\n  lab:\n    sampling: {temperature: 0.1, top_p: 0.1, top_k: 1, seed: 1, min_p: 0.1}\n"
    )
    env = {"GHOSTVIS_TEMPERATURE": "0.2", "GHOSTVIS_TOP_P": "0.2", "GHOSTVIS_TOP_K": "2"}
    sets = ("sampling.temperature=0.3", "sampling.top_p=0.3")
    resolved = place.resolve(
        "lab", env, sets=sets, flags={"sampling.temperature": 0.4, "sampling.seed": None}
    )
    sampling = resolved.profile.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.4, 0.3, 2, 1)
    assert str(resolved.origins["sampling.temperature"]) == "flag --temperature"
    assert str(resolved.origins["sampling.top_p"]) == "flag --set"
    assert str(resolved.origins["sampling.top_k"]) == "environment GHOSTVIS_TOP_K"
    assert str(resolved.origins["sampling.seed"]) == "ghostvis.yaml:3 (profile lab)"
    assert str(resolved.origins["sampling.max_tokens"]) == "default"


def test_a_built_in_value_says_so(place: Place) -> None:
    assert str(place.resolve("remote").origins["engine.base_url"]) == "built-in profile remote"


def test_a_commands_own_default_stands_below_the_profile(place: Place) -> None:
    place.write_user("short", "sampling: {max_tokens: 7}")
    defaults = {"sampling.max_tokens": 200}
    assert place.resolve(defaults=defaults).profile.sampling.max_tokens == 200
    assert str(place.resolve(defaults=defaults).origins["sampling.max_tokens"]) == "default"
    assert place.resolve("short", defaults=defaults).profile.sampling.max_tokens == 7


def test_what_was_chosen_is_told_from_what_is_a_default(place: Place) -> None:
    assert not place.resolve().chose("model.source", "model.step")
    assert place.resolve(flags={"model.layout": "auto"}).chose("model.source", "model.layout")


LAYERS = st.lists(st.dictionaries(st.sampled_from(sorted(keys())), st.integers(), max_size=6), max_size=5)


@settings(deadline=None)
@given(LAYERS)
def test_of_several_layers_the_last_that_has_a_key_wins(layers: list[dict[str, int]]) -> None:
    given_by = Origin("flag", "flag")
    merged = merge([{path: Value(value, given_by) for path, value in layer.items()} for layer in layers])
    assert merged.keys() == keys().keys()
    for path, (value, origin) in merged.items():
        last = next((layer[path] for layer in reversed(layers) if path in layer), None)
        if origin == given_by:
            assert value == last
        else:  # never given, or taken back by a rival
            assert value == keys()[path].default


@settings(deadline=None)
@given(LAYERS)
def test_merging_in_two_steps_is_merging_in_one(layers: list[dict[str, int]]) -> None:
    given_by = Origin("flag", "flag")
    valued = [{path: Value(value, given_by) for path, value in layer.items()} for layer in layers]
    assert merge([*valued, {}]) == merge(valued) == merge([{}, *valued])


def test_a_source_typed_replaces_the_file_a_profile_names(place: Place) -> None:
    place.write_user("file", "model: {checkpoint_path: /m/model_000001.pt}")
    model = place.resolve("file", flags={"model.source": "rl"}).profile.model
    assert (model.source, model.checkpoint_path) == ("rl", None)


def test_a_file_typed_replaces_the_source_tag_and_step_of_a_profile(place: Place) -> None:
    place.write_user("run", "model: {source: sft, model_tag: d32, step: 5}")
    model = place.resolve("run", flags={"model.checkpoint_path": Path("/m/x.pt")}).profile.model
    assert model == ModelSettings(checkpoint_path="/m/x.pt")


def test_a_base_url_typed_makes_any_profile_remote(place: Place) -> None:
    engine = place.resolve("demo", flags={"engine.base_url": "http://gpu-1:30000"}).profile.engine
    assert engine.chosen_kind == "remote"
    with_kind = place.resolve(flags={"engine.base_url": "http://gpu-1"}, sets=["engine.kind=sglang"])
    assert with_kind.profile.engine.chosen_kind == "sglang"  # both were typed


def test_a_key_file_replaces_an_inherited_key_variable(place: Place) -> None:
    place.write_user("a", "engine: {api_key_env: LAB_KEY}")
    place.write_user("b", "extends: a\nengine: {api_key_file: /run/key}")
    engine = place.resolve("b").profile.engine
    assert (engine.api_key_env, engine.api_key_file) == (None, "/run/key")


def test_two_places_for_one_key_in_one_profile_are_a_fault(place: Place) -> None:
    place.write_user("both", "engine:\n  api_key_env: K\n  api_key_file: /k\n")
    (fault,) = place.faults("both")
    assert "both.yaml:2" in fault and "api_key_env and api_key_file are both given" in fault


# --- extends and places


def test_a_profile_inherits_key_by_key(place: Place) -> None:
    place.write(
        "profiles:\n"
        "  base:\n    sampling: {temperature: 0.1, stop: [a, b]}\n    system: Be brief.\n"
        "  lab:\n    extends: base\n    description: Lab\n    sampling: {stop: [c]}\n    system:\n"
    )
    resolved = place.resolve("lab")
    assert resolved.profile.sampling == Sampling(temperature=0.1, stop=("c",))
    assert resolved.profile.system is None and resolved.profile.description == "Lab"
    assert str(resolved.origins["sampling.temperature"]) == "ghostvis.yaml:3 (profile base)"


def test_a_project_hides_the_user_and_the_user_hides_the_built_in(place: Place) -> None:
    place.write_user("demo", "sampling: {top_k: 2}")
    assert place.resolve("demo").profile.sampling.top_k == 2
    place.write("profiles:\n  demo:\n    sampling: {top_k: 3}\n")
    assert place.resolve("demo").profile.sampling.top_k == 3


def test_a_default_of_ones_own_is_used_unasked_and_may_extend_the_one_it_hides(place: Place) -> None:
    place.write_user("default", "extends: default\nsampling: {top_k: 2, top_p: 0.2}")
    place.write("profiles:\n  default:\n    extends: default\n    sampling: {top_k: 3}\n")
    sampling = place.resolve().profile.sampling
    assert (sampling.top_k, sampling.top_p) == (3, 0.2)


def test_a_users_profile_never_inherits_from_a_projects_file(place: Place) -> None:
    place.write_user("mine", "extends: base")
    place.write("profiles:\n  base: {engine: {base_url: 'http://elsewhere'}}\n")
    assert "no profile 'base'" in place.faults("mine")[0]


def test_a_ring_of_extends_is_named(place: Place) -> None:
    place.write("profiles:\n  a: {extends: b}\n  b: {extends: c}\n  c: {extends: a}\n")
    assert place.faults("a") == [
        "ghostvis.yaml:4: profiles.c.extends: goes round in a circle: a -> b -> c -> a"
    ]


def test_a_built_in_name_that_extends_itself_has_nothing_below(place: Place) -> None:
    place.write_user("mine", "extends: mine")
    assert "no profile 'mine'" in place.faults("mine")[0]


def test_an_unknown_parent_is_a_fault_with_the_nearest_name(place: Place) -> None:
    place.write("profiles:\n  a:\n    extends: remot\n")
    assert place.faults("a") == [
        "ghostvis.yaml:3: profiles.a.extends: no profile 'remot' (did you mean remote?)"
    ]


def test_an_unknown_profile_lists_those_there_are(place: Place) -> None:
    with pytest.raises(UsageError) as caught:
        place.resolve("dmo")
    assert caught.value.message == "there is no profile 'dmo' (did you mean demo?)"
    assert caught.value.hint == "there are: default, demo, remote, sglang"


def test_a_profile_named_by_the_environment_counts_and_is_named_when_missing(place: Place) -> None:
    assert place.resolve(env={"GHOSTVIS_PROFILE": "demo"}).profile.name == "demo"
    assert place.resolve("remote", {"GHOSTVIS_PROFILE": "demo"}).profile.name == "remote"
    assert place.resolve(env={"GHOSTVIS_PROFILE": ""}).profile.name == "default"
    assert "which GHOSTVIS_PROFILE names" in place.faults(env={"GHOSTVIS_PROFILE": "gone"})[0]


@pytest.mark.parametrize("name", ["../lab", "/etc/passwd", "a/b", ".hidden", "lab\0"])
def test_a_path_is_no_profile_name(place: Place, name: str) -> None:
    place.write_user("lab", "system: x")
    assert "there is no profile" in place.faults(name)[0]


def test_the_project_file_is_found_upwards_to_the_repositorys_root_and_no_further(place: Place) -> None:
    below = place.project / "a" / "b"
    below.mkdir(parents=True)
    place.write("profiles: {default: {system: found}}")
    assert (
        resolve(env=place.env, cwd=below).profile.system is None
    )  # not a repository: only the directory itself
    (place.project / "a" / ".git").mkdir()
    assert resolve(env=place.env, cwd=below).profile.system is None
    (place.project / "a" / ".git").rmdir()
    (place.project / ".git").write_text("gitdir: elsewhere")  # as in a worktree
    resolved = resolve(env=place.env, cwd=below)
    assert resolved.profile.system == "found"
    assert resolved.files == (place.project / "ghostvis.yaml",)


def test_a_fault_of_another_profile_in_the_file_does_not_stop_a_run(place: Place) -> None:
    place.write("profiles:\n  good: {system: fine}\n  bad: {sampling: {nonsense: 1}}\n")
    assert place.resolve("good").profile.system == "fine"
    assert "nonsense" in place.faults("bad")[0]


def test_a_project_file_that_cant_be_made_out_stops_every_run(place: Place) -> None:
    place.write("profiles: [")
    assert place.faults()[0].startswith("ghostvis.yaml:1: is not YAML")
    assert place.faults("demo")[0].startswith("ghostvis.yaml:1: is not YAML")


def test_paths_in_a_file_start_at_the_file_and_typed_ones_stay(place: Place) -> None:
    place.write(
        "profiles:\n  lab:\n    model: {base_dir: runs, checkpoint_path: ~/m.pt}\n    engine: {ca_file: /c}\n"
    )
    model = place.resolve("lab").profile.model
    assert model.base_dir == str(place.project / "runs")
    assert model.checkpoint_path == str(Path.home() / "m.pt")
    assert place.resolve("lab").profile.engine.ca_file == "/c"
    assert place.resolve("lab", sets=["model.base_dir=runs"]).profile.model.base_dir == "runs"


@pytest.mark.parametrize("name", ["default", "demo", "remote", "sglang"])
def test_a_built_in_profile_opens_with_a_comment_and_has_no_fault(place: Place, name: str) -> None:
    assert (ROOT / "profiles" / f"{name}.yaml").read_text().startswith("# ")
    assert place.resolve(name).profile.description
    assert place.resolve(name).profile.engine.chosen_kind == {"remote": "remote", "sglang": "sglang"}.get(
        name, "local"
    )


# --- homes


def test_xdg_and_home_say_where_the_users_profiles_are(tmp_path: Path) -> None:
    for env, directory in (
        ({"XDG_CONFIG_HOME": str(tmp_path / "xdg")}, tmp_path / "xdg" / "ghostvis"),
        ({"HOME": str(tmp_path / "home")}, tmp_path / "home" / ".config" / "ghostvis"),
        (
            {"HOME": str(tmp_path / "home2"), "XDG_CONFIG_HOME": "relative"},
            tmp_path / "home2/.config/ghostvis",
        ),
    ):
        (directory / "profiles").mkdir(parents=True)
        (directory / "profiles" / "lab.yaml").write_text("system: found")
        assert resolve("lab", env=env, cwd=tmp_path).profile.system == "found"


def test_without_a_home_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # an account without an entry in passwd
    assert resolve("demo", env={}, cwd=tmp_path).profile.name == "demo"
    with pytest.raises(UsageError, match="home directory"):
        begin("lab", env={}, cwd=tmp_path)


def test_a_current_directory_that_is_gone_is_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "current directory is gone" in resolve(env={}).notices[0]


def test_a_user_directory_that_is_a_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("")
    assert (
        resolve(env={"GHOSTVIS_CONFIG_DIR": str(tmp_path / "config")}, cwd=tmp_path).profile.name == "default"
    )


@needs_no_root
def test_an_unreadable_directory_is_a_notice_and_built_in_profiles_still_work(place: Place) -> None:
    place.write_user("lab", "system: x")
    place.user.chmod(0)
    try:
        assert "passed over" in place.resolve("remote").notices[0]
        assert (
            "there is no profile 'lab'" in place.faults("lab")[0] and "passed over" in place.faults("lab")[0]
        )
    finally:
        place.user.chmod(0o700)


@needs_no_root
def test_an_unreadable_profile_fails_only_the_run_that_names_it(place: Place) -> None:
    place.write_user("default", "system: x")
    (place.user / "default.yaml").chmod(0)
    assert "can't be read" in place.resolve().notices[0]
    assert "can't be read: Permission denied" in place.faults("default")[0]


def test_a_directory_in_a_profiles_place_is_a_fault(place: Place) -> None:
    (place.user / "lab.yaml").mkdir()
    assert place.faults("lab")[0].endswith("lab.yaml:1: is not a file")


# --- strictness


def test_all_faults_of_all_layers_come_at_once_with_their_places(place: Place) -> None:
    place.write(
        "profiles:\n"
        "  lab:\n"
        "    extends: base\n"
        "    temprature: 0.2\n"
        "    sampling:\n"
        "      temprature: 0.2\n"
        "      top_p: 3\n"
        "  base:\n"
        "    engine: {kind: remot}\n"
    )
    env, sets = {"GHOSTVIS_TOP_K": "many"}, ("nonsense", "sampling=1", "sampling.top-k=2")
    assert place.faults("lab", env, sets=sets, flags={"model.layout": "upside_down"}) == [
        "ghostvis.yaml:4: profiles.lab.temprature: unknown key (did you mean sampling.temperature?)",
        "ghostvis.yaml:6: profiles.lab.sampling.temprature: unknown key (did you mean temperature?)",
        "ghostvis.yaml:7: profiles.lab.sampling.top_p: is 3, outside 1e-09 to 1",
        "ghostvis.yaml:9: profiles.base.engine.kind: 'remot' is not one of auto, local, sglang, remote"
        " (did you mean remote?)",
        "environment GHOSTVIS_TOP_K: sampling.top_k: takes a whole number, not 'many'",
        "flag --set: 'nonsense' is not KEY=VALUE",
        "flag --set: sampling: is a section; set one of its keys, such as sampling.max_tokens",
        "flag --set: sampling.top-k: unknown key (did you mean top_k?)",
        "flag --layout: model.layout: takes one of auto, inline, prepend, prepend_slots, prepend_literal,"
        " not 'upside_down'",
    ]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("model: {model_tag: 012}", """without quotes YAML reads '012' as the number 12; write "012\""""),
        ("model: {model_tag: true}", "1: model.model_tag: without quotes YAML reads 'true' as true; write "),
        ("model: {model_tag: False}", "reads 'False' as false; write \"False\""),
        ("model: {model_tag: 1.5}", "YAML reads '1.5' as a number"),
        ("model: {model_tag: [a]}", "takes text or null, not a list"),
        ("model: {model_tag: {a: b}}", "takes text or null, not a mapping"),
        ("model: {model_tag: !!binary aGk=}", "takes text, not something tagged binary"),
        ("model: {model_tag: !!python/name:os.system ''}", "something tagged python/name:os.system"),
        ("model: {source: yes}", "'yes' is not one of base, mid, sft, rl, demo"),
        ("model: {step: 1_000}", "takes a whole number or null, not '1_000'"),
        ("model: {step: 1:30}", "takes a whole number or null, not '1:30'"),
        ("model: {step: 0b1}", "takes a whole number or null, not '0b1'"),
        ("model: {step: 1e5}", "takes a whole number or null, not '1e5'; write 100000"),
        ("model: {step: 1.5}", "takes a whole number or null, not '1.5'"),
        ("model: {step: true}", "YAML reads 'true' as true"),
        ("model: {step: '5'}", "5 in quotes is text; write it without"),
        (f"model: {{step: {'9' * 5000}}}", "the number it can't read"),
        ("model: {step: 2026-01-02}", "takes a whole number or null, not '2026-01-02'"),
        ("sampling: {temperature: .nan}", "takes a number, not '.nan'"),
        ("sampling: {temperature: 1e999}", "is inf, outside 0 to 100"),
        ("sampling: {temperature: on}", "takes a number, not 'on'"),
        ("sampling: {temperature: 999}", "is 999, outside 0 to 100"),
        (f"sampling: {{temperature: {'9' * 400}}}", "YAML reads"),
        ("sampling: {temperature: }", "has no value; it takes a number, or leave it out"),
        ("sampling: {ignore_eos: 1}", "'1' is the number 1; write true or false"),
        ("sampling: {ignore_eos: y}", "'y' is text; write true or false"),
        ("sampling: {stop: [a, False]}", "YAML reads 'False' as false"),
        ("sampling: {ignore_eos: yes}", "'yes' is text; write true or false"),
        ("sampling: {stop: ['']}", "a stop string is empty"),
        ("images: {max_redirects: -1}", "is -1, outside 0 to 100"),
        ("engine: {max_batch: 0}", "is 0, outside 1 to 4096"),
        ("engine: {device: gpu}", "engine.device: is 'gpu', not auto, cpu, mps, cuda or cuda:N"),
        ("engine: {base_url: gpu-1}", "must look like http://host:port"),
        ("engine: {base_url: 'http://h:99999'}", "is no address"),
        ("engine: {base_url: 'http://h/?key=1'}", "may hold no spaces"),
        ("model: {base_dir: ''}", "model.base_dir: is no path"),
        ("system: [a]", "system: takes text or null, not a list"),
        ("description: true", "description: takes text, not true"),
        ("extends: [a, b]", "extends: takes text, not a list"),
        ("engine:", "1: engine: must be a mapping (name: value), not nothing"),
        ("engine: local", "engine: must be a mapping (name: value), not text"),
        ("- engine", "1: must be a mapping (name: value), not a list"),
        ("text", "1: must be a mapping (name: value), not text"),
        ("", "1: is empty"),
        ("# only a comment\n", "1: is empty"),
        ("system: a\nsystem: b", "2: system: stands twice, first in line 1"),
        ("model:\n  step: 1\n  layout: auto\n  step: 2", "4: model.step: stands twice, first in line 2"),
        ("model:\n  true: 1", "2: model: a key must be text; YAML reads true here"),
        ("? [a]\n: b", "1: a key must be text; YAML reads a list here"),
        ("system: a\n---\nsystem: b", "2: holds a second document (---); a profile file is one"),
        ("model:\n\tstep: 1", "2: holds a tab where YAML wants spaces"),
        ("system: Answer: yes", "1: is not YAML: a second `: ` in the line; text"),
        ("system: @you", "text that begins with a sign wants quotes"),
        ("system: *you", "found undefined alias 'you'; text that begins with a sign wants quotes"),
        ("system: a\nmodel: {", "2: is not YAML"),
        ("system: a\nother: \x07", "2: holds the control character U+0007"),
        ("system: " + "[" * 5000, "1: is nested too deeply"),
        (r'system: "\U00110000"', "1: is not YAML: chr() arg not in range"),
        (r'system: "\UFFFFFFFF"', "1: is not YAML"),
        (f"%YAML {'9' * 5000}.1\n---\nsystem: a", "1: is not YAML"),
        ("model: &m\n  <<: *m", "2: model: << (merging) is not read, YAML 1.2 has none of it; inherit with"),
        ("<<: {system: a}", "1: << (merging) is not read"),
        ("profiles: {a: {}}", "1: profiles: unknown key"),
        ("sytem: hi", "1: sytem: unknown key (did you mean system?)"),
        ("top_k: 3", "1: top_k: unknown key (did you mean sampling.top_k?)"),
        ("engine: {model_tag: a}", "engine.model_tag: unknown key (did you mean model.model_tag?)"),
        ("sampling: {max_token: 3}", "unknown key (did you mean max_tokens?)"),
    ],
)  # fmt: skip
def test_a_fault_is_explained_where_it_stands(place: Place, body: str, fault: str) -> None:
    assert fault in place.fault_of(body)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"system: a\ndescription: caf\xe9\n", "2: is not UTF-8"),
        (b"s\0y\0", "1: is not UTF-8"),
        (b"\xff\xfes\0y", "1: is not UTF-8"),
        (b"#" * (2**18 + 1), "1: is larger than 256 KiB"),
    ],
)
def test_bytes_that_are_no_profile_are_refused(place: Place, content: bytes, fault: str) -> None:
    (place.user / "lab.yaml").write_bytes(content)
    assert fault in place.faults("lab")[0]


@pytest.mark.parametrize("form", ["utf-8", "utf-16-le", "utf-32-be"])
def test_a_byte_order_mark_is_no_fault(place: Place, form: str) -> None:
    (place.user / "lab.yaml").write_bytes("\ufeffsystem: a\r\nsampling:\r\n  top_k: 3\r\n".encode(form))
    assert place.resolve("lab").profile.system == "a"
    assert place.resolve("lab").profile.sampling.top_k == 3


def test_a_pipe_in_a_profiles_place_does_not_hang(place: Place) -> None:
    os.mkfifo(place.user / "lab.yaml")
    assert "is not a file" in place.faults("lab")[0]


def test_numbers_are_taken_as_people_write_them(place: Place) -> None:
    place.write_user(
        "lab", "sampling: {temperature: 1e-2, top_p: 1, min_p: .5, top_k: 0, repetition_penalty: 1.}"
    )
    sampling = place.resolve("lab").profile.sampling
    assert (sampling.temperature, sampling.top_p, sampling.min_p, sampling.top_k) == (0.01, 1.0, 0.5, 0)
    assert isinstance(sampling.top_p, float)


def test_a_value_behind_an_alias_keeps_its_line(place: Place) -> None:
    place.write("profiles:\n  a:\n    sampling: &s\n      top_k: 3\n  b:\n    sampling: *s\n")
    resolved = place.resolve("b")
    assert resolved.profile.sampling == Sampling(top_k=3)
    assert str(resolved.origins["sampling.top_k"]) == "ghostvis.yaml:4 (profile b)"


@pytest.mark.parametrize(
    "text", ["on", "Off", "yes", "NO", "y", "1:30", "2026-01-02", "1_000", "0b1", "=", "~x"]
)
def test_words_that_yaml_1_1_made_something_else_of_are_words(place: Place, text: str) -> None:
    place.write_user("lab", f"model: {{model_tag: {text}}}\nsystem: {text}")
    profile = place.resolve("lab").profile
    assert (profile.model.model_tag, profile.system) == (text, text)


@pytest.mark.parametrize(
    ("text", "number"), [("010", 10), ("0o17", 15), ("0x1F", 31), ("+7", 7), ("007", 7), ("0", 0)]
)
def test_whole_numbers_are_those_of_yaml_1_2(place: Place, text: str, number: int) -> None:
    place.write_user("lab", f"sampling: {{top_k: {text}, temperature: {text}, min_p: 1e-1}}")
    sampling = place.resolve("lab", sets=[f"sampling.seed={text}"]).profile.sampling
    assert (sampling.top_k, sampling.temperature, sampling.seed, sampling.min_p) == (
        number,
        number,
        number,
        0.1,
    )


TRICKY = ["0o17", "1e5", "1.", ".5", "010", "on", "null", "<<", "True", ".inf", "1:30"]


@given(st.text(max_size=6) | st.sampled_from(TRICKY))
def test_what_is_shown_is_read_back_as_it_was(text: str) -> None:
    node = compose(scalar(text), Document(""))
    assert node is not None and from_node(keys()["system"], node, None) == text


def test_a_project_file_wants_its_settings_under_profiles(place: Place) -> None:
    place.write("engine: {kind: local}\nlab: {}\n")
    assert place.faults() == [
        "ghostvis.yaml:1: engine: stands under profiles: NAME: in this file",
        "ghostvis.yaml:2: lab: only `profiles` stands here",
        "ghostvis.yaml:1: profiles: is missing",
    ]


# --- environment and --set


def test_every_key_has_a_variable_and_an_option_of_its_own() -> None:
    variables = [key.variable for key in keys().values()]
    assert len(set(variables)) == len(variables)
    assert not set(variables) & {"GHOSTVIS_PROFILE", "GHOSTVIS_API_KEY", "GHOSTVIS_CONFIG_DIR"}
    assert keys()["images.timeout_s"].variable == "GHOSTVIS_IMAGES_TIMEOUT_S"
    assert keys()["engine.kind"].flag == "--engine"
    assert keys()["engine.gpu_memory_utilization"].flag == "--gpu-memory-utilization"


def test_an_empty_variable_counts_as_not_set(place: Place) -> None:
    assert not place.resolve(env={"GHOSTVIS_BASE_URL": "", "GHOSTVIS_TOP_K": ""}).chose("engine.base_url")


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("model.model_tag", "012", "012"),
        ("model.model_tag", "on", "on"),
        ("model.model_tag", "null", None),
        ("model.model_tag", '"null"', "null"),
        ("system", "Answer: use # and 'quotes', [briefly]", "Answer: use # and 'quotes', [briefly]"),
        ("system", r'"two\nlines"', "two\nlines"),
        ("sampling.stop", r'["\n", b]', ("\n", "b")),
        ("sampling.stop", "a, b", ("a, b",)),
        ("sampling.stop", r'"\n"', ("\n",)),
        ("sampling.ignore_eos", "1", True),
        ("sampling.ignore_eos", "false", False),
        ("sampling.temperature", "1e-1", 0.1),
        ("sampling.seed", "~", None),
        ("engine.dtype", "bfloat16", "bfloat16"),
    ],
)
def test_text_from_the_shell_is_read_as_people_mean_it(path: str, text: str, value: object) -> None:
    assert from_text(keys()[path], text) == value


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("system", '"open'),
        ("sampling.stop", "[a"),
        ("sampling.top_k", ""),
    ],
)
def test_text_that_cant_be_read_is_a_usage_error(path: str, text: str) -> None:
    with pytest.raises(UsageError):
        from_text(keys()[path], text)


def test_an_unknown_variable_is_a_notice_with_the_nearest_name(place: Place) -> None:
    env = {"GHOSTVIS_TEMPRATURE": "1", "GHOSTVIS_STATE_DIR": "/s", "GHOSTVIS_LAB": "key", "GHOST_X": "1"}
    resolved = place.resolve(env=env, sets=["engine.api_key_env=GHOSTVIS_LAB"])
    assert resolved.notices == (
        "the environment variable 'GHOSTVIS_TEMPRATURE' means nothing here"
        " (did you mean GHOSTVIS_TEMPERATURE?)",
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sampling.top_k", True),
        ("sampling.top_k", 1.0),
        ("sampling.temperature", "hot"),
        ("model.source", ["sft"]),
    ],
)
def test_a_flag_of_the_wrong_type_is_a_fault(place: Place, path: str, value: object) -> None:
    assert place.faults(flags={path: value})[0].startswith(f"flag {keys()[path].flag}: {path}: takes ")


# --- secrets

SECRET = "sk-abcdefghijklmnop"


@pytest.mark.parametrize(
    "name", ["api_key", "apikey", "api-key", "token", "hf_token", "password", "Authorization"]
)
@pytest.mark.parametrize("prefix", ["", "engine."])
def test_a_secret_in_a_profile_or_on_the_command_line_is_refused_and_not_repeated(
    place: Place, name: str, prefix: str
) -> None:
    body = f"{name}: {SECRET}" if not prefix else f"engine:\n  {name}: {SECRET}"
    faults = [place.fault_of(body), *place.faults(sets=[f"{prefix}{name}={SECRET}"])]
    for fault in faults:
        assert "engine.api_key_env or engine.api_key_file" in fault and SECRET not in fault


@pytest.mark.parametrize(
    "body",
    [
        f"engine: {{base_url: 'http://user:{SECRET}@host'}}",
        f"engine: {{base_url: 'http://host/?api_key={SECRET}'}}",
        f"engine: {{api_key_env: {SECRET}}}",
        f"engine: {{kind: {SECRET}}}",
        "engine: {api_key_env: hf_abcdefghijklmnop}",
        f"{SECRET}: 1",
    ],
)
def test_a_secret_in_the_wrong_field_is_refused_and_not_repeated(place: Place, body: str) -> None:
    assert "abcdefgh" not in place.fault_of(body)


def test_show_takes_out_what_looks_like_a_secret(place: Place) -> None:
    resolved = place.resolve(sets=[f"system=The key is {SECRET}.", f"sampling.stop=[Bearer {SECRET}]"])
    assert "abcdefgh" not in as_yaml(resolved, origin=True) + json.dumps(as_record(resolved))


def test_redaction_leaves_ordinary_text_alone() -> None:
    assert redact("http://u:p@host/v1 and https://host/a@b") == "http://***@host/v1 and https://host/a@b"
    for text in (
        "You answer basically in one sentence.",
        "http://gpu-1:30000/v1",
        "/home/a/sk-learn",
        "mail a@b.c",
    ):
        assert redact(text) == text


def test_a_key_is_read_from_its_variable_or_file_or_the_usual_variable(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    env = {"GHOSTVIS_API_KEY": "usual", "LAB": "from-lab"}
    assert read_api_key(EngineSettings(), {}) is None
    assert read_api_key(EngineSettings(), env) == "usual"
    assert read_api_key(EngineSettings(api_key_env="LAB"), env) == "from-lab"
    assert read_api_key(EngineSettings(api_key_file=str(file)), env) == "from-file"


def test_a_key_that_was_promised_and_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "two").write_text(f"{SECRET}\nsecond\n")
    (tmp_path / "none").write_text("\n")
    for engine, message in (
        (EngineSettings(api_key_env="LAB"), "LAB holds no key"),
        (EngineSettings(api_key_file=str(tmp_path / "gone")), "can't be read"),
        (EngineSettings(api_key_file=str(tmp_path / "none")), "holds no key"),
        (EngineSettings(api_key_file=str(tmp_path / "two")), "more than one key"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            read_api_key(engine, {"GHOSTVIS_API_KEY": "usual"})
        assert SECRET not in caught.value.message


def test_a_projects_file_that_sends_the_users_key_away_is_a_notice(place: Place) -> None:
    place.write(
        "profiles:\n  lab:\n    engine: {base_url: 'http://gpu-1:30000'}\n  own:\n    extends: remote\n"
    )
    env = {"GHOSTVIS_API_KEY": SECRET}
    assert place.resolve("lab", env).notices == (
        "the server's key goes to gpu-1, as ghostvis.yaml:3 (profile lab) says",
    )
    assert place.resolve("lab").notices == ()
    assert place.resolve("own", env).notices == ()
    assert place.resolve("lab", {**env, "GHOSTVIS_BASE_URL": "http://mine"}).notices == ()
    for here in ("localhost", "127.0.0.1", "[::1]"):
        place.write(f"profiles:\n  near:\n    engine: {{base_url: 'http://{here}:30000'}}\n")
        assert place.resolve("near", env).notices == ()


# --- printing


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "system": st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30),
            "model.model_tag": st.sampled_from(
                ["012", "on", "null", "~", "a: b", "# x", "'", '"', "1e5", "2026-01-01"]
            ),
            "sampling.stop": st.lists(st.text("ab\n\t:#'\"[]{}, é", min_size=1, max_size=5), max_size=3),
            "sampling.temperature": st.floats(0, 100),
            "sampling.top_k": st.integers(0, 1_000_000),
            "sampling.ignore_eos": st.booleans(),
        },
    )
)
def test_what_show_prints_is_a_profile_with_the_same_values(
    tmp_path_factory, flags: dict[str, object]
) -> None:
    directory = tmp_path_factory.mktemp("shown")
    printed = resolve(flags=flags, env={"GHOSTVIS_CONFIG_DIR": str(directory)}, cwd=directory)
    (directory / "profiles").mkdir()
    for origin in (False, True):
        assert (
            len(as_yaml(printed, origin=origin).split("\n")) == len(keys()) + 6
        )  # each on a line of its own
        (directory / "profiles" / "again.yaml").write_text(as_yaml(printed, origin=origin), encoding="utf-8")
        again = resolve("again", env={"GHOSTVIS_CONFIG_DIR": str(directory)}, cwd=directory).profile
        assert (again.engine, again.model, again.images) == (
            printed.profile.engine, printed.profile.model, printed.profile.images
        )  # fmt: skip
        assert (again.sampling, again.system) == (printed.profile.sampling, printed.profile.system)


def test_show_says_where_each_value_is_from(place: Place) -> None:
    lines = as_yaml(place.resolve("remote", sets=["sampling.top_k=3"]), origin=True).splitlines()
    by_key = {line.split("#")[0].strip(): line.rpartition("  # ")[2] for line in lines}
    assert by_key["base_url: http://localhost:30000"] == "built-in profile remote"
    assert by_key["top_k: 3"] == "flag --set"
    assert by_key["top_p: 0.9"] == "default"


# --- managing files


def test_validate_finds_the_faults_of_every_profile(place: Place) -> None:
    place.write("profiles:\n  a: {nonsense: 1}\n  b: {extends: a}\n  c: {system: fine}\nother: 1\n")
    place.write_user("u", "engine: {api_key_env: A, api_key_file: b}")
    report = validate(env=place.env, cwd=place.project)
    faults = [str(fault) for fault in report.faults]
    assert len(faults) == 3
    assert faults[0].startswith("ghostvis.yaml:5: other") and faults[1].startswith(
        "ghostvis.yaml:2: profiles.a.nonsense"
    )
    assert "u.yaml:1 (profile u): engine: api_key_env and api_key_file are both given" in faults[2]
    assert {stored.name for stored in report.profiles} >= {"a", "b", "c", "u", "default", "remote"}


def test_validate_takes_one_file_of_either_kind(place: Place, tmp_path: Path) -> None:
    single, several = tmp_path / "single.yaml", tmp_path / "several.yaml"
    single.write_text("extends: remote\nsystm: hi\n")
    several.write_text("profiles:\n  a: {extends: b}\n  b: {extends: gone}\n")
    for file, fault in ((single, "single.yaml:2: systm"), (several, "several.yaml:3: profiles.b.extends")):
        report = validate(file, env=place.env, cwd=place.project)
        assert len(report.faults) == 1 and fault in str(report.faults[0])
    with pytest.raises(UsageError, match="can't be read"):
        validate(tmp_path / "gone.yaml", env=place.env, cwd=place.project)


def test_the_built_in_profiles_and_no_others_are_valid_at_the_start(place: Place) -> None:
    assert validate(env=place.env, cwd=place.project).faults == ()


def test_a_new_profile_is_private_changes_nothing_and_is_not_overwritten(place: Place) -> None:
    path = begin("lab", env=place.env, cwd=place.project)
    assert path == place.user / "lab.yaml" and stat.S_IMODE(path.stat().st_mode) == 0o600
    resolved = place.resolve("lab")
    assert resolved.profile.engine == EngineSettings() and not resolved.chose(*keys())
    path.write_text("system: mine")
    with pytest.raises(UsageError, match="is there already"):
        begin("lab", env=place.env, cwd=place.project)
    assert path.read_text() == "system: mine"
    begin("lab", force=True, extends="demo", env=place.env, cwd=place.project)
    assert place.resolve("lab").profile.model.source == "demo"
    assert sorted(each.name for each in place.user.parent.rglob("*")) == [
        "lab.yaml",
        "profile.schema.json",
        "profiles",
    ]


def test_a_new_profile_tells_the_editor_where_its_schema_is(place: Place) -> None:
    path = begin("lab", env=place.env, cwd=place.project)
    first = path.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert json.loads((path.parent / first.partition("$schema=")[2]).read_text()) == schema()


def test_a_new_project_file_holds_the_profile_under_profiles(place: Place) -> None:
    path = begin("lab", project=True, extends="remote", env=place.env, cwd=place.project)
    assert path == place.project / "ghostvis.yaml"
    assert place.resolve("lab").profile.engine.base_url == "http://localhost:30000"


def test_a_profile_that_could_not_be_read_again_is_not_begun(place: Place) -> None:
    for options in ({"name": "../x"}, {"name": ""}, {"name": "ok", "extends": "gone"}):
        with pytest.raises(UsageError):
            begin(**options, env=place.env, cwd=place.project)  # type: ignore[arg-type]
    assert list(place.user.iterdir()) == []


def test_a_place_that_cant_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be written"):
        begin("lab", env={"GHOSTVIS_CONFIG_DIR": str(tmp_path / "file")}, cwd=tmp_path)


@pytest.mark.parametrize("project", [False, True])
def test_a_starter_with_every_comment_taken_off_is_everything_at_its_default(
    place: Place, project: bool
) -> None:
    text = starter("lab", project=project)
    body = text[text.index("# extends") :]
    uncommented = text[: text.index("# extends")] + "\n".join(
        line.replace("# ", "", 1) for line in body.splitlines()
    )
    place.write(uncommented) if project else place.write_user("lab", uncommented)
    resolved = place.resolve("lab")
    assert resolved.chose(*keys()) and resolved.profile.sampling == Sampling()
    assert all(value.place != "default" for value in resolved.origins.values())


# --- keys and schema


def test_every_field_is_a_described_key() -> None:
    classes = {"engine": EngineSettings, "model": ModelSettings, "sampling": Sampling, "images": ImageLimits}
    expected = [f"{section}.{field.name}" for section, cls in classes.items() for field in fields(cls)]
    assert [*expected, "system"] == list(keys())
    assert all(key.about for key in keys().values())


def test_sources_are_those_that_checkpoints_can_have() -> None:
    assert keys()["model.source"].choices == (*SOURCE_DIRS, "demo")


def test_defaults_in_the_table_are_those_of_the_dataclasses() -> None:
    assert keys()["sampling.max_tokens"].default == Sampling().max_tokens
    assert get_args(get_type_hints(EngineSettings)["kind"]) == keys()["engine.kind"].choices


def test_the_published_schema_is_current() -> None:
    """If this fails: python -m ghostvis_cli.profile > docs/profile.schema.json"""
    assert (ROOT / "docs" / "profile.schema.json").read_text() == as_text()


def test_the_schema_knows_every_key_and_no_other() -> None:
    profile = schema()["$defs"]["profile"]
    found = [
        f"{name}.{inner}" if inner else name
        for name, entry in profile["properties"].items()
        for inner in (entry.get("properties") or [""])
    ]
    assert sorted(found) == sorted([*keys(), "description", "extends"])
    assert all(entry.get("additionalProperties", False) is False for entry in profile["properties"].values())


# --- start-up


def test_importing_profiles_loads_nothing_heavy() -> None:
    heavy = ["torch", "numpy", "PIL", "yaml", "httpx2", "rich", "pydantic", "typer", "ghostvis_cli.images"]
    code = f"import sys, ghostvis_cli.profile; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_resolving_loads_no_model_code() -> None:
    heavy = ["torch", "numpy", "PIL", "httpx2", "rich", "pydantic", "typer"]
    code = (
        "import sys, ghostvis_cli.profile as p; p.resolve('demo', env={});"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_built_in_profiles_are_plain_yaml() -> None:
    paths = [*(ROOT / "profiles").glob("*.yaml")]
    assert paths and all(isinstance(yaml.safe_load(path.read_text()), dict) for path in paths)


# --- .yaml and .yml


def test_files_may_end_in_yml(place: Place) -> None:
    (place.project / "ghostvis.yml").write_text("profiles: {default: {extends: lab, system: near}}")
    (place.user / "lab.v2.yml").write_text("sampling: {top_k: 7}")
    (place.user / "lab.yml").write_text("extends: lab.v2\nsystem: far")
    found = place.resolve()
    assert (found.profile.system, found.profile.sampling.top_k) == ("near", 7)
    assert [path.name for path in found.files] == ["ghostvis.yml", "lab.yml", "lab.v2.yml"]
    library = Library(place.env, place.project)
    assert [(stored.name, stored.path.suffix) for stored in library.all()][:3] == [
        ("default", ".yml"),
        ("lab", ".yml"),
        ("lab.v2", ".yml"),
    ]


def test_a_yml_file_is_checked_as_strictly(place: Place) -> None:
    (place.project / "ghostvis.yml").write_text("profiles:\n  default: {sampling: {temprature: 1}}\n")
    assert place.faults() == [
        "ghostvis.yml:2: profiles.default.sampling.temprature: unknown key (did you mean temperature?)"
    ]


def test_two_spellings_of_one_file_are_an_error_for_whoever_reads_it(place: Place) -> None:
    for suffix in ("yaml", "yml"):
        (place.user / f"lab.{suffix}").write_text("system: which?")
    assert place.resolve().profile.system is None
    told = "lab.yaml and lab.yml are both there: keep one of them"
    assert [fault.endswith(told) for fault in place.faults("lab")] == [True]
    assert [str(fault).endswith(told) for fault in validate(env=place.env, cwd=place.project).faults] == [
        True
    ]
    for suffix in ("yaml", "yml"):
        (place.project / f"ghostvis.{suffix}").write_text("profiles: {default: {system: either}}")
    assert place.faults() == [
        "ghostvis.yaml:1: ghostvis.yaml and ghostvis.yml are both there: keep one of them"
    ]


def test_a_new_profile_is_never_written_beside_one_of_its_name(place: Place) -> None:
    (place.user / "lab.yml").write_text("system: mine")
    (place.project / "ghostvis.yml").write_text("profiles: {default: {}}")
    for project in (False, True):
        with pytest.raises(UsageError, match="is there already"):
            begin("lab", project=project, env=place.env, cwd=place.project)
    assert begin("lab", force=True, env=place.env, cwd=place.project) == place.user / "lab.yml"
    assert not list(place.user.glob("*.yaml"))
