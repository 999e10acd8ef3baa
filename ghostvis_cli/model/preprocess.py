"""An image as the model sees it: shortest side to S, centre crop, normalise - bit for bit what training did.

Pillow and numpy only (format specification, section 5.1), so that a server can do it without torch.
"""

from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def normalisation(encoder_name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation by the config's encoder name; upstream takes 0.5 for every name but CLIP's."""
    return (CLIP_MEAN, CLIP_STD) if "clip" in encoder_name and "siglip" not in encoder_name else (HALF, HALF)


def resized_size(width: int, height: int, size: int) -> tuple[int, int]:
    """The image's size once its shortest side is `size`; the long side is truncated, as torchvision does."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def crop(image: Image.Image, size: int) -> Image.Image:
    """The very square the model sees: RGB, size x size pixels, bicubic."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    target = resized_size(*image.size, size)
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (
        round((target[0] - size) / 2),
        round((target[1] - size) / 2),
    )  # Python's rounding: half to even
    return image.crop((left, top, left + size, top + size))


def preprocess(
    image: Image.Image, size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> "NDArray[Any]":
    """An upright image -> (3, size, size) float32."""
    import numpy as np

    pixels = np.asarray(crop(image, size), dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
    shape = (3, 1, 1)
    normalised = (pixels - np.asarray(mean, np.float32).reshape(shape)) / np.asarray(std, np.float32).reshape(
        shape
    )
    return np.ascontiguousarray(normalised)
