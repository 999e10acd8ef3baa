"""Charts as SVG, written by hand: points, lines and bars between two axes. Strings in, a string out.

No plotting library: four kinds of charts do not need 35 MB and half a second of imports. What comes out is crisp
at any size, its text can be selected and read aloud, and its colours are the page's, in light and in dark.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from textwrap import wrap
from typing import Literal

WIDTH, HEIGHT = 540, 300
LEFT, RIGHT, BOTTOM = 78, 30, 46  # right: half of the last label
LEGEND_ROW, LETTER = 20, 7.2  # a row of the legend; an average letter of it, so that it wraps in time
BAR, BAR_GAP, BAR_LABEL = 20, 12, 170
FEW_DOTS = 200  # up to here a dot is drawn larger
MARGIN, CAPTION_ROW, CAPTION_LETTERS = 16, 18, 76
COLOURS = 6  # .s0 to .s5 of the page's style sheet
MOST_DOTS = 2_500
Mark = Literal["line", "dots", "linked"]


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`. `form` writes a tick's value."""

    label: str
    low: float
    high: float
    form: Callable[[float], str]
    log: bool = False

    @classmethod
    def around(
        cls, label: str, values: Sequence[float], form: Callable[[float], str], *, log: bool = False
    ) -> "Axis":
        """From 0 (or the least, where logarithmic) to a little above the greatest of the values."""
        high = max(values, default=1.0) or 1.0
        if not log:
            return cls(label, 0.0, high * 1.05, form)
        low = min((value for value in values if value > 0), default=high / 10)
        return cls(label, low / 1.1, max(high, low * 1.5) * 1.1, form, log=True)

    def at(self, value: float) -> float:
        """The value's place as a share of the axis, 0 to 1."""
        if self.log:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        return self._decades() if self.log else self._round()

    def _round(self) -> list[float]:
        """Steps of 1, 2 or 5 times a power of ten, six of them at most."""
        rough = (self.high - self.low) / 6
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
        first, last = math.ceil(self.low / step), math.floor(self.high / step * 1.000001)
        return [n * step for n in range(first, last + 1)]

    def _decades(self) -> list[float]:
        """1, 2 and 5 of each power of ten; powers alone where there are more than three."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 1_000 else (1,)
        return [m * 10.0**p for p in powers for m in steps if self.low <= m * 10.0**p <= self.high]


@dataclass(frozen=True)
class Series:
    """Points of one colour. `labels` stand beside the points of a linked series."""

    name: str
    points: Sequence[tuple[float, float]]
    mark: Mark = "line"
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    shown: str
    colour: int = 0


def plot(title: str, description: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Series between two axes. `title` and `description` are for screen readers."""
    legend, top = _legend(series)
    frame = _Frame(x, y, top)
    body = [legend, *frame.grid()]
    for number, each in enumerate(series):
        body.append(f'<g class="s{number % COLOURS}">{"".join(frame.marks(each))}</g>')
    return _svg(title, description, WIDTH, HEIGHT, body)


def bars(title: str, description: str, rows: Sequence[Bar], whole: float | None = None) -> str:
    """Horizontal bars from 0 to `whole`, or the longest of them, each with its value at its end."""
    longest = whole or max((bar.value for bar in rows), default=0.0) or 1.0
    room = WIDTH - BAR_LABEL - 90
    body = []
    for number, bar in enumerate(rows):
        y, width = number * (BAR + BAR_GAP) + BAR_GAP, max(bar.value / longest * room, 1)
        middle = y + BAR * 0.72
        body.append(
            f'<text x="{BAR_LABEL - 8}" y="{middle:.1f}" text-anchor="end">{escape(bar.label)}</text>'
        )
        body.append(
            f'<rect class="s{bar.colour % COLOURS} bar" x="{BAR_LABEL}" y="{y}" width="{width:.1f}"'
            f' height="{BAR}" rx="2"/>'
        )
        body.append(
            f'<text class="value" x="{BAR_LABEL + width + 6:.1f}" y="{middle:.1f}">{escape(bar.shown)}</text>'
        )
    return _svg(title, description, WIDTH, len(rows) * (BAR + BAR_GAP) + BAR_GAP, body)


def stacked(figures: Sequence[tuple[str, str]], style: str) -> str:
    """Charts, each with its caption, below one another as a drawing of its own, which brings its style sheet."""
    body, y = (
        [f"<style>{escape(style, quote=False)}</style>", '<rect class="paper" width="100%" height="100%"/>'],
        MARGIN,
    )
    for chart, caption in figures:
        height, inner = _taken_apart(chart)
        body.append(f'<g transform="translate({MARGIN} {y})">{inner}</g>')
        lines = wrap(caption, CAPTION_LETTERS)
        for number, line in enumerate(lines, 1):
            body.append(f'<text x="{MARGIN}" y="{y + height + number * CAPTION_ROW}">{escape(line)}</text>')
        y += height + len(lines) * CAPTION_ROW + 2 * MARGIN
    return _svg("Report of ghostvis bench", f"{len(figures)} charts", WIDTH + 2 * MARGIN, y, body)


def _taken_apart(chart: str) -> tuple[int, str]:
    """The height of an SVG of ours, and what is in it."""
    head, _, rest = chart.partition(">")
    return int(head.split('viewBox="')[1].split('"')[0].split()[3]), rest.removesuffix("</svg>")


class _Frame:
    """Where values are in the drawing."""

    def __init__(self, x: Axis, y: Axis, top: int) -> None:
        self.x, self.y, self.top = x, y, top

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + self.x.at(point[0]) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - self.y.at(point[1]) * (HEIGHT - BOTTOM - self.top)
        return round(x, 1), round(y, 1)

    def grid(self) -> Iterator[str]:
        left, bottom, right = LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT
        for tick in self.y.ticks():
            _, y = self.place((self.x.low, tick))
            yield f'<path class="grid" d="M{left} {y}H{right}"/>'
            yield f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(self.y.form(tick))}</text>'
        for tick in self.x.ticks():
            x, _ = self.place((tick, self.y.low))
            yield f'<path class="grid" d="M{x} {self.top}V{bottom}"/>'
            yield f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{escape(self.x.form(tick))}</text>'
        yield f'<path class="axis" d="M{left} {self.top}V{bottom}H{right}"/>'
        middle = (self.top + bottom) / 2
        yield (
            f'<text class="label" x="{(left + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{escape(self.x.label)}</text>"
        )
        yield (
            f'<text class="label" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y.label)}</text>"
        )

    def marks(self, series: Series) -> Iterator[str]:
        places = [self.place(point) for point in _thinned(series)]
        if series.mark != "dots" and len(places) > 1:
            yield f'<path class="line" d="M{" L".join(f"{x} {y}" for x, y in places)}"/>'
        if series.mark == "dots":
            radius = 4 if len(places) <= FEW_DOTS else 2.2
            yield "".join(f'<circle class="dot" cx="{x}" cy="{y}" r="{radius}"/>' for x, y in places)
        if series.mark == "linked":
            yield "".join(f'<circle class="knot" cx="{x}" cy="{y}" r="4"/>' for x, y in places)
        for (x, y), label in zip(places, series.labels, strict=False):
            anchor, aside = ("end", -8) if x > WIDTH - 120 else ("start", 8)
            yield f'<text x="{x + aside}" y="{y - 7}" text-anchor="{anchor}">{escape(label)}</text>'


def _thinned(series: Series) -> Sequence[tuple[float, float]]:
    """At most MOST_DOTS points: of those close in time the highest, so that no peak is lost."""
    points = series.points
    if len(points) <= MOST_DOTS:
        return points
    edges = [round(n * len(points) / MOST_DOTS) for n in range(MOST_DOTS + 1)]
    return [max(points[a:b], key=lambda point: point[1]) for a, b in pairwise(edges)]


def _legend(series: Sequence[Series]) -> tuple[str, int]:
    """The names of several series, and where the chart begins below them."""
    if len(series) < 2:
        return "", 14
    parts, x, row = [], float(LEFT), 0
    for number, each in enumerate(series):
        width = 28 + LETTER * len(each.name)
        if x + width > WIDTH and x > LEFT:
            x, row = float(LEFT), row + 1
        y = 10 + row * LEGEND_ROW
        sample = f'<path class="line" d="M{x:.1f} {y}h16"/>'
        if each.mark == "dots":
            sample = f'<circle class="dot" cx="{x + 10:.1f}" cy="{y}" r="4"/>'
        parts.append(f'<g class="s{number % COLOURS}">{sample}</g>')
        parts.append(f'<text x="{x + 22:.1f}" y="{y + 4}">{escape(each.name)}</text>')
        x += width
    return "".join(parts), 26 + row * LEGEND_ROW


def _svg(title: str, description: str, width: int, height: int, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(body)}</svg>"
    )
