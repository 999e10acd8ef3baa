"""An image's transparent parts -> the ground they are laid on. Needs Pillow and nothing else of this project.

The colours under transparent pixels are an accident of the program that wrote the image.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

WHITE = (255, 255, 255)
NAMED_GROUNDS = {"white": WHITE, "black": (0, 0, 0), "grey": (128, 128, 128), "gray": (128, 128, 128)}
HEX_GROUND = re.compile(r"#?([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})")


def ground_colour(name: str) -> tuple[int, int, int] | None:
    """white, black, grey, #rrggbb or rrggbb as RGB; None for anything else."""
    if found := HEX_GROUND.fullmatch(name):
        return int(found[1], 16), int(found[2], 16), int(found[3], 16)
    return NAMED_GROUNDS.get(name.lower())


def on_ground(
    image: "Image.Image", rgb: "Image.Image", ground: tuple[int, int, int], bits: int = 8
) -> "Image.Image":
    """`rgb`, the colours of `image`, where it is opaque, and the ground where not. `rgb` itself if all is opaque.

    `bits` a channel in the file: Pillow gives the pixels of a 2, 4 or 16 bit PNG in 8, but not its one
    transparent colour.
    """
    from PIL import Image

    alpha = alpha_of(image, bits)
    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb
    laid = Image.new("RGB", rgb.size, ground)
    laid.paste(rgb, mask=alpha)
    return laid


def alpha_of(image: "Image.Image", bits: int = 8) -> "Image.Image | None":
    """How opaque each pixel is (mode L), whichever way the image says so; None where it says nothing."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return image.getchannel(len(image.getbands()) - 1)
    key = image.info.get("transparency")
    if image.mode == "P" and (key is not None or image.has_transparency_data):
        return image.convert("RGBA").getchannel("A")
    if image.mode in ("1", "L", "RGB", "I;16") and isinstance(key, int | tuple):
        return _all_but(image, (key,) if isinstance(key, int) else key, bits)
    return _inside_first_frame(image)


def _all_but(image: "Image.Image", key: tuple[int, ...], bits: int) -> "Image.Image":
    """Opaque but for the pixels of one colour, which is given in the file's bits."""
    from PIL import Image, ImageChops

    values = key
    if image.mode == "I;16":
        bands = Image.frombytes("LA", image.size, image.tobytes()).split()  # low and high bytes
        values = (key[0] & 255, key[0] >> 8)
    elif image.mode == "1":  # Pillow has made the key 0 or 255 already
        bands = (image.convert("L"),)
    else:
        bands = image.split()
        values = tuple(value >> 8 if bits == 16 else value * (255 // (2**bits - 1)) for value in key)
    clear = Image.new("L", image.size, 255)
    for band, value in zip(bands, values, strict=True):
        clear = ImageChops.multiply(clear, band.point([255 * (each == value) for each in range(256)]))
    return ImageChops.invert(clear)


def _inside_first_frame(image: "Image.Image") -> "Image.Image | None":
    """A GIF's first frame may leave part of the canvas bare."""
    from PIL import Image

    box = getattr(image, "dispose_extent", None)
    if image.format != "GIF" or box is None or tuple(box) == (0, 0, *image.size):
        return None
    alpha = Image.new("L", image.size, 0)
    alpha.paste(255, box)
    return alpha
