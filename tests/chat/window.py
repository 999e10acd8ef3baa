"""A terminal window with a program in it: types keys, reads the screen, answers what programs ask of terminals."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pyte

from tests.commands.processes import GHOSTVIS, environment

PATIENCE_S = 60.0
UP, DOWN, TAB, ENTER, ALT_ENTER = "\x1b[A", "\x1b[B", "\t", "\r", "\x1b\r"
CTRL_C, CTRL_D = "\x03", "\x04"
LINE_BEGINS, LINE_ENDS = "\x1b[?2004h", "\x1b[?2004l"  # the line editor turns bracketed paste on and off
STRINGS = re.compile(r"\x1b[_P\]][^\x1b\x07]*(?:\x1b\\|\x07)")  # commands that pyte does not know
HALF_A_STRING = re.compile(r"\x1b(?:[_P\]][^\x1b\x07]*(?:\x1b)?)?\Z")


class _Screen(pyte.HistoryScreen):
    """Answers where the cursor is."""

    def __init__(self, columns: int, rows: int, answer: Callable[[str], object]) -> None:
        super().__init__(columns, rows, history=20_000, ratio=0.5)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)


class Window:
    """`command` in a window of `columns` x `rows`. `raw` is all that it wrote."""

    def __init__(
        self, command: list[str], env: dict[str, str], columns: int, rows: int, cwd: str | None = None
    ) -> None:
        self.child = pexpect.spawn(
            command[0],
            command[1:],
            env=env,
            cwd=cwd,
            encoding="utf-8",
            dimensions=(rows, columns),
            echo=False,
        )
        self.child.delaybeforesend = None
        self.raw, self._unparsed = "", ""
        self._screen = _Screen(columns, rows, self.child.send)
        self._stream = pyte.Stream(self._screen)

    # --- reading

    @property
    def lines(self) -> list[str]:
        """Everything the window shows or has scrolled out of sight, blanks at the ends of lines taken off."""
        width = self._screen.columns
        gone = ["".join(row[x].data for x in range(width)).rstrip() for row in self._screen.history.top]
        return [*gone, *(line.rstrip() for line in self._screen.display)]

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip()

    @property
    def current(self) -> str:
        """The line the cursor is on."""
        return str(self._screen.display[self._screen.cursor.y]).rstrip()

    @property
    def bottom(self) -> str:
        """The last line that is not empty."""
        return next((line.rstrip() for line in reversed(self._screen.display) if line.strip()), "")

    def until(self, condition: Callable[[], object], what: str = "it") -> None:
        give_up_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < give_up_s, f"{what} did not show:\n{self.text}"
            try:
                self._take(self.child.read_nonblocking(65536, timeout=0.1))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert condition(), f"it ended before {what} showed:\n{self.text}"

    def shows(self, text: str, *, times: int = 1) -> None:
        self.until(lambda: self.text.count(text) >= times, repr(text))

    def prompts(self, begun: str = "") -> None:
        """Wait for the line to type on, and for whoever reads it."""
        self.until(lambda: self.current == f"> {begun}".rstrip() and self.is_reading, "the prompt")

    def _take(self, data: str) -> None:
        self.raw += data
        data = STRINGS.sub("", self._unparsed + data)
        half = HALF_A_STRING.search(data)
        cut = half.start() if half else len(data)
        self._unparsed = data[cut:]
        self._stream.feed(data[:cut])

    @property
    def is_reading(self) -> bool:
        """Whether there is a line to type on, and no reply on its way."""
        return self.raw.rfind(LINE_BEGINS) > self.raw.rfind(LINE_ENDS)

    # --- doing

    def keys(self, *keys: str) -> None:
        self.child.send("".join(keys))

    def type(self, line: str) -> None:
        """A whole line, and Enter."""
        self.keys(line, ENTER)

    def ask(self, line: str) -> str:
        """Type a line, wait for the next prompt, and give what was shown in between, without the bottom bar."""
        self.prompts()
        begin, written = self._row, len(self.raw)
        self.type(line)
        self.until(lambda: LINE_ENDS in self.raw[written:], "the end of the line")
        self.prompts()
        taken = -(-len(f"> {line}") // self._screen.columns)
        return "\n".join(self.lines[begin + taken : self._row]).strip()

    @property
    def _row(self) -> int:
        """Of the cursor, from the first line that was ever written."""
        return int(self._screen.cursor.y) + len(self._screen.history.top)

    def paste(self, text: str) -> None:
        self.keys(f"\x1b[200~{text}\x1b[201~")

    def resize(self, columns: int, rows: int) -> None:
        self._screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def ends(self) -> int:
        """Wait for the end; the code as a shell would tell it."""
        while True:
            try:
                self._take(self.child.read_nonblocking(65536, timeout=PATIENCE_S))
            except pexpect.EOF:
                break
        self.child.close()
        status, number = self.child.exitstatus, self.child.signalstatus
        return int(status) if status is not None else 128 + int(number or 0)


@contextmanager
def chat(
    *args: str,
    state: Path,
    columns: int = 80,
    rows: int = 24,
    cwd: Path | None = None,
    command: tuple[str, ...] = (GHOSTVIS, "chat"),
    **env: str | None,
) -> Iterator[Window]:
    """`ghostvis chat ARGS` in a window, its sessions and history under `state`."""
    changes = {
        "TERM": "xterm-256color",
        "LANG": "C.UTF-8",
        "GHOSTVIS_STATE_DIR": str(state),
        "COLORTERM": None,
    }
    window = Window(
        [*command, *args], environment(**{**changes, **env}), columns, rows, str(cwd) if cwd else None
    )
    try:
        yield window
    finally:
        window.child.kill(signal.SIGKILL)
        window.child.close()
