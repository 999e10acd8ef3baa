"""A report as one HTML page: figures, charts, and where they come from. It loads nothing.

No script, no font, no image from elsewhere: a policy in its head forbids them, so that the page can be mailed,
archived and opened in ten years. Light and dark follow the reader's system.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from ghostvis_cli.bench import metrics
from ghostvis_cli.bench.page_style import STYLE
from ghostvis_cli.bench.report import latencies, prefix_section, rates, round_cells
from ghostvis_cli.bench.schema import LATENCIES, SCALARS, STATISTICS, Record, Report, Run, Summary
from ghostvis_cli.bench.stats import median, percentile_of_ordered
from ghostvis_cli.bench.svg import Axis, Bar, Series, bars, plot, stacked
from ghostvis_cli.bench.units import digits, seconds, shown, tick, title

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TILES = (
    "requests_per_s", "output_tokens_per_s", "image_tokens_per_s", "ttft_p50", "ttft_p95", "tpot_p50", "e2e_p95"
)  # fmt: skip
# Of the distribution: where the curve is drawn through when there are no single requests.
KNOWN = (("p50", 50.0), ("p90", 90.0), ("p95", 95.0), ("p99", 99.0), ("max", 100.0))
CURVE = (0.0, *range(1, 100), 99.5, 99.9, 100.0)
MOST_SERIES, MOST_NOTES = 6, 4


class Figure(NamedTuple):
    """An SVG chart and what to read under it."""

    chart: str
    caption: str


def page(report: Report) -> str:
    name = "ghostvis bench prefix" if "prefix" in report.extra else "ghostvis bench"
    body = "\n".join(part for part in _parts(report) if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{name}</title><style>{STYLE}</style></head>\n<body><main>\n"
        f"<header><h1>{name}</h1><p>{_subtitle(report)}</p></header>\n{body}\n</main></body></html>\n"
    )


def drawing(report: Report) -> str:
    """The page's charts alone, below one another, as one SVG."""
    pairs = _pair_charts(prefix_section(report)["pairs"]) if "prefix" in report.extra else []
    return stacked([*pairs, *_charts(report)], STYLE)


def _parts(report: Report) -> Iterator[str]:
    if report.notes:
        yield f'<section class="notes">{_list(report.notes)}</section>'
    if "prefix" in report.extra:
        yield from _prefix(prefix_section(report))
    if len(report.summaries) == 1:
        yield _section(_name(report.summaries[0]), _tiles(report.summaries[0]))
    elif report.summaries:
        yield _section("At a glance", _glance(report.summaries))
    if report.runs:
        yield f'<section class="charts">{"".join(map(_framed, _charts(report)))}</section>'
    if report.summaries:
        yield _section("Every figure", "".join(_figures(summary) for summary in report.summaries))
    yield _origin(report)


def _subtitle(report: Report) -> str:
    card, work = report.engines[0], report.workload
    names = ", ".join(each.name for each in report.engines)
    model = card.model.rsplit("/", 1)[-1]
    unit = "pairs" if work.kind == "prefix" else "requests a run"
    asked = f"{work.rows} {unit} ({work.kind}, seed {work.seed})"
    return escape(" · ".join((names, model, asked, report.manifest.started_at)))


def _section(name: str, body: str) -> str:
    return f"<section><h2>{escape(name)}</h2>{body}</section>"


def _list(lines: Sequence[str]) -> str:
    """The first few lines, the others folded away."""
    first, folded = lines[:MOST_NOTES], lines[MOST_NOTES:]
    items = "".join(f"<li>{escape(line)}</li>" for line in first)
    if not folded:
        return f"<ul>{items}</ul>"
    more = "".join(f"<li>{escape(line)}</li>" for line in folded)
    return f"<ul>{items}</ul><details><summary>{len(folded)} more</summary><ul>{more}</ul></details>"


def _table(rows: Sequence[Sequence[str]], caption: str) -> str:
    """The first row is the head, the first column names the rows."""
    head, *rest = rows
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rest
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# --- figures


def _name(summary: Summary) -> str:
    return f"{summary.engine}, {summary.load.name}"


def _glance(summaries: Sequence[Summary]) -> str:
    """One row for each engine and load point."""
    names = [name for name in TILES if any(_value(each, name) for each in summaries)]
    rows = [(_name(each), *(shown(name, _value(each, name)) for name in names)) for each in summaries]
    return _table([("", *map(title, names)), *rows], "Means over repeats")


def _value(summary: Summary, name: str) -> float | None:
    figure = summary.figures.get(name)
    return None if figure is None else figure.value


def _figures(summary: Summary) -> str:
    tables = _latency_table(summary) + _rate_table(summary)
    return f"<details><summary>{escape(_name(summary))}</summary>{tables}</details>"


def _tiles(summary: Summary) -> str:
    found = {name: _value(summary, name) for name in TILES}
    tiles = [
        f"<div><dt>{escape(title(name))}</dt><dd>{escape(shown(name, value))}</dd></div>"
        for name, value in found.items()
        if value
    ]
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _latency_table(summary: Summary) -> str:
    rows = [(LATENCIES[base].title, *cells) for base, cells in latencies(summary)]
    return _table([("", *STATISTICS), *rows], "Latency, means over repeats")


def _rate_table(summary: Summary) -> str:
    found = rates(summary)
    rows = [(SCALARS[name].title, value, between or "one repeat") for name, value, between in found]
    return _table([("", "mean over repeats", "95 % interval"), *rows], "Throughput and the like")


# --- charts


def _charts(report: Report) -> list[Figure]:
    distributions = (_distribution(report, base) for base in ("ttft", "tpot", "e2e"))
    drawn = (*distributions, _timeline(report), _sweep(report), _cache(report))
    return [figure for figure in drawn if figure is not None]


def _framed(figure: Figure) -> str:
    return f"<figure>{figure.chart}<figcaption>{escape(figure.caption)}</figcaption></figure>"


def _records(report: Report, summary: Summary) -> list[tuple[Run, Record]]:
    return [
        (run, record)
        for run in report.runs
        if (run.engine, run.load) == (summary.engine, summary.load)
        for record in run.records
        if record.error is None
    ]


def _distribution(report: Report, base: str) -> Figure | None:
    named = LATENCIES[base].title.capitalize()
    series = []
    for summary in report.summaries[:MOST_SERIES]:
        points = _percentiles(report, summary, base)
        if points:
            series.append(Series(_name(summary), points, "line" if len(points) > len(KNOWN) else "linked"))
    if not series:
        return None
    highest = [x for each in series for x, _ in each.points]
    chart = plot(
        f"{named}: distribution",
        f"Share of requests that were at least as fast; {_spoken(series)}",
        Axis.around(named, highest, tick),
        Axis("share of requests", 0, 100, lambda value: f"{value:g} %"),
        series,
    )
    whole = any(each.mark == "line" for each in series)
    more = "" if whole else " Five percentiles: with --details every request is drawn."
    return Figure(chart, f"{named}: how many requests were at least as fast.{more}{_left_out(report)}")


def _percentiles(report: Report, summary: Summary, base: str) -> list[tuple[float, float]]:
    measured = {"ttft": metrics.ttft, "tpot": metrics.tpot, "e2e": metrics.e2e}[base]
    values = [value for _, record in _records(report, summary) if (value := measured(record)) is not None]
    if values:
        values.sort()
        return [(percentile_of_ordered(values, q), q) for q in CURVE]
    found = [(summary.figures.get(f"{base}_{name}"), share) for name, share in KNOWN]
    return [(each.value, share) for each, share in found if each is not None]


def _spoken(series: Sequence[Series]) -> str:
    """The median of each curve in words."""
    told = []
    for each in series:
        x = next((x for x, share in each.points if share >= 50), None)
        told += [f"{each.name}: half within {seconds(x)}"] if x is not None else []
    return "; ".join(told)


def _timeline(report: Report) -> Figure | None:
    series = []
    for summary in report.summaries[:MOST_SERIES]:
        points = sorted(
            (record.scheduled_s, value)
            for _, record in _records(report, summary)
            if (value := metrics.ttft(record)) is not None
        )
        if points:
            series.append(Series(_name(summary), points, "dots"))
    if not series:
        return None
    xs, ys = zip(*(point for each in series for point in each.points), strict=True)
    chart = plot(
        "Time to first token over the run",
        f"{len(xs)} requests; the slowest waited {seconds(max(ys))}",
        Axis.around("time in the run", xs, tick),
        Axis.around("time to first token", ys, tick),
        series,
    )
    caption = f"Each request by the time it was due. Stalls stand out as towers.{_left_out(report)}"
    return Figure(chart, caption)


def _left_out(report: Report) -> str:
    """A remark where not all curves are drawn: there are only so many colours."""
    count = len(report.summaries)
    return f" The first {MOST_SERIES} of {count} are drawn." if count > MOST_SERIES else ""


def _sweep(report: Report) -> Figure | None:
    """Throughput against latency, where one engine was measured at several load points."""
    engines = dict.fromkeys(summary.engine for summary in report.summaries)
    series = [found for name in engines if len((found := _curve(report, name)).points) > 1]
    if not series:
        return None
    xs, ys = zip(*(point for each in series for point in each.points), strict=True)
    chart = plot(
        "Throughput against latency",
        "; ".join(f"{each.name}: up to {digits(max(x for x, _ in each.points))} tokens/s" for each in series),
        Axis.around("output tokens/s", xs, digits),
        Axis.around("time to first token, p95", ys, tick, log=max(ys) > 20 * min(ys)),
        series,
    )
    return Figure(
        chart, "More load to the right, longer waits above: the knee is where more load buys nothing."
    )


def _curve(report: Report, engine: str) -> Series:
    points, labels = [], []
    for summary in report.summaries:
        x, y = summary.figures.get("output_tokens_per_s"), summary.figures.get("ttft_p95")
        if summary.engine == engine and x is not None and y is not None:
            points.append((x.value, y.value))
            labels.append(summary.load.name.partition("=")[2])
    return Series(engine, points, "linked", labels)


def _cache(report: Report) -> Figure | None:
    rows = []
    for number, summary in enumerate(report.summaries):
        rate = summary.figures.get("cache_hit_rate")
        if rate is not None:
            rows.append(Bar(_short(_name(summary)), rate.value, shown("cache_hit_rate", rate.value), number))
    if not any(bar.value for bar in rows):
        return None
    spoken = ", ".join(f"{bar.label} {bar.shown}" for bar in rows)
    chart = bars("Input tokens from the cache", spoken, rows, whole=1.0)
    return Figure(chart, "Share of input tokens the cache held.")


def _short(text: str) -> str:
    return text if len(text) <= 28 else f"{text[:26]}…"


# --- bench prefix


def _prefix(proof: Mapping[str, Any]) -> Iterator[str]:
    alarm = ' class="alarm"' if proof["witness"] == "disagree" else ""
    yield f"<section><p{alarm}><strong>{escape(_first_upper(proof['verdict']))}.</strong></p></section>"
    charts = "".join(map(_framed, _pair_charts(proof["pairs"])))
    yield _section("Pairs", f'<div class="charts">{charts}</div>')
    if proof["rounds"]:
        yield _section("Many questions, one image", _rounds(proof["rounds"]))


def _pair_charts(pairs: Sequence[Mapping[str, Any]]) -> list[Figure]:
    kinds = [kind for kind in ("cold", "flushed", "warm") if pairs[0][f"{kind}_s"] is not None]
    tokens = _tokens_chart(pairs, kinds)
    return [_pairs_chart(pairs, kinds), *([tokens] if tokens else [])]


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _pairs_chart(pairs: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Figure:
    series = [
        Series(kind, [(n + 1, pair[f"{kind}_s"]) for n, pair in enumerate(pairs)], "dots") for kind in kinds
    ]
    ys = [y for each in series for _, y in each.points]
    middles = ", ".join(f"{kind} {seconds(median([p[f'{kind}_s'] for p in pairs]))}" for kind in kinds)
    chart = plot(
        "Time to first token of each pair",
        f"Medians: {middles}",
        Axis("pair", 0, len(pairs) + 1, digits),
        Axis.around("time to first token", ys, tick),
        series,
    )
    return Figure(chart, f"Medians: {middles}.")


def _tokens_chart(pairs: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Figure | None:
    rows = [Bar("prompt", median([p["prompt_tokens"] for p in pairs]), "", 5)]
    for number, kind in enumerate(kinds):
        counts = [pair[f"{kind}_cached"] for pair in pairs]
        if None in counts:
            return None
        rows.append(Bar(f"{kind}: cached", median(counts), "", number))
    rows = [Bar(bar.label, bar.value, f"{digits(bar.value)} tokens", bar.colour) for bar in rows]
    spoken = ", ".join(f"{bar.label} {bar.shown}" for bar in rows)
    return Figure(bars("Cached tokens", spoken, rows), "What the server reports, medians over the pairs.")


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> str:
    head = ("", "questions", "vision tokens asked for", "computed", "ratio", "KV asked for", "KV computed")
    rows = [(each["name"], digits(each["questions"]), *round_cells(each)) for each in rounds]
    per_token = rounds[0]["kv_token_bytes"]
    told = f"{per_token:,} bytes a token" if per_token else "the model's bytes per token are not known"
    return _table([head, *rows], f"Keys and values: {told}")


# --- where it comes from


def _origin(report: Report) -> str:
    manifest, work = report.manifest, report.workload
    groups: dict[str, Mapping[str, Any]] = {
        "Run": {
            "command": manifest.command,
            "started": manifest.started_at,
            "finished": manifest.finished_at,
            "seed": manifest.seed,
        },
        **{f"Engine {card.name}": vars(card) for card in report.engines},
        "Machine": manifest.machine,
        "Noise": {name: f"{value:.3g}" for name, value in manifest.noise.items()},
        "Versions": manifest.versions,
        "Workload": {"kind": work.kind, "rows of a run": work.rows, "sha256": work.sha256, **work.settings},
        "Sampling": work.sampling,
    }
    told = "".join(
        f"<h3>{escape(name)}</h3><dl>"
        + "".join(
            f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>"
            for key, value in group.items()
            if value is not None
        )
        + "</dl>"
        for name, group in groups.items()
        if group
    )
    return f'<section class="origin"><h2>Where this comes from</h2>{told}</section>'
