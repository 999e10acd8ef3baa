"""`ghostvis doctor` against real models, real servers and real faults."""

import json
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from packaging.requirements import Requirement
from PIL import Image

from ghostvis_cli import demo
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.doctor import card
from ghostvis_cli.doctor.finding import Check, Finding, examine
from ghostvis_cli.doctor.machine import admits, of_extra
from ghostvis_cli.engines.base import Chunk, GenerateRequest
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.image_limits import DEFAULT_LIMITS
from ghostvis_cli.images import load_image
from ghostvis_cli.prompt import Message
from tests.cli import invoke
from tests.commands.processes import scripted
from tests.conftest import DATA
from tests.engines.scripted import CARD, HELLO, Reply, ending, lines, usage, words
from tests.engines.serving import PATIENCE_S, running
from tests.sites import certificates, nobody_listens, server_tls

pytestmark = pytest.mark.usefixtures("here")
run = partial(invoke, "doctor")
TEXT_MODEL = DATA / "text_swiglu"


def examined(*args: str) -> tuple[int, list[Finding]]:
    """Exit code and findings."""
    result = run("--json", *args)
    record = json.loads(result.stdout)
    return result.exit_code, [Finding(**each) for each in record["findings"]]


def one(findings: list[Finding], area: str, name: str) -> Finding:
    (found,) = [each for each in findings if (each.area, each.name) == (area, name)]
    return found


def errors(findings: list[Finding]) -> list[Finding]:
    return [each for each in findings if each.status == "error"]


# --- a model in this process


def test_the_demo_model_answers_and_tells_up_from_down() -> None:
    code, findings = examined("--source", "demo")
    assert (code, errors(findings)) == (0, [])
    assert one(findings, "trip", "picture").message.startswith("64 tokens for the image")
    orientation = one(findings, "trip", "orientation")
    assert orientation.status == "ok"
    assert 'upright: "The red circle is at the top."' in orientation.message
    assert 'on its side: "The red circle is on the left."' in orientation.message
    assert one(findings, "trip", "cache").status == "ok"


def test_each_finding_is_one_line_and_the_summary_is_on_stderr() -> None:
    result = run("--no-run", "--base-dir", str(TEXT_MODEL), "--source", "base")
    assert result.exit_code == 0
    marks = {line[:4].strip() for line in result.stdout.splitlines()}
    assert marks <= {"ok", "note", "warn"}
    assert f" {len(result.stdout.splitlines())} findings, 0 errors" in result.stderr


def test_a_pipe_gets_no_colour_and_always_colours_the_mark_alone() -> None:
    args = ("--no-run", "--source", "demo")
    assert "\x1b" not in run(*args).stdout
    line = run(*args, "--color", "always").stdout.splitlines()[0]
    assert line.startswith("\x1b[32mok  \x1b[0m  python ")


def test_json_is_one_object_with_a_schema_version() -> None:
    result = run("--no-run", "--json", "--base-url", "http://127.0.0.1:9")
    record = json.loads(result.stdout)
    assert result.exit_code == 9
    assert (record["schema_version"], record["ok"]) == (1, False)
    assert {tuple(each) for each in record["findings"]} == {("area", "name", "status", "message", "fix")}
    assert {each["status"] for each in record["findings"]} <= {"ok", "note", "warning", "error"}


def test_without_a_run_no_model_is_loaded() -> None:
    code, findings = examined("--no-run", "--source", "demo")
    assert code == 0
    assert not [each for each in findings if each.area in ("model", "trip")]


def test_a_text_model_is_not_shown_an_image() -> None:
    code, findings = examined("--base-dir", str(TEXT_MODEL), "--source", "base")
    assert code == 0
    assert one(findings, "trip", "picture").message == "the model reads text only: no image was sent"


def test_a_model_without_words_for_it_leaves_the_orientation_unproven() -> None:
    code, findings = examined("--base-dir", str(DATA / "vlm_clip_hf"), "--source", "sft")
    assert code == 0
    orientation = one(findings, "trip", "orientation")
    assert orientation.status == "note"
    assert "its words don't tell" in orientation.message


@pytest.mark.parametrize(("tagged", "status"), [(True, "ok"), (False, "error")])
def test_an_image_that_leaves_on_its_side_is_found_out(tagged: bool, status: str) -> None:
    assert card.sent_upright(card.loaded(DEFAULT_LIMITS, tagged=tagged)).status == status


# --- a server


def reply(**counts: Any) -> Reply:
    return Reply((lines(*words("Hel", "lo"), ending(), usage(**counts), "[DONE]"),))


SGLANG: dict[str, Any] = {"/v1/models": {"data": [CARD | {"owned_by": "sglang"}]}, "/ready": {}}


class Blind(FakeEngine):
    """Counts an image as nothing, as a server does that drops it."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        texts = tuple(Message.of(message.role, message.text.strip()) for message in request.messages)
        async for chunk in super().generate(replace(request, messages=texts)):
            yield chunk


class Turning:
    """The demo model behind somebody who turns every image."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine, self.info, self.aclose = engine, engine.info, engine.aclose

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        turned = tuple(
            Message.of(
                message.role,
                message.text.strip(),
                [load_image(image.pil().transpose(Image.Transpose.ROTATE_180)) for image in message.images],
            )
            for message in request.messages
        )
        async for chunk in self.engine.generate(replace(request, messages=turned)):
            yield chunk


def demo_engine() -> LocalEngine:
    return LocalEngine.open(locate.find(demo.BASE_DIR, "sft", demo.MODEL_TAG), LocalSettings())


def test_a_server_of_ours_passes() -> None:
    with running(demo_engine()) as server:
        code, findings = examined("--base-url", server.url)
    assert (code, errors(findings)) == (0, [])
    assert one(findings, "server", "route").message == f"{server.url}, directly"
    assert one(findings, "server", "identity").message == "ghostvis serve"
    assert one(findings, "server", "context").message == "10240 tokens"
    assert one(findings, "trip", "picture").message.startswith("64 tokens")
    assert one(findings, "trip", "orientation").status == "ok"
    assert one(findings, "trip", "cache").status == "ok"


def test_a_server_that_turns_images_is_found_out() -> None:
    with running(Turning(demo_engine())) as server:
        code, findings = examined("--base-url", server.url)
    assert code == 9
    assert [each.name for each in errors(findings)] == ["orientation"]
    assert "at the bottom" in errors(findings)[0].message


def test_a_server_that_ignores_images_is_found_out() -> None:
    with running(Blind()) as server:
        code, findings = examined("--base-url", server.url)
    assert code == 9
    assert [(each.area, each.name) for each in errors(findings)] == [("trip", "picture")]
    assert "ignores images" in errors(findings)[0].message


def test_an_answer_that_says_nothing_of_the_image_proves_nothing() -> None:
    with running(FakeEngine()) as server:
        code, findings = examined("--base-url", server.url)
    assert code == 0
    assert one(findings, "trip", "orientation").message.startswith("not proven: the same answer to both")
    assert one(findings, "trip", "cache").status == "warning"


def test_sglang_that_does_not_report_cached_tokens_is_told_how() -> None:
    about = {"version": "0.5.23", "enable_cache_report": False, "dtype": "bfloat16"}
    image = reply(prompt_tokens=71, prompt_tokens_details={"cached_tokens": 0, "image_tokens": 64})
    with scripted(reply(), image, pages={**SGLANG, "/server_info": about}) as server:
        code, findings = examined("--base-url", server.url)
    assert code == 0
    assert one(findings, "server", "identity").message == "SGLang 0.5.23"
    assert one(findings, "trip", "picture").message.startswith("64 tokens")
    for area in ("server", "trip"):
        cache = one(findings, area, "cache")
        assert (cache.status, cache.message) == ("warning", "cached tokens are not reported")
        assert "--enable-cache-report" in str(cache.fix)


def test_sglang_that_says_its_model_has_no_eyes_is_sent_no_image() -> None:
    with scripted(pages={**SGLANG, "/model_info": {"has_image_understanding": False}}) as server:
        code, findings = examined("--base-url", server.url)
    assert code == 0
    assert one(findings, "trip", "picture").status == "note"


@pytest.mark.parametrize(("status", "found"), [(400, "warning"), (500, "error")])
def test_an_unknown_server_may_refuse_an_image_but_not_break_on_it(status: int, found: str) -> None:
    refused = Reply((b'{"error": {"message": "no eyes"}}',), status, {"Content-Type": "application/json"})
    with scripted(Reply((HELLO,)), refused) as server:
        code, findings = examined("--base-url", server.url)
    assert code == (9 if found == "error" else 0)
    assert one(findings, "trip", "picture").status == found
    assert "no eyes" in one(findings, "trip", "picture").message


def test_a_dead_port_is_a_finding_and_the_other_checks_go_on() -> None:
    code, findings = examined("--base-url", nobody_listens())
    assert code == 9
    (error,) = errors(findings)
    assert (error.area, error.name) == ("server", "connection")
    assert "Connection refused" in error.message
    assert "ghostvis serve" in str(error.fix)
    assert one(findings, "python", "version").status == "ok"


def test_a_key_that_is_not_there_is_told_once() -> None:
    code, findings = examined("--base-url", "http://127.0.0.1:9", "--set", "engine.api_key_env=NO_SUCH_KEY")
    assert code == 9
    assert [each.name for each in errors(findings)] == ["key"]


def test_a_silent_server_takes_no_longer_than_the_limit() -> None:
    started_s = time.monotonic()
    with scripted(pages={"/v1/models": Reply(silent=True)}) as server:
        code, findings = examined("--base-url", server.url, "--time-limit", "2")
    assert code == 9
    assert time.monotonic() - started_s < 30  # the two seconds, on a busy machine
    assert errors(findings)[0].area == "server"


def test_a_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:hush@127.0.0.1:9")
    monkeypatch.setenv("GHOSTVIS_API_KEY", "sk-very-secret-0123456789")
    result = run("--json", "--no-run", "--base-url", "http://gpu.test:30000")
    findings = [Finding(**each) for each in json.loads(result.stdout)["findings"]]
    assert result.exit_code == 9
    route = one(findings, "server", "route")
    assert route.message == "http://gpu.test:30000, through the proxy http://127.0.0.1:9"
    assert "NO_PROXY=gpu.test" in str(route.fix)
    assert one(findings, "server", "tls").message.startswith("plain http")
    assert one(findings, "server", "key").message == "read from the environment variable GHOSTVIS_API_KEY"
    assert not [word for word in ("hush", "very-secret") if word in result.output]


def test_a_certificate_is_verified_and_an_unknown_one_refused(tmp_path: Path) -> None:
    ours = f"engine.ca_file={certificates(tmp_path) / 'ca.pem'}"
    with scripted(tls=server_tls(tmp_path)) as server:
        code, findings = examined("--no-run", "--base-url", server.url, "--set", ours)
        assert (code, one(findings, "server", "tls").status) == (0, "ok")
        code, findings = examined("--no-run", "--base-url", server.url)
    assert code == 9
    assert "certificate" in errors(findings)[0].message
    assert "ca_file" in str(errors(findings)[0].fix)


# --- settings


def test_a_broken_profile_is_found_and_everything_else_still_examined(tmp_path: Path) -> None:
    (tmp_path / "ghostvis.yaml").write_text("profiles:\n  lab: {engine: {kind: lokal}, modle: 1}\n")
    code, findings = examined("--profile", "lab")
    assert code == 9
    assert {each.area for each in errors(findings)} == {"profile"}
    assert len(errors(findings)) == 2
    assert "modle" in " ".join(each.message for each in errors(findings))
    assert one(findings, "memory", "ram").status in ("ok", "note")
    assert one(findings, "pictures", "loader").status == "ok"


def test_a_fault_in_what_was_typed_is_not_looked_for_in_files() -> None:
    _, findings = examined("--base-url", "http://box?x")
    found = [each for each in errors(findings) if each.area == "profile"]
    assert [each.fix for each in found] == [None]


def test_faults_of_a_profile_that_is_not_used_are_warnings(tmp_path: Path) -> None:
    (tmp_path / "ghostvis.yaml").write_text("profiles:\n  lab: {modle: 1}\n")
    code, findings = examined("--no-run", "--source", "demo")
    assert code == 0
    assert "modle" in one(findings, "profile", "others").message


def test_a_variable_that_means_nothing_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOSTVIS_TEMPRATURE", "1")
    code, findings = examined("--no-run", "--source", "demo")
    assert code == 0
    assert "GHOSTVIS_TEMPRATURE" in one(findings, "profile", "notice").message


# --- checkpoints


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base directory with one good model, d4, and one cut short, d8."""
    shutil.copytree(TEXT_MODEL, tmp_path / "base")
    tags = tmp_path / "base" / "base_checkpoints"
    shutil.copytree(tags / "d4", tags / "d8")
    (weights,) = (tags / "d8").glob("model_*.pt")
    weights.write_bytes(weights.read_bytes()[:-1000])
    return tmp_path / "base"


def test_a_damaged_checkpoint_is_a_warning_beside_the_chosen_one(base: Path) -> None:
    code, findings = examined("--no-run", "--base-dir", str(base), "--source", "base", "--model-tag", "d4")
    assert code == 0
    damaged, count = [each for each in findings if (each.area, each.name) == ("checkpoints", "base")]
    assert damaged.status == "warning"
    assert "d8" in damaged.message
    assert count.message == "2 checkpoints, tags: d8, d4"


def test_a_damaged_checkpoint_that_was_chosen_is_an_error(base: Path) -> None:
    code, findings = examined("--no-run", "--base-dir", str(base), "--source", "base", "--model-tag", "d8")
    assert code == 9
    assert [(each.area, each.name) for each in errors(findings)] == [("checkpoints", "chosen")]


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_an_error(base: Path) -> None:
    own = Tokenizer.load(base / "tokenizer" / "tokenizer.pkl")
    specials = own.specials | {"<|extra|>": own.vocab_size}
    larger = tiktoken.Encoding(
        "larger", pat_str=own.pattern, mergeable_ranks=own.ranks, special_tokens=specials
    )
    (base / "base_checkpoints" / "d4" / "tokenizer.pkl").write_bytes(pickle.dumps(larger))
    code, findings = examined("--no-run", "--base-dir", str(base), "--source", "base", "--model-tag", "d4")
    assert code == 9
    (error,) = errors(findings)
    assert "do not belong together" in error.message


def test_no_base_directory_is_a_note_unless_it_was_named(tmp_path: Path) -> None:
    code, findings = examined("--no-run")
    assert (code, one(findings, "checkpoints", "base dir").status) == (0, "note")
    missing = str(tmp_path / "nowhere")
    code, findings = examined("--no-run", "--base-dir", missing)
    assert code == 9
    assert one(findings, "checkpoints", "base dir").status == "warning"
    assert missing in one(findings, "checkpoints", "chosen").message


# --- without torch

# An interpreter to which the packages of [local] were never installed: neither importable nor in the metadata.
HIDE = """
import sys
class Hidden:
    NAMES = ("torch", "numpy", "safetensors", "tiktoken", "tokenizers")
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.metadata as metadata
real = metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name in Hidden.NAMES:
        raise metadata.PackageNotFoundError(name)
    return real(cls, name)
metadata.Distribution.from_name = classmethod(from_name)
sys.meta_path.insert(0, Hidden())
from ghostvis_cli.cli.app import main
main()
"""


def without_torch(*args: str) -> tuple[int, list[Finding]]:
    command = [sys.executable, "-c", HIDE, "doctor", "--json", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, [Finding(**each) for each in json.loads(done.stdout)["findings"]]


def test_a_client_without_torch_is_well() -> None:
    with running(FakeEngine()) as server:
        code, findings = without_torch("--base-url", server.url)
    assert (code, errors(findings)) == (0, [])
    for area, name in (("torch", "version"), ("packages", "local")):
        found = one(findings, area, name)
        assert (found.status, found.fix) == ("note", "pip install 'ghostvis-cli[local]'")


def test_the_local_engine_without_torch_is_an_error_with_its_fix() -> None:
    code, findings = without_torch()
    assert code == 9
    assert {each.area for each in errors(findings)} == {"packages", "torch", "model"}
    assert {each.fix for each in errors(findings)} == {"pip install 'ghostvis-cli[local]'"}


# --- the frame


def raises() -> Iterator[Finding]:
    yield Finding("broken", "first", "ok", "said before")
    raise ZeroDivisionError("by nought")


def hangs() -> Iterator[Finding]:
    threading.Event().wait(PATIENCE_S)
    yield Finding("slow", "late", "ok", "too late")


def fine() -> Iterator[Finding]:
    yield Finding("fine", "all", "ok", "well")


def test_a_check_that_raises_or_hangs_is_a_finding_and_the_next_one_runs() -> None:
    crashes: list[BaseException] = []
    checks = [Check("broken", raises), Check("slow", hangs), Check("fine", fine)]
    found = list(examine(checks, 1.0, crashes.append))
    assert [(each.area, each.status) for each in found] == [
        ("broken", "ok"),
        ("broken", "error"),
        ("slow", "error"),
        ("fine", "ok"),
    ]
    assert "ZeroDivisionError: by nought" in found[1].message
    assert [type(error) for error in crashes] == [ZeroDivisionError]


@pytest.mark.parametrize(
    ("line", "version", "admitted"),
    [
        ("torch>=2.6; extra == 'local'", "2.11.0+cpu", True),
        ("torch>=2.6; extra == 'local'", "2.6.0a0+df5bbc09.nv24.12", True),
        ("torch>=2.6; extra == 'local'", "2.5.1", False),
        ("typer<0.29,>=0.26", "0.28.1", True),
        ("typer<0.29,>=0.26", "0.29.0", False),
        ("pyyaml~=6.0", "7.0", False),
        ("pyyaml!=6.0.3", "6.0.3", False),
        ("openai==2.*", "2.3", True),
        ("rich", "1", True),
        ("rich", "of today", False),
    ],
)
def test_versions_are_compared_with_our_own_metadata(line: str, version: str, admitted: bool) -> None:
    assert admits(Requirement(line), version) is admitted


@pytest.mark.parametrize(
    ("marker", "told"),
    [
        ("sys_platform == 'plan9' and platform_machine == 'x86_64'", ("note", "gone is not for ")),
        ("python_version >= '3.11'", ("note", "missing: gone>=1 ")),
        ("python_version < '3.11' or sys_platform == 'win32'", ("note", "gone is not for ")),
    ],
)
def test_a_package_that_is_not_for_this_machine_is_not_missed(marker: str, told: tuple[str, str]) -> None:
    lines = [
        f"gone>=1; ({marker}) and extra == 'sglang'",
        "rich; extra == 'sglang'",
        "lost; extra == 'serve'",
    ]
    found = list(of_extra(lines, "sglang", "note", "X", "SGLang"))
    assert (found[-1].status, found[-1].message[: len(told[1])]) == told
    assert not any("lost" in finding.message for finding in found)


def test_what_converted_models_take_is_told_with_how_to_have_it_back(
    tmp_path: Path,
) -> None:
    entry = tmp_path / "cache" / "converted" / "d4-0123"
    entry.mkdir(parents=True)
    with (entry / "model.safetensors").open("wb") as file:
        file.truncate(1_500_000_000)
    finding = one(examined("--no-run")[1], "directories", "converted")
    assert finding.message.startswith("1.50 GB")
    assert finding.fix is not None
    assert str(entry.parent) in finding.fix
