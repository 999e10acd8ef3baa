"""The rows in flight: a fixed number at a time, each recorded before the next is taken."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ghostvis_cli import files
from ghostvis_cli.answer import TimedAnswer, ask
from ghostvis_cli.batch.journal import Journal, Progress, write_all
from ghostvis_cli.batch.rows import Row
from ghostvis_cli.engines.base import Engine
from ghostvis_cli.errors import EngineError, ExitCode, GhostvisError
from ghostvis_cli.profile.values import shown
from ghostvis_cli.threads import in_daemon_thread
from ghostvis_cli.version import SCHEMA_VERSION

if TYPE_CHECKING:
    from ghostvis_cli.images import EncodedImage

ENGINE_ERRORS_IN_A_ROW = 5  # with no answer in between: the engine is gone, not a row at fault
FATAL = (ExitCode.BUG, ExitCode.MODEL)  # errors that say nothing about a row


class Sink(Protocol):
    """Where records go. `add` returns when a record may be counted."""

    async def add(self, record: dict[str, Any]) -> None: ...


class JournalSink:
    """Puts records in the journal, all that finish during one sync together in the next."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._syncing: asyncio.Task[None] | None = None

    async def add(self, record: dict[str, Any]) -> None:
        line = _line(record)
        synced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((line, synced))
        if self._syncing is None or self._syncing.done():
            self._syncing = asyncio.create_task(self._sync())
        await synced

    async def _sync(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            failure: Exception | None = None
            try:
                await asyncio.to_thread(self._journal.append, [line for line, _ in group])
            except Exception as error:
                failure = error
            for _, synced in group:
                if synced.done():  # its row was cancelled
                    continue
                if failure is None:
                    synced.set_result(None)
                else:
                    synced.set_exception(failure)


class StreamSink:
    """Writes whole records to a pipe or a device, which may keep us waiting."""

    def __init__(self, path: Path) -> None:
        """OutputError where it can't be opened."""
        self.path, self._stack = path, ExitStack()
        try:
            self._descriptor = self._stack.enter_context(files.straight(path))
        except OSError as error:
            raise files.cannot_write(path, error) from error

    async def add(self, record: dict[str, Any]) -> None:
        try:
            write_all(self._descriptor, _line(record))
        except BrokenPipeError:  # its reader has left, which is no error
            raise
        except OSError as error:
            raise files.cannot_write(self.path, error) from error

    def close(self) -> None:
        self._stack.close()


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace")  # half a surrogate pair, as JSON spells it


@dataclass
class Batch:
    """One run over the rows that are left.

    An error of a row is recorded for it. An EngineError is not the row's fault: the row is left for the next
    run, and several in a row end this one.
    """

    engine: Engine
    rows: Iterator[Row]
    load: "Callable[[str], EncodedImage]"
    sink: Sink
    row_hash: Callable[[int], str]
    progress: Progress
    on_failure: Callable[[Row, GhostvisError], None]
    tokens: int = 0
    textless: int = 0  # answers of this run
    first_textless: str = ""  # which row's, and what came instead
    started_s: float = field(default_factory=time.perf_counter)
    _recorded_before: int = field(init=False)
    _engine_errors: int = 0
    _last_engine_error: EngineError | None = None

    def __post_init__(self) -> None:
        self._recorded_before = self.progress.recorded

    async def run(self, concurrency: int) -> None:
        """Raises what ended the run early: the engine's error, the output's, a bug."""
        workers = [asyncio.create_task(self._work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self._last_engine_error is not None:
            raise self._last_engine_error

    def status(self) -> str:
        """The line of progress: "312/1,000 rows · 2 failed · 29.2 rows/s · 812 tokens/s · 24 s left"."""
        progress, (rows_per_s, tokens_per_s) = self.progress, self._speeds()
        parts = [f"{progress.recorded:,}/{len(progress.wanted):,} rows"]
        parts += [f"{progress.failed:,} failed"] if progress.failed else []
        parts += [f"{rows_per_s:.1f} rows/s", f"{tokens_per_s:.0f} tokens/s"]
        if rows_per_s:
            parts.append(f"{_duration((len(progress.wanted) - progress.recorded) / rows_per_s)} left")
        return " · ".join(parts)

    def summary(self) -> str:
        """The last line: what there is now, and how fast this run's part of it came."""
        progress, (rows_per_s, tokens_per_s) = self.progress, self._speeds()
        counts = f"{len(progress.wanted):,} rows: {progress.finished:,} done, {progress.failed:,} failed"
        if progress.recorded == self._recorded_before:
            return f"{counts}; there was nothing left to run"
        took = _duration(time.perf_counter() - self.started_s)
        ran = f"{progress.recorded - self._recorded_before:,} in {took}"
        return f"{counts}; {ran} ({rows_per_s:.1f} rows/s, {tokens_per_s:.0f} tokens/s)"

    def _speeds(self) -> tuple[float, float]:
        seconds = max(time.perf_counter() - self.started_s, 1e-9)
        return (self.progress.recorded - self._recorded_before) / seconds, self.tokens / seconds

    async def _work(self) -> None:
        for row in self.rows:
            try:
                answer = await self._answer(row)
            except EngineError as error:
                self._missed(error)
            except GhostvisError as error:
                if error.code in FATAL:
                    raise
                await self._record(row, {"error": error.record()}, int(error.code))
                self.on_failure(row, error)
            else:
                self._engine_errors = 0
                await self._record(row, answer.record(self.engine.info), None)
                self.tokens += answer.completion.usage.completion_tokens
                self._look_for_text(row, answer)

    def _look_for_text(self, row: Row, answer: TimedAnswer) -> None:
        if line := answer.completion.notice:
            self.textless += 1
            self.first_textless = self.first_textless or f"row {shown(str(row.id))}: {line}"

    async def _answer(self, row: Row) -> TimedAnswer:
        make = partial(row.request, self.load)
        request = await in_daemon_thread(make, "ghostvis-images") if row.images else make()
        answer = await ask(self.engine, request)
        if answer.completion.finish_reason == "abort" and not self._filters():
            raise EngineError("the answer was cut short: the server is stopping, or somebody aborted it")
        return answer

    def _filters(self) -> bool:
        """Whether a content filter may have cut the answer short: only plain OpenAI servers have one."""
        server = self.engine.server
        return server is not None and server.kind == "openai"

    async def _record(self, row: Row, content: dict[str, Any], code: int | None) -> None:
        about = {"schema_version": SCHEMA_VERSION, "id": row.id, "index": row.index}
        carried = {} if row.metadata is None else {"metadata": row.metadata}
        await self.sink.add({**about, "row_hash": self.row_hash(row.index), **content, **about, **carried})
        self.progress.count(row.index, code)

    def _missed(self, error: EngineError) -> None:
        self._last_engine_error = error
        self._engine_errors += 1
        if self._engine_errors >= ENGINE_ERRORS_IN_A_ROW:
            raise error


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
