"""`ghostvis serve` as a real process, and its refusals."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import httpx2
import openai
import pytest
from typer.testing import CliRunner, Result

from ghostvis_cli.cli.app import build
from ghostvis_cli.engines.base import Sampling
from tests.conftest import DATA
from tests.engines.serving import PATIENCE_S

MODEL = ("--engine", "local", "--base-dir", str(DATA / "vlm_clip_hf"), "--source", "sft", "--port", "0")
MAIN = "from ghostvis_cli.cli.app import main; main()"


class Process:
    """`ghostvis serve ARGS`, its first line of stdout read."""

    def __init__(self, *args: str, key: str | None = None) -> None:
        environment = os.environ | ({} if key is None else {"GHOSTVIS_API_KEY": key})
        command = [sys.executable, "-c", MAIN, "serve", *MODEL, *args]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline().strip()
        self.url = json.loads(self.first_line)["url"] if "--json" in args else self.first_line

    def client(self, key: str = "none") -> Any:  # what our servers add is in none of the library's types
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)

    def end(self) -> tuple[int, str, str]:
        """SIGTERM: exit code, the rest of stdout, stderr."""
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err


@contextmanager
def serving(*args: str, key: str | None = None) -> Iterator[Process]:
    process = Process(*args, key=key)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.communicate()


def run(*args: str) -> Result:
    return CliRunner().invoke(build(), ["serve", *args], prog_name="ghostvis")


def image_question() -> list[Any]:
    data = base64.b64encode((DATA / "vlm_clip_hf" / "image.png").read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "What is it?"},
    ]
    return [{"role": "user", "content": parts}]


def test_it_prints_its_address_serves_the_model_and_leaves_with_0() -> None:
    with serving("--max-tokens", "3", "--temperature", "0") as server:
        assert server.first_line.startswith("http://127.0.0.1:")
        for path in ("/healthz", "/readyz", "/health"):
            assert httpx2.get(server.url + path, trust_env=False).status_code == 200
        (model,) = server.client().models.list().data
        answers = [
            server.client().chat.completions.create(model=model.id, messages=image_question())
            for _ in range(2)
        ]
        code, out, err = server.end()
    assert (code, out) == (0, "")
    assert answers[0].choices[0].message == answers[1].choices[0].message
    first, again = (answer.usage for answer in answers)
    assert 1 <= first.completion_tokens <= 3
    assert first.prompt_tokens_details.to_dict()["image_tokens"] == 8
    assert again.prompt_tokens_details.cached_tokens > first.prompt_tokens_details.cached_tokens
    assert "ready after" in err
    assert "POST /v1/chat/completions 200" in err
    assert " id=" in err


def test_json_tells_address_and_process_and_the_key_is_shown_nowhere() -> None:
    with serving("--json", "--verbose", key="s3cret-s3cret") as server:
        record = json.loads(server.first_line)
        assert (record["schema_version"], record["pid"]) == (1, server.process.pid)
        assert (record["engine"], record["context_tokens"] > 0) == ("local", True)
        assert server.url.endswith(f":{record['port']}")
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert server.client("s3cret-s3cret").models.list().data
        stream = server.client("s3cret-s3cret").chat.completions.create(
            model=record["model"],
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        tokens, limit = 0, Sampling().max_tokens
        while tokens <= limit:  # which nobody named for this server
            tokens += len(next(stream).choices[0].to_dict().get("token_ids", ()))
        stream.close()
        code, out, err = server.end()
    assert code == 0
    assert "GET /v1/models 401" in err
    assert "s3cret" not in out + err


def test_quiet_leaves_stderr_empty() -> None:
    with serving("--quiet") as server:
        assert server.end() == (0, "", "")


def test_no_address_is_printed_for_a_model_that_is_not_there() -> None:
    result = run("--engine", "local", "--checkpoint-path", "/no/such/model", "--port", "0")
    assert (result.exit_code, result.stdout) == (4, "")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--host", "0.0.0.0"), 2, "no API key"),
        (("--api-key-env", "NO_SUCH_KEY"), 2, "NO_SUCH_KEY holds no key"),
        (("--port", "70000"), 2, "--port"),
        (("--cors-origin", "app.example"), 2, "is not an origin"),
        (("--cors-origin", "https://app.example/page"), 2, "is not an origin"),
        (("--cors-origin", "https://*.example"), 2, "is not an origin"),
        (("--allowed-host", "*.example"), 2, "is not a host's name"),
        (("--allowed-host", "https://app.example"), 2, "is not a host's name"),
        (("--allow-image-host", "https://app.example/a"), 2, "is not a host's name"),
        (("--cors-origin", "*"), 2, "there is no API key"),
        (("--engine", "remote", "--set", "engine.base_url=http://127.0.0.1:9"), 2, "the engine is remote"),
        (("--checkpoint-path", "/no/such/model", "--port", "0"), 4, "/no/such/model"),
    ],
)
def test_what_cannot_be_served_is_said_with_a_code(args: tuple[str, ...], code: int, words: str) -> None:
    result = run(*args)
    assert result.exit_code == code
    assert words in result.stderr


def test_a_taken_port_is_told_before_any_model_is_looked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("--port", port, "--checkpoint-path", "/no/such/model")
    assert result.exit_code == 5
    assert f"port {port} is taken by process {os.getpid()}" in result.stderr


@pytest.mark.skipif(find_spec("sglang") is not None, reason="SGLang is installed here")
def test_sglang_asked_for_and_not_installed_is_an_engine_error_with_a_hint() -> None:
    result = run("--engine", "sglang", "--port", "0")
    assert result.exit_code == 5
    assert "SGLang is not installed" in result.stderr
    assert "pip install 'ghostvis-cli[sglang]'" in result.stderr


@pytest.mark.parametrize("words", [("--restart", "on-failure"), ("--", "--chunked-prefill-size", "16")])
def test_what_is_for_sglang_is_refused_by_the_local_engine(words: tuple[str, ...]) -> None:
    result = run("--engine", "local", *words)
    assert result.exit_code == 2
    assert "are for SGLang" in result.stderr


def test_help_imports_neither_the_server_nor_a_model() -> None:
    heavy = ("torch", "uvicorn", "starlette", "prometheus_client", "httpx2", "PIL")
    code = f"import atexit, sys; atexit.register(lambda: print([m for m in {heavy} if m in sys.modules])); "
    code += "from ghostvis_cli.cli.app import build; build()(['serve', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert "--allow-image-host" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
