"""Whom and what the local server lets in: images, keys, limits, clients that leave; and what it counts."""

import asyncio
import json
import select
import socket
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import openai
import pytest
from starlette.datastructures import Headers

from ghostvis_cli.engines.fake import IMAGE_TOKENS, FakeEngine
from ghostvis_cli.image_limits import ImageLimits
from ghostvis_cli.serve.admission import SMALL_BYTES, Bodies, Body
from ghostvis_cli.serve.api_errors import ApiError
from ghostvis_cli.serve.settings import ServerSettings
from tests import sites
from tests.engines.serving import (
    PATIENCE_S,
    USER,
    Letters,
    Running,
    eventually,
    image_part,
    image_url_of,
    running,
    user,
)
from tests.pictures import png


def address(server: Running) -> tuple[str, int]:
    connection = server.connect()
    return connection.host, connection.port


# --- images


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
def test_images_come_by_data_url_only(server: Running, url: str) -> None:
    status, body = server.chat(messages=user(image_part(url)))
    assert (status, body["error"]["code"]) == (400, "invalid_image_url")
    assert body["error"]["param"] == "messages[0].content[0].image_url"


def test_broken_and_too_many_images_are_refused() -> None:
    with running(image_limits=ImageLimits(max_pixels=100)) as server:
        assert server.chat(messages=user(image_part("data:image/png;base64,AAAA")))[0] == 400
        assert server.chat(messages=user(*[image_part(image_url_of((10, 10)))] * 4))[0] == 200
        status, body = server.chat(messages=user(*[image_part(image_url_of((10, 10)))] * 5))
        assert (status, body["error"]["param"]) == (400, "messages[0].content[4].image_url")
    with running(FakeEngine(context_tokens=IMAGE_TOKENS * 2)) as server:
        status, body = server.chat(messages=user(*[image_part(image_url_of())] * 3))
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    text_only = FakeEngine()
    text_only.info = replace(text_only.info, image_tokens=0)
    with running(text_only) as server:
        status, body = server.chat(messages=user(image_part(image_url_of())))
        assert (status, "reads text only" in body["error"]["message"]) == (400, True)


class _Images(sites.Site):
    def respond(self) -> None:
        if self.path == "/elsewhere":
            return self.answer(302, location="/a.png")
        return self.answer(200, png())


def test_an_allowed_host_is_asked_and_its_redirects_are_not_followed() -> None:
    limits = ImageLimits(allow_private=True)
    with (
        sites.serving(_Images) as url,
        running(allowed_image_hosts=("127.0.0.1",), image_limits=limits) as server,
    ):
        assert server.chat(messages=user(image_part(f"{url}/a.png")))[0] == 200
        for other in (f"{url}/elsewhere", f"{url}@evil.example/", "http://evil.example/#@127.0.0.1/"):
            assert server.chat(messages=user(image_part(other)))[0] == 400


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
    for site, status in (("cross-site", 403), ("same-site", 200), ("none", 200)):
        assert server.send("GET", "/v1/models", sec_fetch_site=site)[0] == status
    with running(api_key="k") as keyed:
        answer = keyed.send("GET", "/v1/models", sec_fetch_site="cross-site", authorization="Bearer k")
        assert answer[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((name, 200) for name in ("localhost", "localhost:9", "127.0.0.1:30000", "[::1]:5")),
        *((name, 200) for name in ("a.localhost", "LOCALHOST.", "0.0.0.0:30000")),
        *((name, 403) for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example")),
        *((name, 403) for name in ("10.0.0.1", "[", "", "box", "box.local")),
    ],
)
def test_a_server_without_a_key_answers_to_its_own_names_only(
    server: Running, host: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "box")  # the network may say who that is
    answer = server.send("GET", "/v1/models", host=host)
    assert answer[0] == status
    assert status == 200 or json.loads(answer[2])["error"]["code"] == "forbidden_host"
    assert server.send("GET", "/healthz", host=host)[0] == 200


def test_other_names_are_answered_to_where_they_were_allowed_or_there_is_a_key() -> None:
    with running(allowed_hosts=("Box.example",)) as server:
        assert server.send("GET", "/v1/models", host="box.example:443")[0] == 200
        assert server.send("GET", "/v1/models", host="other.example")[0] == 403
    with running(api_key="k") as server:
        assert server.send("GET", "/v1/models", host="any.example", authorization="Bearer k")[0] == 200


PREFLIGHT = {
    "access_control_request_method": "POST",
    "access_control_request_headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://app.example"])
def test_a_page_that_may_come_in_can_ask_first_and_read_the_answer(origin: str, key: str | None) -> None:
    with running(api_key=key, cors_origins=("https://app.example",)) as server:
        path, bearer = "/v1/chat/completions", {} if key is None else {"authorization": f"Bearer {key}"}
        status, headers, body = server.send("OPTIONS", path, origin=origin, **PREFLIGHT)
        assert (status, body, headers["access-control-allow-origin"]) == (204, b"", origin)
        assert "POST" in headers["access-control-allow-methods"]
        assert headers["access-control-allow-headers"] == PREFLIGHT["access_control_request_headers"]
        assert "access-control-allow-credentials" not in headers
        for stream in (False, True):
            body_ = {"messages": USER, "stream": stream}
            status, headers, _ = server.send("POST", path, body_, origin=origin, **bearer)
            assert (status, headers["access-control-allow-origin"], headers["vary"]) == (
                200,
                origin,
                "Origin",
            )
            assert "x-request-id" in headers["access-control-expose-headers"]
        status, headers, _ = server.send("POST", path, {"messages": []}, origin=origin, **bearer)
        assert (status, headers["access-control-allow-origin"]) == (400, origin)


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "https://app.example:1"]
)
def test_any_other_page_is_told_nothing(origin: str, key: str | None) -> None:
    with running(api_key=key, cors_origins=("https://app.example",)) as server:
        status, headers, _ = server.send("OPTIONS", "/v1/models", origin=origin, **PREFLIGHT)
        assert (status, "access-control-allow-origin" in headers) == (403, False)
        bearer = {} if key is None else {"authorization": "Bearer k"}
        status, headers, _ = server.send("GET", "/v1/models", origin=origin, **bearer)
        assert (status, "access-control-allow-origin" in headers) == (200 if key else 403, False)


def test_without_a_preflights_headers_options_is_no_preflight(server: Running) -> None:
    assert server.send("OPTIONS", "/v1/models", origin="http://localhost:1")[0] == 405


def test_a_slash_at_the_end_changes_nothing() -> None:
    with running(vocabulary=Letters(), api_key="k") as server:
        bearer = {"authorization": "Bearer k", "host": "behind.tls.example"}
        for path, body in (
            ("/v1/chat/completions/", {"messages": USER}),
            ("/v1/completions/", {"prompt": "a"}),
            ("/tokenize/", {"prompt": "a"}),
            *((path, None) for path in ("/v1/models/", "/v1/models/fake/", "/metrics/", "/openapi.json/")),
            *((path, None) for path in ("/health/", "/healthz/", "/readyz/")),
        ):
            method = "GET" if body is None else "POST"
            assert (path, server.send(method, path, body, **bearer)[0]) == (path, 200)
        assert server.send("GET", "/v1/models/")[0] == 401
        assert server.send("GET", "/v1//models", **bearer)[0] == 404


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


@pytest.mark.parametrize("begun", [b"", b" " * 400_000])  # what came fast is no credit for the rest
def test_a_body_that_only_drips_gets_408(begun: bytes) -> None:
    with running(body_pause_s=0.3) as server, closing(server.connect()) as connection:
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", "1000000")
        connection.endheaders(begun)
        assert connection.sock is not None
        with suppress(OSError):  # never one pause as long as the one allowed
            for _ in range(1000):
                connection.send(b" ")
                if select.select([connection.sock], [], [], 0.02)[0]:
                    break
        assert connection.getresponse().status == 408


@pytest.mark.parametrize("begun", [b"", b"POST /v1", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"])
def test_half_a_request_is_not_waited_for(begun: bytes) -> None:
    with running(head_timeout_s=0.2) as server, socket.create_connection(address(server)) as half:
        half.settimeout(PATIENCE_S)
        half.sendall(begun)
        with suppress(ConnectionResetError):
            assert half.recv(1) == b""


def test_the_head_of_a_later_request_has_a_deadline_too() -> None:
    with running(head_timeout_s=0.2) as server, socket.create_connection(address(server)) as half:
        half.settimeout(PATIENCE_S)
        half.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        said = b""
        while not said.endswith(b"}"):
            said += half.recv(4096)
        half.sendall(b"GET /heal")
        with suppress(ConnectionResetError):
            assert half.recv(1) == b""


async def test_a_long_answer_is_cut_by_no_deadline() -> None:
    with running(FakeEngine(delay_s=0.1), head_timeout_s=0.2) as server:
        assert server.chat()[0] == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/nothing"])
@pytest.mark.parametrize("piece", [b"zz\r\n", b"3\r\nabcd", b"-1\r\n"])
def test_a_body_that_is_no_http_gets_400_and_no_traceback(
    path: str, piece: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += "transfer-encoding: chunked\r\n\r\n"
    with running() as server:
        for pieces in ([head.encode() + piece], [head.encode(), piece]):
            with socket.create_connection(address(server)) as client:
                client.settimeout(PATIENCE_S)
                for each in pieces:
                    client.sendall(each)
                    select.select([client], [], [], 0.05)  # as one segment, and as two
                with suppress(ConnectionResetError):
                    assert client.recv(4096)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 404")
        assert server.send("GET", "/healthz")[0] == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_an_upgrade_that_nobody_offers_is_answered_without_advice_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wish = {"connection": "Upgrade", "sec-websocket-key": "eA==", "sec-websocket-version": "13"}
    with running() as server:
        for protocol in ("websocket", "h2c"):
            assert server.send("GET", "/v1/models", upgrade=protocol, **wish)[0] == 200
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


async def test_of_bodies_beyond_their_sum_only_the_oldest_goes_on() -> None:
    bodies = Bodies(limit=SMALL_BYTES + 1)

    async def piece() -> Any:
        return {"type": "http.request", "body": b"x" * SMALL_BYTES, "more_body": True}

    async def receive(body: Body) -> None:
        await body.receive(Headers(), piece, limit=10 * SMALL_BYTES, pause_s=1)

    with bodies.one() as oldest, bodies.one() as younger:
        waiting = asyncio.create_task(receive(younger))
        with pytest.raises(ApiError, match="larger than"):
            await receive(oldest)
        assert len(younger.content) <= 2 * SMALL_BYTES
        waiting.cancel()
    assert bodies.held == 0


async def test_a_small_body_waits_for_no_large_one() -> None:
    bodies = Bodies(limit=10)

    async def whole() -> Any:
        return {"type": "http.request", "body": b"x" * 20}

    with bodies.one() as large, bodies.one() as small:
        for body in (large, small):  # with the first one, all the room is taken
            await asyncio.wait_for(body.receive(Headers(), whole, limit=80, pause_s=1), PATIENCE_S)


def test_a_body_of_millions_of_messages_is_refused_unread() -> None:
    body = b'{"messages": [' + b",".join([b'{"role": "user", "content": "a"}'] * 300_000) + b"]}"
    with running() as server:
        status, _, answer = server.send("POST", "/v1/chat/completions", body)
    error = json.loads(answer)["error"]
    # Once it has been read, what is too much is called by its name.
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", None)


def test_requests_beyond_the_limit_get_429_and_when_to_come_back() -> None:
    engine = FakeEngine(delay_s=2)
    with running(engine, max_waiting=1) as server:
        stream = server.create(stream=True)
        with pytest.raises(openai.RateLimitError) as refused:
            server.create()
        engine.delay_s = 0
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
        stream = server.create(messages=endless, max_tokens=1000, stream=True)
        next(iter(stream))
        stream.close()
        eventually(lambda: engine.aborted == 1)


# --- metrics


def test_metrics_have_the_names_and_values_that_sglang_dashboards_ask_for() -> None:
    with running() as server:
        server.chat()
        list(server.create(stream=True))
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
