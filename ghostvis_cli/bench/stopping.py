"""Ctrl-C, SIGTERM and --timeout while something is measured: what was measured until then is kept.

The first of them ends the measuring alone; the report is written, and then it takes its usual effect. A second one
takes it at once.
"""

import asyncio
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ghostvis_cli import endings
from ghostvis_cli.endings import Ending
from ghostvis_cli.errors import one_line


@dataclass(frozen=True)
class Interruption:
    """Why measuring ended early: a signal, or an error after which it can't go on."""

    by: Ending | Exception

    @property
    def reason(self) -> str:
        return self.by.name if isinstance(self.by, Ending) else one_line(self.by)

    def take_effect(self) -> None:
        """Do what was held up."""
        if isinstance(self.by, Exception):
            raise self.by
        endings.end(self.by)


async def held_up(work: Coroutine[Any, Any, object], kept: ExitStack) -> Interruption | None:
    """Do the work; None if it came to its end. Signals wait until `kept` is left, which is after the report."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    came: list[Ending] = []

    def stop(ending: Ending) -> None:
        came.append(ending)
        loop.call_soon_threadsafe(task.cancel)

    kept.enter_context(endings.held_up())
    try:
        with endings.unwinding(stop):
            await task
    except asyncio.CancelledError:
        if not came:
            raise
    except Exception as error:
        return Interruption(error)
    return Interruption(came[0]) if came else None
