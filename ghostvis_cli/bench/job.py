"""One benchmark from its options to its report: draw the workload, open the engines, run the plan, sum up."""

import asyncio
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol
from urllib.parse import urlsplit

from ghostvis_cli import processor_use
from ghostvis_cli.addresses import is_here
from ghostvis_cli.bench import machine, metrics, workload
from ghostvis_cli.bench.ratios import ratios
from ghostvis_cli.bench.run import Plan, Progress, Target, measure
from ghostvis_cli.bench.schema import Load, Report, Run
from ghostvis_cli.bench.stats import REPEATS
from ghostvis_cli.bench.stopping import Interruption, held_up
from ghostvis_cli.bench.workload import Spec, Workload
from ghostvis_cli.errors import ExitCode, GhostvisError, UsageError
from ghostvis_cli.sampling import Sampling

if TYPE_CHECKING:
    from ghostvis_cli.engines.base import Engine
    from ghostvis_cli.profile import Profile
    from ghostvis_cli.profile.settings import EngineSettings

KINDS: tuple[Literal["local", "sglang", "remote"], ...] = ("local", "sglang", "remote")
WARM_UP = 4
OPEN_FILES = 65_536
KNOWN = 0.4  # of a new prompt, cached: more than the markup that prompts share
OFF_BY = 0.1  # a prompt length that differs by more from what was asked for is worth a line


@dataclass(frozen=True)
class Job:
    """`input` None draws the workload of `spec`. `engines` empty is the profile's own."""

    spec: Spec = field(default_factory=Spec)
    input: str | None = None
    engines: tuple[str, ...] = ()
    against: tuple[str, ...] = ()  # addresses of servers, measured beside
    loads: tuple[Load, ...] = ()  # empty: closed loop, as many in flight as suits the engine
    repeats: int = REPEATS
    duration_s: float | None = None
    warm_up: int = WARM_UP
    ignore_eos: bool = True
    slo: Mapping[str, float] = field(default_factory=dict)
    details: bool = False
    workload_file: Path | None = None
    command: str = "ghostvis bench"


class Reporter(Protocol):
    """Where a job reports to. The module cli.output is one."""

    def notice(self, text: str, /) -> None: ...
    def progress(self, line: Callable[[], str], /) -> AbstractAsyncContextManager[None]: ...


async def run_job(
    job: Job, profile: "Profile", reporter: Reporter, kept: ExitStack
) -> tuple[Report, Interruption | None]:
    """Measure everything the job asks for, on engines that it starts. Interrupted: what was measured so far.

    Until `kept` is left, what would end the run waits for the report to be written.
    """
    from ghostvis_cli.engines.factory import make_engine

    profiles = engine_profiles(job, profile)
    _allow_connections()
    plan = make_plan(job, next(iter(profiles.values())))
    work = make_workload(job, profile, plan)
    reporter.notice(_announced(job, work, plan))
    watch = machine.Watch(job.command, job.spec.seed)
    async with AsyncExitStack() as stack:
        targets = []
        for name, settings in profiles.items():
            made = await make_engine(settings, report=reporter.notice, many_connections=True)
            engine = await stack.enter_async_context(made)
            for line in engine.info.notices:
                reporter.notice(line)
            targets.append(Target(name, engine, _is_here(settings), port=_port(settings)))
        progress = Progress()
        runs: list[Run] = []
        async with reporter.progress(progress.line):
            cut = await held_up(measure(targets, work, plan, progress, runs), kept)
        if cut is not None and not runs:
            cut.take_effect()
        return _report(job, work, watch, runs, targets, profiles, cut), cut


async def measure_engine(job: Job, profile: "Profile", engine: "Engine") -> Report:
    """Measure an engine that runs already. Requests that the server did not take are repeated as its owner set."""
    plan = make_plan(job, profile)
    work = await asyncio.to_thread(make_workload, job, profile, plan)
    watch = machine.Watch(job.command, job.spec.seed)
    target = Target(engine.info.kind, engine, _is_here(profile), port=_port(profile))
    runs = await measure([target], work, plan, Progress())
    return _report(job, work, watch, runs, [target], {target.name: profile})


def make_plan(job: Job, profile: "Profile") -> Plan:
    loads = job.loads or (Load(concurrency=profile.engine.usual_in_flight),)
    return Plan(loads, job.repeats, job.duration_s, job.spec.seed, job.slo)


def _report(
    job: Job,
    work: Workload,
    watch: machine.Watch,
    runs: Sequence[Run],
    targets: Sequence[Target],
    profiles: Mapping[str, "Profile"],
    cut: Interruption | None = None,
) -> Report:
    """Everything in one document. Records stay in it only with `details`."""
    told = [line for each in targets for line in each.engine.info.notices]
    planned = len(work.rounds) * len(targets)
    first = [_cut_short(cut, runs, planned)] if cut is not None else []
    runs = _without_rests(runs)
    notes = [
        *first,
        *work.notes,
        *told,
        *(note for run in runs for note in run.notes),
        *_lengths_off(job, runs),
        *_known_before(job, runs, work.summary.rows),
    ]
    return Report(
        manifest=watch.manifest(),
        workload=work.summary,
        engines=tuple(machine.card(each.name, each.engine, profiles[each.name]) for each in targets),
        runs=tuple(run if job.details else replace(run, records=()) for run in runs),
        summaries=metrics.summarise(runs),
        slo=dict(job.slo),
        notes=tuple(dict.fromkeys(notes)),
        extra={"ratios": found} if (found := ratios(runs)) else {},
        cut_short=cut.reason if cut else None,
    )


def _cut_short(cut: Interruption, runs: Sequence[Run], planned: int) -> str:
    whole = sum(not run.cut_short for run in runs)
    return f"CUT SHORT ({cut.reason}): {whole} of {planned} runs came to their end"


def _without_rests(runs: Sequence[Run]) -> list[Run]:
    """The runs without interrupted ones, except where an engine has no complete run at that load."""
    whole = {(run.engine, run.load) for run in runs if not run.cut_short}
    return [run for run in runs if not run.cut_short or (run.engine, run.load) not in whole]


def engine_profiles(job: Job, profile: "Profile") -> dict[str, "Profile"]:
    """The profile of each engine, by the name it is measured under, with retries off."""
    settings = replace(profile.engine, retries=0)
    own = job.engines or ((settings.chosen_kind,) if not job.against or settings.base_url else ())
    if unknown := [name for name in own if name not in KINDS]:
        raise UsageError(f"no engine is called {unknown[0]!r}", hint=f"--engines {','.join(KINDS[::2])}")
    found: dict[str, EngineSettings] = {
        kind: replace(settings, kind=kind) for name in own for kind in KINDS if kind == name
    }
    for url in job.against:
        # A profile's own key and model are for its own server.
        try:
            found[urlsplit(url).netloc or url] = replace(
                settings, kind="remote", base_url=url, model=None, api_key_env=None, api_key_file=None
            )
        except UsageError as error:
            raise UsageError(f"--against: {error.message}", hint="--against http://localhost:8000") from error
    return {name: replace(profile, engine=engine) for name, engine in found.items()}


def make_workload(job: Job, profile: "Profile", plan: Plan) -> Workload:
    greedy = Sampling(
        max_tokens=job.spec.output_len.longest, temperature=0.0, top_p=1.0, top_k=0, ignore_eos=job.ignore_eos
    )
    if job.input is None:
        drawn = workload.drawn(job.spec, greedy, rounds=plan.rounds, warm_up=job.warm_up)
        return workload.save(job.spec, drawn, job.workload_file) if job.workload_file else drawn
    return workload.from_file(
        job.input,
        greedy,
        profile.images,
        num_prompts=job.spec.num_prompts,
        rounds=plan.rounds,
        warm_up=job.warm_up,
        seed=job.spec.seed,
        system=profile.system,
    )


def _announced(job: Job, work: Workload, plan: Plan) -> str:
    """Lines about what will be sent, and how answers end."""
    runs = f"{plan.rounds} runs" if plan.rounds > 1 else "1 run"
    size = f"{len(work.rounds[0]):,} requests" if plan.duration_s is None else f"{plan.duration_s:g} s"
    end = (
        "answers run to their full length (--ignore-eos)"
        if job.ignore_eos
        else "answers end where the model does"
    )
    return f"{runs} of {size} for each engine, greedy; {end}"


def exit_code(runs: Iterable[Run]) -> int:
    """0, or 8 where some requests failed, or the code of the most frequent failure where all did."""
    done = failed = 0
    kinds: dict[str, int] = {}
    for run in runs:
        done += int(run.figures.get("requests") or 0)
        failed += sum(run.failures.values())
        for kind, count in run.failures.items():
            kinds[kind] = kinds.get(kind, 0) + count
    if not failed:
        return ExitCode.OK
    if done:
        return ExitCode.PARTIAL
    codes = {each.kind: int(each.code) for each in GhostvisError.__subclasses__()}
    return codes.get(max(kinds, key=kinds.__getitem__), int(ExitCode.REQUEST))


def _allow_connections() -> None:
    """Raise the limit of open files: each request in flight is one, and shells allow some 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _is_here(profile: "Profile") -> bool:
    """Whether the engine's GPU is this machine's."""
    url = profile.engine.base_url
    return profile.engine.chosen_kind != "remote" or url is None or is_here(url)


def _port(profile: "Profile") -> int | None:
    """The port of a server on this machine, whose processes can be inspected; else None."""
    url = profile.engine.base_url
    return processor_use.local_port(url) if profile.engine.chosen_kind == "remote" and url else None


def _lengths_off(job: Job, runs: Iterable[Run]) -> Iterable[str]:
    """A note where prompts came out longer or shorter than was asked for, by the server's tokenizer."""
    length = job.spec.length
    if job.input is not None or job.spec.vision or job.spec.turns > 1 or job.spec.shared_prefix:
        return
    for run in runs:
        total, count = run.figures.get("input_tokens"), run.figures.get("requests")
        if length.kind == "fixed" and total and count and abs(total / count - length.a) > OFF_BY * length.a:
            yield (
                f"prompts were {total / count:.0f} tokens in {run.engine}'s tokenizer, not {length.a:.0f}:"
                " lengths are counted in common words"
            )
            return


def _known_before(job: Job, runs: Iterable[Run], rows: int) -> Iterable[str]:
    """A note where a run's prompts were cached already, as when a command is repeated against a running server."""
    if job.input is not None or job.spec.turns > 1 or job.spec.shared_prefix:
        return
    for run in runs:
        if len(run.records) > rows:  # it repeated itself
            continue
        new = [each for each in run.records if each.prompt_tokens and not each.images_seen]
        shares = sorted((each.cached_tokens or 0) / (each.prompt_tokens or 1) for each in new)
        if shares and shares[len(shares) // 2] > KNOWN:
            yield (
                f"{run.engine} had more than {KNOWN:.0%} of most new prompts in its cache, from an earlier"
                f" measurement perhaps: --seed {job.spec.seed + 1} asks what it can't know"
            )
            return
