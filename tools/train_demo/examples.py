"""The example pictures that ship with the model, and a landscape that it is not expected to understand."""

import math
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from tools.train_demo.scenes import Ground, Scene, Shape, render

WHITE = Ground("white", (255, 255, 255), (255, 255, 255))
EXAMPLES: dict[str, tuple[Scene, tuple[int, int]]] = {
    "red-circle.png": (Scene((Shape("red", "circle", (220, 20, 40), 0.5, 0.5, 0.28),), WHITE), (320, 320)),
    "three-shapes.jpg": (
        Scene(
            (
                Shape("blue", "square", (30, 80, 220), 0.2, 0.22, 0.15),
                Shape("yellow", "star", (250, 220, 30), 0.78, 0.5, 0.19),
                Shape("green", "triangle", (0, 160, 60), 0.3, 0.8, 0.13),
            ),
            Ground("gray", (90, 90, 90), (90, 90, 90)),
        ),
        (400, 400),
    ),
    "two-circles-striped.png": (
        Scene(
            (
                Shape("orange", "circle", (255, 140, 0), 0.24, 0.5, 0.2),
                Shape("purple", "circle", (128, 0, 128), 0.78, 0.5, 0.1),
            ),
            Ground("striped", (225, 228, 215), (180, 186, 170)),
        ),
        (480, 300),
    ),
    "cross-and-diamond.jpg": (
        Scene(
            (
                Shape("white", "cross", (255, 255, 255), 0.5, 0.2, 0.14),
                Shape("red", "diamond", (230, 50, 40), 0.5, 0.75, 0.2),
            ),
            Ground("black", (0, 0, 0), (0, 0, 0)),
        ),
        (300, 420),
    ),
}
PHOTO = "photo.jpg"


def draw(folder: Path) -> None:
    """Write every example into `folder`; the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (scene, size) in EXAMPLES.items():
        large = render(scene, Random(5), (2 * size[0], 2 * size[1]), jpeg=False)
        large.resize(size, Image.Resampling.LANCZOS).save(folder / name, quality=90)
    landscape().save(folder / PHOTO, quality=88)


def landscape(width: int = 640, height: int = 427) -> Image.Image:
    """Mountains over a lake at dusk, with clouds, haze and grain."""
    noise = np.random.default_rng(7)
    down = np.linspace(0, 1, height)[:, None, None]
    sky: NDArray[np.float64] = (1 - down) * np.array((52, 96, 168)) + down * np.array((255, 214, 170))
    picture = np.broadcast_to(sky, (height, width, 3)).copy()
    clouds = _octaves(noise, width, height)
    cover = np.clip((clouds - 0.52) * 4, 0, 1)[..., None] * np.clip(1.2 - 1.6 * down, 0, 1)
    picture = picture * (1 - 0.75 * cover) + np.array((250, 244, 238)) * 0.75 * cover
    rows = np.arange(height)[:, None]
    for level, rough, tint in (
        (0.46, 0.16, (120, 132, 160)),
        (0.55, 0.12, (78, 92, 112)),
        (0.62, 0.07, (38, 56, 52)),
    ):
        ridge = height * (level - rough * (_ridge(noise, width) - 0.5))
        shade = np.array(tint) + 14 * (_octaves(noise, width, height)[..., None] - 0.5)
        picture = np.where((rows > ridge[None])[..., None], shade, picture)
    shore = int(height * 0.7)
    mirrored = picture[shore - (height - shore) : shore][::-1]
    ripples = 12 * np.sin(rows[shore:] / 2.3 + 6 * _octaves(noise, width, height - shore))[..., None]
    picture[shore:] = 0.62 * mirrored + np.array((14, 30, 46)) + ripples
    picture += noise.normal(0, 5, (height, width, 1))
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    pen = ImageDraw.Draw(image)
    for _ in range(46):  # firs along the shore
        x, tall = noise.uniform(0, width), noise.uniform(14, 44)
        foot = shore + noise.uniform(-6, 4)
        pen.polygon(
            ((x - tall / 5, foot), (x + tall / 5, foot), (x, foot - tall)),
            fill=(18, int(noise.integers(28, 44)), 24),
        )
    return image


def _octaves(noise: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    """Clouds of numbers in 0…1, (height, width)."""
    total = np.zeros((height, width))
    for cells, weight in ((4, 0.5), (8, 0.25), (20, 0.15), (50, 0.1)):
        small = Image.fromarray(noise.integers(0, 256, (cells, 2 * cells), dtype=np.uint8))
        total += weight * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) / 255
    return total


def _ridge(noise: np.random.Generator, width: int) -> NDArray[np.float64]:
    at = np.linspace(0, 1, width)
    line = np.zeros(width)
    for octave in range(1, 8):
        line += np.abs(np.sin(math.pi * (2**octave * at * 0.7 + noise.uniform(0, 2)))) / 1.9**octave
    return (line - line.min()) / (line.max() - line.min())
