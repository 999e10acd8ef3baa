"""The HTML report: whole in itself, safe against what is in it, and right in a real browser."""

import http.server
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ghostvis_cli.bench.html import page
from ghostvis_cli.bench.prefix import Pair, Round, Settings, as_extra, judged
from ghostvis_cli.bench.schema import Load, Report
from ghostvis_cli.bench.svg import MOST_DOTS, Axis, Bar, Series, bars, plot
from ghostvis_cli.bench.units import digits, seconds
from tests import sites
from tests.bench.reports import CARD, record, report

FIGURES = {
    "requests_per_s": 12.5, "output_tokens_per_s": 200.0, "ttft_p50": 0.05, "ttft_p90": 0.06, "ttft_p95": 0.07,
    "ttft_p99": 0.08, "ttft_max": 0.09, "cache_hit_rate": 0.4,
}  # fmt: skip
RECORDS = tuple(record(n, ttft_s=0.05 + 0.01 * (n % 7)) for n in range(50))


def sweep() -> Report:
    """Four load points, every request kept."""
    loads = {
        Load(n): [{k: v * n if v is not None else v for k, v in FIGURES.items()}] * 3 for n in (1, 2, 4, 8)
    }
    return report(loads, records=RECORDS)


def proof() -> Report:
    pairs = [Pair(0.1, 0.03, 2, 66, 100, 64, flushed_s=0.06, flushed_cached=2) for _ in range(8)]
    found = judged(pairs, [Round("one by one", 10, 640, 64, 5120)])
    return replace(report([]), extra={"prefix": as_extra(found, Settings())})


# --- what is in it


class _Elements(HTMLParser):
    """Every tag with its attributes; open ones must be closed in order."""

    VOID = ("meta", "link", "path", "rect", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("made", [sweep, proof])
def test_a_page_asks_nobody_for_anything(made: partial[Report]) -> None:
    text = page(made())
    elements = _Elements(text).found
    assert not {tag for tag, _ in elements} & {"script", "img", "iframe", "object", "use", "image"}
    addresses = [value for _, attrs in elements for key, value in attrs.items() if key in ("src", "href")]
    assert addresses == ["data:,"]
    assert "url(" not in text and "@import" not in text


def test_a_page_holds_what_the_report_says_and_never_obeys_it() -> None:
    nasty = '</title><script>alert("1")</script>'
    made = replace(sweep(), notes=(nasty,), engines=(replace(CARD, model=nasty),))
    text = page(made)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    _Elements(text)


def test_every_chart_says_in_words_what_it_shows() -> None:
    charts = re.findall(r"<svg.*?</svg>", page(sweep()), re.S)
    assert len(charts) == 6
    for chart in charts:
        root = ET.fromstring(chart)
        assert root.attrib["role"] == "img"
        words = [element.text for element in root if element.tag.endswith(("title", "desc"))]
        assert len(words) == 2 and all(words)


def test_a_sweep_has_its_curve_and_one_load_point_has_none() -> None:
    assert "Throughput against latency" in page(sweep())
    assert "Throughput against latency" not in page(report([FIGURES], records=RECORDS))


def test_without_details_the_distribution_is_drawn_from_percentiles_and_says_so() -> None:
    text = page(report([FIGURES]))
    assert "with --details every request is drawn" in text
    assert "Time to first token over the run" not in text


def test_curves_that_find_no_colour_are_counted() -> None:
    loads = {Load(n): [FIGURES] for n in range(1, 9)}
    assert "The first 6 of 8 are drawn." in page(report(loads))
    assert "are drawn." not in page(sweep())


def test_a_page_carries_where_its_numbers_come_from() -> None:
    text = page(sweep())
    for part in ("ghostvis bench", "python", "sha256", "abc", "seed", "max_tokens", "float32"):
        assert part in text


def test_a_contradiction_stands_out() -> None:
    pairs = [Pair(0.1, 0.1, 2, 66, 100, 64) for _ in range(8)]
    text = page(replace(report([]), extra={"prefix": as_extra(judged(pairs, []), Settings())}))
    assert 'class="alarm"' in text
    assert 'class="alarm"' not in page(proof())


# --- charts


def test_ticks_are_round_and_within_the_axis() -> None:
    assert Axis("", 0, 1.07, digits).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    log = Axis.around("", [0.01, 3.0], seconds, log=True)
    assert log.ticks() == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    assert log.at(log.low) == 0 and log.at(log.high) == pytest.approx(1)


def test_points_lie_where_their_values_are() -> None:
    axis = Axis("", 0, 10, digits)
    text = plot("t", "d", axis, axis, [Series("s", [(0, 0), (10, 10)], "dots")])
    (left, bottom), (right, top) = [
        (float(x), float(y)) for x, y in re.findall(r'<circle class="dot" cx="(\S+)" cy="(\S+)"', text)
    ]
    assert left < right and top < bottom


def test_many_points_are_thinned_without_losing_the_peak() -> None:
    points = [(float(n), 1.0) for n in range(10_000)]
    points[7_777] = (7_777.0, 50.0)
    axis = Axis("", 0, 10_000, digits)
    text = plot("t", "d", axis, Axis("", 0, 50, digits), [Series("s", points, "dots")])
    heights = [float(y) for y in re.findall(r'<circle class="dot" cx="\S+" cy="(\S+)"', text)]
    assert len(heights) == MOST_DOTS
    assert sum(height == min(heights) for height in heights) == 1


def test_bars_are_as_long_as_their_values() -> None:
    text = bars("t", "d", [Bar("a", 10, "10"), Bar("b", 5, "5"), Bar("c", 0, "0")])
    widths = [float(width) for width in re.findall(r'<rect [^>]* width="(\S+)"', text)]
    assert widths[0] == pytest.approx(2 * widths[1])
    assert widths[2] == 1
    half, whole = (bars("t", "d", [Bar("a", 0.5, "50 %")], whole=each) for each in (1.0, 0.5))
    assert half != whole == bars("t", "d", [Bar("a", 0.5, "50 %")])


def test_nothing_measured_is_still_a_page() -> None:
    text = page(report([{}]))
    assert [tag for tag, _ in _Elements(text).found if tag in ("h1", "svg", "td", "tr")] == ["h1", "tr", "tr"]
    for part in ("ghostvis bench", "local, concurrency=1", "abc", "float32"):
        assert part in text
    assert not re.search(r"\b(None|nan|inf)\b", text)


# --- in a browser


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder over HTTP, and every path that was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, template: str, *values: object) -> None:
            asked.append(self.path)

    with sites.serving(partial(Handler, directory=str(folder))) as url:
        yield url, asked


@pytest.mark.slow
@pytest.mark.parametrize("made", [sweep, proof])
def test_a_browser_renders_the_page_without_a_complaint_or_a_request(
    made: partial[Report], tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    (tmp_path / "report.html").write_text(page(made()), encoding="utf-8")
    with serving(tmp_path) as (url, asked):
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
                f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2000",
                f"--screenshot={tmp_path / 'page.png'}", f"{url}/report.html",
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert asked == ["/report.html"]
    assert "CONSOLE" not in done.stderr
    from PIL import Image

    image = Image.open(tmp_path / "page.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 24) or []}
    assert {(37, 99, 201), (194, 87, 12)} <= colours  # the first two series were drawn
