"""Makes docs/chat.svg: holds a real conversation with the built-in model in a pseudo-terminal and draws the window.

python -m tools.chat_image
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from io import StringIO
from itertools import groupby
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

FOLDER = Path("ghostvis_cli/demo")
TARGET = Path("docs/chat.svg")
COLUMNS, ROWS = 96, 46
COMMAND = ("chat", "--stats")
LINES = (
    "/image three-shapes.jpg",
    "What is in this picture?",
    "How many shapes are there?",
    "/image red-circle.png",
    "What is this?",
    "What was in the first picture?",
)
QUESTION = re.compile(r"\x1b_[^\x1b]*\x1b\\")  # about kitty's protocol; pyte does not know such strings
GREY = "bright_black"


class _Screen(pyte.Screen):
    """Says where the cursor is when it is asked."""

    def __init__(self, answer: Callable[[str], object]) -> None:
        super().__init__(COLUMNS, ROWS)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)


class Window:
    """A terminal with `ghostvis chat` in it."""

    def __init__(self, state: str) -> None:
        env = {"HOME": "/home/ada", "TERM": "xterm-256color", "COLORTERM": "truecolor", "LANG": "C.UTF-8"}
        self.child = pexpect.spawn(
            str(Path(sys.executable).with_name("ghostvis").absolute()),
            list(COMMAND),
            env={**env, "PATH": os.environ["PATH"], "GHOSTVIS_STATE_DIR": state, "GHOSTVIS_TEMPERATURE": "0"},
            cwd=str(FOLDER),
            encoding="utf-8",
            dimensions=(ROWS, COLUMNS),
        )
        self.screen = _Screen(self.child.send)
        self._stream = pyte.Stream(self.screen)

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            written = QUESTION.sub("", self.child.read_nonblocking(65536, timeout=60))
            self._stream.feed(written.replace("\x1b[2m", "\x1b[90m"))  # nor dim text

    @property
    def current(self) -> str:
        return str(self.screen.display[self.screen.cursor.y]).rstrip()

    def answer_to(self, line: str) -> None:
        """Type a line as a person does, and wait for what comes of it and the next prompt."""
        self.child.send(line)
        self.until(lambda: self.current == f"> {line}")
        row = self.screen.cursor.y
        self.child.send("\r")
        self.until(lambda: self.current == ">" and self.screen.cursor.y > row)

    def row(self, number: int) -> Text:
        """One row with its colours, neighbours of one look in one piece."""
        text = Text()
        cells = [self.screen.buffer[number][column] for column in range(COLUMNS)]
        for (fore, back, bold, italic), same in groupby(cells, lambda c: (c.fg, c.bg, c.bold, c.italics)):
            style = Style(color=_color(fore), bgcolor=_color(back), bold=bold, italic=italic)
            text.append("".join(cell.data for cell in same), style)
        text.rstrip()
        return text


def _color(name: str) -> str | None:
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return {"brown": "yellow", "brightblack": GREY}.get(name, name)


def main() -> None:
    with tempfile.TemporaryDirectory() as state:
        window = Window(state)
        window.until(lambda: any("vlm_tiny" in line for line in window.screen.display))
        window.until(lambda: window.current == ">")
        for line in LINES:
            window.answer_to(line)
        window.until(lambda: "cached" in window.screen.display[ROWS - 1])  # the bar
        rows = [window.row(number) for number in range(ROWS)]
        window.child.close(force=True)
    console = Console(
        record=True, width=COLUMNS + 2, file=StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(Text.assemble(("$ ", "bold green"), (f"ghostvis {' '.join(COMMAND)}", "bold")))
    for row in rows:
        console.print(row)
    svg = console.export_svg(title="ghostvis chat", theme=MONOKAI)
    # Fonts from elsewhere would be a request whenever somebody looks at the page.
    TARGET.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


if __name__ == "__main__":
    main()
