"""A test card that tells up from down: a red circle above a blue square, stored lying on its side.

The file is a JPEG as a phone writes it: pixels turned by 90 degrees and an EXIF tag that says so. A loader that
ignores the tag sees the circle on the left; one that turns the wrong way sees it at the bottom.
"""

from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING

from ghostvis_cli.doctor.finding import Finding

if TYPE_CHECKING:
    from PIL import Image

    from ghostvis_cli.image_limits import ImageLimits
    from ghostvis_cli.images import EncodedImage

SIZE = 224
CIRCLE, SQUARE = (0.36, 0.08, 0.64, 0.36), (0.36, 0.65, 0.64, 0.93)  # left, top, right, bottom
QUESTION, WORD = "Where is the red circle?", "top"
ORIENTATION, TURN_RIGHT = 0x0112, 6  # the tag, and its value for "turn clockwise by 90 degrees to see it"


def encoded(*, tagged: bool) -> bytes:
    """The card as a JPEG file, with its EXIF tag or without."""
    from PIL import Image, ImageDraw

    upright = Image.new("RGB", (SIZE, SIZE), "white")
    draw = ImageDraw.Draw(upright)
    draw.ellipse([SIZE * edge for edge in CIRCLE], fill="red")
    draw.rectangle([SIZE * edge for edge in SQUARE], fill="blue")
    exif = Image.Exif()
    if tagged:
        exif[ORIENTATION] = TURN_RIGHT
    file = BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def loaded(limits: "ImageLimits", *, tagged: bool = True) -> "EncodedImage":
    from ghostvis_cli.images import from_bytes

    return from_bytes(encoded(tagged=tagged), "test card", limits)


def sent_upright(image: "EncodedImage") -> Finding:
    """Whether the image that engines get has the circle on top, and no EXIF tag that would turn it again."""
    from PIL import Image

    sent = Image.open(BytesIO(image.data))
    tag = sent.getexif().get(ORIENTATION, 1)
    pixels = sent.convert("RGB")
    if tag == 1 and _is_red(pixels, CIRCLE) and not _is_red(pixels, SQUARE):
        message = "a photo stored on its side is turned by its EXIF tag before any engine gets it"
        return Finding("pictures", "loader", "ok", message)
    message = f"a photo stored on its side is not upright when it leaves (EXIF orientation {tag})"
    return Finding("pictures", "loader", "error", message, "pip install --upgrade pillow, and report it")


def _is_red(image: "Image.Image", box: tuple[float, float, float, float]) -> bool:
    """The colour in the middle of a box, given the losses of JPEG."""
    left, top, right, bottom = box
    pixel = image.getpixel((int(SIZE * (left + right) / 2), int(SIZE * (top + bottom) / 2)))
    assert isinstance(pixel, tuple)
    red, green, blue = pixel
    return bool(red > 200 and green < 80 and blue < 80)


def images(limits: "ImageLimits") -> Iterator[Finding]:
    yield sent_upright(loaded(limits))
