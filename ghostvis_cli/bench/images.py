"""Images drawn from a seed: a lit background, shapes that overlap, a line of writing, grain as of a camera.

Flat colour would compress to nothing, decode in no time and look the same to a cache; these weigh about what
photographs of their size do. The only module of bench that needs Pillow.
"""

import math
from io import BytesIO
from random import Random
from typing import Literal, TypeAlias

from PIL import Image, ImageDraw, ImageFilter

Format: TypeAlias = Literal["jpeg", "png", "webp"]
FORMATS: tuple[Format, ...] = ("jpeg", "png", "webp")
JPEG_QUALITY = 85
GRAIN = 18  # of 255: how far grain moves a pixel at most
SHAPES = 12


def draw(random: Random, width: int, height: int, kind: Format) -> bytes:
    """An encoded image. The same state of `random` gives the same pixels."""
    image = _background(random, width, height)
    pen = ImageDraw.Draw(image)
    for _ in range(SHAPES):
        _shape(random, pen, width, height)
    image = image.filter(ImageFilter.GaussianBlur(0.7))
    pen = ImageDraw.Draw(image)
    pen.text((width * random.random() * 0.6, height * random.random() * 0.9), f"{random.random():.9f}")
    return _encoded(_with_grain(random, image), kind)


def _background(random: Random, width: int, height: int) -> Image.Image:
    """Four corners of colour, blended."""
    corners = Image.frombytes("RGB", (2, 2), bytes(_whole(random, 256) for _ in range(12)))
    return corners.resize((width, height), Image.Resampling.BICUBIC)


def _shape(random: Random, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    x, y = random.random() * width, random.random() * height
    reach = (0.05 + 0.2 * random.random()) * min(width, height) + 1
    color = (_whole(random, 256), _whole(random, 256), _whole(random, 256))
    turn = random.random() * math.tau
    sides = (0, 3, 4, 5, 6)[_whole(random, 5)]
    if not sides:
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=color)
        return
    angles = [turn + corner * math.tau / sides for corner in range(sides)]
    pen.polygon([(x + reach * math.cos(a), y + reach * math.sin(a)) for a in angles], fill=color)


def _with_grain(random: Random, image: Image.Image) -> Image.Image:
    """Noise of half the resolution, as sensors and their filters leave it."""
    size = (max(1, image.width // 2), max(1, image.height // 2))
    noise = Image.frombytes("L", size, random.randbytes(size[0] * size[1])).resize(image.size)
    grain = Image.merge("RGB", [noise] * 3)
    return Image.blend(image, grain, GRAIN / 255)


def _encoded(image: Image.Image, kind: Format) -> bytes:
    file = BytesIO()
    if kind == "jpeg":
        image.save(file, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(file, kind.upper())
    return file.getvalue()


def _whole(random: Random, below: int) -> int:
    return math.floor(random.random() * below)
