"""`ghostvis bench prefix`: the proof of a prefix cache."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ghostvis_cli import endings
from ghostvis_cli.cli import options, output
from ghostvis_cli.errors import ExitCode

EXAMPLES = """Examples:

  ghostvis bench prefix

  ghostvis bench prefix --base-url http://gpu-1:30000 --pairs 50 --output proof.html

  ghostvis bench prefix --base-url http://gpu-1:30000 --flush

  ghostvis bench prefix --text 1000 --json
"""


@options.shared(options.MODEL, options.ANY_ENGINE, options.SCRIPTED)
def bench_prefix(
    ctx: typer.Context,
    pairs: Annotated[
        int, typer.Option("--pairs", metavar="N", max=10_000, help="Images, each asked twice.")
    ] = 20,
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=2, max=256, help="To one image, at the end.")
    ] = 10,
    text: Annotated[
        int,
        typer.Option(
            "--text", metavar="WORDS", min=0, max=1_000_000, help="A text of so many words, no image."
        ),
    ] = 0,
    image_size: Annotated[
        str, typer.Option("--image-size", metavar="WxH", help="Of the images.")
    ] = "512x384",
    flush: Annotated[
        bool, typer.Option("--flush", help="Ask a third time after SGLang forgot its keys and values.")
    ] = False,
    workload_seed: Annotated[
        int | None,
        typer.Option(
            "--seed", metavar="N", min=0, max=2**53, help="Of the images (default: one never used before)."
        ),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option("--output", metavar="REPORT", help="Write the report: .json, .csv, .html or .svg."),
    ] = None,
    *,
    json: bool,
) -> None:
    """Prove the prefix cache: new images against known ones. Code 9 when server and clock disagree."""
    options.guarded(ctx)
    from ghostvis_cli.bench import prefix, schema
    from ghostvis_cli.bench.files import check_place, save
    from ghostvis_cli.bench.lengths import Sizes
    from ghostvis_cli.bench.report import prefix_lines

    resolved = options.resolve_profile(ctx)
    settings = prefix.Settings(
        pairs=pairs,
        questions=questions,
        seed=_unused_seed() if workload_seed is None else workload_seed,
        text=text,
        image_size=Sizes.one(image_size),
        flush=flush,
    )
    check_place(output_file)
    with ExitStack() as kept:
        report, cut = endings.run(prefix.run(settings, resolved.profile, typed(), output, kept))
        proof = report.extra["prefix"]
        try:
            if output_file is not None:
                save(report, output_file)
        finally:
            if json:
                output.record(schema.to_json(report))
            else:
                output.aside(prefix_lines(proof))
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


def _unused_seed() -> int:
    """Images of a seed that was used before may still be in the server's cache."""
    import secrets

    return secrets.randbelow(2**31)


def typed() -> str:
    """The command line as it was typed, without secrets."""
    import sys
    from shlex import join

    from ghostvis_cli.profile.secrets import redact

    return redact(join(["ghostvis", *sys.argv[1:]]))
