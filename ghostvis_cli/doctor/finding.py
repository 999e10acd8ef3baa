"""Findings, and running checks so that none can crash or hang the others."""

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Literal, TypeAlias

from ghostvis_cli.errors import ExitCode, GhostvisError

Status: TypeAlias = Literal["ok", "note", "warning", "error"]
QUICK = 0.25  # of all the time: a home directory on a file server that is gone must not take the rest


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do. `fix` can be typed, or says what to change."""

    area: str
    name: str
    status: Status
    message: str
    fix: str | None = None


@dataclass(frozen=True)
class Check:
    """A name for messages, what finds, and the share of the time it may take."""

    area: str
    find: Callable[[], Iterator[Finding]]
    share: float = QUICK


@dataclass(frozen=True)
class _Ended:
    error: BaseException | None = None


def examine(
    checks: list[Check], total_s: float, on_crash: Callable[[BaseException], None]
) -> Iterator[Finding]:
    """Findings as they come. A check that raises or is too slow becomes an error, and the next one begins."""
    deadline = time.monotonic() + total_s
    for check in checks:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            yield _too_slow(check.area, f"not checked: {total_s:g} s are over", total_s)
            continue
        limit_s = min(left_s, check.share * total_s)
        yield from _run(check, limit_s, total_s, on_crash)


def _run(
    check: Check, limit_s: float, total_s: float, on_crash: Callable[[BaseException], None]
) -> Iterator[Finding]:
    """Run a check in a daemon thread: reading from a dead file server or a large file can't be stopped."""
    said: SimpleQueue[Finding | _Ended] = SimpleQueue()

    def work() -> None:
        try:
            for finding in check.find():
                said.put(finding)
            said.put(_Ended())
        except BaseException as error:  # a SystemExit of some library too
            said.put(_Ended(error))

    Thread(target=work, name=f"doctor-{check.area}", daemon=True).start()
    deadline = time.monotonic() + limit_s
    while True:
        try:
            heard = said.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            yield _too_slow(check.area, f"not finished within {limit_s:.0f} s", total_s)
            return
        if isinstance(heard, Finding):
            yield heard
            continue
        if heard.error is not None:
            yield _failure(check.area, heard.error, on_crash)
        return


def from_error(area: str, name: str, error: GhostvisError, status: Status = "error") -> Finding:
    return Finding(area, name, status, error.message, error.hint)


def _failure(area: str, error: BaseException, on_crash: Callable[[BaseException], None]) -> Finding:
    if isinstance(error, GhostvisError) and error.code != ExitCode.BUG:
        return from_error(area, "check", error)
    on_crash(error)
    message = f"this check failed itself: {type(error).__name__}: {error}"
    return Finding(area, "check", "error", message, "ghostvis doctor -v, and report what it says")


def _too_slow(area: str, message: str, total_s: float) -> Finding:
    return Finding(area, "time", "error", message, f"--time-limit {2 * total_s:g}")


def in_loop(findings: AsyncGenerator[Finding, None]) -> Iterator[Finding]:
    """The findings of an asynchronous check, each as soon as it is there."""
    import asyncio

    with asyncio.Runner() as runner:
        try:
            while (finding := runner.run(_next(findings))) is not None:
                yield finding
        finally:
            runner.run(findings.aclose())


async def _next(findings: AsyncGenerator[Finding, None]) -> Finding | None:
    return await anext(findings, None)
