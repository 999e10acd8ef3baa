"""The proof of a prefix cache: the same image asked about twice, in pairs, on one server.

    cold     a question about a new image: the vision tower runs, the whole prompt is prefilled
    warm     another question about the same image, right after: what came before the question may be known
    flushed  with --flush, a third question after the server forgot its keys and values. SGLang's flush keeps the
             image's embeddings: cold - flushed is the tower's time, flushed - warm the prefill's

Two witnesses: the server, who reports cached tokens, and our clock, which measures the time to the first token.
The proof is that they agree. Pairs are interleaved, so what slows a machine down for a while slows both; one
request runs at a time, so no queue is measured. In place of an image a text works too (--text).
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ghostvis_cli.bench import metrics, stats
from ghostvis_cli.bench.run import together
from ghostvis_cli.bench.schema import Record, Report, WorkloadSummary
from ghostvis_cli.bench.stats import Interval
from ghostvis_cli.bench.stopping import Interruption, held_up
from ghostvis_cli.bench.workload import QUESTIONS, WORDS
from ghostvis_cli.engines.base import Chunk, Engine, GenerateRequest, Sampling
from ghostvis_cli.errors import GhostvisError, RequestError, UsageError
from ghostvis_cli.images import EncodedImage
from ghostvis_cli.prompt import Message

if TYPE_CHECKING:
    from ghostvis_cli.bench.job import Reporter
    from ghostvis_cli.profile import Profile

now = time.monotonic
ANSWER_TOKENS = 4  # the first of them may be part of a character, and show nothing
LEAST_PAIRS = 6  # with fewer, no interval holds the median at 95 %
QUESTION_WORDS = 12
Witness = Literal["agree", "disagree", "unknown"]


@dataclass(frozen=True)
class Settings:
    """How much to ask. `text` is the length in words of a text that stands in for the image; 0: an image."""

    pairs: int = 20
    questions: int = 10
    warm_up: int = 2
    seed: int = 42
    text: int = 0
    image_size: tuple[int, int] = (512, 384)
    flush: bool = False

    def __post_init__(self) -> None:
        if self.pairs < LEAST_PAIRS:
            raise UsageError(f"{self.pairs} pairs show nothing: it takes {LEAST_PAIRS}", hint="--pairs 20")


class Flusher(Protocol):
    """Makes a server forget its keys and values."""

    async def __call__(self) -> None: ...


@dataclass(frozen=True)
class Pair:
    """One image (or text): times to the first token in seconds, tokens as the server counted them."""

    cold_s: float
    warm_s: float
    cold_cached: int | None
    warm_cached: int | None
    prompt_tokens: int
    image_tokens: int
    flushed_s: float | None = None
    flushed_cached: int | None = None

    @property
    def saved(self) -> float:
        """The share of the cold time that the warm request saved."""
        return 1 - self.warm_s / self.cold_s if self.cold_s else 0.0

    @property
    def reused(self) -> int | None:
        """Cached tokens beyond those that even a new image finds, such as the chat markup before it."""
        if self.cold_cached is None or self.warm_cached is None:
            return None
        return self.warm_cached - self.cold_cached


@dataclass(frozen=True)
class Round:
    """Many questions to one image. Vision tokens: None where the server does not report them, or none cached."""

    name: str  # "one by one", "all at once"
    questions: int
    asked: int | None
    computed: int | None
    kv_token_bytes: int | None

    @property
    def ratio(self) -> float | None:
        return self.asked / self.computed if self.asked and self.computed else None

    def kv_bytes(self, tokens: int | None) -> int | None:
        return None if tokens is None or self.kv_token_bytes is None else tokens * self.kv_token_bytes


@dataclass(frozen=True)
class Proof:
    """The result over all pairs. `saved` and `saved_s` are medians over pairs with 95 % intervals."""

    pairs: tuple[Pair, ...]
    rounds: tuple[Round, ...]
    saved: Interval
    saved_s: Interval
    reused: float | None
    witness: Witness
    verdict: str
    doubts: tuple[str, ...]


# --- measuring


@dataclass
class Measured:
    """What was measured so far, kept where the proof is interrupted."""

    pairs: list[Pair] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


async def prove(engine: Engine, settings: Settings, flush: Flusher | None = None) -> Proof:
    """Measure the pairs, then the rounds of many questions. RequestError where a request fails."""
    found = Measured()
    await _measure(engine, settings, flush, found)
    return judged(found.pairs, found.rounds)


async def _measure(engine: Engine, settings: Settings, flush: Flusher | None, found: Measured) -> None:
    rows = _Rows(settings)
    for _ in range(settings.warm_up):
        await _pair(engine, rows, None)
    for _ in range(settings.pairs):
        found.pairs.append(await _pair(engine, rows, flush))
    for name in () if settings.text else ROUNDS:
        found.rounds.append(await _round(engine, rows, name))


async def _pair(engine: Engine, rows: "_Rows", flush: Flusher | None) -> Pair:
    ask = rows.fresh()
    cold = await _asked(engine, ask.question())
    warm = await _asked(engine, ask.question())
    flushed = None
    if flush is not None:
        await flush()
        flushed = await _asked(engine, ask.question())
    return Pair(
        cold_s=_ttft(cold),
        warm_s=_ttft(warm),
        cold_cached=cold.cached_tokens,
        warm_cached=warm.cached_tokens,
        prompt_tokens=warm.prompt_tokens or 0,
        image_tokens=warm.image_tokens or engine.info.image_tokens * warm.images,
        flushed_s=_ttft(flushed) if flushed else None,
        flushed_cached=flushed.cached_tokens if flushed else None,
    )


ROUNDS = ("one by one", "all at once")


async def _round(engine: Engine, rows: "_Rows", name: str) -> Round:
    ask = rows.fresh()
    requests = [ask.question() for _ in range(rows.settings.questions)]
    if name == "one by one":
        records = [await _asked(engine, request) for request in requests]
    else:
        async with together() as tasks:
            asked = [tasks.create_task(_asked(engine, request)) for request in requests]
        records = [each.result() for each in asked]
    tokens = records[0].image_tokens or engine.info.image_tokens
    records = [
        replace(record, image_tokens=tokens, images_seen=min(n, 1)) for n, record in enumerate(records)
    ]
    computed = metrics.image_tokens_computed(records) if tokens else None
    return Round(
        name,
        len(records),
        tokens * len(records) or None,
        None if computed is None else int(computed),
        engine.info.kv_token_bytes,
    )


async def _asked(engine: Engine, request: GenerateRequest) -> Record:
    """Run one request. Its record's times count from sending it."""
    started_s = now()
    first_s: float | None = None
    last = Chunk()
    async with aclosing(engine.generate(request)) as stream:
        async for last in stream:
            if first_s is None and last.generated:
                first_s = now() - started_s
    usage = last.usage
    if usage is None or not usage.prompt_tokens:
        raise RequestError("the engine counts no tokens, and without them there is no proof")
    return Record(
        id="prefix",
        scheduled_s=0.0,
        sent_s=0.0,
        first_token_s=first_s,
        finished_s=now() - started_s,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        image_tokens=usage.image_tokens,
        images=sum(len(message.images) for message in request.messages),
    )


def _ttft(record: Record) -> float:
    return record.finished_s if record.first_token_s is None else record.first_token_s


class _Rows:
    """Images and questions from the seed, none of them twice."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.random = Random(f"prefix:{settings.seed}")
        self.sampling = Sampling(
            max_tokens=ANSWER_TOKENS, temperature=0.0, top_p=1.0, top_k=0, ignore_eos=True
        )

    def fresh(self) -> "_Subject":
        if self.settings.text:
            return _Subject(self, None, self.words(self.settings.text))
        from ghostvis_cli.bench import images

        width, height = self.settings.image_size
        content = images.draw(self.random, width, height, "jpeg")
        image = EncodedImage("fresh.jpeg", content, "image/jpeg", width, height)
        return _Subject(self, replace(image, encoded=image.base64()), "")  # before anything is timed

    def words(self, count: int) -> str:
        return " ".join(self.random.choice(WORDS) for _ in range(count))


@dataclass(frozen=True)
class _Subject:
    """What several questions have in common: an image, or a text."""

    rows: _Rows
    image: EncodedImage | None
    text: str

    def question(self) -> GenerateRequest:
        """A question that differs from all others in its first word, and has as many words."""
        random = self.rows.random
        asked = f"{self.rows.words(QUESTION_WORDS)}. {random.choice(QUESTIONS)}"
        # A copy, so that an engine in this process decodes the image again, as a server does.
        images = [] if self.image is None else [replace(self.image)]
        text = f"{self.text}\n\n{asked}" if self.text else asked
        return GenerateRequest((Message.of("user", text, images),), sampling=self.rows.sampling)


# --- judging


def judged(pairs: Sequence[Pair], rounds: Sequence[Round]) -> Proof:
    saved = stats.median_interval([pair.saved for pair in pairs])
    saved_s = stats.median_interval([pair.cold_s - pair.warm_s for pair in pairs])
    reported = [pair.reused for pair in pairs if pair.reused is not None]
    reused = stats.median(reported) if len(reported) == len(pairs) else None
    witness, verdict = _verdict(saved, reused, pairs)
    return Proof(
        tuple(pairs), tuple(rounds), saved, saved_s, reused, witness, verdict, tuple(_doubts(pairs, rounds))
    )


def _verdict(saved: Interval, reused: float | None, pairs: Sequence[Pair]) -> tuple[Witness, str]:
    clock = f"the clock sees {100 * saved.low:.0f} to {100 * saved.high:.0f} % of the time saved"
    faster = saved.low > 0
    if reused is None:
        hint = "SGLang reports them with --enable-cache-report"
        if faster:
            return "unknown", f"{clock}, which a cache would explain; cached tokens are not reported ({hint})"
        return "unknown", f"no sign of a cache: {clock}, and cached tokens are not reported ({hint})"
    tokens = stats.median([pair.prompt_tokens for pair in pairs])
    reused = max(reused, 0.0)
    claim = f"the server reports {reused:.0f} of {tokens:.0f} prompt tokens reused"
    if reused > 0 and faster:
        return "agree", f"the cache works: {claim}, and {clock}"
    if reused > 0:
        return "disagree", f"{claim}, but {clock}: cached tokens that save no time"
    if faster:
        return "disagree", f"{claim}, but {clock}: something else was kept, such as the image's embeddings"
    return "agree", f"nothing was reused: {claim}, and {clock}"


def _doubts(pairs: Sequence[Pair], rounds: Sequence[Round]) -> Iterator[str]:
    """What a reader must know before believing the proof."""
    size = pairs[0].image_tokens
    known = [pair for pair in pairs if size and (pair.cold_cached or 0) >= size]
    if known:
        yield f"{len(known)} of {len(pairs)} cold images were in the cache already: take another --seed"
    partly = [pair for pair in pairs if size and pair.reused is not None and 0 < pair.reused < size]
    if partly:
        yield f"{len(partly)} of {len(pairs)} warm requests reused only a part of the picture's {size} tokens"
    slower = sum(pair.warm_s >= pair.cold_s and (pair.reused or 0) > 0 for pair in pairs)
    if slower:
        yield f"in {slower} of {len(pairs)} pairs tokens were reused, and yet the warm request was not faster"
    if any(not round_.asked for round_ in rounds):
        yield "the server does not say how many tokens an image takes"


# --- the report


async def run(
    settings: Settings, profile: "Profile", command: str, reporter: "Reporter", kept: ExitStack
) -> tuple[Report, Interruption | None]:
    """The proof on the engine of a profile, as a report without runs. Cut short, of the pairs measured by then.

    Until `kept` is left, what would end the run waits for the report to be written.
    """
    from ghostvis_cli.bench import machine
    from ghostvis_cli.engines.factory import make_engine

    profile = replace(profile, engine=replace(profile.engine, retries=0))
    watch = machine.Watch(command, settings.seed)
    async with await make_engine(profile, report=reporter.notice) as engine:
        for line in engine.info.notices:
            reporter.notice(line)
        if not settings.text and engine.info.kind == "local" and not engine.info.image_tokens:
            raise UsageError("this model reads text only", hint="bench prefix --text 1000")
        flush, found = flusher(engine) if settings.flush else None, Measured()
        async with reporter.progress(lambda: f"pair {len(found.pairs)}/{settings.pairs}"):
            cut = await held_up(_measure(engine, settings, flush, found), kept)
        if cut is not None and len(found.pairs) < LEAST_PAIRS:
            cut.take_effect()
        proof = judged(found.pairs, found.rounds)
        card = machine.card(engine.info.kind, engine, profile)
    done = f"{len(proof.pairs)} of {settings.pairs} pairs"
    report = Report(
        manifest=watch.manifest(),
        workload=_workload(settings),
        engines=(card,),
        runs=(),
        summaries=(),
        notes=(*((f"CUT SHORT ({cut.reason}): {done}",) if cut else ()), *proof.doubts),
        extra={"prefix": as_extra(proof, asdict(settings))},
        cut_short=cut.reason if cut else None,
    )
    return report, cut


def _workload(settings: Settings) -> WorkloadSummary:
    plain = json.loads(json.dumps(asdict(settings)))
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    images = 0 if settings.text else settings.pairs
    return WorkloadSummary("prefix", settings.seed, settings.pairs, digest, images, settings=plain)


def as_extra(proof: Proof, settings: object) -> Mapping[str, Any]:
    """For Report.extra["prefix"]: plain JSON values."""
    rounds = [
        asdict(round_)
        | {
            "ratio": round_.ratio,
            "kv_asked_bytes": round_.kv_bytes(round_.asked),
            "kv_computed_bytes": round_.kv_bytes(round_.computed),
        }
        for round_ in proof.rounds
    ]
    return {**asdict(proof), "rounds": rounds, "settings": settings}


def flusher(engine: Engine) -> Flusher:
    """Asks SGLang to forget its keys and values. UsageError for engines that can't be asked."""
    if engine.server is None or engine.server.kind != "sglang":
        raise UsageError("only an SGLang server can be flushed", hint="leave out --flush")
    from ghostvis_cli.engines.connection import Connection

    async def flush() -> None:
        connection = Connection(engine.settings)  # type: ignore[attr-defined]
        try:
            response = await connection.open("POST", "/flush_cache?timeout=30", b"", now() + 60)
            await response.aclose()
        except GhostvisError as error:
            raise RequestError(f"the server's cache could not be flushed: {error.message}") from error
        finally:
            await connection.aclose()

    return flush
