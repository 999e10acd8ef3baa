"""`ghostvis bench prefix`: the proof of a prefix cache."""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ghostvis_cli import endings
from ghostvis_cli.cli import options, output
from ghostvis_cli.cli.options import option
from ghostvis_cli.errors import ExitCode

if TYPE_CHECKING:
    from ghostvis_cli.bench.schema import Report

EXAMPLES = """Examples:

  ghostvis bench prefix

  ghostvis bench prefix --base-url http://gpu-1:30000 --pairs 50 --output proof.html

  ghostvis bench prefix --base-url http://gpu-1:30000 --flush

  ghostvis bench prefix --text 1000 --json
"""


@options.takes(
    option(int, "--pairs N", "Images, each asked twice.", default=20, max=10_000),
    option(int, "--questions N", "To one image, at the end.", default=10, min=2, max=256),
    option(int, "--text WORDS", "A text of so many words, no image.", default=0, min=0, max=1_000_000),
    option(str, "--image-size WxH", "Of the images.", default="512x384"),
    option(bool, "--flush", "Ask a third time after SGLang forgot its keys and values."),
    option(
        int,
        "--seed N",
        "Of the images (default: one never used before).",
        name="workload_seed",
        min=0,
        max=2**53,
    ),
    option(Path, "--output REPORT", "Write the report: .json, .csv, .html or .svg.", name="output_file"),
    options.MODEL,
    options.ANY_ENGINE,
    options.SCRIPTED,
)
def bench_prefix(ctx: typer.Context, *, image_size: str, output_file: Path | None, json: bool) -> None:
    """Prove the prefix cache: new images against known ones. Code 9 when server and clock disagree."""
    options.guarded(ctx)
    from ghostvis_cli.bench import prefix
    from ghostvis_cli.bench.files import check_place
    from ghostvis_cli.bench.lengths import Sizes
    from ghostvis_cli.bench.report import prefix_lines

    resolved, given = options.resolve_profile(ctx), ctx.params
    settings = prefix.Settings(
        **{name: given[name] for name in ("pairs", "questions", "text", "flush")},
        seed=_unused_seed() if given["workload_seed"] is None else given["workload_seed"],
        image_size=Sizes.one(image_size),
    )
    check_place(output_file)
    with ExitStack() as kept:
        report, cut = endings.run(prefix.run(settings, resolved.profile, typed(), output, kept))
        proof = report.extra["prefix"]
        hand_over(report, output_file, prefix_lines(proof), json=json)
        output.notices(report.notes)
        disagree = proof["witness"] == "disagree"
        if disagree:
            output.loud(f"SERVER AND CLOCK DISAGREE: {proof['verdict']}")
        else:
            output.notice(proof["verdict"])
        if cut is not None:
            cut.take_effect()
    if disagree:
        raise typer.Exit(ExitCode.CHECK_FAILED)


def hand_over(report: "Report", output_file: Path | None, lines: Iterable[str], *, json: bool) -> None:
    """Write a report where that was asked for. Its figures are shown even where it can't be written."""
    from ghostvis_cli.bench import files, schema

    try:
        if output_file is not None:
            files.save(report, output_file)
    finally:
        if json:
            output.record(schema.to_json(report))
        else:
            output.aside(lines)


def _unused_seed() -> int:
    """A seed for this run alone: images of an earlier one may still be in the server's cache."""
    import secrets

    return secrets.randbelow(2**31)


def typed() -> str:
    """The command line as it was typed, without secrets."""
    import sys
    from shlex import join

    from ghostvis_cli.profile.secrets import redact

    return redact(join(["ghostvis", *sys.argv[1:]]))
