"""The screen of a chat: what is written there, and everything a slash command asks of it.

Only this file writes while a chat is on a terminal. Replies, images and what commands print go to stdout, remarks
to stderr; nothing is ever redrawn but the one line of the spinner.
"""

import asyncio
import os
import shlex
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

from ghostvis_cli import files, scratch
from ghostvis_cli.chat.surface import Clip, Options
from ghostvis_cli.cli import output
from ghostvis_cli.cli.output import CONTROL
from ghostvis_cli.errors import GhostvisError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from ghostvis_cli.chat.preview import Protocol

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
SPINS_EVERY_S = 0.1
SPINS_AFTER_S = 0.3  # without a sign of life
ERASE = "\r\x1b[K"


class TerminalGoneError(Exception):
    """The window was closed: nothing can be shown any more."""


class Terminal:
    """A Surface. `above_line` runs a function while the line being typed is out of the way."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.colored = output.colored(sys.stdout)
        self.above_line: Callable[[Callable[[], None]], None] = lambda write: write()
        self._column_0, self._spinning, self._written_s = True, False, 0.0
        self._busy, self._notes = False, list[str]()
        self._protocol: Protocol | None = None
        self._moves = os.environ.get("TERM", "dumb") != "dumb"

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        try:
            size = os.get_terminal_size(sys.stdout.fileno())
        except (OSError, ValueError):
            return 80, 24
        return size.columns or 80, size.lines or 24

    def width(self) -> int:
        return self.size()[0]

    # --- writing

    def write(self, text: str) -> None:
        """Text that may drive the terminal, because it comes from us."""
        if not text:
            return
        if self._spinning:
            self._spinning = False
            text = ERASE + text
        self._column_0, self._written_s = text.endswith("\n"), time.monotonic()
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except (OSError, ValueError) as error:
            raise TerminalGoneError from error

    def say(self, text: str) -> None:
        self.write(CONTROL.sub("", text).rstrip("\n") + "\n")

    def answer(self, text: str) -> None:
        self.say(text)

    def note(self, text: str) -> None:
        if self._options.quiet:
            return
        if not output.is_terminal(sys.stderr):
            output.notice(text)
            return
        if not self._column_0 and self._busy:
            self._notes.append(text)  # not into the middle of a sentence
            return
        line = CONTROL.sub("", " ".join(text.splitlines()))
        shown = f"\x1b[2m{line}\x1b[0m" if output.colored(sys.stderr) else line
        self._aside(lambda: print(shown, file=sys.stderr, flush=True))  # noqa: T201

    def error(self, error: GhostvisError) -> None:
        self._aside(lambda: output.error(error))

    def _aside(self, write: Callable[[], None]) -> None:
        """Write a line of its own, above the one being typed, not inside a reply."""

        def out_of_the_way() -> None:
            with suppress(OSError, ValueError, TerminalGoneError):
                self.end_line()
                write()

        self.above_line(out_of_the_way)

    def end_line(self) -> None:
        """What comes next begins at the left edge."""
        if self._spinning:
            self.write("\r")
            self._column_0 = True
        elif not self._column_0:
            self.write("\n")

    # --- while a reply is on its way

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """A spinner whenever nothing was written for a while; keys are kept for the next line, unseen."""
        spinner = asyncio.create_task(self._spin()) if self._moves else None
        self._busy = True
        try:
            with _no_echo():
                yield
        finally:
            self._busy = False
            if spinner is not None:
                spinner.cancel()
            if self._spinning:
                with suppress(TerminalGoneError):
                    self.end_line()
            while self._notes:
                self.note(self._notes.pop(0))

    async def _spin(self) -> None:
        started_s = self._written_s = time.monotonic()
        while True:
            await asyncio.sleep(SPINS_EVERY_S)
            now_s = time.monotonic()
            if now_s - self._written_s < SPINS_AFTER_S or not self._column_0:
                continue
            frame = SPINNER[int(now_s / SPINS_EVERY_S) % len(SPINNER)]
            line = f"{frame} {now_s - started_s:.0f} s"
            with suppress(OSError, ValueError):
                sys.stdout.write(ERASE + (f"\x1b[2m{line}\x1b[0m" if self.colored else line))
                sys.stdout.flush()
            self._spinning = True

    # --- what commands ask for

    def show_image(self, image: "Image.Image", caption: str = "") -> None:
        from ghostvis_cli.chat import preview

        if self.colored and self._moves:
            if self._protocol is None:
                self._protocol = preview.protocol(os.environ, preview.ask_terminal())
            true_color = os.environ.get("COLORTERM") in ("truecolor", "24bit")
            self.write(preview.encoded(image, self._protocol, self.size(), true_color=true_color))
        if caption:
            self.say(caption)

    def edit_text(self, text: str) -> str | None:
        """$VISUAL or $EDITOR on a file of its own."""
        editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "") or ["vi"]
        with scratch.folder() as folder:
            file = folder / "message.md"
            files.write(file, text.encode(errors="replace"), durable=False)
            try:
                code = subprocess.run([*editor, str(file)], check=False).returncode
            except OSError as error:
                hint = "export EDITOR=nano"
                raise UsageError(f"no editor {editor[0]!r}: {error.strerror}", hint=hint) from error
            if code != 0:
                return None
            return file.read_text(encoding="utf-8-sig", errors="replace").rstrip("\n")

    def clipboard(self) -> Clip:
        from ghostvis_cli.chat import clipboard

        return clipboard.read()


@contextmanager
def _no_echo() -> Iterator[None]:
    """What is typed meanwhile does not show inside the reply; it stands on the next line, key by key.

    Line by line, the terminal itself would swallow Ctrl-D and whatever is pasted beyond 4,095 characters.
    """
    import termios

    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (termios.error, OSError, ValueError):
        yield
        return
    now = [*before]
    now[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(number, termios.TCSANOW, now)
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(number, termios.TCSANOW, before)
