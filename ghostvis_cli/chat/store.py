"""Sessions on disk: a directory each, with the conversation and its images, locked while a chat has it open.

    STATE/chats/NAME/session.jsonl        replaced whole, so that every moment has a complete one
    STATE/chats/NAME/images/SHA256        written once, before the line that names it; removed after

Directories are 0700 and files 0600. An unnamed session is called after the time, as in
20261123-101500-4711; the newest UNNAMED_KEPT of those are kept.
"""

import errno
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from ghostvis_cli import files
from ghostvis_cli.chat import transcript
from ghostvis_cli.chat.session import Session, Turn
from ghostvis_cli.encoding import lines, pieces_of
from ghostvis_cli.errors import InputError, LockedError, UsageError, one_line, printable
from ghostvis_cli.paths import expanded

if TYPE_CHECKING:
    from ghostvis_cli.image_limits import ImageLimits

SESSION, IMAGES = "session.jsonl", "images"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
UNNAMED = re.compile(r"\d{8}-\d{6}-\d+")
UNNAMED_KEPT = 100
LARGEST_BYTES = 2**30
PRIVATE = 0o600


class SessionStore:
    """The place where sessions lie. `directory` None: there is no home, so nothing can be kept."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    @classmethod
    def of_user(cls) -> Self:
        from ghostvis_cli.paths import state_dir

        state = state_dir()
        return cls(state / "chats" if state else None)

    def names(self) -> list[str]:
        """Sessions that hold something, the newest first."""
        found: list[tuple[float, str]] = []
        with suppress(OSError):
            for entry in self.directory.iterdir() if self.directory else ():
                with suppress(OSError):
                    found.append(((entry / SESSION).stat().st_mtime, entry.name))
        return [name for _, name in sorted(found, reverse=True)]

    def open(self, name: str) -> "SessionFile":
        """The session of that name, or an empty place for one; LockedError while another chat has it.

        OSError where there can be no such place.
        """
        return SessionFile(self._home() / _checked(name))

    def newest(self) -> "SessionFile":
        names = self.names()
        if not names:
            raise UsageError("there is no earlier session to continue", hint="ghostvis chat --session NAME")
        return self.open(names[0])

    def unnamed(self) -> "SessionFile":
        """A place for an unnamed session. Nothing is written before it holds something."""
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        # Several may begin in one second: the page has a button for it.
        places = (self._home() / f"{stem}{again}" for again in ("", *range(1000)))
        return SessionFile(next(place for place in places if not place.exists()), lazy=True)

    def prune(self) -> None:
        """Remove the oldest unnamed sessions that no chat has open, and what killed chats left of any."""
        names = self.names()
        unnamed = [name for name in names if UNNAMED.fullmatch(name)]
        for name in [*unnamed[UNNAMED_KEPT:], *self._begun(names)]:
            with suppress(OSError, LockedError):
                file = self.open(name)
                shutil.rmtree(file.directory)
                file.close()
        for name in names:
            files.sweep(self._home() / name)
            files.sweep(self._home() / name / IMAGES)

    def _begun(self, names: list[str]) -> list[str]:
        """Unnamed sessions whose first writing was cut short."""
        with suppress(OSError):
            found = {entry.name for entry in self._home().iterdir() if UNNAMED.fullmatch(entry.name)}
            return sorted(found.difference(names))
        return []

    def _home(self) -> Path:
        if self.directory is None:
            raise FileNotFoundError(errno.ENOENT, "there is no home directory")
        return self.directory


class SessionFile:
    """A session's place on disk, this process's alone until `close` or the end of the process."""

    def __init__(self, directory: Path, *, lazy: bool = False) -> None:
        self.directory, self.name = directory, directory.name
        self._lock: int | None = None
        self._written: set[str] = set()  # hashes of images that lie there
        self._lines: list[tuple[Turn, bytes]] = []  # as they were written last
        if not lazy:
            self._take()

    @property
    def exists(self) -> bool:
        return (self.directory / SESSION).exists()

    def load(self, limits: "ImageLimits") -> Session:
        """The stored session. InputError where it can't be read; the file stays unchanged."""
        return read_file(self.directory / SESSION, limits, name=f"session {self.name}")

    def save(self, session: Session, about: dict[str, str], *, durable: bool = True) -> None:
        """Put it there; OSError where that can't be done, and what was there before stays."""
        if self._lock is None:
            if session.empty:
                return
            self._take()
        used = {transcript.image_hash(image): image for image in session.images}
        if used:
            (self.directory / IMAGES).mkdir(mode=0o700, exist_ok=True)
        for digest in used.keys() - self._written:
            place = self.directory / IMAGES / digest
            files.write(place, used[digest].data, mode=PRIVATE, durable=durable)
            self._written.add(digest)
        rows = self._rows(session, about)
        files.write(self.directory / SESSION, rows, mode=PRIVATE, durable=durable)
        if durable:
            self._sweep(used.keys())

    def _rows(self, session: Session, about: dict[str, str]) -> Iterator[bytes]:
        """The whole file; but turns never change, so only new ones are put into words."""
        del self._lines[len(session.turns) :]
        yield transcript.head(session, about).encode()
        for number, turn in enumerate(session.turns):
            if number == len(self._lines) or self._lines[number][0] is not turn:
                self._lines[number:] = [(turn, transcript.line_of(turn).encode())]
            yield self._lines[number][1]
        yield from (line.encode() for line in transcript.draft(session))

    def _sweep(self, used: Iterable[str]) -> None:
        """Remove images that nothing names any more."""
        with suppress(OSError):
            for entry in (self.directory / IMAGES).iterdir():
                if entry.name not in used:
                    entry.unlink()
                    self._written.discard(entry.name)

    def _take(self) -> None:
        """Make the directory and lock it: the lock goes with the process, however that ends."""
        self.directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            self.directory.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), self.directory.stat()):
                    self._lock = lock
                    return
            except FileNotFoundError:  # another process removed it meanwhile
                pass
            except BlockingIOError as error:
                os.close(lock)
                raise LockedError(
                    f"another chat has the session {self.name} open", hint="ghostvis chat --session OTHER"
                ) from error
            os.close(lock)

    def rename(self, name: str) -> None:
        """Call it something else, what is said from now on included. OSError where that can't be done."""
        place = self.directory.with_name(_checked(name))
        if place == self.directory:
            return
        if place.exists():
            raise UsageError(f"there is a session {name} already", hint="another name")
        if self._lock is not None:
            self.directory.rename(place)  # the lock moves along
        self.directory, self.name = place, name

    def remove(self) -> None:
        """Delete it with its images, and close it."""
        if self._lock is not None:
            shutil.rmtree(self.directory)
            os.close(self._lock)
            self._lock = None

    def close(self) -> None:
        if self._lock is None:
            return
        if not self.exists:
            with suppress(OSError):  # not empty
                self.directory.rmdir()
        os.close(self._lock)
        self._lock = None


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{printable(name)!r} is no name of a session", hint="letters, digits, - and _, such as trip-2"
        )
    return name


# --- files


def read_file(path: Path, limits: "ImageLimits", *, name: str | None = None) -> Session:
    """A session from any file, its images inside or beside it."""
    name = printable(name or str(path))

    def beside(digest: str) -> bytes:
        try:
            with _opened(path.parent / IMAGES / digest) as file:
                return file.read(limits.max_bytes + 1)
        except OSError as error:
            raise InputError(
                f"an image can't be read: {IMAGES}/{digest[:12]}...: {one_line(error)}"
            ) from error

    try:
        with _opened(expanded(path)) as file:
            if os.fstat(file.fileno()).st_size > LARGEST_BYTES:
                raise InputError(f"{name}: larger than {LARGEST_BYTES / 2**30:g} GiB")
            content = (line or b"" for line in lines(pieces_of(file), name, LARGEST_BYTES))
            return transcript.read(content, name, limits, beside)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{name} can't be read: {one_line(error)}") from error


def write_file(path: Path, session: Session, about: dict[str, str]) -> None:
    """A session with its images inside."""
    files.write(path, (line.encode() for line in transcript.lines(session, about)), mode=PRIVATE)


def _opened(path: Path) -> BinaryIO:
    """A regular file only: a pipe would wait for a writer, a device never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError("it is not a regular file")
    return file
