"""Which addresses mean this machine, and which way leads to the others."""

import socket

import pytest

from ghostvis_cli.addresses import (
    as_number,
    is_here,
    is_loopback,
    is_public,
    is_this_machine,
    proxy_for,
    root_of,
)
from ghostvis_cli.errors import UsageError


@pytest.mark.parametrize(
    "host",
    [
        *(
            "localhost",
            "LOCALHOST",
            "localhost.",
            "app.localhost",
            "127.0.0.1",
            "127.8.9.1",
            "127.1",
            "0x7f000001",
        ),
        *("2130706433", "::1", "[::1]", "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1", "::1%lo"),
    ],
)
def test_these_hosts_can_only_be_the_loopback_interface(host: str) -> None:
    assert is_loopback(host) and is_this_machine(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "gpu-1",
        "localhost.evil.test",
        "notlocalhost",
        "127.0.0.1.evil.test",
        "10.0.0.1",
        "fe80::1",
        "1.2.3.4.5",
    ],
)
def test_these_hosts_may_be_another_machine(host: str) -> None:
    assert not is_loopback(host) and not is_this_machine(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0", socket.gethostname(), socket.gethostname().upper()])
def test_a_connection_to_every_interface_or_to_ones_own_name_stays_here(host: str) -> None:
    assert is_this_machine(host)
    assert is_here(f"http://{f'[{host}]' if ':' in host else host}:30000/v1")


@pytest.mark.parametrize("url", ["http://gpu-1:30000", "http://[::1", "nonsense", "http://:80"])
def test_an_address_elsewhere_or_none_is_not_here(url: str) -> None:
    assert not is_here(url)


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("64:ff9b::808:808", True), ("10.0.0.1", False),
        ("169.254.169.254", False), ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False), ("fe80::1%eth0", False),
    ],
)  # fmt: skip
def test_numbers_that_everyone_reads_alike_are_public(host: str, public: bool) -> None:
    assert is_public(host) == public


def test_a_name_is_no_number() -> None:
    assert as_number("gpu-1") is None and as_number("999.1.1.1") is None and as_number("") is None


# --- NO_PROXY, one rule for servers and images


@pytest.mark.parametrize(
    ("no_proxy", "host", "port"),
    [
        ("gpu.test", "gpu.test", 30000), ("GPU.test", "gpu.TEST", None), (".test", "gpu.test", None),
        ("*.test", "gpu.test", None), ("gpu.test", "a.gpu.test", None), ("gpu.test", "gpu.test.", None),
        ("gpu.test:30000", "gpu.test", 30000), ("gpu.test:443", "gpu.test", None), ("*", "gpu.test", None),
        ("a.test  gpu.test", "gpu.test", None), ("10.0.0.0/8", "10.1.2.3", 30000), ("10.1.2.3", "10.1.2.3", 1),
        ("10.0.0.0/255.0.0.0", "10.1.2.3", None), ("10.0.0.0/8", "::ffff:10.1.2.3", None),
        ("fd00::/8", "fd12::1", None), ("[fd00::]/8", "fd12::1", None), ("[fd12::1]:8000", "fd12::1", 8000),
        ("fd12:0::1", "fd12::1", 9), ("10.1.2.3:80", "10.1.2.3", 80), ("a,b,.gpu.test,c", "x.gpu.test", None),
    ],
)  # fmt: skip
def test_no_proxy_takes_a_host_out(
    no_proxy: str, host: str, port: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.test:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    assert proxy_for("https", host, port) == "http://proxy.test:3128"
    monkeypatch.setenv("no_proxy", no_proxy)
    assert proxy_for("https", host, port) is None


@pytest.mark.parametrize(
    ("no_proxy", "host", "port"),
    [
        ("pu.test", "gpu.test", None), ("gpu.test:1", "gpu.test", None), ("10.0.0.0/8", "11.1.2.3", None),
        ("nonsense/8, 10.0.0.0/99", "10.1.2.3", None), (".0.0.1", "10.0.0.1", None), (", ,", "gpu.test", None),
        ("10.0.0.0/8", "10.gpu.test", None), ("fd00::/8", "fe00::1", None), ("2.3", "10.1.2.3", None),
        ("[fd12::1]:8000", "fd12::1", 8001),
    ],
)  # fmt: skip
def test_no_proxy_leaves_other_hosts_where_they_were(
    no_proxy: str, host: str, port: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "proxy.test:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert proxy_for("https", host, port) == "http://proxy.test:3128"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0", socket.gethostname()])
def test_this_machine_is_never_reached_through_a_proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "http://proxy.test:3128")
    monkeypatch.setenv("no_proxy", "")
    assert proxy_for("http", host) is None


# --- a server's address


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://gpu_1:30000/", "http://gpu_1:30000"), ("https://h/v1", "https://h"), ("http://h./a/v1/", "http://h./a"),
        ("http://[fd12::1]:8000/v1", "http://[fd12::1]:8000"), ("http://bücher.test", "http://bücher.test"),
    ],
)  # fmt: skip
def test_a_root_is_the_address_without_v1(given: str, root: str) -> None:
    assert root_of(given) == root


@pytest.mark.parametrize(
    "given", ["http://a..b", "http://h:0", "http://-_/x y", f"http://{'x' * 64}.test", "//h"]
)
def test_what_no_lookup_would_take_is_no_address(given: str) -> None:
    with pytest.raises(UsageError, match=r"^base_url "):
        root_of(given)
