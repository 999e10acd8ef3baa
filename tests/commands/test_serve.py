"""`ghostvis serve` as a real process, and its refusals."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import httpx2
import openai
import pytest

from ghostvis_cli.engines.base import Sampling
from tests.cli import invoke
from tests.commands.processes import Running, environment, running
from tests.conftest import DATA
from tests.engines.serving import PATIENCE_S, USER, client, image_part, user
from tests.pictures import data_url

MODEL = ("--engine", "local", "--base-dir", str(DATA / "vlm_clip_hf"), "--source", "sft", "--port", "0")
run = partial(invoke, "serve")


@contextmanager
def serving(*args: str, key: str | None = None) -> Iterator[tuple[Running, str]]:
    """`ghostvis serve ARGS`, and the first line of its stdout."""
    with running("serve", *MODEL, *args, env=environment(GHOSTVIS_API_KEY=key)) as started:
        yield started, started.line()


def test_it_prints_its_address_serves_the_model_and_leaves_with_0() -> None:
    image = data_url((DATA / "vlm_clip_hf" / "image.png").read_bytes())
    question = user(image_part(image), {"type": "text", "text": "What is it?"})
    with serving("--max-tokens", "3", "--temperature", "0") as (server, url):
        assert url.startswith("http://127.0.0.1:")
        for path in ("/healthz", "/readyz", "/health"):
            assert httpx2.get(url + path, trust_env=False).status_code == 200
        (model,) = client(url).models.list().data
        create = partial(client(url).chat.completions.create, model=model.id, messages=question)
        answers = create(), create()
        ended = server.send(signal.SIGTERM)
    assert (ended.code, ended.out) == (0, "")
    assert answers[0].choices[0].message == answers[1].choices[0].message
    first, again = (answer.usage for answer in answers)
    assert 1 <= first.completion_tokens <= 3
    assert first.prompt_tokens_details.to_dict()["image_tokens"] == 8
    assert again.prompt_tokens_details.cached_tokens > first.prompt_tokens_details.cached_tokens
    assert "ready after" in ended.err
    assert "POST /v1/chat/completions 200" in ended.err
    assert " id=" in ended.err


def test_json_tells_address_and_process_and_the_key_is_shown_nowhere() -> None:
    with serving("--json", "--verbose", key="s3cret-s3cret") as (server, line):
        record = json.loads(line)
        assert (record["schema_version"], record["pid"]) == (1, server.process.pid)
        assert (record["engine"], record["context_tokens"] > 0) == ("local", True)
        assert record["url"].endswith(f":{record['port']}")
        with pytest.raises(openai.AuthenticationError):
            client(record["url"], "wrong").models.list()
        ours = client(record["url"], "s3cret-s3cret")
        assert ours.models.list().data
        stream = ours.chat.completions.create(
            model=record["model"],
            messages=USER,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        tokens, limit = 0, Sampling().max_tokens
        while tokens <= limit:  # which nobody named for this server
            tokens += len(next(stream).choices[0].to_dict().get("token_ids", ()))
        stream.close()
        ended = server.send(signal.SIGTERM)
    assert ended.code == 0
    assert "GET /v1/models 401" in ended.err
    assert "s3cret" not in ended.out + ended.err


def test_quiet_leaves_stderr_empty() -> None:
    with serving("--quiet") as (server, _):
        ended = server.send(signal.SIGTERM)
    assert (ended.code, ended.out, ended.err) == (0, "", "")


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
