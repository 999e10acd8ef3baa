"""`ghostvis bench`: throughput and latency of any engine; the proof of its prefix cache; runs compared."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ghostvis_cli import endings
from ghostvis_cli.bench.stats import MOST_REPEATS, REPEATS
from ghostvis_cli.cli import options, output
from ghostvis_cli.cli.options import option
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
@options.takes(
    option(int, "--num-prompts N", "Requests of a run (default 100).", min=1, max=MOST),
    option(bool, "--with-vision", "An image of its own in every prompt."),
    option(int, "--images G", "Images, shared by --questions.", min=1, max=MOST),
    option(int, "--questions Q", "Questions to each of --images.", min=1, max=MOST),
    option(
        int, "--shared-prefix N", "Tokens of a system prompt they share.", default=0, min=0, max=1_000_000
    ),
    option(int, "--turns N", "Turns of each conversation.", default=1, min=1, max=100),
    option(str, "--prompt-len LEN", "128, 64-256, normal:128,32 or lognormal:128,0.5 (words)."),
    option(str, "--output-len LEN", "Tokens of an answer, likewise.", default="64"),
    option(str, "--image-size SIZE", "512x384, 720p, 224,336 or 224-1024.", default="512x384"),
    option(str, "--image-format KIND", "jpeg, png or webp.", default="jpeg"),
    option(str, "--input FILE.jsonl", "Your own rows, as for generate --input.", name="input_file"),
    option(Path, "--save-workload FILE.jsonl", "Write the rows; --input replays them.", name="workload_file"),
    option(int, "--seed N", "Of workload and arrivals.", name="workload_seed", default=42, min=0, max=2**53),
    option(
        bool, "--ignore-eos/--natural-stops", "Answers of full length, or as the model ends.", default=True
    ),
    option(int, "--concurrency N", "Requests in flight; with a rate, at most.", min=1, max=65536),
    option(float, "--request-rate X", "Requests a second, whatever the server does."),
    option(str, "--arrival KIND", "Of --request-rate: poisson or constant.", default="poisson"),
    option(float, "--ramp-up SECONDS", "To full load in a straight line.", default=0.0, min=0),
    option(str, "--sweep NAME=V,V", "concurrency=1,2,4,8 or request-rate=1,2,4."),
    option(float, "--duration SECONDS", "Send for so long, rows over and over."),
    option(int, "--warm-up N", "Requests before, not counted.", default=4, min=0, max=MOST),
    option(
        int,
        "--repeat N",
        f"Runs of each (default 1; {REPEATS} for a report: compare needs them to tell chance).",
        min=1,
        max=MOST_REPEATS,
    ),
    option(str, "--slo LIMITS", "For goodput: ttft=200ms,tpot=20ms,e2e=2s."),
    option(str, "--engines KIND,KIND", "Several in turn: local, sglang, remote."),
    option(list[str], "--against URL", "An OpenAI-compatible server to measure. Repeatable."),
    option(Path, "--output REPORT", "Write the report: .json, .csv, .html or .svg.", name="output_file"),
    option(bool, "--details", "Keep every request's times in the report."),
    options.MODEL,
    options.IMAGES_BACKGROUND,
    options.ANY_ENGINE,
    options.GPUS,
    options.SCRIPTED,
)
def bench(ctx: typer.Context, *, output_file: Path | None, json: bool) -> None:
    """Measure throughput and latency, of text or with images."""
    if ctx.invoked_subcommand is not None:
        _refuse_before_a_command(ctx)
        return
    options.guarded(ctx)
    from ghostvis_cli.bench.files import check_place
    from ghostvis_cli.bench.job import engine_profiles, exit_code, run_job
    from ghostvis_cli.bench.report import lines

    resolved = options.resolve_profile(ctx, (), several=ctx.params["engines"] is not None)
    job = _job(ctx)
    measured = engine_profiles(job, resolved.profile).values()
    options.heed(resolved, [each.engine.chosen_kind for each in measured], option="--engines")
    check_place(output_file)
    with ExitStack() as kept:
        report, cut = endings.run(run_job(job, resolved.profile, output, kept))
        bench_prefix.hand_over(report, output_file, lines(report), json=json)
        if cut is not None:
            cut.take_effect()
    raise typer.Exit(exit_code(report.runs))


def _wants_records(path: str | None) -> bool:
    """Whether the report needs every request's record: a page and its charts show them."""
    from ghostvis_cli.bench.files import kind

    return path is not None and kind(Path(path)) in (".html", ".svg")


def _refuse_before_a_command(ctx: typer.Context) -> None:
    """Refuse options before a subcommand, as in `bench --json compare A B`: they would be ignored."""
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
