"""`ghostvis bench compare` and `bench report`: what reports say, once they are written."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ghostvis_cli.cli import options, output
from ghostvis_cli.cli.options import option
from ghostvis_cli.errors import CheckFailedError, InputError, UsageError, printable
from ghostvis_cli.version import SCHEMA_VERSION

if TYPE_CHECKING:
    from ghostvis_cli.bench.checks import Condition
    from ghostvis_cli.bench.compare import Comparison

EXAMPLES = """Examples:

  ghostvis bench compare before.json after.json

  ghostvis bench compare main.json branch.json --fail-if 'ttft_p95>+5%' --fail-if 'requests_per_s<-5%'

  ghostvis bench compare a.json b.json c.json --format markdown >> $GITHUB_STEP_SUMMARY

  ghostvis bench compare a.json b.json --format benchfmt | benchstat -col run /dev/stdin
"""


@options.takes(
    option(list[str], "--metric -m NAME", "Figures to compare, such as ttft_p90. Repeatable."),
    option(list[str], "--fail-if CONDITION", "'ttft_p95>+5%': then code 9. Repeatable."),
    option(bool, "--force", "Compare even what is not the same work."),
    option(
        str, "--format KIND", "table, markdown, json or benchfmt (benchstat).", name="form", default="table"
    ),
    options.JSON,
)
def bench_compare(
    reports: Annotated[
        list[Path], typer.Argument(metavar="A.json [B.json]...", help="The first is the base.")
    ],
    *,
    metric: list[str] | None,
    fail_if: list[str] | None,
    force: bool,
    form: str,
    json: bool,
) -> None:
    """Say of each figure whether it got better or worse, or that there is no evidence."""
    from ghostvis_cli.bench import compare as comparing
    from ghostvis_cli.bench import compare_text as text
    from ghostvis_cli.bench import schema
    from ghostvis_cli.bench.checks import condition

    form = "json" if json else form
    if form not in ("table", "markdown", "json", "benchfmt"):
        raise UsageError(f"--format {form!r} is none of table, markdown, json, benchfmt")
    names = tuple(comparing.known_metric(name) for name in metric or ())
    checks = [condition(each) for each in fail_if or ()]
    sides = comparing.sides(dict(zip(_told_apart(reports), map(schema.read, reports), strict=True)))
    wanted = dict.fromkeys((*(names or comparing.HEADLINES), *(check.metric for check in checks)))
    found = [
        comparing.compare(a, b, metrics=tuple(wanted), force=force) for a, b in comparing.pairings(sides)
    ]
    match form:
        case "json":
            output.record({"schema_version": SCHEMA_VERSION, "comparisons": text.record(found)})
        case "markdown":
            output.answer(text.markdown(found))
        case "benchfmt":
            output.answer(text.benchfmt(sides))
        case _:
            for comparison in found:
                _show_comparison(comparison)
    _fail_if(checks, found)


def _told_apart(paths: list[Path]) -> list[str]:
    """File names where they differ, else whole paths."""
    names = [printable(path.stem) for path in paths]
    if len(set(names)) == len(names):
        return names
    return [printable(f"{n + 1}:{path}") for n, path in enumerate(paths)]


def _show_comparison(comparison: "Comparison") -> None:
    from ghostvis_cli.bench.compare_text import HEADERS, rows

    headers = [{"A": comparison.a.name, "B": comparison.b.name}.get(name, name) for name in HEADERS]
    output.table(headers, rows(comparison))
    output.notices(comparison.notes)


def _fail_if(checks: "list[Condition]", found: "list[Comparison]") -> None:
    from ghostvis_cli.bench.checks import judged

    met = [(check, line) for check in checks for line in judged(check, found)]
    for check in checks:
        open_ = [f for each in found for f in each.named(check.metric) if check.possible_in(f)]
        if open_ and not any(check is failed for failed, _ in met):
            output.notice(f"--fail-if {check.text} did not fail, but the intervals do not rule it out")
    if met:
        listed = "\n".join(f"{check.text}: {line}" for check, line in met)
        raise CheckFailedError(
            f"{len(met)} checks failed:\n{listed}" if len(met) > 1 else f"--fail-if {listed}"
        )


# --- a report once more


@options.takes(option(Path, "--output FILE", "Write it as .html, .svg, .csv or .json.", name="output_file"))
def bench_report(
    report: Annotated[Path, typer.Argument(metavar="REPORT.json", help="What a run wrote with --output.")],
    *,
    output_file: Path | None,
) -> None:
    """Show a report again, or make a page or an image of it."""
    from ghostvis_cli.bench import schema
    from ghostvis_cli.bench.files import check_place, save
    from ghostvis_cli.bench.report import lines

    read = schema.read(report)
    check_place(output_file)
    if output_file is not None:
        save(read, output_file)
    else:
        if not (shown := "".join(f"{line}\n" for line in lines(read))):
            raise InputError(f"{printable(str(report))}: nothing was measured in this report")
        output.answer(shown)
