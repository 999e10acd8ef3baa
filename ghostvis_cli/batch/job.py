"""One batch from its options to its exit code: check the rows, go on with the output, run what is left, sum up."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ghostvis_cli import endings, files
from ghostvis_cli.batch.journal import Journal, Progress
from ghostvis_cli.batch.manifest import Manifest
from ghostvis_cli.batch.rows import Row, RunSettings
from ghostvis_cli.batch.run import Batch, JournalSink, StreamSink
from ghostvis_cli.batch.source import RowFile
from ghostvis_cli.errors import ExitCode, GhostvisError, UsageError
from ghostvis_cli.paths import expanded
from ghostvis_cli.profile.values import shown

if TYPE_CHECKING:
    from ghostvis_cli.images import EncodedImage
    from ghostvis_cli.profile import Profile

STDIO = "-"
FAILURES_TOLD = 5


@dataclass(frozen=True)
class Job:
    """`output` None or `-` is stdout: records are written as they come, and the run can't be resumed.

    So is a pipe or a device, such as /dev/stdout or what a shell makes of >(...).
    """

    input: str
    output: str | None = None
    concurrency: int | None = None
    retry_errors: bool = False
    raw: bool = False


class Reporter(Protocol):
    """Where a job reports to. The module cli.output is one."""

    def notice(self, text: str, /) -> None: ...
    def detail(self, text: str, /) -> None: ...
    def record(self, value: dict[str, Any], /) -> None: ...
    def progress(self, line: Callable[[], str], /) -> AbstractAsyncContextManager[None]: ...


def run_job(job: Job, profile: "Profile", reporter: Reporter) -> int:
    """Run a batch; the exit code. Refuses what can't work before a model is loaded."""
    settings = RunSettings(profile.sampling, profile.system, job.raw)
    journal, stream = None, None
    with ExitStack() as stack:
        rows = stack.enter_context(closing(RowFile.open(job.input, settings)))
        path = None if job.output in (None, STDIO) else expanded(str(job.output))
        if path is not None and (path.is_dir() or not files.is_special(path)):
            stack.enter_context(endings.unwinding())  # rows in flight are ended, and what is recorded is told
            if rows.is_file(path):
                raise UsageError(f"--input and --output are both {path}")
            journal = stack.enter_context(closing(Journal.open(path)))
            journal.check(settings)
        elif job.retry_errors:
            raise UsageError("--retry-errors goes on with a file", hint="--output results.jsonl")
        elif path is not None:
            stream = stack.enter_context(closing(StreamSink(path)))
        return endings.run(_Run(job, profile, reporter, rows, journal, stream).run())


@dataclass
class _Run:
    job: Job
    profile: "Profile"
    reporter: Reporter
    rows: RowFile
    journal: Journal | None
    stream: "StreamSink | None" = None
    failures: int = 0

    async def run(self) -> int:
        from ghostvis_cli.engines.factory import make_engine

        reporter = self.reporter
        async with await make_engine(self.profile, report=reporter.notice, detail=reporter.detail) as engine:
            for line in engine.info.notices:
                self.reporter.notice(line)
            manifest = Manifest.of(self.rows.settings, engine.info)

            def row_hash(index: int) -> str:
                return manifest.row_hash(self.rows.digest(index))

            progress = self._resumed(manifest, row_hash) if self.journal else Progress.fresh(len(self.rows))
            sink = JournalSink(self.journal) if self.journal else self.stream or _Stdout(self.reporter)
            wanted = self.rows.rows(progress.wanted)
            batch = Batch(engine, wanted, self._image, sink, row_hash, progress, self._failed)
            usual = engine.info.max_batch or self.profile.engine.usual_in_flight
            await self._run_rows(batch, self.job.concurrency or usual)
            return self._code(progress)

    def _resumed(self, manifest: Manifest, row_hash: Callable[[int], str]) -> Progress:
        assert self.journal is not None
        self.journal.check(self.rows.settings, manifest)
        progress = self.journal.resume(len(self.rows), row_hash, retry_errors=self.job.retry_errors)
        self.journal.begin(manifest)
        name = self.journal.path.name
        if progress.repaired:
            self.reporter.notice(f"{name}: an unfinished last line ({progress.repaired} bytes) was cut off")
        if progress.dropped:
            self.reporter.notice(f"{name}: failed rows taken out, to run again: {progress.dropped:,}")
        if progress.recorded:
            self.reporter.notice(
                f"{name}: {progress.recorded:,} of {len(self.rows):,} rows are there already"
            )
        return progress

    async def _run_rows(self, batch: Batch, concurrency: int) -> None:
        try:
            async with self.reporter.progress(batch.status):
                await batch.run(concurrency)
        except BaseException:
            if self.journal is not None:
                count = f"{batch.progress.recorded:,} of {len(self.rows):,}"
                self.reporter.notice(f"{count} rows are recorded; the same command goes on with the rest")
            raise
        self.reporter.notice(batch.summary())
        if batch.textless:
            more = f"; so have {batch.textless - 1:,} more" if batch.textless > 1 else ""
            self.reporter.notice(f"{batch.first_textless}{more}")
        if batch.progress.failed and self.journal is not None:
            self.reporter.notice("the same command with --retry-errors runs the failed rows again")

    def _image(self, url: str) -> "EncodedImage":
        """A relative path is relative to the input file, wherever the command was typed."""
        from ghostvis_cli.images import beside, load_image

        return load_image(beside(self.rows.directory, url), limits=self.profile.images)

    def _failed(self, row: Row, error: GhostvisError) -> None:
        self.failures += 1
        if self.failures <= FAILURES_TOLD:
            self.reporter.notice(f"row {shown(str(row.id))} failed: {error.message}")
        elif self.failures == FAILURES_TOLD + 1:
            self.reporter.notice("further failures are told by their records alone")

    def _code(self, progress: Progress) -> int:
        if not progress.failed:
            return ExitCode.OK
        return ExitCode.PARTIAL if progress.finished else progress.failure_code or ExitCode.PARTIAL


class _Stdout:
    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    async def add(self, record: dict[str, Any]) -> None:
        self._reporter.record(record)
