"""Whom and what the local server lets in: pictures, keys, limits, clients that leave; and what it counts."""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import openai
import pytest

from ghostvis_cli.engines.fake import IMAGE_TOKENS, FakeEngine
from ghostvis_cli.images import ImageLimits
from ghostvis_cli.serve.settings import ServerSettings
from tests.engines.serving import USER, Letters, Running, eventually, image_part, picture, running, user


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(vocabulary=Letters()) as started:
        yield started


# --- pictures


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "-",
        "http://127.0.0.1/a.png",
        "https://a.example/x",
        "ftp://a/b",
        "",
    ],
)
def test_pictures_come_by_data_url_only(server: Running, url: str) -> None:
    status, body = server.chat(messages=user(image_part(url)))
    assert (status, body["error"]["code"]) == (400, "invalid_image_url")
    assert body["error"]["param"] == "messages[0].content[0].image_url"


def test_broken_and_too_many_pictures_are_refused() -> None:
    with running(image_limits=ImageLimits(max_pixels=100)) as server:
        assert server.chat(messages=user(image_part("data:image/png;base64,AAAA")))[0] == 400
        assert server.chat(messages=user(*[image_part(picture((10, 10)))] * 4))[0] == 200
        status, body = server.chat(messages=user(*[image_part(picture((10, 10)))] * 5))
        assert (status, body["error"]["param"]) == (400, "messages[0].content[4].image_url")
    with running(FakeEngine(context_tokens=IMAGE_TOKENS * 2)) as server:
        status, body = server.chat(messages=user(*[image_part(picture())] * 3))
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    text_only = FakeEngine()
    text_only.info = replace(text_only.info, image_tokens=0)
    with running(text_only) as server:
        status, body = server.chat(messages=user(image_part(picture())))
        assert (status, "reads text only" in body["error"]["message"]) == (400, True)


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("location", "/a.png")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(base64.b64decode(picture().partition(",")[2]))

    def log_message(self, *_: Any) -> None:
        pass


def test_an_allowed_host_is_asked_and_its_redirects_are_not_followed() -> None:
    with HTTPServer(("127.0.0.1", 0), _Pictures) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        limits = ImageLimits(allow_private=True)
        url = f"http://127.0.0.1:{host.server_port}"
        with running(allowed_image_hosts=("127.0.0.1",), image_limits=limits) as server:
            assert server.chat(messages=user(image_part(f"{url}/a.png")))[0] == 200
            for other in (f"{url}/elsewhere", f"{url}@evil.example/", "http://evil.example/#@127.0.0.1/"):
                assert server.chat(messages=user(image_part(other)))[0] == 400
        host.shutdown()


# --- who gets in


def test_with_a_key_only_the_probes_are_open() -> None:
    with running(api_key="s3cret") as server:
        assert server.send("GET", "/healthz")[0] == 200
        assert server.send("GET", "/readyz")[0] == 200
        for path in ("/metrics", "/v1/models", "/nothing"):
            assert server.send("GET", path)[0] == 401
        for header in ("Bearer", "Bearer wrong", "Basic s3cret", "s3cret", "Bearer s3cr\xe9t"):
            assert server.send("GET", "/v1/models", authorization=header)[0] == 401
        with pytest.raises(openai.AuthenticationError) as refused:
            server.client("wrong").models.list()
        assert (refused.value.code, "wrong" in refused.value.message) == ("invalid_api_key", False)
        assert server.client("s3cret").models.list().data[0].id == "fake"
        assert server.send("GET", "/metrics", authorization="bearer s3cret")[0] == 200


def test_the_key_is_in_no_representation() -> None:
    assert "s3cret" not in repr(ServerSettings(api_key="s3cret"))


def test_web_pages_of_other_hosts_are_kept_out_without_a_key(server: Running) -> None:
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://localhost:3000", 200)):
        assert server.send("GET", "/v1/models", origin=origin)[0] == status


def test_the_request_id_is_echoed_or_made(server: Running) -> None:
    assert server.send("GET", "/healthz", x_request_id="abc-1")[1]["x-request-id"] == "abc-1"
    made = server.send("GET", "/healthz", x_request_id="a b\tc")[1]["x-request-id"]
    assert len(made) == 32
    assert server.send("GET", "/healthz")[1]["server"] == "ghostvis"


def test_a_body_over_the_limit_gets_413_declared_or_not() -> None:
    with running(max_body_bytes=1000) as server:
        big = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]}).encode()
        assert server.send("POST", "/v1/chat/completions", big)[0] == 413
        connection = server.connect()
        pieces = iter([big[:500], big[500:1500], big[1500:]])
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", pieces, headers, encode_chunked=True)
        response = connection.getresponse()
        assert (response.status, json.load(response)["error"]["code"]) == (413, "request_too_large")
        connection.close()
        assert server.chat()[0] == 200


def test_a_body_that_stands_still_gets_408() -> None:
    with running(body_pause_s=0.1) as server:
        connection = server.connect()
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", "100")
        connection.endheaders(b'{"messages"')
        assert connection.getresponse().status == 408
        connection.close()


def test_requests_beyond_the_limit_get_429_and_when_to_come_back() -> None:
    with running(FakeEngine(delay_s=0.1), max_waiting=1) as server:
        stream = server.client().chat.completions.create(model="fake", messages=USER, stream=True)
        with pytest.raises(openai.RateLimitError) as refused:
            server.client().chat.completions.create(model="fake", messages=USER)
        assert refused.value.response.headers["retry-after"] == "1"
        assert len(list(stream)) == 5
        eventually(lambda: server.chat()[0] == 200)


@pytest.mark.parametrize(("stream", "n"), [(False, 1), (True, 1), (True, 3)])
def test_a_client_that_leaves_aborts_its_request(stream: bool, n: int) -> None:
    engine = FakeEngine(delay_s=0.02)
    endless = [{"role": "user", "content": "word " * 3000}]
    body = {"messages": endless, "stream": stream, "n": n, "max_tokens": 1000}
    with running(engine) as server:
        connection = server.connect()
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
        )
        if stream:
            assert connection.getresponse().read(10) == b'data: {"id'
        eventually(lambda: engine.running == n)
        connection.sock and connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        eventually(lambda: engine.aborted == n and engine.running == 0)
        eventually(
            lambda: b'num_aborted_requests_total{model_name="fake"} 1.0' in server.send("GET", "/metrics")[2]
        )
        assert server.chat(max_tokens=1)[0] == 200


def test_the_openai_client_aborts_by_closing_its_stream() -> None:
    engine = FakeEngine(delay_s=0.02)
    with running(engine) as server:
        endless = [{"role": "user", "content": "word " * 3000}]
        stream = server.client().chat.completions.create(
            model="fake", messages=endless, max_tokens=1000, stream=True
        )
        next(iter(stream))
        stream.close()
        eventually(lambda: engine.aborted == 1)


# --- metrics


def test_metrics_have_the_names_and_values_that_sglang_dashboards_ask_for() -> None:
    with running() as server:
        server.chat()
        list(server.client().chat.completions.create(model="fake", messages=USER, stream=True))
        server.chat(n=0)
        eventually(
            lambda: (
                b'requests_total{is_streaming="true",model_name="fake"} 1.0'
                in server.send("GET", "/metrics")[2]
            )
        )
        text = server.send("GET", "/metrics")[2].decode()
    for line in (
        'sglang:prompt_tokens_total{is_streaming="false",model_name="fake"} 3.0',
        'sglang:generation_tokens_total{is_streaming="true",model_name="fake"} 3.0',
        'sglang:cached_tokens_total{cache_source="total",model_name="fake"} 0.0',
        'sglang:num_requests_total{is_streaming="false",model_name="fake"} 1.0',
        'sglang:num_running_reqs{model_name="fake"} 0.0',
        'sglang:num_queue_reqs{model_name="fake"} 0.0',
        'sglang:time_to_first_token_seconds_count{is_streaming="true",model_name="fake"} 1.0',
        'sglang:inter_token_latency_seconds_count{model_name="fake"} 4.0',
        'sglang:e2e_request_latency_seconds_count{is_streaming="false",model_name="fake"} 1.0',
        'ghostvis:http_responses_total{status="400"} 1.0',
    ):
        assert line in text.splitlines()
