"""Reaching a server, being refused by it, leaving it: over real sockets."""

import asyncio
import re
import resource
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from ghostvis_cli.addresses import route
from ghostvis_cli.engines.base import complete
from ghostvis_cli.engines.connection import SPARE_FILES
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
from ghostvis_cli.errors import EngineError, ExitCode, RequestError, UsageError
from tests.engines.scripted import (
    CARD,
    KEY,
    Reply,
    ScriptedServer,
    Serve,
    answer_to,
    ask,
    connected,
    ending,
    engine_for,
    lines,
    refusal,
    words,
)
from tests.limits import limited
from tests.sites import nobody_accepts, nobody_listens, server_tls


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/team/a", "/team/a/v1"])
async def test_an_address_may_end_in_v1_and_may_have_a_prefix(suffix: str, serve: Serve) -> None:
    prefix = "/team/a" if "team" in suffix else ""
    server = await serve(pages={f"{prefix}/v1/models": {"data": [CARD]}})
    async with await connected(server, suffix) as engine:
        await complete(engine, ask())
    assert server.posts[0].target == f"{prefix}/v1/chat/completions"


@pytest.mark.parametrize(
    "url",
    [
        "gpu-1:30000",
        "localhost",
        "ftp://gpu",
        "http://",
        "http://gpu:port",
        "http://[::1",
        "http://gpu/?key=1",
        "http://g u",
    ],
)
def test_what_is_no_address_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(UsageError, match=r"base_url (is no address|must look like|may hold no)") as failure:
        RemoteSettings(url)
    assert "http://localhost:30000" in str(failure.value.hint)


@pytest.mark.parametrize("url", [f"http://me:{KEY}@gpu:30000", f"https://{KEY}@gpu/v1", f"http://:{KEY}@gpu"])
def test_a_secret_in_the_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="holds a user or a password") as failure:
        RemoteSettings(url)
    assert KEY not in str(failure.value) + str(failure.value.hint)


# Refusals


@pytest.mark.parametrize(
    ("status", "body", "code", "message", "hint"),
    [
        (
            400,
            {"object": "error", "message": "too long: 9 > 8", "code": 400},
            6,
            "with 400: too long: 9 > 8",
            None,
        ),
        (400, {"error": {"message": "nested"}}, 6, "with 400: nested", None),
        (400, {"error": {"message": ""}, "x": 1}, 6, "with 400: {", None),
        (422, {"detail": [{"loc": ["body"], "msg": "bad"}]}, 6, '"msg": "bad"', None),
        (401, {"error": "Unauthorized"}, 6, "with 401: Unauthorized", "GHOSTVIS_API_KEY"),
        (403, b"no", 6, "with 403: no", "engine.api_key_env"),
        (
            404,
            {"message": "model 'ghost' not found"},
            6,
            "/v1/chat/completions with 404: model",
            "/v1/models",
        ),
        (413, b"", 6, "with 413: ", "smaller images"),
        (429, {"error": {"message": "slow down"}}, 6, "with 429: slow down", "--concurrency"),
        (500, b"<h1>oops</h1>", 6, "with 500: <h1>oops</h1>", None),
        (503, {"error": {"message": "Loading model"}}, 5, "with 503: Loading model", "wait"),
    ],
)
async def test_each_refusal_says_who_what_and_the_next_step(
    status: int, body: Any, code: int, message: str, hint: str | None, serve: Serve
) -> None:
    with pytest.raises((RequestError, EngineError), match=re.escape(message)) as failure:
        await answer_to(refusal(status, body), serve)
    assert failure.value.code == code
    assert "http://127.0.0.1:" in failure.value.message
    assert (hint is None) == (failure.value.hint is None) and (hint or "") in (failure.value.hint or "")


async def test_a_redirect_is_shown_and_not_followed(serve: Serve) -> None:
    other = await serve()
    moved = Reply((), 307, {"Location": f"{other.url}/elsewhere"})
    with pytest.raises(RequestError, match=f"with 307: {other.url}/elsewhere"):
        await answer_to(moved, serve, api_key=KEY)
    assert other.seen == []


async def test_what_a_server_says_is_cut_to_one_harmless_line(serve: Serve) -> None:
    shout = b"\x1b[31mERR\x07\r\n\tOR " + b"x" * 3_000_000
    with pytest.raises(RequestError) as failure:
        await answer_to(refusal(500, shout), serve)
    assert "with 500: [31mERR OR xxx" in failure.value.message
    assert failure.value.message.isprintable() and len(failure.value.message) < 700


async def test_a_refusal_that_never_ends_is_not_read_to_its_end(serve: Serve) -> None:
    endless = Reply((b"x" * 100_000,), 500, {}, end="hang")
    with pytest.raises(RequestError, match="with 500: xxx"):
        await asyncio.wait_for(answer_to(endless, serve), 2)


# Repeats


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_server_is_asked_again_no_sooner_than_it_says(status: int, serve: Serve) -> None:
    server = await serve(refusal(status, {}, **{"Retry-After": "0.3"}), Reply())
    async with engine_for(server, retries=1) as engine:
        assert (await complete(engine, ask())).text == "Hello"
    first, second = server.times
    assert second - first >= 0.3
    assert server.posts[0].body == server.posts[1].body


async def test_repeats_end_and_the_last_refusal_is_told(serve: Serve) -> None:
    server = await serve(refusal(503, {}, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}))
    async with engine_for(server, retries=2) as engine:
        with pytest.raises(EngineError, match="503"):
            await complete(engine, ask())
    assert len(server.posts) == 3


async def test_a_wait_longer_than_the_time_limit_is_not_begun(serve: Serve) -> None:
    server = await serve(refusal(429, {"message": "quota"}, **{"Retry-After": "3600"}))
    async with engine_for(server, retries=3, timeout_s=5) as engine:
        with pytest.raises(RequestError, match="quota"):
            await asyncio.wait_for(complete(engine, ask()), 1)
    assert len(server.posts) == 1


async def test_other_refusals_are_not_repeated(serve: Serve) -> None:
    server = await serve(refusal(500, {"message": "no"}))
    async with engine_for(server, retries=3) as engine:
        with pytest.raises(RequestError):
            await complete(engine, ask())
    assert len(server.posts) == 1


async def test_a_server_that_starts_a_moment_later_is_reached() -> None:
    server = ScriptedServer()
    settings = RemoteSettings(nobody_listens(), model="ghost", retries=6)
    async with RemoteEngine(settings) as engine:
        answer = asyncio.create_task(complete(engine, ask()))
        await asyncio.sleep(0.05)
        await server.start(port=int(settings.base_url.rpartition(":")[2]))
        assert (await answer).text == "Hello"
    await server.stop()


async def test_a_server_that_is_not_there_is_named_with_the_reason() -> None:
    url = nobody_listens()
    with pytest.raises(EngineError, match=f"can't reach {url}: Connection refused") as failure:
        await RemoteEngine.connect(RemoteSettings(url, retries=1))
    assert failure.value.code == ExitCode.ENGINE
    assert "ghostvis serve" in str(failure.value.hint)


async def test_a_name_that_is_not_known_is_named() -> None:
    with pytest.raises(EngineError, match=r"can't reach http://no-such-host\.invalid:30000: "):
        await RemoteEngine.connect(RemoteSettings("http://no-such-host.invalid:30000", retries=0))


async def test_a_server_that_takes_no_connection_is_given_up_in_time() -> None:
    with nobody_accepts() as url, pytest.raises(EngineError, match=r"no connection within 0\.2 s") as failure:
        await RemoteEngine.connect(RemoteSettings(url, retries=0, connect_timeout_s=0.2))
    assert "connect_timeout_s" in str(failure.value.hint)


# Leaving early


async def test_closing_the_generator_closes_the_connection(serve: Serve) -> None:
    server = await serve(Reply((lines(*words("a")),), end="hang"))
    async with engine_for(server) as engine:
        async with aclosing(engine.generate(ask())) as stream:
            assert (await anext(stream)).text == "a"
            assert server.open_now == 1
        await asyncio.wait_for(server.empty.wait(), 5)
    assert server.left.is_set()


@pytest.mark.parametrize("reply", [Reply((lines(*words("a")),), end="hang"), Reply(silent=True)])
async def test_cancelling_the_task_closes_the_connection(reply: Reply, serve: Serve) -> None:
    server = await serve(reply)
    async with engine_for(server) as engine:
        task = asyncio.create_task(complete(engine, ask()))
        await asyncio.wait_for(server.asked.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(server.left.wait(), 5)


async def test_a_caller_that_takes_its_time_between_pieces_is_not_interrupted(serve: Serve) -> None:
    server = await serve(Reply((lines(*words("a", "b"), ending(), "[DONE]"),)))
    async with engine_for(server, timeout_s=0.1) as engine, aclosing(engine.generate(ask())) as stream:
        assert (await anext(stream)).text == "a"
        await asyncio.sleep(
            0.2
        )  # cancelled here, if the time limit were not kept to the engine's own waiting
        assert (await anext(stream)).text == "b"


async def test_a_closed_engine_says_so(serve: Serve) -> None:
    server = await serve()
    async with engine_for(server) as engine:
        pass
    with pytest.raises(RequestError, match="the engine is closed"):
        await complete(engine, ask())


# Many at once


async def test_requests_one_after_another_share_a_connection(serve: Serve) -> None:
    server = await serve()
    async with engine_for(server) as engine:
        for _ in range(5):
            await complete(engine, ask())
    assert (len(server.posts), server.connections) == (5, 1)


async def test_a_second_crowd_shares_the_connections_of_the_first(serve: Serve) -> None:
    server = await serve(crowd=12)
    async with engine_for(server) as engine:
        for _ in range(2):
            await asyncio.gather(*(complete(engine, ask()) for _ in range(12)))
    assert (len(server.posts), server.connections) == (24, 12)


async def test_closing_the_engine_closes_every_connection(serve: Serve) -> None:
    server = await serve(Reply((lines(*words("a")),), end="hang"), crowd=12)
    async with engine_for(server) as engine:
        streams = [engine.generate(ask()) for _ in range(12)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        assert server.open_now == 12
    await asyncio.wait_for(server.empty.wait(), 5)
    for stream in streams:
        await stream.aclose()


async def test_a_thousand_requests_run_at_once(serve: Serve) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2500:
        pytest.skip(f"both ends of 1,000 connections need 2,500 open files, and {hard} are allowed")
    with limited(resource.RLIMIT_NOFILE, max(soft, 2500)):
        server = await serve(crowd=1000)
        async with engine_for(server) as engine:
            answers = await asyncio.gather(*(complete(engine, ask(f"number {i}")) for i in range(1000)))
    assert {answer.text for answer in answers} == {"Hello"}
    assert len({seen.body for seen in server.posts}) == 1000
    assert server.most_open == 1000


async def test_with_few_files_allowed_requests_wait_for_a_connection(serve: Serve) -> None:
    server = await serve()
    few = max(80, server.socket_number + 40)
    most = few - SPARE_FILES
    async with engine_for(server) as engine:
        with limited(
            resource.RLIMIT_NOFILE, few
        ):  # while only one of the server's ends is in this process too
            await complete(engine, ask())
        answers = await asyncio.gather(*(complete(engine, ask()) for _ in range(3 * most)))
    assert [answer.text for answer in answers] == ["Hello"] * 3 * most
    assert server.most_open <= most


# Proxies


async def test_loopback_is_reached_directly_whatever_the_environment_says(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, proxy = await serve(), await serve()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
        async with RemoteEngine(RemoteSettings(url, model="ghost")) as engine:
            assert (await complete(engine, ask())).text == "Hello"
        assert route(url) is None
    assert len(server.posts) == 2 and proxy.connections == 0


async def test_other_names_go_through_the_proxy_of_the_environment(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await serve(Reply(), refusal(502, b"no route"))
    monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//me:hunter2@"))
    async with RemoteEngine(RemoteSettings("http://gpu.test:30000", model="ghost")) as engine:
        assert (await complete(engine, ask())).text == "Hello"
        with pytest.raises(RequestError, match=re.escape(f"(through the proxy {proxy.url})")) as failure:
            await complete(engine, ask())
    assert "hunter2" not in failure.value.message
    assert proxy.posts[0].target == "http://gpu.test:30000/v1/chat/completions"
    assert proxy.posts[0].headers["proxy-authorization"].startswith("Basic ")


@pytest.mark.parametrize(
    ("url", "no_proxy", "proxied"),
    [
        ("http://gpu.test:30000", "", True),
        ("http://gpu.test:30000", "gpu.test", False),
        ("http://gpu.test:30000", "other.test, .test", False),
        ("http://gpu.test:30000", "*.test", False),
        ("http://gpu.test:30000", "pu.test", True),
        ("http://gpu.test:30000", "gpu.test:30000", False),
        ("http://gpu.test:30000", "gpu.test:1", True),
        ("http://GPU.test:30000", "gpu.TEST", False),
        ("http://gpu.test:30000", "*", False),
        ("http://10.1.2.3:30000", "10.0.0.0/8", False),
        ("http://11.1.2.3:30000", "10.0.0.0/8,nonsense/8", True),
        ("http://[2001:db8::1]:30000", "[2001:db8::1]", False),
        ("https://gpu.test", "", True),
        ("http://127.9.9.9", "", False),
        ("http://[::1]:30000", "", False),
        ("http://[::ffff:127.0.0.1]:30000", "", False),
        ("http://0.0.0.0:30000", "", False),
        ("http://LOCALHOST:30000/v1", "", False),
        ("http://localhost.test", "", True),
    ],
)
def test_the_route_is_what_the_environment_asks_for(
    url: str, no_proxy: str, proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "proxy.test:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert route(url) == ("http://proxy.test:3128" if proxied else None)


def test_a_route_is_shown_without_the_proxys_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:hunter2@proxy.test:3128")
    assert route("https://gpu.test") == "http://proxy.test:3128"
    assert route("http://gpu.test") is None


@pytest.mark.parametrize("proxy", ["socks5://me:hunter2@127.0.0.1:1", "gopher://me:hunter2@127.0.0.1:1"])
async def test_a_proxy_that_cant_be_used_is_named(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(EngineError, match="proxy") as failure:
        await RemoteEngine.connect(RemoteSettings("http://gpu.test:30000", retries=0))
    assert "NO_PROXY=gpu.test" in str(failure.value.hint)
    assert "hunter2" not in str(failure.value)


# TLS


async def test_a_servers_certificate_is_accepted_with_our_own_authority(
    serve: Serve, certificates: Path
) -> None:
    server = await serve(tls=server_tls(certificates))
    async with engine_for(server, ca_file=str(certificates / "ca.pem")) as engine:
        assert (await complete(engine, ask())).text == "Hello"


@pytest.mark.parametrize("scheme", ["https", "HTTPS"])
async def test_an_unknown_certificate_is_refused_at_once_with_the_remedy(
    scheme: str, serve: Serve, certificates: Path
) -> None:
    server = await serve(tls=server_tls(certificates))
    url = server.url.replace("https", scheme)
    async with RemoteEngine(RemoteSettings(url, model="ghost", api_key=KEY, retries=3)) as engine:
        with pytest.raises(EngineError, match="CERTIFICATE_VERIFY_FAILED") as failure:
            await complete(engine, ask())
    assert "engine.ca_file" in str(failure.value.hint)
    assert server.seen == []


async def test_a_file_without_certificates_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for name in ("empty.pem", "missing.pem"):
        settings = RemoteSettings("https://127.0.0.1:1", ca_file=str(tmp_path / name))
        with pytest.raises(UsageError, match=f"no certificates can be read from .*{name}"):
            await RemoteEngine.connect(settings)


async def test_plain_http_to_a_tls_port_is_explained(serve: Serve, certificates: Path) -> None:
    server = await serve(tls=server_tls(certificates))
    plain = RemoteSettings(server.url.replace("https", "http"), model="ghost", retries=0)
    async with RemoteEngine(plain) as engine:
        with pytest.raises(EngineError, match="gave no answer") as failure:
            await complete(engine, ask())
    assert "https://" in str(failure.value.hint)


def test_the_engine_is_imported_without_torch_and_pillow() -> None:
    heavy = ("torch", "PIL", "numpy", "transformers")
    code = f"import sys, ghostvis_cli.engines.remote; print(*{{*{heavy}}} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == ""
