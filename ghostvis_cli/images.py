"""One image from a path, `-`, a `data:` URL, http(s) or bytes: checked, upright, opaque RGB.

Limits hold before anything is decoded, every failure is an InputError that names the image, nothing prints.
Stops at pixels: resizing, cropping and normalising belong to the model.
"""

import base64
import binascii
import hashlib
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO, Literal
from urllib.parse import unquote_to_bytes, urlsplit

from ghostvis_cli.errors import InputError, limit_reached, one_line, printable
from ghostvis_cli.fetch import fetch
from ghostvis_cli.image_limits import DEFAULT_LIMITS, ImageLimits
from ghostvis_cli.jpeg import is_filled_up, with_end
from ghostvis_cli.transparency import on_ground

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

FIRST_OF = {
    "animation": "an animation: the model sees its first frame",
    "pages": "several pages: the model sees the first",
}
NOTICE_BELOW = 0.8  # a centre crop that keeps less than this share of the image is worth a line

# Pillow's readers of still images. Not EPS or PDF, which run other programs; not ICO, whose header does not
# bind the image inside it, so that no limit could hold before decoding. AVIF is last: Pillow may lack it.
# JPEG's reader also opens MPO, the two-image files of phones.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SENT_AS_IS = {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}

# What people pass by mistake: how it begins, what it is, what helps.
LOOKALIKES = (
    (rb"%PDF-", "a PDF document", "pdftoppm -png -r 150 {file} page"),
    (rb"....ftyp(hei[cmsx]|hev|mif1|msf1)", "a HEIC photo", "heif-convert {file} photo.jpg"),
    (rb"....ftyp", "a video", "ffmpeg -i {file} -frames:v 1 frame.png"),
    (rb"\s*(<[?!][^>]*>\s*)*<svg\b", "an SVG drawing", "rsvg-convert {file} -o image.png"),
    (rb"\s*(<[?!][^>]*>\s*)*<(html|head|body|meta|title)\b", "an HTML page", "pass the image's address"),
    (rb"\0\0\x01\0", "an icon", "magick {file} image.png"),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*", "a damaged image", None),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", "gs -sDEVICE=png16m -o page.png {file}"),
    (rb"[\t\n\r\x20-\x7e\x80-\xff]+\Z", "a text file", None),
)  # fmt: skip

SHRINK = "magick {file} -resize 2048x2048 smaller.jpg"


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An upright image ready for any engine: RGB pixels, no tensors."""

    name: str  # what the user called it, safe to print: no query, no credentials, no control characters
    original: bytes | None = field(repr=False)  # the file, where every decoder makes `pil()` of it
    mime: str
    width: int
    height: int
    first_of: Literal["animation", "pages"] | None = None  # what it is only the first frame or page of
    laid_on: str | None = None  # the ground, where the image was transparent
    encoded: bytes | None = field(default=None, repr=False)  # base64 of `data`, where made ahead

    @cached_property
    def _pixels(self) -> "Image.Image":
        from PIL import Image

        return Image.open(BytesIO(self.data), formats=FORMATS).convert("RGB")

    @cached_property
    def data(self) -> bytes:
        """What a server is sent: the file, or a PNG of the upright pixels (a second for a large photo)."""
        return _png(self._pixels) if self.original is None else self.original

    def pil(self) -> "Image.Image":
        """The image decoded, RGB. Decoded once and shared: copy it before changing it."""
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

    @property
    def notices(self) -> Iterator[str]:
        """Lines for stderr on what the model does not see: other frames, and over 20 % outside the square."""
        if self.first_of is not None:
            yield f"{self.name}: {FIRST_OF[self.first_of]}"
        if self.kept_fraction < NOTICE_BELOW:
            percent = int(100 * self.kept_fraction)
            yield f"{self.name}: the model sees the central square, {percent} % of the picture"

    @property
    def details(self) -> Iterator[str]:
        """Lines for stderr with -v."""
        if self.laid_on is not None:
            yield f"{self.name}: transparent parts are shown on {self.laid_on}; images.background sets another"

    def base64(self) -> bytes:
        """`data` as the text that a server is sent."""
        return base64.b64encode(self.data) if self.encoded is None else self.encoded

    def data_url(self) -> str:
        return f"data:{self.mime};base64,{self.base64().decode('ascii')}"


def load_image(
    source: "str | os.PathLike[str] | bytes | Image.Image",
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    stdin: BinaryIO | None = None,
) -> EncodedImage:
    """Only a str is interpreted (`-`, `data:`, `http://`, `file://`); a Path is always a file."""
    if isinstance(source, bytes):
        return from_bytes(source, "image", limits)
    if not isinstance(source, str | os.PathLike):
        return _checked(source, None, printable(str(getattr(source, "filename", "") or "image")), limits)
    name, content = _read(source, limits, stdin)
    return from_bytes(content, name, limits)


def _read(source: str | os.PathLike[str], limits: ImageLimits, stdin: BinaryIO | None) -> tuple[str, bytes]:
    """The image's name for messages, and its bytes."""
    text = os.fspath(source)
    if text == "-" and isinstance(source, str):
        return "stdin", _read_stdin(stdin, limits)
    scheme = re.match(r"data(?=:)|[a-z][a-z0-9+.-]*(?=://)", text, re.I)
    if scheme is None or not isinstance(source, str):
        return text, _read_file(text, printable(text), limits)
    if scheme[0].lower() == "data":
        return "data: URL", _decode_data_url(text, limits)
    name = printable(re.sub(r"//[^/]*@", "//", re.split(r"[?#]", text)[0]))  # the rest may hold secrets
    match scheme[0].lower():
        case "file":
            return name, _read_file(_file_url_path(text, name), name, limits)
        case "http" | "https":
            return name, fetch(text, name, limits)
    raise InputError(f"{name}: only http, https, file and data addresses are read", hint="download it first")


def from_bytes(data: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> EncodedImage:
    """An encoded image, checked and made upright. What an engine can take as it is stays byte for byte."""
    from PIL import Image, UnidentifiedImageError

    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata is no business of the user's stderr
    name = printable(name)
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
        raise _not_an_image(data, name) from error
    except Exception as error:  # Pillow's readers let anything out on a damaged file
        unread = InputError(f"{name}: the header cannot be read: {one_line(error)}")
        raise limit_reached(error) or unread from error
    return _checked(image, data, name, limits)


def _checked(image: "Image.Image", data: bytes | None, name: str, limits: ImageLimits) -> EncodedImage:
    """An image of which only the header was read, and the bytes it came from if it came from bytes."""
    width, height = image.size
    if min(width, height) < 1:
        raise InputError(f"{name}: the image has no pixels ({width} x {height})")
    if width * height > limits.max_pixels:
        message = f"{name}: {width} x {height} is more than {limits.max_pixels:,} pixels"
        raise InputError(message, hint=_command(SHRINK, name))
    if max(width, height) > limits.max_aspect * min(width, height):
        message = f"{name}: one side of {width} x {height} is over {limits.max_aspect:g} times the other"
        raise InputError(message, hint="cut out the part that matters")
    try:
        return _encoded(*_loaded(image, data), name, limits)
    except Exception as error:  # as above
        kind = image.format or "image"
        broken = InputError(f"{name}: broken or truncated {kind}: {one_line(error)}")
        raise limit_reached(error) or broken from error


def _loaded(image: "Image.Image", data: bytes | None) -> "tuple[Image.Image, bytes | None]":
    """Its pixels decoded. A JPEG that only lost its end marker gets it back."""
    from PIL import Image

    jpeg = data if image.format in ("JPEG", "MPO") else None
    try:
        if jpeg is not None and is_filled_up(jpeg):
            raise OSError("zeros where its end should be")
        image.load()
    except OSError:
        whole = with_end(jpeg) if jpeg is not None else None
        if whole is None:
            raise
        image, data = Image.open(BytesIO(whole), formats=("JPEG",)), whole
        image.load()
    return image, data


def _encoded(image: "Image.Image", data: bytes | None, name: str, limits: ImageLimits) -> EncodedImage:
    """The first frame, its transparent parts on the ground, turned as EXIF says."""
    as_is, orientation = data is not None and _can_be_sent(image, data), _orientation(image)
    colours = image if data and image.mode == "RGB" else _eight_bit(image).convert("RGB")  # a copy less
    opaque = on_ground(image, colours, limits.ground, bits=data[24] if data and image.format == "PNG" else 8)
    first_of = _first_of(image, data)
    rgb = _upright(opaque, orientation)
    encoded = EncodedImage(
        name,
        data if as_is else None,
        SENT_AS_IS[str(image.format)] if as_is else "image/png",
        *rgb.size,
        first_of=first_of,
        laid_on=None if opaque is colours else limits.background,
    )
    encoded.__dict__["_pixels"] = rgb  # decoded once: this is where cached_property keeps its value
    return encoded


def _first_of(image: "Image.Image", data: bytes | None) -> Literal["animation", "pages"] | None:
    """What else the file has: frames or pages. A phone's MPO counts as one image, its others are for depth."""
    from PIL import Image

    if data is None or image.format in ("JPEG", "MPO"):
        return None
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as again:  # looking further moves a GIF on
            more = getattr(again, "is_animated", False)
    except Exception:  # whatever a damaged second frame makes Pillow raise
        return None
    if not more:
        return None
    return "pages" if image.format == "TIFF" else "animation"


def _can_be_sent(image: "Image.Image", data: bytes) -> bool:
    """Whether any decoder gets the pixels of `_encoded` from the original bytes."""
    if image.format not in SENT_AS_IS or image.mode not in ("RGB", "L") or _orientation(image) != 1:
        return False
    if image.format == "PNG" and data[24] != 8:  # bit depth: 16 has no single way to 8
        return False
    animated = getattr(image, "is_animated", False) and image.format != "MPO"  # an MPO begins as a plain JPEG
    return not animated and "transparency" not in image.info


def _orientation(image: "Image.Image") -> int:
    tag = image.getexif().get(0x0112)
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


def _upright(rgb: "Image.Image", orientation: int) -> "Image.Image":
    """Turned, and free of metadata that could turn it twice.

    Not ImageOps.exif_transpose: it writes the other EXIF tags anew and fails on those that are damaged.
    """
    from PIL.Image import Transpose as To

    rgb.info.clear()
    turns = (None, To.FLIP_LEFT_RIGHT, To.ROTATE_180, To.FLIP_TOP_BOTTOM,
             To.TRANSPOSE, To.ROTATE_270, To.TRANSVERSE, To.ROTATE_90)  # fmt: skip
    turn = turns[orientation - 1]
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
        raise limit_reached(error) or InputError(f"{name}: {one_line(error)}") from error


def beside(directory: "Path", source: str) -> str:
    """`source` for `load_image`, where a relative path is relative to `directory`."""
    complete = source[:5].lower() == "data:" or "://" in source or source.startswith(("/", "~"))
    # Not Path: it loses the "./" that keeps a leading tilde literal.
    return source if complete else f"{directory}/{source}"


def _file_url_path(url: str, name: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise InputError(f"{name}: a file on another machine", hint="file:///path/to/image.jpg")
    return os.fsdecode(unquote_to_bytes(parts.path))


def _read_stdin(stdin: BinaryIO | None, limits: ImageLimits) -> bytes:
    stream = stdin or getattr(sys.stdin, "buffer", None)
    if stream is None or stream.closed:
        raise InputError("stdin: closed, no image to read")
    if stream.isatty():
        hint = "ghostvis generate -i - 'What is this?' < photo.jpg"
        raise InputError("stdin: a terminal, not an image", hint=hint)
    try:
        return bytes(stream.read(limits.max_bytes + 1))
    except OSError as error:
        raise InputError(f"stdin: {one_line(error)}") from error


def _decode_data_url(url: str, limits: ImageLimits) -> bytes:
    """RFC 2397, with the line breaks, missing padding and URL-safe alphabet that people paste."""
    header, comma, payload = url.partition(",")
    if not comma:
        raise InputError("data: URL: no comma, so no image", hint="data:image/png;base64,iVBORw0KGgo...")
    content = unquote_to_bytes(payload)  # never longer than the URL itself
    if not header.lower().endswith(";base64"):
        return content
    if len(content) * 3 // 4 <= limits.max_bytes:
        with suppress(binascii.Error):  # nearly all of them; what is odd takes longer
            return binascii.a2b_base64(content, strict_mode=True)
    # Not by a regular expression: of 40 MB that would stop every other thread for seconds.
    content = content.translate(bytes.maketrans(b"-_", b"+/"), b" \t\n\r\f\v=")
    if len(content) * 3 // 4 > limits.max_bytes:
        raise _too_large("data: URL", limits)
    try:
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except binascii.Error as error:
        raise InputError(f"data: URL: not valid base64: {one_line(error)}") from error


def _too_large(name: str, limits: ImageLimits) -> InputError:
    return InputError(f"{name}: larger than {limits.size}", hint=_command(SHRINK, name))


def _not_an_image(data: bytes, name: str) -> InputError:
    for beginning, meaning, command in LOOKALIKES:
        if re.match(beginning, data[:2048], re.I | re.S):
            return InputError(f"{name}: seems to be {meaning}", hint=command and _command(command, name))
    return InputError(f"{name}: not an image in a known format")


def _command(command: str, name: str) -> str:
    file = shlex.quote(name) if os.path.isfile(name) else "FILE"  # noqa: PTH113 - Path raises on long names
    return command.format(file=file)
