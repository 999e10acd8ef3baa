"""Work in threads that do not hold up the end of the process."""

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
# A step of a smaller model is too short to share among cores: waiting for the other core costs more than the step,
# and on a busy machine some fifty times more.
LEAST_PARAMETERS_TO_SHARE = 10_000_000


def too_small_to_share(parameters: int) -> bool:
    """Whether a model with so many parameters runs faster on one core than on several."""
    return parameters < LEAST_PARAMETERS_TO_SHARE


class Impatient(ThreadPoolExecutor):
    """An executor whose shutdown does not wait for running work, such as reading weights."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)


def require_loop() -> None:
    """OSError where an event loop gets no descriptors. One that was made by half prints a traceback as it goes."""
    import selectors
    import socket

    with selectors.DefaultSelector():
        for end in socket.socketpair():
            end.close()


def in_daemon_thread(work: Callable[[], T], name: str) -> Awaitable[T]:
    """The result of blocking `work`, for the running event loop. Cancelling ends the wait, not the work."""
    import asyncio

    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from here on it takes a result, even where the wait was cancelled

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return asyncio.wrap_future(future)
