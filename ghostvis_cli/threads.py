"""Work in other threads, none of which holds up whoever leaves."""

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ghostvis_cli.errors import MemoryLimitError

T = TypeVar("T")


class Impatient(ThreadPoolExecutor):
    """An executor for an event loop whose end does not wait for weights that are still being read."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)


def in_daemon_thread(work: Callable[[], T], name: str) -> Awaitable[T]:
    """The result of blocking `work`, for the running event loop. Cancelling ends the wait alone."""
    import asyncio

    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from here on it can be given a result, whoever still waits

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    start(threading.Thread(target=run, name=name, daemon=True))
    return asyncio.wrap_future(future)


def start(thread: threading.Thread) -> None:
    """MemoryLimitError where there is no room for it: a thread's stack is taken from the address space at once."""
    try:
        thread.start()
    except RuntimeError as error:
        raise no_room() from error


def no_room() -> MemoryLimitError:
    return MemoryLimitError(
        "out of memory: no room for another thread",
        hint="raise the limit (ulimit -v, ulimit -u, a container's pids), or set OMP_NUM_THREADS=1",
    )
