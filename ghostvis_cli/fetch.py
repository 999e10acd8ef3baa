"""One GET for an image: bounded in time and bytes, to public addresses only.

The address that was checked is the address that is connected to, at every redirect.
"""

import socket
import time
from collections.abc import Container
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from ghostvis_cli.addresses import is_public, proxy_for
from ghostvis_cli.errors import InputError, one_line, printable
from ghostvis_cli.version import __version__

if TYPE_CHECKING:
    import httpx2

    from ghostvis_cli.image_limits import ImageLimits


def is_from(url: str, hosts: Container[str]) -> bool:
    """Whether it is an http(s) address of one of the hosts, which are in lower case."""
    import httpx2  # the parser that fetches must be the one that judges

    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and parsed.host.lower() in hosts


def fetch(url: str, name: str, limits: "ImageLimits") -> bytes:
    """GET within `timeout_s`, all in all.

    In a thread, because neither a name lookup nor a header that arrives byte by byte heeds a timeout. When
    time is up the sockets are shut down, which ends the thread too.
    """
    answers: SimpleQueue[bytes | Exception] = SimpleQueue()
    sockets: list[socket.socket] = []

    def work() -> None:
        try:
            answers.put(_Fetch(name, limits, sockets).get(url))
        except Exception as error:
            answers.put(error)

    Thread(target=work, daemon=True, name="image-fetch").start()
    try:
        answer = answers.get(timeout=limits.timeout_s)
    except Empty:
        for opened in sockets:
            with suppress(OSError):  # of the plain class: a TLS socket's own method would race with its read
                socket.socket.shutdown(opened, socket.SHUT_RDWR)
        raise InputError(f"{name}: not fetched within {limits.timeout_s:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


class _Fetch:
    """One image's way through redirects. Every hop is checked, and connects to the very address checked.

    Behind a proxy (HTTPS_PROXY and so on) the proxy resolves names and decides which hosts may be reached;
    addresses written as numbers are still checked here, and this machine is never reached through one.
    """

    def __init__(self, name: str, limits: "ImageLimits", sockets: list[socket.socket]) -> None:
        self.name, self.limits, self.sockets = name, limits, sockets
        self.deadline = time.monotonic() + limits.timeout_s

    def get(self, text: str) -> bytes:
        import httpx2

        try:
            url = httpx2.URL(text)
            for _ in range(self.limits.max_redirects + 1):
                answer = self._hop(url)
                if isinstance(answer, bytes):
                    return answer
                if url.scheme == "https" and answer.scheme != "https":
                    raise InputError(f"{self.name}: redirected from https to {answer.scheme}")
                url = answer
        # ImportError: a SOCKS proxy without its package. The two after it: an impossible host, proxy or port.
        except (
            httpx2.HTTPError,
            httpx2.InvalidURL,
            ImportError,
            ValueError,
            OverflowError,
            OSError,
        ) as error:
            raise InputError(f"{self.name}: not fetched: {one_line(error)}") from error
        raise InputError(f"{self.name}: more than {self.limits.max_redirects} redirects")

    def _hop(self, url: "httpx2.URL") -> "bytes | httpx2.URL":
        """The body, or where the server sends us next."""
        import httpx2

        if url.scheme not in ("http", "https") or not url.host:
            raise InputError(f"{self.name}: leads to an address that is not http or https")
        if url.userinfo:
            message = f"{self.name}: a URL with a user name or password is not read"
            raise InputError(message, hint="download it first")
        proxy = proxy_for(url.scheme, url.host, url.port)
        addresses = self._addresses(url, numbers_only=proxy is not None)
        # trust_env would also send credentials from ~/.netrc; the certificates of SSL_CERT_FILE are kept.
        verify = httpx2.create_ssl_context()
        with httpx2.Client(proxy=proxy, verify=verify, trust_env=False) as client:
            response = self._connect(client, url, [url.host] if proxy else addresses)
            if response.has_redirect_location:
                return url.join(response.headers["location"])
            if response.status_code != 200:
                status = f"{response.status_code} {printable(response.reason_phrase)}"
                raise InputError(f"{self.name}: the server answered {status}")
            return self._body(response)

    def _addresses(self, url: "httpx2.URL", *, numbers_only: bool) -> list[str]:
        try:
            flags = socket.AI_NUMERICHOST if numbers_only else 0
            found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM, flags=flags)
        except socket.gaierror:
            if numbers_only:
                return []
            raise
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if not (self.limits.allow_private or is_public(address)):
                message = f"{self.name}: {printable(url.host)} is {address}, which is not a public address"
                raise InputError(message, hint="download it first")
        return addresses

    def _connect(self, client: "httpx2.Client", url: "httpx2.URL", hosts: list[str]) -> "httpx2.Response":
        """The head of the answer of the first host that can be reached, asked for by the URL's own name."""
        import httpx2

        headers = {
            "host": url.netloc.decode("ascii"),
            "user-agent": f"ghostvis/{__version__}",
            "accept": "image/*",
            "accept-encoding": "identity",
        }
        extensions = {"sni_hostname": url.raw_host.decode("ascii"), "trace": self._remember_socket}
        failure: Exception = httpx2.ConnectTimeout("no time left")
        for host in hosts:
            left_s = self.deadline - time.monotonic()
            if left_s <= 0:
                break
            client.timeout = httpx2.Timeout(left_s, connect=left_s / len(hosts))
            target = url.copy_with(host=host)
            request = client.build_request("GET", target, headers=headers, extensions=extensions)
            try:
                return client.send(request, stream=True)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                failure = error
        raise failure

    def _remember_socket(self, event: str, details: dict[str, Any]) -> None:
        """The trace hook, the only public way to the socket before the response's head has come."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self.sockets.append(details["return_value"].get_extra_info("socket"))

    def _body(self, response: "httpx2.Response") -> bytes:
        """Counted as it comes, after content decoding: neither a false length nor a gzip bomb gets past."""
        declared = response.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.limits.max_bytes:
            raise InputError(f"{self.name}: larger than {self.limits.size}")
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            if len(body) > self.limits.max_bytes:
                raise InputError(f"{self.name}: larger than {self.limits.size}")
        return bytes(body)
