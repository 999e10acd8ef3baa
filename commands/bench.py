"""`ghostvis bench`: throughput and latency of any engine; the proof of its prefix cache; runs compared."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ghostvis_cli.bench.stats import REPEATS
from ghostvis_cli.cli import options, output
from ghostvis_cli.errors import CheckFailedError, ExitCode, UsageError, printable

if TYPE_CHECKING:
    from ghostvis_cli.bench.compare import Comparison, Condition
    from ghostvis_cli.bench.job import Job
    from ghostvis_cli.bench.schema import Load, Report
    from ghostvis_cli.bench.workload import Spec

app = typer.Typer(rich_markup_mode=None)
EXAMPLES = """Examples:

  ghostvis bench --num-prompts 1000

  ghostvis bench --num-prompts 100 --with-vision

  ghostvis bench --images 4 --questions 10 --output report.json

  ghostvis bench --base-url http://gpu-1:30000 --request-rate 20 --duration 60 --slo ttft=200ms,tpot=20ms

  ghostvis bench --engines local,remote --base-url http://localhost:30000 --sweep concurrency=1,2,4,8 --repeat 3

Requests are greedy and run to their full length (--ignore-eos). Every figure is defined in docs/bench.md.
"""
ARRIVALS = ("poisson", "constant")


# The same function twice: bare `ghostvis bench`, and `ghostvis bench run`.
@app.callback(invoke_without_command=True, epilog=EXAMPLES)
@app.command("run", epilog=EXAMPLES)
def bench(
    ctx: typer.Context,
    num_prompts: Annotated[
        int | None, typer.Option("--num-prompts", metavar="N", min=1, help="Requests of a run (default 100).")
    ] = None,
    with_vision: Annotated[
        bool, typer.Option("--with-vision", help="A picture of its own in every prompt.")
    ] = False,
    images: Annotated[
        int | None, typer.Option("--images", metavar="G", min=1, help="Pictures, shared by --questions.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option("--questions", metavar="Q", min=1, help="Questions to each of --images.")
    ] = None,
    shared_prefix: Annotated[
        int,
        typer.Option("--shared-prefix", metavar="N", min=0, help="Tokens of a system prompt they share."),
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
        int, typer.Option("--seed", metavar="N", min=0, help="Of workload and arrivals.")
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
        int, typer.Option("--warm-up", metavar="N", min=0, help="Requests before, not counted.")
    ] = 4,
    repeat: Annotated[
        int | None,
        typer.Option(
            "--repeat",
            metavar="N",
            min=1,
            max=1000,
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
        typer.Option("--output", metavar="REPORT", help="Write the report: .json, .csv or .html."),
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Keep every request's times in the report.")
    ] = False,
    source: options.Source = None,
    model_tag: options.ModelTag = None,
    step: options.Step = None,
    checkpoint_path: options.CheckpointPath = None,
    base_dir: options.BaseDir = None,
    layout: options.LayoutOption = None,
    engine: options.EngineKind = None,
    base_url: options.BaseUrl = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    tensor_parallel_size: options.TensorParallel = None,
    gpu_memory_utilization: options.GpuMemory = None,
    profile: options.Profile = None,
    sets: options.Set = None,
    json: options.JsonFlag = False,
    timeout: options.Timeout = None,
    lock: options.Lock = None,
    log_file: options.LogFile = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Measure throughput and latency, of text or with pictures."""
    if ctx.invoked_subcommand is not None:
        _refuse_before_a_command(ctx)
        return
    from ghostvis_cli.bench import schema
    from ghostvis_cli.bench.job import exit_code, run_job
    from ghostvis_cli.bench.report import save

    options.talk(quiet, verbose, color)
    options.guarded(ctx)
    resolved = options.resolve_profile(ctx)
    job = _job(ctx)
    _check_output(output_file)
    report = asyncio.run(run_job(job, resolved.profile, output))
    if output_file is not None:
        save(report, output_file)
    if json:
        output.record(schema.to_json(report))
    else:
        _show(report)
    raise typer.Exit(exit_code(report.runs))


def _check_output(path: Path | None) -> None:
    """Before an hour of measuring, not after it."""
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no such folder")
    if path is not None and path.suffix not in (".json", ".csv", ".html"):
        raise UsageError("a report is .json, .csv or .html", hint="--output report.json")


def _wants_records(path: str | None) -> bool:
    """A page shows every request."""
    return path is not None and path.endswith(".html")


def _refuse_before_a_command(ctx: typer.Context) -> None:
    """`bench --json compare A B` would drop --json without a word."""
    for name in ctx.params:
        if str(ctx.get_parameter_source(name)).endswith("COMMANDLINE"):
            command = ctx.invoked_subcommand
            raise UsageError(
                f"options go behind {command}: ghostvis bench {command} ...",
                hint=f"ghostvis bench {command} -h",
            )


# --- options -> job


def _job(ctx: typer.Context) -> "Job":
    import sys
    from shlex import join

    from ghostvis_cli.bench.job import Job
    from ghostvis_cli.bench.metrics import parse_slo
    from ghostvis_cli.profile.secrets import redact

    given = ctx.params
    if given["duration"] is not None and given["duration"] <= 0:
        raise UsageError("--duration is a number of seconds above 0")
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
        command=redact(join(["ghostvis", *sys.argv[1:]])),
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
    return loads(
        given["concurrency"], given["request_rate"], given["arrival"], given["ramp_up"], given["sweep"]
    )


def _show(report: "Report") -> None:
    """The figures on stderr: stdout is for --json."""
    from ghostvis_cli.bench import metrics, ratios
    from ghostvis_cli.bench.report import lines

    output.aside(lines(report))
    output.aside(map(metrics.reuse, report.summaries))
    output.aside(ratios.lines(report.extra.get("ratios", ())))


# --- the cache proof


PREFIX_EXAMPLES = """Examples:

  ghostvis bench prefix

  ghostvis bench prefix --base-url http://gpu-1:30000 --pairs 50 --output proof.html

  ghostvis bench prefix --base-url http://gpu-1:30000 --flush

  ghostvis bench prefix --text 1000 --json
"""


@app.command("prefix", epilog=PREFIX_EXAMPLES)
def bench_prefix(
    ctx: typer.Context,
    pairs: Annotated[
        int, typer.Option("--pairs", metavar="N", max=10_000, help="Pictures, each asked twice.")
    ] = 20,
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=2, max=256, help="To one picture, at the end.")
    ] = 10,
    text: Annotated[
        int, typer.Option("--text", metavar="WORDS", min=0, help="A text of so many words, no picture.")
    ] = 0,
    image_size: Annotated[
        str, typer.Option("--image-size", metavar="WxH", help="Of the pictures.")
    ] = "512x384",
    flush: Annotated[
        bool, typer.Option("--flush", help="Ask a third time after SGLang forgot its keys and values.")
    ] = False,
    workload_seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", min=0, help="Of the pictures (default: one never used before)."),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option("--output", metavar="REPORT", help="Write the report: .json, .csv or .html."),
    ] = None,
    source: options.Source = None,
    model_tag: options.ModelTag = None,
    step: options.Step = None,
    checkpoint_path: options.CheckpointPath = None,
    base_dir: options.BaseDir = None,
    layout: options.LayoutOption = None,
    engine: options.EngineKind = None,
    base_url: options.BaseUrl = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    profile: options.Profile = None,
    sets: options.Set = None,
    json: options.JsonFlag = False,
    timeout: options.Timeout = None,
    lock: options.Lock = None,
    log_file: options.LogFile = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Prove the prefix cache: new pictures against known ones. Code 9 when server and clock disagree."""
    from ghostvis_cli.bench import prefix, schema
    from ghostvis_cli.bench.report import prefix_lines, save

    options.talk(quiet, verbose, color)
    options.guarded(ctx)
    resolved = options.resolve_profile(ctx)
    settings = prefix.Settings(
        pairs=pairs,
        questions=questions,
        seed=_unused_seed() if workload_seed is None else workload_seed,
        text=text,
        image_size=_width_and_height(image_size),
        flush=flush,
    )
    report = asyncio.run(prefix.run(settings, resolved.profile, _command(), output))
    proof = report.extra["prefix"]
    if output_file is not None:
        save(report, output_file)
    if json:
        output.record(schema.to_json(report))
    else:
        output.aside(prefix_lines(proof))
    output.notices(report.notes)
    if proof["witness"] != "disagree":
        output.notice(proof["verdict"])
        return
    output.loud(f"SERVER AND CLOCK DISAGREE: {proof['verdict']}")
    raise typer.Exit(ExitCode.CHECK_FAILED)


def _unused_seed() -> int:
    """Pictures of a seed that was used before may still be in the server's cache."""
    import secrets

    return secrets.randbelow(2**31)


def _width_and_height(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 0 < int(width) <= 8192 and 0 < int(height) <= 8192):
        raise UsageError(f"--image-size {text!r} is no WIDTHxHEIGHT", hint="--image-size 512x384")
    return int(width), int(height)


def _command() -> str:
    import sys
    from shlex import join

    from ghostvis_cli.profile.secrets import redact

    return redact(join(["ghostvis", *sys.argv[1:]]))


# --- two runs and more


COMPARE_EXAMPLES = """Examples:

  ghostvis bench compare before.json after.json

  ghostvis bench compare main.json branch.json --fail-if 'ttft_p95>+5%' --fail-if 'requests_per_s<-5%'

  ghostvis bench compare a.json b.json c.json --format markdown >> $GITHUB_STEP_SUMMARY

  ghostvis bench compare a.json b.json --format benchfmt | benchstat -col run /dev/stdin
"""


@app.command("compare", epilog=COMPARE_EXAMPLES)
def bench_compare(
    reports: Annotated[
        list[Path], typer.Argument(metavar="A.json [B.json]...", help="The first is the base.")
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", "-m", metavar="NAME", help="Figures to compare, such as ttft_p90. Repeatable."
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option("--fail-if", metavar="CONDITION", help="'ttft_p95>+5%': then code 9. Repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare even what is not the same work.")] = False,
    form: Annotated[
        str, typer.Option("--format", metavar="KIND", help="table, markdown, json or benchfmt (benchstat).")
    ] = "table",
    json: options.JsonFlag = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Say of each figure whether it got better or worse, or that there is no evidence."""
    from ghostvis_cli.bench import compare as comparing
    from ghostvis_cli.bench import compare_text as text
    from ghostvis_cli.bench import schema

    options.talk(quiet, verbose, color)
    form = "json" if json else form
    if form not in ("table", "markdown", "json", "benchfmt"):
        raise UsageError(f"--format {form!r} is none of table, markdown, json, benchfmt")
    names = tuple(comparing.known_metric(name) for name in metric or ())
    checks = [comparing.condition(each) for each in fail_if or ()]
    sides = comparing.sides(dict(zip(_told_apart(reports), map(schema.read, reports), strict=True)))
    wanted = dict.fromkeys((*(names or comparing.HEADLINES), *(check.metric for check in checks)))
    found = [
        comparing.compare(a, b, metrics=tuple(wanted), force=force) for a, b in comparing.pairings(sides)
    ]
    match form:
        case "json":
            output.record({"schema_version": output.SCHEMA_VERSION, "comparisons": text.record(found)})
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
    from ghostvis_cli.bench.compare import judged

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


@app.command("report")
def bench_report(
    report: Annotated[Path, typer.Argument(metavar="REPORT.json", help="What a run wrote with --output.")],
    output_file: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write it as .html, .csv or .json.")
    ] = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    color: options.Color = "auto",
) -> None:
    """Show a report again, or make a page of it."""
    from ghostvis_cli.bench import schema
    from ghostvis_cli.bench.report import lines, save

    options.talk(quiet, verbose, color)
    read = schema.read(report)
    if output_file is not None:
        save(read, output_file)
    else:
        output.answer("".join(f"{line}\n" for line in lines(read)))
