"""`ghostvis bench`: throughput and latency of any engine; the proof of its prefix cache; runs compared."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ghostvis_cli import endings
from ghostvis_cli.bench.stats import MOST_REPEATS, REPEATS
from ghostvis_cli.cli import options, output
from ghostvis_cli.errors import UsageError

from . import bench_compare, bench_prefix  # noqa: TID251 - its own parts

if TYPE_CHECKING:
    from ghostvis_cli.bench.job import Job
    from ghostvis_cli.bench.schema import Load
    from ghostvis_cli.bench.workload import Spec

app = typer.Typer(rich_markup_mode=None)
app.command("prefix", epilog=bench_prefix.EXAMPLES)(bench_prefix.bench_prefix)
app.command("compare", epilog=bench_compare.EXAMPLES)(bench_compare.bench_compare)
app.command("report")(bench_compare.bench_report)
LONGEST_S = 1e8  # three years
MOST = 1_000_000  # of requests drawn beforehand, all in memory
EXAMPLES = """Examples:

  ghostvis bench --num-prompts 1000

  ghostvis bench --num-prompts 100 --with-vision

  ghostvis bench --images 4 --questions 10 --output report.json

  ghostvis bench --base-url http://gpu-1:30000 --request-rate 20 --duration 60 --slo ttft=200ms,tpot=20ms

  ghostvis bench --engines local,remote --base-url http://localhost:30000 --sweep concurrency=1,2,4,8 --repeat 3

Requests are greedy and run to their full length (--ignore-eos). Every figure is defined in docs/bench.md.
"""


# The same function twice: bare `ghostvis bench`, and `ghostvis bench run`.
@app.callback(invoke_without_command=True, epilog=EXAMPLES)
@app.command("run", epilog=EXAMPLES)
@options.shared(options.MODEL, options.IMAGES_BACKGROUND, options.ANY_ENGINE, options.GPUS, options.SCRIPTED)
def bench(
    ctx: typer.Context,
    num_prompts: Annotated[
        int | None,
        typer.Option("--num-prompts", metavar="N", min=1, max=MOST, help="Requests of a run (default 100)."),
    ] = None,
    with_vision: Annotated[
        bool, typer.Option("--with-vision", help="An image of its own in every prompt.")
    ] = False,
    images: Annotated[
        int | None,
        typer.Option("--images", metavar="G", min=1, max=MOST, help="Images, shared by --questions."),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option("--questions", metavar="Q", min=1, max=MOST, help="Questions to each of --images."),
    ] = None,
    shared_prefix: Annotated[
        int,
        typer.Option(
            "--shared-prefix", metavar="N", min=0, max=1_000_000, help="Tokens of a system prompt they share."
        ),
    ] = 0,
    turns: Annotated[
        int, typer.Option("--turns", metavar="N", min=1, max=100, help="Turns of each conversation.")
    ] = 1,
    prompt_len: Annotated[
        str | None,
        typer.Option(
            "--prompt-len", metavar="LEN", help="128, 64-256, normal:128,32 or lognormal:128,0.5 (words)."
        ),
    ] = None,
    output_len: Annotated[
        str, typer.Option("--output-len", metavar="LEN", help="Tokens of an answer, likewise.")
    ] = "64",
    image_size: Annotated[
        str, typer.Option("--image-size", metavar="SIZE", help="512x384, 720p, 224,336 or 224-1024.")
    ] = "512x384",
    image_format: Annotated[
        str, typer.Option("--image-format", metavar="KIND", help="jpeg, png or webp.")
    ] = "jpeg",
    input_file: Annotated[
        str | None,
        typer.Option("--input", metavar="FILE.jsonl", help="Your own rows, as for generate --input."),
    ] = None,
    workload_file: Annotated[
        Path | None,
        typer.Option("--save-workload", metavar="FILE.jsonl", help="Write the rows; --input replays them."),
    ] = None,
    workload_seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, max=2**53, help="Of workload and arrivals.")
    ] = 42,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos/--natural-stops", help="Answers of full length, or as the model ends."),
    ] = True,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", metavar="N", min=1, max=65536, help="Requests in flight; with a rate, at most."
        ),
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option("--request-rate", metavar="X", help="Requests a second, whatever the server does."),
    ] = None,
    arrival: Annotated[
        str, typer.Option("--arrival", metavar="KIND", help="Of --request-rate: poisson or constant.")
    ] = "poisson",
    ramp_up: Annotated[
        float, typer.Option("--ramp-up", metavar="SECONDS", min=0, help="To full load in a straight line.")
    ] = 0.0,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="NAME=V,V", help="concurrency=1,2,4,8 or request-rate=1,2,4."),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option("--duration", metavar="SECONDS", help="Send for so long, rows over and over."),
    ] = None,
    warm_up: Annotated[
        int, typer.Option("--warm-up", metavar="N", min=0, max=MOST, help="Requests before, not counted.")
    ] = 4,
    repeat: Annotated[
        int | None,
        typer.Option(
            "--repeat",
            metavar="N",
            min=1,
            max=MOST_REPEATS,
            help=f"Runs of each (default 1; {REPEATS} for a report: compare needs them to tell chance).",
        ),
    ] = None,
    slo: Annotated[
        str | None, typer.Option("--slo", metavar="LIMITS", help="For goodput: ttft=200ms,tpot=20ms,e2e=2s.")
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option("--engines", metavar="KIND,KIND", help="Several in turn: local, sglang, remote."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="URL", help="An OpenAI-compatible server to measure. Repeatable."),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option("--output", metavar="REPORT", help="Write the report: .json, .csv, .html or .svg."),
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Keep every request's times in the report.")
    ] = False,
    *,
    json: bool,
) -> None:
    """Measure throughput and latency, of text or with images."""
    if ctx.invoked_subcommand is not None:
        _refuse_before_a_command(ctx)
        return
    options.guarded(ctx)
    from ghostvis_cli.bench import schema
    from ghostvis_cli.bench.files import check_place, save
    from ghostvis_cli.bench.job import engine_profiles, exit_code, run_job
    from ghostvis_cli.bench.report import lines

    resolved = options.resolve_profile(ctx, (), several=ctx.params["engines"] is not None)
    job = _job(ctx)
    measured = engine_profiles(job, resolved.profile).values()
    options.heed(resolved, [each.engine.chosen_kind for each in measured], option="--engines")
    check_place(output_file)
    with ExitStack() as kept:
        report, cut = endings.run(run_job(job, resolved.profile, output, kept))
        try:
            if output_file is not None:
                save(report, output_file)
        finally:  # a full disk shall not take the figures along
            if json:
                output.record(schema.to_json(report))
            else:
                output.aside(lines(report))
        if cut is not None:
            cut.take_effect()
    raise typer.Exit(exit_code(report.runs))


def _wants_records(path: str | None) -> bool:
    """A page shows every request, and so do its charts."""
    from ghostvis_cli.bench.files import kind

    return path is not None and kind(Path(path)) in (".html", ".svg")


def _refuse_before_a_command(ctx: typer.Context) -> None:
    """`bench --json compare A B` would drop --json without a word."""
    for name in ctx.params:
        if options.was_typed(ctx, name):
            command = ctx.invoked_subcommand
            raise UsageError(
                f"options go behind {command}: ghostvis bench {command} ...",
                hint=f"ghostvis bench {command} -h",
            )


# --- options -> job


def _job(ctx: typer.Context) -> "Job":
    from ghostvis_cli.bench.job import Job
    from ghostvis_cli.bench.metrics import parse_slo

    given = ctx.params
    if given["duration"] is not None and not 0 < given["duration"] <= LONGEST_S:
        raise UsageError("--duration is a number of seconds above 0", hint="--duration 60")
    return Job(
        spec=_spec(ctx),
        input=given["input_file"],
        engines=tuple((given["engines"] or "").replace(",", " ").split()),
        against=tuple(given["against"] or ()),
        loads=_loads(ctx),
        repeats=given["repeat"] or (REPEATS if given["output_file"] else 1),
        duration_s=given["duration"],
        warm_up=given["warm_up"],
        ignore_eos=given["ignore_eos"],
        slo=parse_slo(given["slo"]) if given["slo"] else {},
        details=given["details"] or _wants_records(given["output_file"]),
        workload_file=Path(given["workload_file"]) if given["workload_file"] else None,
        command=bench_prefix.typed(),
    )


def _spec(ctx: typer.Context) -> "Spec":
    from ghostvis_cli.bench.lengths import Length, Sizes
    from ghostvis_cli.bench.workload import FORMATS, Spec

    given = ctx.params
    if given["image_format"] not in FORMATS:
        raise UsageError(f"--image-format is one of {', '.join(FORMATS)}")
    if given["input_file"] is not None:
        drawing = ("with_vision", "images", "questions", "shared_prefix", "prompt_len", "workload_file")
        if stray := [name for name in drawing if given[name]]:
            raise UsageError(
                f"--{stray[0].replace('_', '-')} has no place beside --input, whose rows are yours"
            )
    length = given["prompt_len"]
    return Spec(
        seed=given["workload_seed"],
        num_prompts=given["num_prompts"],
        prompt_len=Length.parse(length, "--prompt-len") if length else None,
        output_len=Length.parse(given["output_len"], "--output-len"),
        with_vision=given["with_vision"],
        images=given["images"],
        questions=given["questions"],
        shared_prefix=given["shared_prefix"],
        turns=given["turns"],
        image_size=Sizes.parse(given["image_size"]),
        image_format=given["image_format"],
    )


def _loads(ctx: typer.Context) -> "tuple[Load, ...]":
    from ghostvis_cli.bench.loads import loads

    given = ctx.params
    if not given["ramp_up"] <= LONGEST_S:
        raise UsageError("--ramp-up is a number of seconds", hint="--ramp-up 10")
    return loads(
        given["concurrency"], given["request_rate"], given["arrival"], given["ramp_up"], given["sweep"]
    )
