"""Lengths and image sizes: fixed, or drawn from a distribution, as they are typed."""

import math
import re
from dataclasses import dataclass
from random import Random
from typing import Literal

from ghostvis_cli.errors import UsageError

NUMBER = r"(\d+(?:\.\d+)?)"
NAMED_SIZES = {"360p": (640, 360), "720p": (1280, 720), "1080p": (1920, 1080), "4k": (3840, 2160)}
LARGEST_SIDE = 8192
LONGEST = 1_000_000  # of a prompt or an answer, in tokens
WIDEST = 10.0  # sigma of a lognormal length; its exponential must stay finite


@dataclass(frozen=True)
class Length:
    """A number of tokens: `128`, `64-256` (uniform), `normal:128,32` or `lognormal:128,0.5` (median, sigma)."""

    kind: Literal["fixed", "uniform", "normal", "lognormal"]
    a: float
    b: float = 0.0

    @classmethod
    def parse(cls, text: str, option: str) -> "Length":
        found = None
        if match := re.fullmatch(r"\d+", text):
            found = cls("fixed", float(match[0]))
        elif match := re.fullmatch(r"(\d+)-(\d+)", text):
            found = cls("uniform", float(match[1]), float(match[2]))
        elif match := re.fullmatch(rf"(normal|lognormal):{NUMBER},{NUMBER}", text):
            found = cls("normal" if match[1] == "normal" else "lognormal", float(match[2]), float(match[3]))
        if found is None or not found._is_possible():
            raise UsageError(
                f"{option} {text!r} is no length: 128, 64-256, normal:128,32 or lognormal:128,0.5",
                hint=f"{option} 128",
            )
        return found

    def _is_possible(self) -> bool:
        most = WIDEST if self.kind == "lognormal" else LONGEST
        return 1 <= self.a <= LONGEST and self.b <= most and self.a <= self.longest <= LONGEST

    def draw(self, random: Random) -> int:
        """At least 1; a bell's tails end at four times its centre, so that one request can't be the whole run."""
        match self.kind:
            case "fixed":
                value = self.a
            case "uniform":
                value = self.a + math.floor(random.random() * (self.b - self.a + 1))
            case "normal":
                value = self.a + self.b * _bell(random)
            case "lognormal":
                value = self.a * math.exp(self.b * _bell(random))
        return max(1, min(round(value), self.longest))

    @property
    def longest(self) -> int:
        return int({"fixed": self.a, "uniform": self.b}.get(self.kind, 4 * self.a))


def _bell(random: Random) -> float:
    """A normal draw by Box and Muller from random(), the only draw whose sequence Python guarantees."""
    return math.sqrt(-2 * math.log(1 - random.random())) * math.cos(2 * math.pi * random.random())


@dataclass(frozen=True)
class Sizes:
    """Image sizes, (width, height) in pixels: `512x384`, `336`, `720p`, several with commas, `224-1024`."""

    choices: tuple[tuple[int, int], ...] = ()
    sides: tuple[int, int] | None = None  # both sides drawn, independently, from this range

    @classmethod
    def parse(cls, text: str) -> "Sizes":
        if match := re.fullmatch(r"(\d{1,5})-(\d{1,5})", text):
            low, high = int(match[1]), int(match[2])
            if 1 <= low <= high <= LARGEST_SIDE:
                return cls(sides=(low, high))
        else:
            sizes = [_size(part.strip()) for part in text.split(",")]
            if all(size is not None and 1 <= min(size) <= max(size) <= LARGEST_SIDE for size in sizes):
                return cls(choices=tuple(size for size in sizes if size is not None))
        raise UsageError(
            f"--image-size {text!r} is no size: 512x384, 336, 720p, several with commas, or 224-1024",
            hint="--image-size 512x384",
        )

    @classmethod
    def one(cls, text: str) -> tuple[int, int]:
        """A single size, (width, height) in pixels."""
        found = cls.parse(text)
        if len(found.choices) != 1:
            raise UsageError(f"--image-size {text!r} is not one size", hint="--image-size 512x384")
        return found.choices[0]

    def draw(self, random: Random) -> tuple[int, int]:
        if self.sides is not None:
            low, high = self.sides
            return tuple(low + math.floor(random.random() * (high - low + 1)) for _ in range(2))  # type: ignore[return-value]
        return self.choices[math.floor(random.random() * len(self.choices))]


def _size(text: str) -> tuple[int, int] | None:
    if match := re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text):
        return int(match[1]), int(match[2] or match[1])
    return NAMED_SIZES.get(text.lower())
