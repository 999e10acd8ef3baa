"""Addresses: which are this machine's, which are public, what a base URL's root is, which proxy to use.

Judges names and numbers only: no lookups, no connections.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeAlias
from urllib.parse import urlsplit

from ghostvis_cli.errors import UsageError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses as an IPv6-only network sees them
PORTS = {"http": 80, "https": 443}
SHORT_IPV4 = re.compile(r"(0x[0-9a-f]+|\d+)(\.(0x[0-9a-f]+|\d+)){0,3}")  # 127.1, 0x7f000001


# --- which machine


def is_loopback(host: str) -> bool:
    """Whether the host, a name or a number, can mean nothing but the loopback interface."""
    if (address := as_number(host)) is not None:
        return address.is_loopback
    name = _plain(host)
    return name == "localhost" or name.endswith(".localhost")


def is_this_machine(host: str) -> bool:
    """Whether a connection to the host ends on this machine: loopback, 0.0.0.0, or its own name."""
    if (address := as_number(host)) is not None:
        return address.is_loopback or address.is_unspecified
    own = _plain(socket.gethostname())
    return is_loopback(host) or (own != "" and _plain(host) == own)


def is_here(url: str) -> bool:
    """`is_this_machine` of a URL's host."""
    with suppress(ValueError):
        return is_this_machine(urlsplit(url).hostname or "")
    return False


def is_public(host: str) -> bool:
    """Whether the number is a public address of the internet, also as IPv4 inside IPv6."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def as_number(host: str) -> Address | None:
    """The address that a host is written as, in any way that connecting accepts; None for a name."""
    text = _plain(host)
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        if not SHORT_IPV4.fullmatch(text):
            return None
        with suppress(OSError):
            return ipaddress.IPv4Address(socket.inet_aton(text))
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _plain(host: str) -> str:
    """Lower case, without the brackets of IPv6 and the dot that ends a full name."""
    return host.strip().lower().removeprefix("[").removesuffix("]").removesuffix(".")


# --- a server's address


def root_of(base_url: str) -> str:
    """A server's address without a slash or /v1 at its end. UsageError if it can't be one.

    Messages never repeat the address: it may hold what must not be shown.
    """
    hint = "--base-url http://localhost:30000"
    try:
        url = urlsplit(base_url)
        port = url.port  # ValueError unless it is a number that fits
    except ValueError as error:
        raise UsageError(f"base_url is no address: {error}", hint=hint) from error
    if url.username is not None or url.password is not None:
        raise UsageError(
            "base_url holds a user or a password; give secrets with api_key_env or api_key_file",
            hint="export GHOSTVIS_API_KEY=...",
        )
    if url.scheme not in PORTS or not is_host(url.hostname) or port == 0:
        raise UsageError("base_url must look like http://host:port", hint=hint)
    if url.query or url.fragment or re.search(r"[\s\x00-\x1f\x7f?#]", base_url):
        raise UsageError(
            "base_url may hold no spaces, no ? and no #; give secrets with api_key_env", hint=hint
        )
    return url._replace(path=url.path.rstrip("/").removesuffix("/v1").rstrip("/")).geturl()


def is_host(host: str | None) -> bool:
    """Whether it is a number, or a name that a lookup would take: labels of at most 63 characters."""
    if not host or as_number(host) is not None:
        return bool(host)
    with suppress(UnicodeError):
        name = host if host.isascii() else host.encode("idna").decode("ascii")
        return re.fullmatch(r"([\w-]{1,63}\.)*[\w-]{1,63}\.?", name, re.ASCII) is not None
    return False


# --- the way there


def proxy_for(scheme: str, host: str, port: int | None = None) -> str | None:
    """The proxy on the way to a host, as environment or system say; None where the way is direct.

    This machine is always reached directly, whether or not NO_PROXY names it.
    """
    # Imported here: 20 ms that only a connection should cost. Where no variable is set, macOS has settings.
    from urllib.request import getproxies, getproxies_environment, proxy_bypass

    variables = getproxies_environment()
    proxies = variables or getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy or is_this_machine(host):
        return None
    no_proxy = variables.get("no", "")
    if is_exempt(host, port or PORTS.get(scheme), no_proxy) if variables else proxy_bypass(host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def proxy_of(url: str) -> str | None:
    """`proxy_for` of a URL."""
    parts = urlsplit(url)
    return proxy_for(parts.scheme, parts.hostname or "", parts.port)


def route(url: str) -> str | None:
    """`proxy_of`, without the proxy's password."""
    if (proxy := proxy_of(url)) is None:
        return None
    scheme, _, rest = proxy.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def is_exempt(host: str, port: int | None, no_proxy: str) -> bool:
    """Whether NO_PROXY has the host: gpu.test, .gpu.test, *.gpu.test, gpu.test:30000, 10.0.0.0/8, [::1], *."""
    return any(_matches(host, port, entry) for entry in _entries(no_proxy))


def _entries(no_proxy: str) -> Iterable[str]:
    return filter(None, re.split(r"[,\s]+", no_proxy.lower()))


def _matches(host: str, port: int | None, entry: str) -> bool:
    if entry == "*":
        return True
    name, wanted = _split_port(entry)
    if wanted is not None and wanted != port:
        return False
    if (address := as_number(host)) is not None:
        return _holds(name, address)
    name = _plain(name.removeprefix("*").removeprefix("."))
    return name != "" and f".{_plain(host)}".endswith(f".{name}")


def _split_port(entry: str) -> tuple[str, int | None]:
    """gpu.test:443 -> gpu.test and 443. The colons of an IPv6 address without brackets begin no port."""
    name, colon, port = entry.rpartition(":")
    is_port = colon and port.isdecimal() and (":" not in name or name.endswith("]"))
    return (name, int(port)) if is_port else (entry, None)


def _holds(entry: str, address: Address) -> bool:
    """Whether an entry is this number, or a network that it is in."""
    if "/" not in entry:
        return as_number(entry) == address
    base, _, size = entry.partition("/")
    with suppress(ValueError):
        return address in ipaddress.ip_network(f"{_plain(base)}/{size.removesuffix(']')}", strict=False)
    return False
