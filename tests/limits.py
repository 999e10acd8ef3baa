"""Limits of the system (`resource.RLIMIT_...`), for this process for a while or for a child from its start."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """Meanwhile this process may have no more. A write beyond the size of a file is an error and no signal."""
    soft, hard = resource.getrlimit(kind)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def limit(kind: int, most: int) -> Callable[[], None]:
    """The same for a child, as its `preexec_fn`."""

    def set_it() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(kind, (most, most))

    return set_it
