"""The line people type on: Enter sends, Alt-Enter begins a new line, Tab completes, a paste stays in one piece.

Knows keys, history and what stands around the line. What a line means is slash.py's business.
"""

import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.filters import completion_is_selected
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.styles import Style

from ghostvis_cli.chat.completion import IMAGES, Completions, Names
from ghostvis_cli.paths import is_file

MARK = "> "
HOW_TO_LEAVE = "Ctrl-D or /quit leaves"
STYLE = Style.from_dict({
    "mark": "ansicyan bold",
    "chip": "ansiyellow",
    "bottom-toolbar": "noreverse ansibrightblack",
    "warning": "ansired",
})  # fmt: skip


class Editor:
    """Reads a message or command at a time. `chips` are the images of the next message, `bar` the bottom line."""

    def __init__(
        self,
        *,
        history: Path | None,
        names: Mapping[str, Names],
        chips: Callable[[], list[str]],
        bar: Callable[[], str],
        colored: bool = True,
        **streams: Any,  # prompt_toolkit's input and output, where they are not the terminal
    ) -> None:
        self._chips, self._bar = chips, bar
        self._interrupts = 0  # in a row, without a key in between
        self.interrupted = False  # Ctrl-C came after the last line was sent
        self._session: PromptSession[str] = PromptSession(
            message=self._prompt,
            multiline=True,
            prompt_continuation=" " * len(MARK),
            completer=Completions(names),
            complete_while_typing=False,
            reserve_space_for_menu=6,
            history=_history(history),
            key_bindings=self._keys(),
            bottom_toolbar=self._bottom,
            style=STYLE,
            color_depth=None if colored else ColorDepth.DEPTH_1_BIT,
            enable_suspend=True,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            **streams,
        )
        self._session.default_buffer.on_text_changed += self._on_text_changed

    async def read(self, text: str = "") -> str:
        """The next line, which begins as `text`. EOFError for Ctrl-D on an empty one."""
        self._interrupts = 0
        line = await self._session.prompt_async(default=text, handle_sigint=False)
        ahead = get_typeahead(self._session.input)
        # Typed after Enter and before the terminal was its own master again: it means what the line began.
        self.interrupted = any(key.key == Keys.ControlC for key in ahead)
        store_typeahead(self._session.input, [key for key in ahead if key.key != Keys.ControlC])
        return line

    def interrupt(self) -> bool:
        """A SIGINT from elsewhere means Ctrl-C on the line, if one is being typed."""
        app = self._session.app
        if not app.is_running or app.is_done:
            return False
        app.key_processor.send_sigint()
        return True

    def refresh(self) -> None:
        """Something around the line has changed."""
        self._session.app.invalidate()

    def leave(self) -> None:
        """End the line being typed as Ctrl-D would."""
        if self._session.app.is_running:
            self._session.app.exit(exception=EOFError)

    def above_line(self, write: Callable[[], None]) -> None:
        """Let `write` write above the line being typed, if there is one."""
        if self._session.app.is_running:
            run_in_terminal(write)
        else:
            write()

    async def confirm(self, question: str) -> bool:
        """Yes or no, Enter meaning yes; Ctrl-C and Ctrl-D mean no."""
        session: PromptSession[str] = PromptSession(style=STYLE, color_depth=self._session.color_depth)
        try:
            answer = await session.prompt_async([("class:chip", question), ("", " [Y/n] ")])
        except (EOFError, KeyboardInterrupt):
            return False
        return answer.strip().lower() in ("", "y", "yes")

    # --- what stands around the line

    def _prompt(self) -> StyleAndTextTuples:
        chips: StyleAndTextTuples = [("class:chip", f"[{chip}] ") for chip in self._chips()]
        return [*chips, *([("", "\n")] if chips else []), ("class:mark", MARK)]

    def _bottom(self) -> StyleAndTextTuples:
        return [("class:warning", f" {HOW_TO_LEAVE}")] if self._interrupts > 1 else [("", f" {self._bar()}")]

    # --- keys

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        keys.add("enter", filter=completion_is_selected)(_take_completion)
        keys.add("enter", filter=~completion_is_selected)(
            lambda event: event.current_buffer.validate_and_handle()
        )
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        keys.add("c-c")(self._on_interrupt)
        keys.add("<sigint>")(self._on_interrupt)
        return keys

    def _on_interrupt(self, event: KeyPressEvent) -> None:
        event.current_buffer.reset()
        self._interrupts += 1

    def _on_text_changed(self, buffer: Any) -> None:
        if buffer.text:
            self._interrupts = 0


def _take_completion(event: KeyPressEvent) -> None:
    """Enter on the menu chooses; the next Enter sends."""
    event.current_buffer.complete_state = None


# --- history


class _Remembered(FileHistory):
    """A history of typed lines. A full disk or a read-only home loses lines and is no error."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):
            super().store_string(string)


def _history(path: Path | None) -> History:
    """The lines of `path`, a file that only its owner reads; of this session alone where there is no such file."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        if not path.is_file():  # a device would be read for ever
            return InMemoryHistory()
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return _Remembered(path)


# --- files dropped on the terminal


def dropped_image(line: str) -> str | None:
    """The path, if the line is nothing but one: what terminals type for a file that is dropped on them."""
    text = line.strip()
    if text.startswith("file://"):
        text = shlex.quote(unquote(urlsplit(text).path))
    try:
        words = shlex.split(text)
    except ValueError:
        return None
    if len(words) != 1 or "/" not in words[0] or not words[0].lower().endswith(IMAGES):
        return None
    return words[0] if is_file(words[0]) else None
