"""`ghostvis generate`: one answer per prompt to stdout, for people and for scripts."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ghostvis_cli import endings
from ghostvis_cli.cli import options, output
from ghostvis_cli.cli.options import option
from ghostvis_cli.errors import ExitCode, GhostvisError, InputError, UsageError

if TYPE_CHECKING:
    from ghostvis_cli.answer import TimedAnswer
    from ghostvis_cli.engines.base import Engine, GenerateRequest
    from ghostvis_cli.images import EncodedImage
    from ghostvis_cli.profile import Profile

app = typer.Typer(rich_markup_mode=None)
EXAMPLES = """Examples:

  ghostvis generate "What is in this picture?" --image photo.jpg

  ghostvis generate -i a.png --json --temperature 0 "How many shapes are there?"

  echo "Hello" | ghostvis generate

  ghostvis generate --source sft --model-tag d32 --prompt "Who are you?"

  ghostvis generate --input rows.jsonl --output results.jsonl --temperature 0
"""

NOT_BESIDE_INPUT = {
    "prompts": "a prompt", "prompt": "--prompt", "prompt_file": "--prompt-file", "image": "--image",
    "json": "--json", "stream": "--stream", "stats": "--stats",
}  # fmt: skip


@app.command(epilog=EXAMPLES)
@options.takes(
    option(list[str], "--prompt TEXT", "A prompt. Repeatable."),
    option(Path, "--prompt-file FILE", "Read the prompt from a file."),
    option(
        list[str],
        "--image -i SOURCE",
        "Path, - (stdin), data: or http(s) URL. Repeatable; goes to every prompt.",
    ),
    option(str, "--input FILE.jsonl", "Many prompts, one row a line; - is stdin.", name="input_file"),
    option(str, "--output OUT.jsonl", "Where rows' results go; run again, it goes on.", name="output_file"),
    option(int, "--concurrency N", "Rows in flight (default: the engine's).", min=1, max=4096),
    option(bool, "--retry-errors", "Run rows again that failed in an earlier run."),
    option(bool, "--raw", "Continue the text as it is, without chat markup."),
    option(int, "--logprobs N", "Alternatives per token, in JSON only."),
    option(bool | None, "--ignore-eos", "Do not stop where the model would."),
    option(Path, "--schema FILE", "Answer in JSON that fits this JSON Schema."),
    option(str, "--regex TEXT", "The whole answer matches this expression."),
    option(bool, "--jsonl", "One JSON object a line, one per prompt."),
    option(bool | None, "--stream/--no-stream", "Show text as it comes (default: on a terminal)."),
    option(bool, "--stats", "A line of statistics per answer, on stderr."),
    options.ANSWERING,
)
def generate(
    ctx: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="- reads stdin.")] = None,
    *,
    image: list[str] | None,
    raw: bool,
    jsonl: bool,
    json: bool,
) -> None:
    """Answer a prompt, with or without images."""
    options.guarded(ctx)
    typed, profile = ctx.params, options.resolve_profile(ctx).profile
    if typed["schema"] is not None:
        profile = _with_schema(profile, typed["schema"])
    if json and jsonl:
        raise UsageError("--json and --jsonl exclude each other", hint="--jsonl prints one object a line")
    if typed["input_file"] is not None:
        raise typer.Exit(_run_batch(ctx, profile))
    if typed["output_file"] is not None or typed["concurrency"] is not None or typed["retry_errors"]:
        raise UsageError(
            "--output, --concurrency and --retry-errors go with --input", hint="--input rows.jsonl"
        )
    texts = _prompts([*(prompts or []), *(typed["prompt"] or [])], typed["prompt_file"], image or [])
    if json and len(texts) > 1:
        raise UsageError(f"--json prints one object, and there are {len(texts)} prompts", hint="--jsonl")
    if raw and typed["system"]:
        raise UsageError("--raw takes no --system: it continues the text as it is", hint="leave out --raw")
    if typed["logprobs"] is not None and not (json or jsonl):
        raise UsageError("--logprobs shows only in JSON", hint="add --json")
    if raw and image:
        raise UsageError(
            "--raw takes no images: their place is a matter of chat markup", hint="leave out --raw"
        )
    images = _images(image or [], profile)
    requests = [_request(text, images, profile, raw=raw) for text in texts]
    stream = output.is_terminal_stdout() if typed["stream"] is None else typed["stream"]
    show = _Show(json or jsonl, stream and not (json or jsonl), typed["stats"], profile.sampling.has_grammar)
    raise typer.Exit(endings.run(_answer_all(profile, requests, show)))


def _run_batch(ctx: typer.Context, profile: "Profile") -> int:
    from ghostvis_cli.batch.job import Job, run_job

    for name, shown in NOT_BESIDE_INPUT.items():
        if ctx.params[name]:
            raise UsageError(
                f"{shown} has no place beside --input", hint="rows hold prompts; results are JSONL"
            )
    names = ("input_file", "output_file", "concurrency", "retry_errors", "raw")
    return run_job(Job(*(ctx.params[name] for name in names)), profile, output)


def _with_schema(profile: "Profile", file: Path) -> "Profile":
    from ghostvis_cli.cli.inputs import read_text
    from ghostvis_cli.sampling import SamplingError

    try:
        return replace(profile, sampling=replace(profile.sampling, json_schema=read_text(file)))
    except SamplingError as error:
        hint = "leave out --regex" if error.field == "regex" else error.hint
        raise InputError(f"{file}: {error.message}", hint=hint) from error


def _prompts(given: list[str], prompt_file: Path | None, images: list[str]) -> list[str]:
    """Every prompt in the order typed; stdin for -, or where nothing was typed and stdin holds something."""
    from ghostvis_cli.cli.inputs import piped, read_stdin, read_text

    if (given + images).count("-") > 1:
        raise UsageError("- can be named once: there is one stdin")
    texts = [read_stdin() if text == "-" else text for text in given]
    if prompt_file is not None:
        texts.append(read_text(prompt_file))
    if not texts and "-" not in images and piped():
        texts.append(read_stdin())
    if not all(text.strip() for text in texts):
        raise InputError("the prompt is empty")
    if not texts:
        raise UsageError("no prompt", hint='ghostvis generate "What is in this picture?" --image FILE')
    return texts


def _images(sources: list[str], profile: "Profile") -> "list[EncodedImage]":
    if not sources:
        return []
    from ghostvis_cli.images import load_image

    images = [load_image(source, limits=profile.images) for source in sources]
    for image in images:
        output.notices(image.notices)
        for line in image.details:
            output.detail(line)
    return images


def _request(text: str, images: "list[EncodedImage]", profile: "Profile", *, raw: bool) -> "GenerateRequest":
    from ghostvis_cli.engines.base import GenerateRequest
    from ghostvis_cli.prompt import Message

    if raw:
        return GenerateRequest(prompt=text, sampling=profile.sampling)
    system = [Message.of("system", profile.system)] if profile.system else []
    return GenerateRequest(messages=(*system, Message.of("user", text, images)), sampling=profile.sampling)


@dataclass(frozen=True)
class _Show:
    """How answers are shown. `whole_only`: a part of one is of no use, as of JSON."""

    records: bool
    stream: bool
    stats: bool
    whole_only: bool

    def piece(self, text: str) -> None:
        if self.stream:
            output.answer(text)

    def whole(self, answer: "TimedAnswer", engine: "Engine") -> None:
        if self.records:
            output.record(answer.record(engine.info))
        else:
            output.answer("\n" if self.stream else f"{answer.text}\n")
        if answer.completion.notice is not None:
            output.notice(answer.completion.notice)
        if self.whole_only and answer.completion.finish_reason == "length":
            output.notice("the answer was cut off and is not whole: a larger --max-tokens gives it room")
        if self.stats:
            output.notice(answer.statistics())
        used = answer.completion.usage.prompt_tokens + answer.completion.usage.completion_tokens
        trained = engine.info.trained_tokens
        if trained is not None and used > trained:
            output.notice(f"{used} positions were used; the model was trained on {trained}")


async def _answer_all(profile: "Profile", requests: "list[GenerateRequest]", show: _Show) -> int:
    """All requests at once, shown in their order. One alone streams."""
    from ghostvis_cli.answer import ask
    from ghostvis_cli.engines.factory import make_engine

    async with await make_engine(profile, report=output.notice, detail=output.detail) as engine:
        told = engine.info.notices
        output.notices(told)
        if len(requests) == 1:
            show.whole(await ask(engine, requests[0], show.piece), engine)
            code = int(ExitCode.OK)
        else:
            code = await _answer_many(engine, requests, show)
        # Some are known only after the answers.
        output.notices(line for line in engine.info.notices if line not in told)
        return code


async def _answer_many(engine: "Engine", requests: "list[GenerateRequest]", show: _Show) -> int:
    """Each prompt fails for itself. Code 8 where some succeeded, else the first failure's code."""
    from ghostvis_cli.answer import ask

    quiet_show = replace(show, stream=False)
    tasks = [asyncio.create_task(ask(engine, request)) for request in requests]
    failures: list[GhostvisError] = []
    for task in tasks:
        try:
            answer = await task
        except GhostvisError as error:
            failures.append(error)
            output.error(error)
        else:  # what can't be written is no failure of a prompt
            quiet_show.whole(answer, engine)
    if not failures:
        return ExitCode.OK
    return ExitCode.PARTIAL if len(failures) < len(tasks) else int(failures[0].code)
