"""`ghostvis serve --engine sglang` as a real process, from its announcement to its end, however that comes.

A start takes 20 s on a calm machine, so one server is asked everything that leaves it alive, in this order.
"""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from ghostvis_cli import demo
from ghostvis_cli.convert import run as conversion
from ghostvis_cli.convert.plan import ConvertSettings, make_plan
from ghostvis_cli.sglang.child import members
from ghostvis_cli.sglang.runtime import CPU_RUNNING_REQUESTS
from tests.conftest import DATA, Reference
from tests.engines.serving import eventually

pytestmark = pytest.mark.slow

GHOSTVIS = Path(sys.executable).with_name("ghostvis")
TEXT_MODEL = ("--base-dir", str(DATA / "text_swiglu"), "--source", "base")
PATIENCE_S = 300.0  # a start on a machine that many others use: seen 170 s
KEY = "s3cret-of-the-tests"
PAGE = "https://app.example"
MAINS = (b"sglang.launch_server", b"ghostvis_cli.sglang.plugin.launch")
WORKERS = ("--", "--tokenizer-worker-num", "2")
MARK = "SERVE_TEST"  # a variable that everything below one `ghostvis` inherits


class Process:
    """`ghostvis serve --engine sglang --json ARGS`, in a session of its own."""

    def __init__(self, cache: Path, *args: str, **variables: str) -> None:
        self.mark = uuid4().hex
        # Models this small are many times slower on two threads than on one where others want the cores.
        own = {"GHOSTVIS_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", MARK: self.mark}
        command = [str(GHOSTVIS), "serve", "--engine", "sglang", "--device", "cpu", "--json", *args]
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | own | variables,
            start_new_session=True,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=lines.extend, args=(stream,), daemon=True)
            for lines, stream in ((self.out, self.process.stdout), (self.err, self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def until(self, words: str, times: int = 1) -> None:
        """Wait for these words on stderr."""

        def said() -> bool:
            assert self.process.poll() is None, self.said
            return sum(words in line for line in self.err) >= times

        eventually(said, within_s=PATIENCE_S)

    @property
    def said(self) -> str:
        return "".join(self.err)

    @property
    def record(self) -> dict[str, Any]:
        return dict(json.loads(self.out[0]))

    @property
    def group(self) -> int:
        """SGLang's process group: the child of ours that is not the watcher."""
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes()
                if parent == self.process.pid and any(module in command for module in MAINS):
                    return int(entry.name)
        return 0

    def begun(self) -> int:
        """SGLang's process group once it is there; it imports for many seconds then."""

        def is_there() -> bool:
            assert self.process.poll() is None, self.said
            return self.group > 0

        eventually(is_there, within_s=PATIENCE_S)
        return self.group

    def post(self, body: dict[str, Any], **options: Any) -> httpx2.Response:
        asked = {"model": self.record["model"], "temperature": 0, **body}
        return self.ask("POST", "/v1/chat/completions", json=asked, **options)

    def ask(self, method: str, path: str, key: str = KEY, **options: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {key}"}
        url = f"{self.record['url']}{path}"
        return httpx2.request(method, url, headers=headers, trust_env=False, timeout=PATIENCE_S, **options)

    def end(self, number: signal.Signals | None = None) -> int:
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        return code

    def left(self) -> list[str]:
        """What still lives of all that this process ever started, by the variable they share."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found


@contextmanager
def serving(cache: Path, *args: str, **variables: str) -> Iterator[Process]:
    process = Process(cache, *args, **variables)
    try:
        yield process
    finally:
        group = process.group
        process.process.kill()
        process.process.wait()
        if group:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(cache: Path) -> Iterator[Process]:
    """The demo model, with a key, started again when it falls."""
    args = ("--source", "demo", "--port", "0", "--restart", "on-failure", "--temperature", "0.5")
    limits = ("--max-tokens", "5", "--cors-origin", PAGE)
    with serving(cache, *args, *limits, GHOSTVIS_API_KEY=KEY) as process:
        process.until("ready after")
        eventually(lambda: bool(process.out))
        yield process


def image_question() -> list[dict[str, Any]]:
    data = base64.b64encode(demo.EXAMPLES[0].read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return [{"role": "user", "content": [image, {"type": "text", "text": "What is in this picture?"}]}]


# --- one server, alive


def test_it_is_announced_once_it_is_ready_with_model_and_context(server: Process) -> None:
    record = server.record
    assert (record["schema_version"], record["engine"], record["model"]) == (1, "sglang", "vlm_tiny")
    assert record["pid"] == server.process.pid
    assert record["url"] == f"http://127.0.0.1:{record['port']}"
    assert record["context_tokens"] > 2000
    assert len(server.out) == 1
    assert "serving with SGLang" in server.said


def test_an_image_is_seen_counted_and_cached(server: Process) -> None:
    first, again = (server.post({"messages": image_question(), "max_tokens": 12}).json() for _ in range(2))
    assert first["choices"][0]["message"]["content"] == "A red circle on a white background."
    assert first["choices"] == again["choices"]
    details = again["usage"]["prompt_tokens_details"]
    assert details["image_tokens"] == 64
    assert details["cached_tokens"] == again["usage"]["prompt_tokens"] - 1


def test_its_own_limit_holds_for_answers_and_its_origins_for_pages(server: Process) -> None:
    """The rest of what SGLang's server is told is tried in test_door.py."""
    answer = server.post({"messages": image_question(), "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 5
    asking = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    url = f"{server.record['url']}/v1/chat/completions"
    preflight = httpx2.request("OPTIONS", url, headers=asking, trust_env=False)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, PAGE)


def test_without_the_key_nothing_is_answered(server: Process) -> None:
    for path in ("/v1/models", "/model_info", "/flush_cache", "/server_info"):
        assert httpx2.get(server.record["url"] + path, trust_env=False).status_code == 401


def test_the_key_is_in_no_argument_no_environment_and_no_log(server: Process) -> None:
    assert members(server.group)
    for pid in members(server.group):
        for file in ("cmdline", "environ"):
            assert KEY.encode() not in Path("/proc", str(pid), file).read_bytes()
    assert KEY not in server.said
    folder = Path(f"/proc/{server.group}/cmdline").read_bytes().split(b"\0")
    link = Path(folder[folder.index(b"--config") + 1].decode())
    assert str(link.readlink()).startswith("/proc/self/fd/")  # no file holds it either


def test_what_the_server_says_of_itself_holds_no_key(server: Process) -> None:
    bearer = {"Authorization": f"Bearer {KEY}"}
    said = httpx2.get(f"{server.record['url']}/server_info", headers=bearer, trust_env=False)
    assert said.status_code == 200
    assert said.json()["api_key"] == "***"
    assert KEY not in said.text


def test_stderr_has_milestones_and_requests_and_no_batches(server: Process) -> None:
    eventually(lambda: '"POST /v1/chat/completions HTTP/1.1" 200' in server.said)
    assert "Load weight end" in server.said
    assert "Decode batch" not in server.said
    assert "Traceback" not in server.said


def test_a_killed_scheduler_takes_sglang_down_and_it_comes_back_at_the_same_address(server: Process) -> None:
    before = server.group
    schedulers = [
        pid for pid in members(before) if b"sglang::scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(schedulers[0], signal.SIGKILL)
    server.until("starting again in 1 s")
    server.until("ready after", times=2)
    assert members(before) == []
    assert server.group != before
    answer = server.post({"messages": image_question(), "max_tokens": 12}).json()
    assert answer["choices"][0]["message"]["content"] == "A red circle on a white background."


def test_killed_itself_it_leaves_no_process(server: Process) -> None:
    """SIGKILL: nothing of ours runs any more but the watcher. The last test of this server."""
    group = server.group
    assert members(group)
    server.end(signal.SIGKILL)
    eventually(lambda: not members(group), within_s=30)
    eventually(lambda: not server.left(), within_s=30)


# --- servers that end


@pytest.mark.parametrize("options", [(), WORKERS], ids=["one worker", "two workers"])
def test_sigterm_lets_16_running_requests_finish(cache: Path, options: tuple[str, ...]) -> None:
    with serving(cache, *TEXT_MODEL, "--port", "0", "--drain-timeout", "240", *options) as process:
        process.until("ready after")
        eventually(lambda: bool(process.out))
        begun, counts = threading.Barrier(CPU_RUNNING_REQUESTS + 1), []

        def ask(number: int) -> None:
            body = {
                "model": process.record["model"],
                "messages": [{"role": "user", "content": f"Count from {number}"}],
                "max_tokens": 200,  # 16 of them fit into the cache at once
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            url = f"{process.record['url']}/v1/chat/completions"
            with httpx2.stream("POST", url, json=body, trust_env=False, timeout=PATIENCE_S) as response:
                lines = response.iter_lines()
                next(line for line in lines if line)
                begun.wait()
                events = [line for line in lines if line.startswith("data: {")]
            counts.append(json.loads(events[-1][6:])["usage"]["completion_tokens"])

        askers = [threading.Thread(target=ask, args=(number,)) for number in range(CPU_RUNNING_REQUESTS)]
        for asker in askers:
            asker.start()
        begun.wait(PATIENCE_S)
        group = process.group
        process.process.send_signal(signal.SIGTERM)
        for asker in askers:
            asker.join(PATIENCE_S)
        assert process.end() == 0
        assert counts == [200] * CPU_RUNNING_REQUESTS
        assert members(group) == []
        assert process.left() == []


def test_each_of_several_http_workers_has_the_guards_and_knows_an_image_that_another_read(
    cache: Path,
) -> None:
    """Each request comes on a connection of its own, which either of two workers may take."""
    with serving(cache, "--source", "demo", "--port", "0", *WORKERS, GHOSTVIS_API_KEY=KEY) as process:
        process.until("ready after")
        eventually(lambda: bool(process.out))
        answers = [process.post({"messages": image_question(), "max_tokens": 1}) for _ in range(12)]
        details = [answer.json()["usage"]["prompt_tokens_details"] for answer in answers]
        assert all(each["cached_tokens"] > each["image_tokens"] for each in details[1:]), details
        body = {"input_ids": [10**7], "sampling_params": {"max_new_tokens": 1}}
        refused = [process.ask("POST", "/generate", json=body) for _ in range(12)]
        assert {answer.status_code for answer in refused} == {400}
        assert {process.ask("GET", "/v1/models", key="no").status_code for _ in range(12)} == {401}
        for pid in members(process.group):
            assert all(
                KEY.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
                for name in ("cmdline", "environ")
            )
        assert KEY not in process.said and "Traceback" not in process.said
        assert process.post({"messages": image_question(), "max_tokens": 1}).status_code == 200


def test_a_child_killed_while_it_starts_is_an_engine_error_and_leaves_nothing(cache: Path) -> None:
    with serving(cache, *TEXT_MODEL, "--port", "0") as process:
        eventually(lambda: len(members(process.group or -1)) > 1, within_s=PATIENCE_S)  # it has children
        os.kill(process.group, signal.SIGKILL)
        assert process.end() == 5
        assert "SGLang was killed (SIGKILL)" in process.said
        assert process.record["error"]["code"] == 5
        assert process.left() == []


def test_killed_itself_while_sglang_imports_it_leaves_no_process(cache: Path) -> None:
    """The moment when SGLang's own processes do not yet look after their parent."""
    with serving(cache, *TEXT_MODEL, "--port", "0") as process:
        group = process.begun()
        process.end(signal.SIGKILL)
        eventually(lambda: not members(group), within_s=30)
        eventually(lambda: not process.left(), within_s=30)


def test_a_signal_while_it_starts_ends_it_at_once(cache: Path) -> None:
    with serving(cache, *TEXT_MODEL, "--port", "0", "--ready-timeout", "600") as process:
        process.begun()
        assert process.end(signal.SIGINT) == 0
        assert process.left() == []


def test_a_damaged_model_is_told_as_one(cache: Path, tmp_path: Path) -> None:
    checkpoint = Reference("text_swiglu").checkpoint()
    plan = make_plan(checkpoint, ConvertSettings(dtype="float32", verify=False))
    place = tmp_path / "model"
    conversion.run(plan, place, conversion.Progress(plan.weights_bytes))
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with serving(cache, "--checkpoint-path", str(place), "--port", "0") as process:
        assert process.end() == 4
        assert "was changed since it was converted: model.safetensors" in process.said
        assert "the converted model is damaged" in process.said
        assert process.left() == []


# --- refusals that cost nothing


def refused(cache: Path, *args: str) -> tuple[int, str]:
    with serving(cache, *args) as process:
        code = process.end()
        assert process.left() == []
        return code, process.said


def test_a_taken_port_is_told_before_anything_is_converted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = refused(tmp_path / "cache", *TEXT_MODEL, "--port", str(port))
    assert code == 5
    assert f"port {port} is taken by process {os.getpid()}" in said
    assert not (tmp_path / "cache").exists()


def test_a_checkpoint_that_is_none_is_told_and_leaves_no_entry(tmp_path: Path) -> None:
    original = Reference("text_swiglu").checkpoint()
    broken = tmp_path / "in"
    broken.mkdir()
    for path in (original.path, original.meta_path, original.tokenizer_path):
        shutil.copy(path, broken / path.name)
    (broken / original.path.name).write_bytes(original.path.read_bytes()[:100_000])
    code, said = refused(tmp_path / "cache", "--checkpoint-path", str(broken), "--port", "0")
    assert code == 4
    assert original.path.name in said
    assert [entry for entry in (tmp_path / "cache" / "converted").iterdir() if entry.is_dir()] == []


def test_options_that_sglang_does_not_know_are_a_usage_error(cache: Path) -> None:
    code, said = refused(cache, *TEXT_MODEL, "--port", "0", "--", "--no-such-option", "1")
    assert code == 2
    assert "unrecognized arguments: --no-such-option" in said


def test_a_wide_address_needs_a_key(cache: Path) -> None:
    code, said = refused(cache, *TEXT_MODEL, "--port", "0", "--host", "0.0.0.0")
    assert code == 2
    assert "there is no API key" in said
