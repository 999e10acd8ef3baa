"""The signals that end a server of either kind: the first one drains, a later one ends the process."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals(stop: asyncio.Event, kill: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The first signal sets `stop`; one after that calls `kill` and ends the process, with 128 plus its number.

    Only in the main thread, which gets signals. `timeout` signals a process and then its group: what comes before
    `stop` is set counts as one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    seen: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.is_set() or len(seen) > 1:
            kill()
            # Not by an exception or the default action: threads may hang in native code, and process 1 of a
            # container is immune to a signal's default action.
            os._exit(128 + number)
        seen.append(number)
        loop.call_soon_threadsafe(stop.set)

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
