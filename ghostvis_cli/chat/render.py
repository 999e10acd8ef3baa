"""A reply -> what a terminal shows, as it comes. Written once, never redrawn; nothing here writes.

The unit is the line. Text of paragraphs, headings and list items appears as it comes; a line of code when it ends
or grows long; a table once its first rows have settled its columns. Held back is only what may still change its
look. Line breaks stay where the model put them. Not taken from Markdown: underlined headings, tables that don't
begin with a bar, and HTML, which is shown as it is.

Model text is data: control characters and what turns the direction of text around are taken out first of all.
"""

import re
from collections.abc import Callable
from typing import Protocol

from ghostvis_cli.chat.highlight import Highlighter
from ghostvis_cli.chat.inline import BOLD, DIM, HOLD, UNDERLINE, Flow, Span, cells, painted, settle
from ghostvis_cli.chat.tables import Table, is_delimiter
from ghostvis_cli.cli.output import CONTROL

LONG_CODE = 160  # characters of a line of code that are shown before the line ends
DEEPEST = 24  # columns of indentation that are kept

QUOTE = re.compile(r" {0,3}(?:> ?)+")
HEADING = re.compile(r" {0,3}(#{1,6}) +")
ITEM = re.compile(r"( *)([-*+]|\d{1,9}[.)]) +(\[[ xX]\] )?")
RULE = re.compile(r" {0,3}([-*_])(?: *\1){2,} *\Z")
FENCE = re.compile(r"( *)(`{3,}|~{3,}) *([\w+#.-]*)[^`]*\Z")
# Beginnings of lines whose kind the next character may decide.
UNDECIDED = re.compile(
    r" *(?:#{0,6} *|[-*_+ ]*|[-*+] +\[[ xX]?\]?|\d{1,9}(?:[.)] *(?:\[[ xX]?\]?)?)?|`{1,2}|~{1,2})\Z"
)
WHOLE_LINE = re.compile(r" *(?:`{3,}[^`]*\Z|~~~|\|)")  # a fence, a row
BOXES = {"[ ] ": "☐ ", "[x] ": "☑ ", "[X] ": "☑ "}


class Renderer(Protocol):
    def feed(self, text: str) -> str:
        """What to write now that this text has come."""
        ...

    def finish(self) -> str:
        """The rest, and a line feed if the last line has none. The renderer is as new afterwards."""
        ...


class Plain:
    """`--raw`: the text as it came, but for what would drive the terminal."""

    def __init__(self) -> None:
        self._mid_line = False

    def feed(self, text: str) -> str:
        text = CONTROL.sub("", text)
        if text:
            self._mid_line = not text.endswith("\n")
        return text

    def finish(self) -> str:
        ended, self._mid_line = "\n" if self._mid_line else "", False
        return ended


class Markdown:
    """`width` in columns is asked as the text is laid out. Not `styled`: laid out alike, with its marks left in."""

    def __init__(self, width: Callable[[], int], *, styled: bool = True) -> None:
        self._width, self._styled = width, styled
        self._reset()

    def _reset(self) -> None:
        self._line = ""  # of the line that is coming, what is not laid out yet
        self._flow: Flow | None = None  # where the coming line goes, once its kind is known
        self._before = ""  # the last character laid out
        self._base, self._inline = "", True  # style of that line; whether its marks mean anything
        self._fence: _Fence | None = None
        self._header: str | None = None  # a row that is one only if a delimiter follows
        self._table: Table | None = None
        self._blank = False  # a blank line stands between what was written and what comes
        self._written = False
        self._in_list = False

    def feed(self, text: str) -> str:
        *ended, begun = CONTROL.sub("", text).replace("\t", "    ").split("\n")
        out = []
        for line in ended:
            self._line += line
            out.append(self._noted(self._end_of_line()))
        if begun:
            self._line += begun
            out.append(self._noted(self._so_far()))
        return "".join(out)

    def finish(self) -> str:
        out = self._end_of_line() if self._line or self._flow else ""
        out += self._end_of_table()
        self._reset()
        return out

    def _noted(self, out: str) -> str:
        self._written = self._written or bool(out)
        return out

    # --- lines

    def _so_far(self) -> str:
        """What of a line that has not ended can be written."""
        if self._fence is not None:
            out = ""
            while len(self._line) > LONG_CODE:
                out += self._fence.part(self._line[:LONG_CODE])
                self._line = self._line[LONG_CODE:]
            return out
        if self._flow is not None:
            return self._text(final=False)
        if len(self._line) < HOLD and (
            UNDECIDED.match(_unquoted(self._line)) or WHOLE_LINE.match(self._line)
        ):
            return ""
        if self._line.lstrip().startswith("|"):
            return ""
        return self._end_of_table() + self._opened() + self._text(final=False)

    def _end_of_line(self) -> str:
        if self._fence is not None:
            return self._code_line()
        if self._flow is not None:
            out = self._text(final=True)
            self._flow = None
            return f"{out}\n"
        line = self._line
        if line.lstrip().startswith("|"):
            self._line = ""
            return self._row(line)
        out = self._end_of_table()
        if not line.strip():
            self._line, self._blank = "", self._written
            return out
        if begun := FENCE.match(line):
            self._line = ""
            self._fence = _Fence(begun[1], begun[2], begun[3], styled=self._styled)
            return out + self._gap() + self._fence.edge(line.strip())
        if RULE.match(line):
            self._line = ""
            return out + self._gap() + painted(self._dim, "─" * min(self._width(), 40)) + "\n"
        out += self._opened() + self._text(final=True)
        self._flow = None
        return f"{out}\n"

    @property
    def _dim(self) -> str:
        return DIM if self._styled else ""

    def _gap(self) -> str:
        """The blank line that the source had before this one."""
        blank, self._blank = self._blank, False
        return "\n" if blank else ""

    def _text(self, *, final: bool) -> str:
        """Words of the line whose kind is known."""
        assert self._flow is not None
        spans: list[Span] = [(self._base, self._line)]
        taken = len(self._line)
        if self._inline:
            spans, taken = settle(self._line, self._base, final=final, before=self._before)
        self._before = self._line[taken - 1] if taken else self._before
        self._line = self._line[taken:]
        out = self._flow.feed(spans)
        return out + self._flow.end() if final else out

    def _opened(self) -> str:
        """Take the beginning off the coming line that says what it is, and write what stands for it."""
        gap = self._gap()
        line = self._line
        quote = QUOTE.match(line)
        bars = "│ " * quote[0].count(">") if quote else ""
        prefix = painted(self._dim, bars)
        line = line[quote.end() :] if quote else line
        indent = len(line) - len(line.lstrip(" "))
        self._before, self._base, self._inline = "", "", self._styled
        first = rest = " " * min(indent, DEEPEST)
        if item := ITEM.match(line):
            self._in_list = True
            first, rest = self._item(item)
            line = line[item.end() :]
        elif self._styled and (heading := HEADING.match(line)):
            self._in_list = False
            self._base = f"{BOLD};{UNDERLINE}" if len(heading[1]) == 1 else BOLD
            line, first, rest = line[heading.end() :], "", ""
        else:
            self._in_list = self._in_list and (indent > 0 or not gap)
            self._inline = self._styled and (indent < 4 or self._in_list)
            line = line[indent:]
        self._line = line
        room = self._width() - cells(bars)
        rest = rest if len(rest) < room // 2 else ""  # a narrow window has no room for indentation
        self._flow = Flow(self._width, prefix + rest, column=cells(prefix + first))
        return gap + prefix + first

    def _item(self, item: re.Match[str]) -> tuple[str, str]:
        """What stands before an item's first line, and before its others."""
        indent = " " * min(len(item[1]), DEEPEST)
        marker = "•" if item[2] in "-*+" else item[2]
        box = BOXES.get(item[3] or "", "")
        return f"{indent}{marker} {box}", indent + " " * (cells(marker) + 1 + cells(box))

    # --- code and tables

    def _code_line(self) -> str:
        assert self._fence is not None
        line, self._line = self._line, ""
        if self._fence.closed_by(line):
            fence, self._fence = self._fence, None
            return fence.edge(line.strip())
        out = ""
        while len(line) > LONG_CODE:
            out, line = out + self._fence.part(line[:LONG_CODE]), line[LONG_CODE:]
        return out + self._fence.end(line)

    def _row(self, line: str) -> str:
        if self._table is not None:
            return self._table.add(line)
        if self._header is None:
            self._header = line
            return ""
        header, self._header = self._header, line
        if not is_delimiter(line):
            return self._as_text(header)
        self._header = None
        self._table = Table(header, line, self._width, styled=self._styled)
        return self._gap()

    def _end_of_table(self) -> str:
        if self._header is not None:
            header, self._header = self._header, None
            return self._as_text(header)
        if self._table is not None:
            table, self._table = self._table, None
            return self._noted(table.settle())
        return ""

    def _as_text(self, line: str) -> str:
        """A line that began as a table and is none."""
        kept, self._line = self._line, line
        out = f"{self._opened()}{self._text(final=True)}\n"
        self._line, self._flow = kept, None
        return self._noted(out)


class _Fence:
    """A block of code: its indentation taken off and put on again, its language's colours."""

    def __init__(self, indent: str, mark: str, language: str, *, styled: bool) -> None:
        self._indent, self._mark, self._styled = indent, mark, styled
        self._colors = Highlighter(language if styled else "")
        self._mid_line = False

    def closed_by(self, line: str) -> bool:
        text = line.strip()
        return not self._mid_line and len(text) >= len(self._mark) and not text.strip(self._mark[0])

    def edge(self, text: str) -> str:
        return self._indent + painted(DIM if self._styled else "", text) + "\n"

    def part(self, text: str) -> str:
        first, self._mid_line = not self._mid_line, True
        if first:
            text = self._indent + text.removeprefix(self._indent)
        return self._colors.line(text)

    def end(self, text: str) -> str:
        out = self.part(text)
        self._mid_line = False
        return f"{out}\n" if out.strip() else "\n"


def _unquoted(line: str) -> str:
    quote = QUOTE.match(line)
    return line[quote.end() :] if quote else line
