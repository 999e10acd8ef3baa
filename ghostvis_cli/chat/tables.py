"""A Markdown table, its columns as wide as the first rows need; later rows go into the same columns at once."""

import re
from collections.abc import Callable, Iterable

from ghostvis_cli.chat.inline import BOLD, DIM, Flow, Span, cells, painted, settle

FIRST_ROWS = 8  # rows seen before the widths are settled
SPARE = 4  # columns of text by which later cells may be wider, if there is room
NARROWEST = 4  # columns of text under which a table says nothing
DELIMITER = re.compile(r"\|? *:?-+:? *(\| *:?-+:? *)*\|?\s*\Z")
BETWEEN = " │ "


def is_delimiter(line: str) -> bool:
    return "-" in line and DELIMITER.match(line) is not None


class Table:
    """Lines of the source in, lines for the screen out. `styled` says whether to colour."""

    def __init__(self, header: str, delimiter: str, width: Callable[[], int], *, styled: bool) -> None:
        self._alignment = [_alignment(cell) for cell in _cells_of(delimiter)]
        self._header = self._fitted(_cells_of(header))
        self._rows: list[list[str]] = []
        self._widths: list[int] | None = None
        self._width, self._styled = width, styled

    def add(self, line: str) -> str:
        """What can be written now that this row is here."""
        row = self._fitted(_cells_of(line))
        if self._widths is not None:
            return self._lines(row)
        self._rows.append(row)
        return self.settle(spare=SPARE) if len(self._rows) == FIRST_ROWS else ""

    def settle(self, spare: int = 0) -> str:
        """The header and the first rows, with widths that hold from here on; nothing where that was done."""
        if self._widths is not None:
            return ""
        columns = zip(self._header, *self._rows, strict=True)
        natural = [spare + max(cells(self._plain(cell)) for cell in column) for column in columns]
        self._widths = _shrunk(natural, self._width() - len(BETWEEN) * (len(natural) - 1))
        rule = painted(DIM if self._styled else "", "─┼─".join("─" * width for width in self._widths))
        return self._lines(self._header, BOLD) + f"{rule}\n" + "".join(self._lines(row) for row in self._rows)

    def _fitted(self, row: list[str]) -> list[str]:
        """As many cells as there are columns; what is too much goes into the last one."""
        last = len(self._alignment) - 1
        return [*row[:last], *[""] * (last - len(row)), " | ".join(row[last:])]

    def _spans(self, cell: str, style: str) -> list[Span]:
        return settle(cell, style, final=True)[0] if self._styled else [("", cell)]

    def _plain(self, cell: str) -> str:
        return "".join(text for _, text in self._spans(cell, ""))

    def _lines(self, row: list[str], style: str = "") -> str:
        """One row, as many lines as its highest cell needs."""
        assert self._widths is not None
        columns = [
            _wrapped(self._spans(cell, style), width) for cell, width in zip(row, self._widths, strict=True)
        ]
        height = max(len(column) for column in columns)
        out = []
        for number in range(height):
            line = [
                _placed(column[number] if number < len(column) else "", width, alignment)
                for column, width, alignment in zip(columns, self._widths, self._alignment, strict=True)
            ]
            out.append(painted(DIM if self._styled else "", BETWEEN).join(line).rstrip() + "\n")
        return "".join(out)


def _cells_of(line: str) -> list[str]:
    inside = line.strip().removeprefix("|")
    if inside.endswith("|") and not inside.endswith("\\|"):
        inside = inside[:-1]
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inside)]


def _alignment(cell: str) -> str:
    right = cell.endswith(":")
    return "^" if right and cell.startswith(":") else ">" if right else "<"


def _shrunk(widths: list[int], room: int) -> list[int]:
    """The widest columns give way first, none under NARROWEST."""
    widths = [max(1, width) for width in widths]
    while sum(widths) > room and max(widths) > NARROWEST:
        widest = max(widths)
        next_widest = max((width for width in widths if width < widest), default=NARROWEST)
        columns = [n for n, width in enumerate(widths) if width == widest]
        excess = -(-(sum(widths) - room) // len(columns))
        for column in columns:
            widths[column] = max(next_widest, NARROWEST, widest - excess)
    return widths


def _wrapped(spans: Iterable[Span], width: int) -> list[str]:
    """Lines of at most `width` columns; a word longer than that is cut."""
    flow = Flow(lambda: width)
    pieces = [(style, part) for style, text in spans for part in _cut(text, width)]
    return (flow.feed(pieces) + flow.end()).split("\n")


def _cut(text: str, width: int) -> list[str]:
    """Text with a place to break in every word longer than `width`."""
    out: list[str] = []
    for word in re.split(r"(\s+)", text):
        while cells(word) > width:
            taken = 1
            while cells(word[: taken + 1]) <= width:
                taken += 1
            out += [word[:taken], "\n"]
            word = word[taken:]
        out.append(word)
    return out


def _placed(text: str, width: int, alignment: str) -> str:
    room = max(0, width - cells(text))
    left = {"<": 0, ">": room, "^": room // 2}[alignment]
    return " " * left + text + " " * (room - left)
