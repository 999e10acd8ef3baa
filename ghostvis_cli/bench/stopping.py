"""Ctrl-C, SIGTERM and --timeout while something is measured: what was measured until then is kept.

The first of them ends the measuring alone; the report is written, and then it takes its usual effect. A second one
takes it at once.
"""

import asyncio
import signal
from collections.abc import Coroutine
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ghostvis_cli.errors import one_line

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGALRM: "--timeout"}


@dataclass(frozen=True)
class Cut:
    """Why measuring ended early: a signal, or an error that left no point in going on, be it a bug of ours."""

    by: signal.Signals | Exception

    @property
    def reason(self) -> str:
        return NAMES[self.by] if isinstance(self.by, signal.Signals) else one_line(self.by)

    def take_effect(self) -> None:
        """What would have happened had nobody held it up. Raises, or ends the process."""
        if isinstance(self.by, Exception):
            raise self.by
        signal.raise_signal(self.by)


async def held_up(work: Coroutine[Any, Any, object]) -> Cut | None:
    """Do the work; None if it came to its end. Only in the main thread, to which signals come."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    came: list[signal.Signals] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        came.append(signal.Signals(number))
        restore()
        loop.call_soon_threadsafe(task.cancel)

    before = {number: signal.signal(number, stop) for number in NAMES}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        await task
    except asyncio.CancelledError:
        if not came:
            raise
    except Exception as error:
        return Cut(error)
    finally:
        restore()
    return Cut(came[0]) if came else None
