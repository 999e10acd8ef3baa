"""What an early end of this process, by a signal or a deadline, has to respect. cli/guard.py catches the signals.

A handler of Python's must not raise: the exception would surface wherever the main thread happens to be, in a C++
callback of `import torch` too, which aborts the process. So the guard ends the process at once, from the handler.
Where that would lose something, the code says so here:

    with unwinding(): ...        an early end waits for this block: the command's work is cancelled, and unwinds
    with held_up(): ...          an early end waits for this short block to finish
    with undone(remove): ...     an end at once calls `remove` first

`run` is the asyncio.run of commands, which can be cancelled so.
"""

from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, TypeVar

from ghostvis_cli.errors import DeadlineError, ExitCode

T = TypeVar("T")


@dataclass(frozen=True)
class Ending:
    """Why a run ends before its time. `error` is what to say about it: of a deadline alone."""

    code: int
    name: str
    error: DeadlineError | None = None


class Ended(SystemExit):
    """Raised by code that was asked to stop, once it has stopped."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.code)
        self.ending = ending


class ReaderGone(SystemExit):
    """The reader of stdout has closed it."""

    def __init__(self) -> None:
        super().__init__(int(ExitCode.READER_GONE))


Stop: TypeAlias = Callable[[Ending], None]


@dataclass(frozen=True, eq=False)
class _Need:
    """A block that must be left before the process ends, and how to stop it, where it has its own way."""

    stop: Stop | None


class _State:
    """What is under way in this process."""

    def __init__(self) -> None:
        self.needs: list[_Need] = []
        self.cancel: Stop | None = None  # of the command's work
        self.asked: Ending | None = None  # before there was any
        self.hurry: Stop | None = None  # should unwinding get stuck
        self.undo: list[Callable[[], None]] = []


_state = _State()


@contextmanager
def unwinding(stop: Stop | None = None) -> Iterator[None]:
    """An early end waits for this block: it calls `stop`, or else cancels the command's work."""
    need = _Need(stop)
    _state.needs.append(need)
    try:
        yield
    finally:
        _state.needs.remove(need)


@contextmanager
def held_up() -> Iterator[None]:
    """Delay the end of the process, by a signal or a deadline, to the end of this block."""
    came: list[Ending] = []
    with unwinding(came.append):
        yield
    if came:
        end(came[0])


def end(ending: Ending) -> NoReturn:
    """End the process as the delayed signal or deadline would have."""
    hurry(ending)
    raise Ended(ending)


def hurry(ending: Ending) -> None:
    """Tell the guard that the process has to end soon."""
    if _state.hurry:
        _state.hurry(ending)


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Run `undo` if the process has to end at once: in a signal handler, while other threads go on."""
    _state.undo.append(undo)
    try:
        yield
    finally:
        _state.undo.remove(undo)


def run(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run that raises Ended where the work was asked to stop, even if it finished since."""
    import asyncio

    from ghostvis_cli.threads import Impatient, require_loop

    came: list[Ending] = []
    try:
        if _state.asked:
            raise Ended(_state.asked)
        require_loop()
    except BaseException:
        work.close()
        raise

    async def cancellable() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        loop.set_default_executor(Impatient())

        def cancel(ending: Ending) -> None:
            came.append(ending)
            loop.call_soon_threadsafe(task.cancel)

        _state.cancel = cancel
        try:
            return await work
        finally:
            _state.cancel = None

    main = cancellable()
    try:
        result = asyncio.run(main)
    except BaseException:
        if came:
            raise Ended(came[0]) from None
        raise
    finally:  # where there was no room even for a loop
        main.close()
        work.close()
    if came:
        raise Ended(came[0])
    return result


# --- for the guard


def hurried_by(hurry: Stop) -> None:
    """Register what `hurry` calls."""
    _state.hurry = hurry


def is_free() -> bool:
    """Whether nothing would be lost if the process ended now."""
    return not _state.needs


def ask_to_stop(ending: Ending) -> bool:
    """For signal handlers: ask what runs to stop. True where it has its own way to, which has no time limit."""
    own = _own_stop()
    if stop := own or _state.cancel:
        stop(ending)
    else:
        _state.asked = ending  # `run` will see it
    return own is not None


def can_stop() -> bool:
    """Whether a signal can stop what runs now, rather than end the process."""
    return bool(_state.cancel or _own_stop())


def _own_stop() -> Stop | None:
    """Of the innermost block that has one."""
    return next((need.stop for need in reversed(_state.needs) if need.stop), None)


def undo_all() -> None:
    """Undo what must not be left half done, the newest first."""
    for undo in reversed(_state.undo):
        undo()
