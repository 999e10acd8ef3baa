"""The one writer of the project's files: each is written whole or not at all.

A regular file is made under another name beside its place, synced and renamed, so that a reader sees the old
content or the new one; its mode stays. Links are followed to what they name. What is no regular file (a FIFO, a
device, /dev/stdout, the /dev/fd/63 of a shell's >(...)) is never replaced: it is written straight.

A killed run can leave the other name, `.NAME.ghostvis-1a2b3c4d`. Its writer holds a lock on it, so the next run
that writes to the same directory can tell it from a file that is still being written, and removes it.
"""

import errno
import fcntl
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ghostvis_cli.endings import undone
from ghostvis_cli.errors import OutputError, one_line, printable

LEFTOVER = re.compile(r"\..{1,40}\.ghostvis-[0-9a-f]{8}", re.DOTALL)
READER_WAIT_S = 10.0  # for a FIFO's reader, which may be starting just now
_LINKS = 40  # as many as the system follows
_ON_MACOS = sys.platform == "darwin"
# RENAME_EXCL and RENAME_SWAP of macOS, RENAME_NOREPLACE and RENAME_EXCHANGE of Linux.
_NO_REPLACE, _EXCHANGE = (4, 2) if _ON_MACOS else (1, 2)
_AT_FDCWD = -100
_UNKNOWN_CALL = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # to the system, or to this disk


def write(
    path: Path,
    content: bytes | Iterable[bytes],
    *,
    mode: int = 0o666,
    durable: bool = True,
    over: bool = True,
) -> None:
    """OSError where that can't be done, and what was there before stays.

    mode      of a file that is new, less the umask
    durable   False leaves it to the system when the content reaches the disk
    over      False raises FileExistsError rather than replace anything
    """
    place = target(path)
    straight = over and is_special(place)
    writing = _through(place) if straight else replacing(place, mode=mode, durable=durable, over=over)
    try:
        with writing as descriptor, os.fdopen(descriptor, "wb", closefd=False) as file:
            file.writelines((content,) if isinstance(content, bytes) else content)
    except OSError as error:  # it may name the temporary file, which means nothing to the user
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def cannot_write(path: Path, error: OSError, hint: str | None = None) -> OutputError:
    """The OutputError for an OSError of this module."""
    return OutputError(f"{printable(str(path))} can't be written: {one_line(error)}", hint=hint)


@contextmanager
def replacing(path: Path, *, mode: int = 0o666, durable: bool = True, over: bool = True) -> Iterator[int]:
    """A descriptor of a new file, to read and append; when the block ends, the file takes the place of `path`.

    `path` is a `target`. The file is locked as long as the descriptor or a duplicate of it is open. Where the block
    raises, nothing is left of the file, and what was there before stays.
    """
    if durable:
        sweep(path.parent)
    descriptor, temporary = _temporary(path, mode)
    try:
        with undone(partial(temporary.unlink, missing_ok=True)):
            _keep_mode(descriptor, path)
            yield descriptor
            if durable:
                os.fsync(descriptor)
            if over:
                temporary.replace(path)
            else:
                rename_new(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)
    if durable:
        sync_directory(path.parent)


# --- what a name means


def target(path: Path) -> Path:
    """Links followed to what they name, which need not exist. A name of a descriptor of this process stays one."""
    _require_name(path)
    for _ in range(_LINKS):
        path = Path(os.path.realpath(path.parent)) / path.name
        if _descriptor(path) is not None or not path.is_symlink():
            return path
        path = path.parent / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _require_name(path: Path) -> None:
    """Refuse a name that no system call can take, which Python tells by ValueError."""
    try:
        if b"\0" not in os.fsencode(path):
            return
    except UnicodeEncodeError:
        raise OSError(
            errno.EINVAL, "no file can have that name: half a character", ascii(str(path))
        ) from None
    raise OSError(errno.EINVAL, "no file can have that name: a NUL character", ascii(str(path)))


def is_special(path: Path) -> bool:
    """Whether something that is no regular file has that name, or a stream of this process."""
    try:
        place = target(path)
        return _descriptor(place) is not None or not stat.S_ISREG(place.stat().st_mode)
    except OSError:
        return False


def _descriptor(place: Path) -> int | None:
    """The number in /dev/fd/N and in what /dev/stdout and /proc/self/fd/N lead to."""
    found = re.fullmatch(rf"/dev/fd/(\d+)|/proc/{os.getpid()}(?:/task/\d+)?/fd/(\d+)", str(place))
    return int(found[1] or found[2]) if found else None


@contextmanager
def straight(path: Path) -> Iterator[int]:
    """A descriptor to write to what `is_special`, piece by piece."""
    with _through(target(path)) as descriptor:
        yield descriptor


@contextmanager
def _through(place: Path) -> Iterator[int]:
    number = _descriptor(place)
    # A duplicate goes on where the stream is; opening a redirected stdout anew would begin at its start.
    descriptor = os.dup(number) if number is not None else _opened(place)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _opened(place: Path) -> int:
    until = time.monotonic() + READER_WAIT_S
    while True:
        try:
            descriptor = os.open(place, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO or not place.is_fifo():
                raise
            if time.monotonic() > until:
                raise OSError(errno.ENXIO, "no process reads this FIFO", str(place)) from error
            time.sleep(0.02)
        else:
            os.set_blocking(descriptor, True)
            return descriptor


# --- the other name


def _temporary(path: Path, mode: int) -> tuple[int, Path]:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    while True:
        temporary = path.with_name(f".{path.name[:40]}.ghostvis-{secrets.token_hex(4)}")
        descriptor = os.open(temporary, flags, mode)
        if lock(descriptor) and os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)  # another process removed it before it was locked


def lock(descriptor: int) -> bool:
    """False where another process has it. True on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _keep_mode(descriptor: int, path: Path) -> None:
    with suppress(OSError):
        before = path.stat()
        with suppress(OSError):  # only root gives files away
            os.fchown(descriptor, before.st_uid, before.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def sweep(directory: Path) -> None:
    """Remove what killed runs left there."""
    with suppress(OSError):
        for name in os.listdir(directory):  # noqa: PTH208 - names are enough, and there may be many
            if LEFTOVER.fullmatch(name):
                _remove_unlocked(directory / name)


def _remove_unlocked(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make a new or renamed entry survive a power cut, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- renaming files and directories


def rename_new(source: Path, place: Path) -> None:
    """Rename, but never onto anything: FileExistsError where something has that name, a broken link included."""
    failed = _rename(source, place, _NO_REPLACE)
    if failed in _UNKNOWN_CALL:
        _claim_and_rename(source, place)
    elif failed:
        raise OSError(failed, os.strerror(failed), str(place))  # EEXIST makes it a FileExistsError


def _claim_and_rename(source: Path, place: Path) -> None:
    """Without such a system call: create the name, which only one process can, and rename onto it."""
    if source.is_dir():
        place.mkdir()
    else:
        place.touch(exist_ok=False)
    try:
        source.rename(place)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:  # it is no longer what was made here
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from error
        raise


def exchange(a: Path, b: Path) -> bool:
    """Swap two names at once; False where the system or the disk can't."""
    return _rename(a, b, _EXCHANGE) == 0


def _rename(a: Path, b: Path, flag: int) -> int:
    """renameat2 of Linux, renamex_np of macOS: 0 or an errno."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    try:
        if _ON_MACOS:
            failed = library.renamex_np(first, second, flag)
        else:
            failed = library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, flag)
    except AttributeError:
        return errno.ENOSYS
    return ctypes.get_errno() if failed else 0
