"""Pictures with known content: what is in them (`Scene`) and their pixels (`render`).

Coordinates are fractions of the picture's central square, which is all that a GhostVis model sees of it:
shapes lie inside that square whatever the picture's proportions, so that every label is visible.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Rgb = tuple[int, int, int]
Pixels = NDArray[np.uint8]
Content = Literal["shapes", "clutter"]
Held = Literal["never", "always", "any"]

# Each colour is the region between its anchors, a little blurred; names that people disagree on are left out.
COLORS: dict[str, tuple[Rgb, ...]] = {
    "red": ((255, 0, 0), (220, 20, 40), (230, 50, 40)),
    "orange": ((255, 165, 0), (255, 140, 0), (245, 130, 30)),
    "yellow": ((255, 255, 0), (250, 220, 30), (255, 230, 80)),
    "green": ((0, 128, 0), (0, 200, 0), (0, 255, 0), (40, 160, 70)),
    "blue": ((0, 0, 255), (30, 80, 220), (40, 60, 180), (65, 105, 225)),
    "purple": ((128, 0, 128), (140, 50, 190), (110, 30, 160)),
    "pink": ((255, 192, 203), (255, 105, 180), (250, 150, 190)),
    "brown": ((165, 42, 42), (139, 69, 19), (120, 72, 40)),
    "cyan": ((0, 255, 255), (0, 215, 225), (60, 220, 230)),
    "black": ((0, 0, 0), (25, 25, 25)),
    "white": ((255, 255, 255), (245, 245, 245)),
    "gray": ((128, 128, 128), (160, 160, 160), (100, 100, 100)),
}
KINDS = ("circle", "oval", "square", "rectangle", "triangle", "diamond", "star", "cross")
HELD_PAIRS = frozenset(
    {
        ("purple", "star"),
        ("green", "cross"),
        ("pink", "diamond"),
        ("orange", "square"),
        ("cyan", "triangle"),
        ("yellow", "oval"),
    }
)
PLAIN_GROUNDS: dict[str, tuple[Rgb, ...]] = {
    "white": ((255, 255, 255), (250, 250, 250)),
    "black": ((0, 0, 0), (20, 20, 20)),
    "gray": ((128, 128, 128), (200, 200, 200), (90, 90, 90)),
    "light blue": ((173, 216, 230), (190, 215, 250)),
    "light green": ((144, 238, 144), (200, 240, 200)),
    "light yellow": ((255, 255, 200), (250, 245, 180)),
    **{
        name: COLORS[name]
        for name in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "cyan")
    },
}
PLAIN_WEIGHTS = (40, 11, 13, 5, 5, 5) + (2,) * 9
PATTERNS = ("striped", "checkered", "dotted", "speckled", "shaded")
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the center",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
MARGIN = 0.035  # no centre lies closer than this to the border between two places
CONTRAST = 60.0  # least distance between a shape's colour and its ground, in RGB


@dataclass(frozen=True)
class Shape:
    """One figure. `size` is half its extent, `proportion` its short side by its long side, `turn` in radians."""

    color: str
    kind: str
    rgb: Rgb
    x: float
    y: float
    size: float
    proportion: float = 1.0
    turn: float = 0.0
    edge: Rgb | None = None
    hollow: bool = False

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def column(self) -> int:
        return min(int(self.x * 3), 2)

    @property
    def row(self) -> int:
        return min(int(self.y * 3), 2)

    @property
    def place(self) -> str:
        return PLACES[3 * self.row + self.column]

    @property
    def size_word(self) -> str | None:
        """None between the classes, where nobody should be asked."""
        for word, low, high in (("small", 0.0, 0.11), ("medium", 0.13, 0.18), ("large", 0.21, 1.0)):
            if low <= self.size <= high:
                return word
        return None


@dataclass(frozen=True)
class Ground:
    label: str
    first: Rgb
    second: Rgb  # patterns have two tints; plain grounds repeat the first

    @property
    def is_plain(self) -> bool:
        return self.label not in PATTERNS


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `shapes` are in reading order. Clutter is a picture without anything we could name."""

    shapes: tuple[Shape, ...]
    ground: Ground
    content: Content = "shapes"


def _color(anchors: Sequence[Rgb], rng: Random, spread: int = 10) -> Rgb:
    one, other, share = rng.choice(anchors), rng.choice(anchors), rng.random()
    if rng.random() < 0.35:
        return one  # the very colours that drawing programs offer
    r, g, b = (
        min(255, max(0, round(a + share * (c - a)) + rng.randint(-spread, spread)))
        for a, c in zip(one, other, strict=True)
    )
    return r, g, b


def _far(one: Rgb, other: Rgb) -> bool:
    return math.dist(one, other) >= CONTRAST


def sample_ground(rng: Random) -> Ground:
    if rng.random() < 0.68:
        label = rng.choices(tuple(PLAIN_GROUNDS), PLAIN_WEIGHTS)[0]
        rgb = _color(PLAIN_GROUNDS[label], rng, spread=0 if label in ("white", "black") else 6)
        if label == "gray":
            rgb = (rgb[0],) * 3
        return Ground(label, rgb, rgb)
    level, step = rng.randint(70, 235), rng.randint(28, 60) * rng.choice((-1, 1))
    tint = [rng.randint(-25, 25) if rng.random() < 0.6 else 0 for _ in range(3)]
    first, second = (tuple(min(255, max(0, base + part)) for part in tint) for base in (level, level + step))
    return Ground(rng.choice(PATTERNS), first, second)  # type: ignore[arg-type]


def _sample_pair(rng: Random, wanted: Held) -> tuple[str, str]:
    if wanted == "always":
        return rng.choice(sorted(HELD_PAIRS))
    while True:
        pair = rng.choice(tuple(COLORS)), rng.choice(KINDS)
        if wanted == "any" or pair not in HELD_PAIRS:
            return pair


def _sample_shape(
    rng: Random, pair: tuple[str, str], cell: int, largest: float, ground: Ground
) -> Shape | None:
    color, kind = pair
    if color == ground.label:
        return None
    rgb = _color(COLORS[color], rng)
    if not (_far(rgb, ground.first) and _far(rgb, ground.second)):
        return None
    size = rng.uniform(0.065, largest)
    if cell != 4:
        size = min(size, 0.27)
    centre = []
    for band in (cell % 3, cell // 3):
        low = max(band / 3 + MARGIN, size + 0.01)
        high = min((band + 1) / 3 - MARGIN, 0.99 - size)
        if low > high:
            return None
        centre.append(rng.uniform(low, high))
    proportion = rng.uniform(0.4, 0.66) if kind in ("oval", "rectangle") else 1.0
    turn = rng.uniform(-0.12, 0.12) if rng.random() < 0.5 else 0.0
    if kind == "circle":
        turn = 0.0
    elif kind in ("oval", "rectangle") and rng.random() < 0.45:
        turn += math.pi / 2
    edge: Rgb | None = None
    hollow = False
    if rng.random() < 0.22:
        edge = rng.choice(((0, 0, 0), (255, 255, 255), (90, 90, 90), _darker(rgb)))
    elif size > 0.1 and rng.random() < 0.07:
        hollow = True
    return Shape(color, kind, rgb, centre[0], centre[1], size, proportion, turn, edge, hollow)


def _darker(rgb: Rgb) -> Rgb:
    return rgb[0] // 2, rgb[1] // 2, rgb[2] // 2


def sample_scene(rng: Random, held: Held = "never", count: int | None = None) -> Scene:
    """A picture's content. `held` says whether colour-and-shape pairs kept from training may or must occur."""
    ground = sample_ground(rng)
    if count is None:
        if held == "never" and rng.random() < 0.04:
            return Scene((), ground, "clutter")
        # Four and five shapes are beyond what the model promises, but people draw them.
        count = rng.choices(range(6), (3, 26, 31, 32, 5, 3))[0] if held != "always" else rng.randint(1, 3)
    largest = (0.3, 0.46, 0.24, 0.2, 0.15, 0.13)[count]
    while True:
        shapes: list[Shape] = []
        twin = rng.random() < 0.12
        for cell in rng.sample(range(9), count):
            if cell != 4 and count == 1 and rng.random() < 0.35:
                cell = 4  # one shape in the middle is what people draw first
            pair = _sample_pair(rng, "never" if held == "always" and shapes else held)
            if twin and shapes:
                pair = shapes[0].color, shapes[0].kind
            shape = next(
                (s for _ in range(6) if (s := _sample_shape(rng, pair, cell, largest, ground))), None
            )
            if shape is None or any(
                math.dist((shape.x, shape.y), (other.x, other.y)) < shape.size + other.size + 0.015
                for other in shapes
            ):
                break
            shapes.append(shape)
        if len(shapes) == count:
            return Scene(tuple(sorted(shapes, key=lambda s: (s.row, s.column))), ground)
        if rng.random() < 0.3:
            ground = sample_ground(rng)


def outline(shape: Shape) -> NDArray[np.float64]:
    """The shape's corners as fractions of the square, (n, 2)."""
    points: list[tuple[float, float]]
    match shape.kind:
        case "circle" | "oval":
            points = [(math.cos(t), math.sin(t)) for t in np.linspace(0, 2 * math.pi, 56, endpoint=False)]
        case "square" | "rectangle":
            points = [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
        case "triangle":
            points = [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)]
        case "diamond":
            points = [(0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)]
        case "star":
            points = [
                (math.sin(k * math.pi / 5) * r, -math.cos(k * math.pi / 5) * r)
                for k, r in enumerate((1.0, 0.42) * 5)
            ]
        case _:
            arm = 0.32
            quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm)]
            points = []
            for _ in range(4):
                points += quarter[:3]
                quarter = [(-y, x) for x, y in quarter]
    corners = np.array(points) * (1.0, shape.proportion)
    cos, sin = math.cos(shape.turn), math.sin(shape.turn)
    turned = corners @ np.array(((cos, sin), (-sin, cos)))
    placed: NDArray[np.float64] = turned * shape.size + (shape.x, shape.y)
    return placed


def patch_labels(scene: Scene, grid: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Colour and kind seen by each patch of a grid x grid raster, 0 for ground: (grid², ) each."""
    at = (np.arange(grid) + 0.5) / grid
    colors, kinds = np.zeros((grid, grid), np.int64), np.zeros((grid, grid), np.int64)
    for shape in scene.shapes:
        reach = max(shape.size * 0.8, 0.5 / grid)
        inside = (at[None] - shape.x) ** 2 + (at[:, None] - shape.y) ** 2 <= reach**2
        inside[min(int(shape.y * grid), grid - 1), min(int(shape.x * grid), grid - 1)] = True
        colors[inside] = 1 + tuple(COLORS).index(shape.color)
        kinds[inside] = 1 + KINDS.index(shape.kind)
    return colors.reshape(-1), kinds.reshape(-1)


def canvas_size(rng: Random) -> tuple[int, int]:
    short = rng.choices(
        (64, 96, 112, 128, 160, 200, 224, 256, 320, 400, 512), (2, 6, 10, 12, 12, 12, 12, 12, 6, 4, 4)
    )[0]
    if rng.random() < 0.5:
        return short, short
    long = int(short * rng.uniform(1.05, 2.0))
    return (short, long) if rng.random() < 0.4 else (long, short)


def render(
    scene: Scene, rng: Random, size: tuple[int, int] | None = None, *, jpeg: bool | None = None
) -> Image.Image:
    """Draw the scene as one of the many pictures it could be: size, proportions, smooth or sharp, noise, JPEG."""
    width, height = size or canvas_size(rng)
    fine = 2 if min(width, height) <= 256 and rng.random() < 0.5 else 1
    w, h = width * fine, height * fine
    if scene.content == "clutter":
        image = clutter(rng, w, h)
    else:
        image = _draw_ground(scene.ground, rng, w, h)
        _draw_shapes(image, scene, rng)
        if rng.random() < 0.05:
            frame = rng.choice(((0, 0, 0), (255, 255, 255), (110, 110, 110)))
            ImageDraw.Draw(image).rectangle(
                (0, 0, w - 1, h - 1), outline=frame, width=max(1, min(w, h) // 80)
            )
    if fine > 1:
        image = image.resize((width, height), Image.Resampling.BOX)
    if rng.random() < 0.04:
        image = image.filter(ImageFilter.GaussianBlur(min(width, height) / 200))
    if rng.random() < 0.12:
        image = _grained(image, rng, rng.uniform(2, 7))
    if rng.random() < 0.35 if jpeg is None else jpeg:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=rng.randint(35, 95))
        image = Image.open(file)
        image.load()
    return image


def _grained(image: Image.Image, rng: Random, strength: float) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, strength, (image.height, image.width, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _draw_ground(ground: Ground, rng: Random, w: int, h: int) -> Image.Image:
    image = Image.new("RGB", (w, h), ground.first)
    draw = ImageDraw.Draw(image)
    unit = min(w, h)
    step = max(4, int(unit / rng.uniform(5, 13)))
    match ground.label:
        case "striped":
            width, slant = max(2, step // 2), rng.choice((0, 0, 1, -1))
            across = rng.random() < 0.5 and slant == 0
            for at in range(-h if slant else 0, (h if across else w) + (h if slant else 0), step):
                line = (0, at, w, at) if across else (at, 0, at + slant * h, h)
                draw.line(line, fill=ground.second, width=width)
        case "checkered":
            for top in range(0, h, step):
                for left in range((top // step % 2) * step, w, 2 * step):
                    draw.rectangle((left, top, left + step - 1, top + step - 1), fill=ground.second)
        case "dotted":
            r = max(1, int(step * rng.uniform(0.14, 0.26)))
            for top in range(step // 2, h, step):
                for left in range(step // 2, w, step):
                    draw.ellipse((left - r, top - r, left + r, top + r), fill=ground.second)
        case "speckled":
            grain = max(1, unit // 128)
            noise = np.random.default_rng(rng.getrandbits(32)).normal(
                0, rng.uniform(18, 34), (h // grain + 1, w // grain + 1)
            )
            noise = noise.repeat(grain, 0).repeat(grain, 1)[:h, :w, None]
            image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
        case "shaded":
            down, right = rng.choice(((1, 0), (0, 1), (1, 1), (1, -1)))
            slope = down * np.linspace(-0.5, 0.5, h)[:, None] + right * np.linspace(-0.5, 0.5, w)[None]
            slope = (slope - slope.min()) / (slope.max() - slope.min())
            tints = np.array(ground.first), np.array(ground.second)
            mixed = tints[0] + slope[..., None] * 1.6 * (tints[1] - tints[0]) - 0.3 * (tints[1] - tints[0])
            image = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
    return image


def _draw_shapes(image: Image.Image, scene: Scene, rng: Random) -> None:
    w, h = image.size
    unit = min(w, h)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        corners = outline(shape) * unit + ((w - unit) / 2, (h - unit) / 2)
        points: list[tuple[float, float]] = [(float(x), float(y)) for x, y in corners]
        width = max(1, round(unit * rng.uniform(0.006, 0.016)))
        if shape.hollow:
            width = max(2, round(shape.size * unit * rng.uniform(0.14, 0.3)))
            draw.line([*points, *points[:2]], fill=shape.rgb, width=width, joint="curve")
        else:
            draw.polygon(points, fill=shape.rgb)
            if shape.edge:
                draw.line([*points, *points[:2]], fill=shape.edge, width=width, joint="curve")


def clutter(rng: Random, w: int, h: int) -> Image.Image:
    """Something like the world: clouds of colour at several scales, perhaps a horizon and many blobs."""
    noise = np.random.default_rng(rng.getrandbits(32))
    total: NDArray[Any] = np.zeros((h, w, 3))
    for cells in rng.choice(((2, 4, 8, 16), (3, 9, 27), (2, 5, 40), (6, 12, 24, 48))):
        small = Image.fromarray(noise.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (np.asarray(small.resize((w, h), Image.Resampling.BICUBIC)) - 128.0) / cells**0.5
    total *= rng.uniform(0.6, 1.4)
    if rng.random() < 0.5:
        total = total.mean(2, keepdims=True) + 0.35 * total
    total += noise.integers(60, 200, 3)
    if rng.random() < 0.5:
        total[int(h * rng.uniform(0.3, 0.75)) :] += noise.integers(-90, 90, 3)
    image = Image.fromarray(total.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.choice((0, 0, 6, 14, 30))):
        x, y, r = rng.random() * w, rng.random() * h, rng.uniform(0.02, 0.16) * min(w, h)
        corners = [
            (x + r * rng.uniform(0.4, 1.2) * math.cos(t), y + r * rng.uniform(0.4, 1.2) * math.sin(t))
            for t in np.linspace(0, 6.0, rng.randint(5, 11))
        ]
        draw.polygon(corners, fill=tuple(int(v) for v in noise.integers(0, 256, 3)))
    return image.filter(ImageFilter.GaussianBlur(min(w, h) / 160)) if rng.random() < 0.5 else image
