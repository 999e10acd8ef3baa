"""What `ghostvis serve` promises at its door, kept by SGLang's own HTTP server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from ghostvis_cli.serve.settings import ServerSettings
from ghostvis_cli.sglang.plugin.door import Rules
from tests.engines.serving import USER
from tests.sglang.asking import DEMO, directory
from tests.sglang.servers import Server, serving

pytestmark = pytest.mark.xdist_group("door")
PAGE = "https://app.example"
CONTEXT = 256


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    rules = Rules.of(ServerSettings(cors_origins=(PAGE,), allowed_hosts=("box.example",)))
    place = directory(DEMO, tmp_path_factory.mktemp("door"))
    with serving(place, "--context-length", str(CONTEXT), **rules.as_variable()) as started:
        yield started


def ask(server: Server, method: str, path: str, body: Any = None, **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with httpx2.Client(trust_env=False, timeout=60) as client:
        return client.request(method, server.url + path, json=body, headers=named)


def chat(server: Server, **fields: Any) -> httpx2.Response:
    body = {"messages": USER, "max_tokens": 1, "temperature": 0, **fields}
    return ask(server, "POST", "/v1/chat/completions", body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *(
            ({name: "x"}, name)
            for name in ("guided_json", "structured_outputs", "grammar", "n_predict", "images")
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "messages[0].images"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": "x"}]}]},
            "messages[0].content[0].image_url",
        ),
        ({"stream_options": {"usage": True}}, "stream_options.usage"),
    ],
)
def test_a_field_that_sglang_would_drop_is_refused_by_its_name(
    server: Server, fields: dict[str, Any], param: str
) -> None:
    answer = chat(server, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_what_sglang_follows_and_what_means_nothing_pass(server: Server) -> None:
    ignored = {"store": False, "service_tier": "auto", "metadata": {"a": "b"}, "parallel_tool_calls": True}
    followed = {"frequency_penalty": 0.5, "min_tokens": 1, "return_token_ids": True}
    assert chat(server, tools=[], tool_choice="none", **ignored, **followed).status_code == 200
    body = {"prompt": "a", "max_tokens": 1, "best_of": 1, "user": "me"}
    assert ask(server, "POST", "/v1/completions/", body).status_code == 200
    assert ask(server, "POST", "/v1/completions", {**body, "max_completion_tokens": 1}).status_code == 400


@pytest.mark.parametrize("prompt", ["Hello.", ["Hello.", "Why?"], [261, 701], [[261, 701], [388]]], ids=str)
def test_a_prompt_is_scored_without_an_answer(server: Server, prompt: Any) -> None:
    """As evaluation asks for it: `max_tokens: 0`, which SGLang's own route has no room for."""
    body = {"prompt": prompt, "temperature": 0, "echo": True, "logprobs": 1}
    answered, scored = (
        ask(server, "POST", "/v1/completions", {**body, "max_tokens": limit}).json() for limit in (1, 0)
    )
    assert (scored["usage"]["completion_tokens"], scored["choices"][0]["finish_reason"]) == (0, "length")
    assert scored["usage"]["prompt_tokens"] == answered["usage"]["prompt_tokens"]
    for choice, longer in zip(scored["choices"], answered["choices"], strict=True):
        assert longer["text"].startswith(choice["text"])
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            assert choice["logprobs"][name] == longer["logprobs"][name][:-1]
    events = ask(server, "POST", "/v1/completions", {**body, "max_tokens": 0, "stream": True}).text
    told = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    streamed = [each for event in told for each in event["choices"] if each["logprobs"]]
    assert [each["logprobs"]["tokens"] for each in sorted(streamed, key=lambda each: int(each["index"]))] == [
        choice["logprobs"]["tokens"] for choice in scored["choices"]
    ]
    without = ask(server, "POST", "/v1/completions", {"prompt": prompt, "max_tokens": 0}).json()
    assert {choice["text"] for choice in without["choices"]} == {""}


@pytest.mark.parametrize("limit", [-1, False, 0.5, "0"], ids=str)
def test_no_other_limit_is_taken_for_that_one(server: Server, limit: Any) -> None:
    answer = ask(server, "POST", "/v1/completions", {"prompt": "a", "max_tokens": limit})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_a_value_out_of_range_is_refused_by_its_fields_name(server: Server, field: str) -> None:
    answer = chat(server, **{field: -5})
    assert (answer.status_code, answer.json()["param"]) == (400, field)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"model": 5}, "model"),
        ({"messages": "abc"}, "messages"),
        ({"messages": [None]}, "messages[0]"),
    ],
)
def test_a_body_that_sglang_cannot_read_is_refused_by_its_fields_name(
    server: Server, fields: dict[str, Any], param: str
) -> None:
    answer = chat(server, **fields)
    told = answer.json().get("error", answer.json())
    assert (answer.status_code, told["param"]) == (400, param)
    assert "File" not in told["message"]
    assert param not in ("model", "messages") or told["message"].endswith(("not 5", "not a string"))


@pytest.mark.parametrize("body", [None, [], 5])
def test_a_body_that_is_no_object_gets_400(server: Server, body: Any) -> None:
    content = json.dumps(body).encode()
    with httpx2.Client(trust_env=False, timeout=60) as client:
        for path in ("/v1/chat/completions", "/v1/completions"):
            kind = {"content-type": "application/json"}
            answer = client.post(server.url + path, content=content, headers=kind)
            assert (answer.status_code, "object" in answer.json()["error"]["message"]) == (400, True)


def test_without_a_limit_an_answer_takes_the_rest_of_the_context(server: Server) -> None:
    """Also on the route where SGLang would end it after 16 tokens."""
    for path, asked in (
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/completions", {"prompt": "a b c"}),
    ):
        body = {"temperature": 0, "ignore_eos": True, **asked}
        usage = ask(server, "POST", path, body).json()["usage"]
        assert CONTEXT - 2 <= usage["total_tokens"] <= CONTEXT


def test_a_schema_that_would_be_followed_in_part_is_refused(server: Server) -> None:
    for rule, status in (({"multipleOf": 100000007}, 400), ({"minimum": 5}, 200)):
        schema = {"type": "integer", **rule}
        format_ = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        answer = chat(server, response_format=format_)
        assert (answer.status_code, "multipleOf" in answer.text) == (status, status == 400)


@pytest.mark.parametrize("grammar", [{"regex": "[a-z]{2000}"}, {"json_schema": {"minLength": 2000}}], ids=str)
def test_a_grammar_that_the_context_cuts_short_is_no_success(server: Server, grammar: dict[str, Any]) -> None:
    if "json_schema" in grammar:
        schema = {"type": "string", **grammar["json_schema"]}
        grammar = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}
    for path, asked in (
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/completions", {"prompt": "a b c"}),
    ):
        answer = ask(server, "POST", path, {"temperature": 0, **asked, **grammar}).json()
        assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_prompt_that_is_too_long_has_openais_code(server: Server, path: str, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    text: Any = "word " * 2 * CONTEXT
    with pytest.raises(openai.APIError) as refused:
        if "chat" in path:
            made: Any = client.chat.completions.create(
                model="default", messages=[{"role": "user", "content": text}], stream=stream
            )
        else:
            made = client.completions.create(model="default", prompt=text, stream=stream)
        for _ in made if stream else ():
            pass
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == ("messages" if "chat" in path else "prompt")


def test_hosts_origins_and_slashes_are_as_on_the_local_server(server: Server) -> None:
    for host, status in (("localhost:1", 200), ("box.example", 200), ("evil.example", 403)):
        assert ask(server, "GET", "/v1/models", host=host).status_code == status
    for path in ("/v1/models/", "/health/", "/health", "/metrics/"):
        assert ask(server, "GET", path).status_code == 200
    for path in ("/v1/models", "/health"):
        assert (ask(server, "HEAD", path).status_code, ask(server, "HEAD", path).content) == (200, b"")
    assert ask(server, "GET", "/flush_cache", sec_fetch_site="cross-site").status_code == 403
    asking = {"access_control_request_method": "POST", "access_control_request_headers": "content-type"}
    for origin, status, let_in in (
        (PAGE, 204, PAGE),
        ("http://localhost:3000", 204, "http://localhost:3000"),
        ("https://evil.example", 403, None),
    ):
        answer = ask(server, "OPTIONS", "/v1/chat/completions", origin=origin, **asking)
        assert (answer.status_code, answer.headers.get("access-control-allow-origin")) == (status, let_in)
        answer = ask(server, "GET", "/v1/models", origin=origin)
        assert (answer.status_code == 200, answer.headers.get("access-control-allow-origin")) == (
            let_in is not None,
            let_in,
        )
        assert "access-control-allow-credentials" not in answer.headers


def test_what_is_no_route_has_openais_shape(server: Server) -> None:
    for path, told in (
        ("/v1/nothing", (404, "unknown_url")),
        ("/v1/completions", (405, "method_not_allowed")),
    ):
        answer = ask(server, "GET", path)
        assert (answer.status_code, answer.json()["error"]["code"]) == told
    assert answer.headers["allow"] == "POST"


def test_a_server_started_with_a_limit_gives_it_to_requests_that_name_none(tmp_path: Path) -> None:
    rules = Rules.of(ServerSettings(max_tokens=20))
    with serving(directory(DEMO, tmp_path), "--context-length", "256", **rules.as_variable()) as started:
        for path, asked in (
            ("/v1/chat/completions", {"messages": USER}),
            ("/v1/completions", {"prompt": "a"}),
        ):
            body = {"temperature": 0, "ignore_eos": True, **asked}
            assert ask(started, "POST", path, body).json()["usage"]["completion_tokens"] == 20
            tokens = ask(started, "POST", path, {**body, "max_tokens": 3}).json()["usage"][
                "completion_tokens"
            ]
            assert tokens == 3
        long = {"prompt": [5] * 246, "temperature": 0, "ignore_eos": True}
        answer = ask(started, "POST", "/v1/completions", long)
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"] < 20) == (200, True)
    assert json.loads(rules.as_variable()["GHOSTVIS_SERVE"])["max_tokens"] == 20
