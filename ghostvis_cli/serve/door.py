"""Which browser requests are allowed, and their CORS headers. The same for the local server and SGLang.

A page in the user's browser can send requests to this machine. Without a key, its `Origin` must be this
machine's or an allowed one. So must its `Host`: a page can point a name of its own here (DNS rebinding), and
its requests then look as if of the same origin.
"""

from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from ghostvis_cli.addresses import as_number, is_loopback
from ghostvis_cli.serve.api_errors import ApiError
from ghostvis_cli.serve.settings import ServerSettings

EXPOSED = "x-request-id, retry-after"
KEPT_S = 600  # how long a browser may remember a preflight's answer
METHODS = "GET, POST"


@dataclass(frozen=True)
class Door:
    """`host` is the name that the server was told to listen on. Origins are as browsers write them, or *."""

    keyless: bool
    host: str = ""
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: ServerSettings, **more: Any) -> Self:
        same = (settings.host, settings.allowed_hosts, settings.cors_origins)
        return cls(settings.api_key is None, *same, **more)

    def check(self, headers: Headers) -> None:
        """ApiError for a request that is not allowed."""
        if self.keyless or self.allowed_hosts:
            named = headers.getlist("host")
            if not named or not all(self._is_ours(host) for host in named):
                raise ApiError(
                    403,
                    "the Host header names no host of this server (ghostvis serve --allowed-host NAME)",
                    code="forbidden_host",
                )
        if self.keyless and self._is_foreign(headers):
            message = (
                "requests from web pages of other hosts need an API key, or ghostvis serve --cors-origin"
            )
            raise ApiError(403, message, code="forbidden_origin")

    def cors(self, headers: Headers) -> dict[str, str]:
        """The headers that let the page read an answer, if it may."""
        origin = headers.get("origin")
        if origin is None:
            return {}
        if not self._allows(origin):
            return {"vary": "Origin"}
        return {
            "vary": "Origin",
            "access-control-allow-origin": origin,
            "access-control-expose-headers": EXPOSED,
        }

    def preflight(self, method: str, headers: Headers) -> dict[str, str] | None:
        """The headers that answer a preflight; None for any other request."""
        if method != "OPTIONS" or "origin" not in headers or "access-control-request-method" not in headers:
            return None
        if not self._allows(headers["origin"]):
            raise ApiError(403, "pages of this origin are not let in", code="forbidden_origin")
        found = {"access-control-allow-methods": METHODS, "access-control-max-age": str(KEPT_S)}
        if (wanted := headers.get("access-control-request-headers")) is not None:
            found["access-control-allow-headers"] = wanted
        if headers.get("access-control-request-private-network") == "true":
            found["access-control-allow-private-network"] = "true"
        return found

    def _is_foreign(self, headers: Headers) -> bool:
        """Whether a page that is not allowed sent it. Images and links send no origin, but Sec-Fetch-Site."""
        if (origin := headers.get("origin")) is not None:
            return not self._allows(origin)
        return headers.get("sec-fetch-site") == "cross-site"

    def _is_ours(self, host: str) -> bool:
        """Whether it names this server. The machine's own name does not: the network decides where it leads."""
        name = hostname(f"//{host}")
        ours = map(str.lower, (self.host, *self.allowed_hosts))
        number = as_number(name)
        return name != "" and (
            is_loopback(name) or name in ours or (number is not None and number.is_unspecified)
        )

    def _allows(self, origin: str) -> bool:
        return (
            is_loopback(hostname(origin))
            or "*" in self.cors_origins
            or origin.lower() in map(str.lower, self.cors_origins)
        )


def without_slash(scope: Scope) -> Scope:
    """/v1/models/ is /v1/models: a redirect would lead to http:// behind a proxy that speaks TLS."""
    path = scope["path"]
    if path == "/" or not path.endswith("/"):
        return scope
    return {**scope, "path": path.rstrip("/") or "/", "raw_path": scope["raw_path"].rstrip(b"/") or b"/"}


def hostname(url: str) -> str:
    """The host of an address, without its port; empty where it has none or can't be read."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
