"""One picture from a path, `-`, a `data:` URL, http(s) or bytes: checked, upright, RGB, ready for any engine.

Limits hold before anything is decoded, every failure is an InputError that names the picture, nothing prints.
Stops at pixels: resizing, cropping and normalising belong to the model.
"""

import base64
import binascii
import hashlib
import ipaddress
import os
import re
import shlex
import socket
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit

from ghostvis_cli import __version__
from ghostvis_cli.errors import InputError

if TYPE_CHECKING:
    import httpx2
    from PIL import Image

NOTICE_BELOW = 0.8  # a centre crop that keeps less than this share of the picture is worth a line

# Pillow's readers of still pictures. Not EPS or PDF, which run other programs; not ICO, whose header does not
# bind the picture inside it, so that no limit could hold before decoding. AVIF is last: Pillow may lack it.
# JPEG's reader also opens MPO, the two-picture files of phones.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SENT_AS_IS = {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}

# What people pass by mistake: how it begins, what it is, what helps.
LOOKALIKES = (
    (rb"%PDF-", "a PDF document", "pdftoppm -png -r 150 {file} page"),
    (rb"....ftyp(hei[cmsx]|hev|mif1|msf1)", "a HEIC photo", "heif-convert {file} photo.jpg"),
    (rb"....ftyp", "a video", "ffmpeg -i {file} -frames:v 1 frame.png"),
    (rb"\s*(<[?!][^>]*>\s*)*<svg\b", "an SVG drawing", "rsvg-convert {file} -o picture.png"),
    (rb"\s*(<[?!][^>]*>\s*)*<(html|head|body|meta|title)\b", "an HTML page", "pass the picture's address"),
    (rb"\0\0\x01\0", "an icon", "magick {file} picture.png"),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*", "a damaged picture", None),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", "gs -sDEVICE=png16m -o page.png {file}"),
    (rb"[\t\n\r\x20-\x7e\x80-\xff]+\Z", "a text file", None),
)  # fmt: skip

SHRINK = "magick {file} -resize 2048x2048 smaller.jpg"
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses as an IPv6-only network sees them


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost. The defaults admit what cameras make and nothing that stops a laptop."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000  # 192 MB as RGB; full-frame cameras end at 61 million
    max_aspect: float = 100.0  # the long side is resized before the crop: 336 x 33,600 is 11 million pixels
    timeout_s: float = 20.0  # name lookup, every redirect and the whole body together
    max_redirects: int = 3
    allow_private: bool = False  # loopback, link-local (cloud metadata), private networks and the like


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class EncodedImage:
    """An upright picture ready for any engine: encoded RGB pixels, no tensors."""

    name: str  # what the user called it, safe to print: no query, no credentials, no control characters
    data: bytes = field(repr=False)  # decodes to exactly the pixels of `pil()`, in any decoder
    mime: str
    width: int
    height: int

    @cached_property
    def _pixels(self) -> "Image.Image":
        from PIL import Image

        return Image.open(BytesIO(self.data), formats=FORMATS).convert("RGB")

    def pil(self) -> "Image.Image":
        """The picture decoded, RGB. Decoded once and shared: copy it before changing it."""
        return self._pixels

    @cached_property
    def digest(self) -> str:
        """sha256 of size and RGB bytes: the same pixels in another file format have the same identity."""
        header = f"{self.width}x{self.height}:".encode()
        return hashlib.sha256(header + self.pil().tobytes()).hexdigest()

    @property
    def kept_fraction(self) -> float:
        """The share of the area that the model's central square leaves."""
        return min(self.width, self.height) / max(self.width, self.height)

    def data_url(self) -> str:
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode('ascii')}"


def crop_notice(image: EncodedImage) -> str | None:
    """One line for stderr when the central square loses over 20 % of the picture."""
    if image.kept_fraction >= NOTICE_BELOW:
        return None
    percent = int(100 * image.kept_fraction)
    return f"{image.name}: the model sees the central square, {percent} % of the picture"


def load_image(
    source: "str | os.PathLike[str] | bytes | Image.Image",
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    stdin: BinaryIO | None = None,
) -> EncodedImage:
    """Only a str is interpreted (`-`, `data:`, `http://`, `file://`); a Path is always a file."""
    if isinstance(source, bytes):
        return from_bytes(source, "picture", limits)
    if not isinstance(source, str | os.PathLike):
        return _checked(source, None, _printable(str(getattr(source, "filename", "") or "picture")), limits)
    name, content = _read(source, limits, stdin)
    return from_bytes(content, name, limits)


def _read(source: str | os.PathLike[str], limits: ImageLimits, stdin: BinaryIO | None) -> tuple[str, bytes]:
    """The picture's name for messages, and its bytes."""
    text = os.fspath(source)
    if text == "-" and isinstance(source, str):
        return "stdin", _read_stdin(stdin, limits)
    scheme = re.match(r"data(?=:)|[a-z][a-z0-9+.-]*(?=://)", text, re.I)
    if scheme is None or not isinstance(source, str):
        return text, _read_file(text, _printable(text), limits)
    if scheme[0].lower() == "data":
        return "data: URL", _decode_data_url(text, limits)
    name = _printable(re.sub(r"//[^/]*@", "//", re.split(r"[?#]", text)[0]))  # the rest may hold secrets
    match scheme[0].lower():
        case "file":
            return name, _read_file(_file_url_path(text, name), name, limits)
        case "http" | "https":
            return name, _fetch(text, name, limits)
    raise InputError(f"{name}: only http, https, file and data addresses are read", hint="download it first")


def from_bytes(data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> EncodedImage:
    """An encoded picture, checked and made upright. What an engine can take as it is stays byte for byte."""
    from PIL import Image, UnidentifiedImageError

    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata is no business of the user's stderr
    name = _printable(name)
    if not data:
        raise InputError(f"{name}: empty, 0 bytes")
    if len(data) > limits.max_bytes:
        raise _too_large(name, limits)
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        message = f"{name}: more than {limits.max_pixels:,} pixels"
        raise InputError(message, hint=_command(SHRINK, name)) from error
    except (UnidentifiedImageError, KeyError) as error:  # KeyError: a Pillow that knows no AVIF
        raise _not_a_picture(data, name) from error
    except Exception as error:  # Pillow's readers let anything out on a damaged file
        raise InputError(f"{name}: the header cannot be read: {_one_line(error)}") from error
    return _checked(image, data, name, limits)


def _checked(image: "Image.Image", data: bytes | None, name: str, limits: ImageLimits) -> EncodedImage:
    """A picture of which only the header was read, and the bytes it came from if it came from bytes."""
    width, height = image.size
    if min(width, height) < 1:
        raise InputError(f"{name}: the picture has no pixels ({width} x {height})")
    if width * height > limits.max_pixels:
        message = f"{name}: {width} x {height} is more than {limits.max_pixels:,} pixels"
        raise InputError(message, hint=_command(SHRINK, name))
    if max(width, height) > limits.max_aspect * min(width, height):
        message = f"{name}: one side of {width} x {height} is over {limits.max_aspect:g} times the other"
        raise InputError(message, hint="cut out the part that matters")
    try:
        image.load()
        rgb = _upright_rgb(image)
        if data and _can_be_sent(image, data):
            encoded = EncodedImage(name, data, SENT_AS_IS[str(image.format)], *rgb.size)
        else:
            encoded = EncodedImage(name, _png(rgb), "image/png", *rgb.size)
    except Exception as error:  # as above
        kind = image.format or "picture"
        raise InputError(f"{name}: broken or truncated {kind}: {_one_line(error)}") from error
    encoded.__dict__["_pixels"] = rgb  # decoded once: this is where cached_property keeps its value
    return encoded


def _can_be_sent(image: "Image.Image", data: bytes) -> bool:
    """Whether any decoder gets the pixels of `_upright_rgb` from the original bytes."""
    if image.format not in SENT_AS_IS or image.mode not in ("RGB", "L") or _orientation(image) != 1:
        return False
    if image.format == "PNG" and data[24] != 8:  # bit depth: 16 has no single way to 8
        return False
    animated = getattr(image, "is_animated", False) and image.format != "MPO"  # an MPO begins as a plain JPEG
    return not animated and "transparency" not in image.info


def _orientation(image: "Image.Image") -> int:
    tag = image.getexif().get(0x0112)
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


def _upright_rgb(image: "Image.Image") -> "Image.Image":
    """The first frame, turned as EXIF says, alpha dropped, free of metadata that could turn it twice.

    Not ImageOps.exif_transpose: it writes the other EXIF tags anew and fails on those that are damaged.
    """
    from PIL.Image import Transpose as To

    rgb = _eight_bit(image).convert("RGB")
    rgb.info.clear()
    turns = (None, To.FLIP_LEFT_RIGHT, To.ROTATE_180, To.FLIP_TOP_BOTTOM,
             To.TRANSPOSE, To.ROTATE_270, To.TRANSVERSE, To.ROTATE_90)  # fmt: skip
    turn = turns[_orientation(image) - 1]
    return rgb if turn is None else rgb.transpose(turn)


def _eight_bit(image: "Image.Image") -> "Image.Image":
    """Grey of 16 bits, 32 bits or floats -> 8 bits by its full scale; Pillow's own way clips at 255."""
    if image.mode in ("RGBa", "La"):  # premultiplied: Pillow has no direct way to RGB
        return image.convert(image.mode.upper())
    if not image.mode.startswith(("I", "F")):
        return image
    wide = image if image.mode == "F" else image.convert("I")
    low, high = (float(str(value)) for value in wide.getextrema())
    scales = (1, 255, 65535) if wide.mode == "F" else (65535,)
    full = next((scale for scale in scales if low >= 0 and high <= scale), None)
    start, span = (0.0, float(full)) if full else (low, (high - low) or 1.0)  # no known scale: stretch it
    factor = 255 / span
    return wide.point(lambda value: value * factor + (0.5 - start * factor)).convert("L")


def _png(rgb: "Image.Image") -> bytes:
    buffer = BytesIO()
    rgb.save(buffer, "PNG", compress_level=1)  # 12 noisy megapixels: 0.7 s, not 3.0, and no larger
    return buffer.getvalue()


def _read_file(path: str, name: str, limits: ImageLimits) -> bytes:
    try:
        # os.path: Path("./~x") loses the "./" that keeps a leading tilde literal.
        with open(os.path.expanduser(path), "rb") as file:  # noqa: PTH111, PTH123
            if os.fstat(file.fileno()).st_size > limits.max_bytes:
                raise _too_large(name, limits)
            return file.read(limits.max_bytes + 1)  # pipes and devices have no size to ask for
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{name}: {_one_line(error)}") from error


def _file_url_path(url: str, name: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise InputError(f"{name}: a file on another machine", hint="file:///path/to/picture.jpg")
    return os.fsdecode(unquote_to_bytes(parts.path))


def _read_stdin(stdin: BinaryIO | None, limits: ImageLimits) -> bytes:
    stream = stdin or getattr(sys.stdin, "buffer", None)
    if stream is None or stream.closed:
        raise InputError("stdin: closed, no picture to read")
    if stream.isatty():
        hint = "ghostvis generate -i - 'What is this?' < photo.jpg"
        raise InputError("stdin: a terminal, not a picture", hint=hint)
    try:
        return bytes(stream.read(limits.max_bytes + 1))
    except OSError as error:
        raise InputError(f"stdin: {_one_line(error)}") from error


def _decode_data_url(url: str, limits: ImageLimits) -> bytes:
    """RFC 2397, with the line breaks, missing padding and URL-safe alphabet that people paste."""
    header, comma, payload = url.partition(",")
    if not comma:
        raise InputError("data: URL: no comma, so no picture", hint="data:image/png;base64,iVBORw0KGgo...")
    content = unquote_to_bytes(payload)  # never longer than the URL itself
    if not header.lower().endswith(";base64"):
        return content
    content = re.sub(rb"[\s=]+", b"", content).translate(bytes.maketrans(b"-_", b"+/"))
    if len(content) * 3 // 4 > limits.max_bytes:
        raise _too_large("data: URL", limits)
    try:
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except binascii.Error as error:
        raise InputError(f"data: URL: not valid base64: {_one_line(error)}") from error


def _fetch(url: str, name: str, limits: ImageLimits) -> bytes:
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
    """One picture's way through redirects. Every hop is checked, and connects to the very address checked.

    Behind a proxy (HTTPS_PROXY and so on) the proxy resolves names and decides which hosts may be reached;
    addresses written as numbers are still checked here, and loopback is never proxied.
    """

    def __init__(self, name: str, limits: ImageLimits, sockets: list[socket.socket]) -> None:
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
            raise InputError(f"{self.name}: not fetched: {_one_line(error)}") from error
        raise InputError(f"{self.name}: more than {self.limits.max_redirects} redirects")

    def _hop(self, url: "httpx2.URL") -> "bytes | httpx2.URL":
        """The body, or where the server sends us next."""
        import httpx2

        if url.scheme not in ("http", "https") or not url.host:
            raise InputError(f"{self.name}: leads to an address that is not http or https")
        if url.userinfo:
            message = f"{self.name}: a URL with a user name or password is not read"
            raise InputError(message, hint="download it first")
        proxy = _proxy(url)
        addresses = self._addresses(url, numbers_only=proxy is not None)
        # trust_env would also send credentials from ~/.netrc; the certificates of SSL_CERT_FILE are kept.
        verify = httpx2.create_ssl_context()
        with httpx2.Client(proxy=proxy, verify=verify, trust_env=False) as client:
            response = self._connect(client, url, [url.host] if proxy else addresses)
            if response.has_redirect_location:
                return url.join(response.headers["location"])
            if response.status_code != 200:
                status = f"{response.status_code} {_printable(response.reason_phrase)}"
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
            if not (self.limits.allow_private or _is_public(address)):
                message = f"{self.name}: {_printable(url.host)} is {address}, which is not a public address"
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
        """The trace hook: the one public way to the socket while the response's head is still on its way."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self.sockets.append(details["return_value"].get_extra_info("socket"))

    def _body(self, response: "httpx2.Response") -> bytes:
        """Counted as it comes, after content decoding: neither a false length nor a gzip bomb gets past."""
        declared = response.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.limits.max_bytes:
            raise _too_large(self.name, self.limits)
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            if len(body) > self.limits.max_bytes:
                raise _too_large(self.name, self.limits)
        return bytes(body)


def _proxy(url: "httpx2.URL") -> str | None:
    from urllib.request import getproxies, proxy_bypass  # 20 ms that only a URL should cost

    host = url.host
    if host in ("localhost", "::1") or host.startswith("127.") or proxy_bypass(host):
        return None
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _is_public(text: str) -> bool:
    """Whether everyone on the internet means the same machine by this address, IPv4 inside IPv6 included."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return _is_public(str(inner))
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _printable(name: str) -> str:
    """One line, at most 200 characters, nothing that a terminal would obey."""
    name = name if len(name) <= 200 else f"{name[:80]}...{name[-117:]}"
    return "".join(char if char.isprintable() else "?" for char in name) or "''"


def _one_line(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return _printable(" ".join(text.split()))


def _too_large(name: str, limits: ImageLimits) -> InputError:
    limit = f"{limits.max_bytes / 2**20:g} MiB" if limits.max_bytes >= 2**20 else f"{limits.max_bytes} bytes"
    return InputError(f"{name}: larger than {limit}", hint=_command(SHRINK, name))


def _not_a_picture(data: bytes, name: str) -> InputError:
    for beginning, meaning, command in LOOKALIKES:
        if re.match(beginning, data[:2048], re.I | re.S):
            return InputError(f"{name}: seems to be {meaning}", hint=command and _command(command, name))
    return InputError(f"{name}: not a picture in a known format")


def _command(command: str, name: str) -> str:
    file = shlex.quote(name) if os.path.isfile(name) else "FILE"  # noqa: PTH113 - Path raises on long names
    return command.format(file=file)
