"""Text inside a block of Markdown: which part of it has a settled style, and how it is broken into lines.

Both go forward only. `settle` keeps back what may still turn into emphasis, code or a link, for HOLD characters at
most; `Flow` keeps back a word that begins near the edge. What they have given out stays as it is.
"""

import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

Span: TypeAlias = tuple[str, str]  # SGR codes such as "1;3" (none: ""), and text without control characters

ROOM = 30  # columns in which any word may begin, and show at once: few words are longer
HOLD = 300  # characters after an opening mark within which its closing one must come; then it is plain text
BOLD, DIM, ITALIC, UNDERLINE, STRUCK, CODE = "1", "2", "3", "4", "9", "36"

SPECIAL = re.compile(r"[\\`*_~!\[]")
ESCAPABLE = "`*_~#|<>"  # not brackets, parentheses, backslash and dollar: those are how models write formulas
TICKS = re.compile(r"`+")
RUN = re.compile(r"\*+|_+|~+")
NAME = re.compile(r"\w+")  # __init__ is one of Python's, not bold
STYLES = {1: ITALIC, 2: BOLD, 3: f"{BOLD};{ITALIC}"}
CLOSING = {
    "*": re.compile(r"(?<![\s\\*])\*(?!\*)"),
    "**": re.compile(r"(?<![\s\\])\*\*(?!\*)"),
    "***": re.compile(r"(?<![\s\\])\*\*\*(?!\*)"),
    "_": re.compile(r"(?<![\s\\_])_(?!\w)"),
    "__": re.compile(r"(?<![\s\\])__(?!\w)"),
    "___": re.compile(r"(?<![\s\\])___(?!\w)"),
    "~~": re.compile(r"(?<![\s\\])~~(?!~)"),
}
ADDRESS = r"[^\s()]*(?:\([^\s()]*\)[^\s()]*)?"
LINK = re.compile(rf'!?\[([^\[\]]+)\]\(({ADDRESS})(?: "[^"]*")?\)')
LINK_BEGUN = re.compile(r"!?(?:\[[^\[\]]*(?:\](?:\([^)]*(?:\([^)]*\)[^)]*)?)?)?)?\Z")

# Characters between which a line may be broken without a space: the scripts that have none.
UNSPACED = (
    r"\u2e80-\u2fff\u3005-\u3007\u3021-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\U00020000-\U0003ffff"
)
PIECE = re.compile(rf"\s+|[{UNSPACED}]|[^\s{UNSPACED}]+")
SPACED = re.compile(rf"[^{UNSPACED}]")
SGR = re.compile(r"\x1b\[[0-9;]*m")


def settle(text: str, style: str = "", *, final: bool, before: str = "") -> tuple[list[Span], int]:
    """The spans that nothing to come can change, and how many characters they took.

    `before` is the character in front of `text`. `final`: nothing will come.
    """
    spans: list[Span] = []
    at = 0
    while at < len(text):
        special = SPECIAL.search(text, at)
        start = special.start() if special else len(text)
        if start > at:
            spans.append((style, text[at:start]))
        if special is None:
            return spans, len(text)
        waits = not final and len(text) - start < HOLD
        found = _mark(text, start, style, before=text[start - 1] if start else before, waits=waits)
        if found is None:
            return spans, start
        more, at = found
        spans += more
    return spans, at


def _mark(text: str, start: int, style: str, *, before: str, waits: bool) -> tuple[list[Span], int] | None:
    """The spans that begin with the special character at `start`, and where they end; None while that is open."""
    match text[start]:
        case "\\":
            return _escaped(text, start, style, waits=waits)
        case "`":
            return _code(text, start, style, waits=waits)
        case "[" | "!":
            return _link(text, start, style, waits=waits)
    return _emphasis(text, start, style, before=before, waits=waits)


def _escaped(text: str, start: int, style: str, *, waits: bool) -> tuple[list[Span], int] | None:
    following = text[start + 1 : start + 2]
    if not following and waits:
        return None
    if following and following in ESCAPABLE:
        return [(style, following)], start + 2
    return [(style, "\\")], start + 1


def _code(text: str, start: int, style: str, *, waits: bool) -> tuple[list[Span], int] | None:
    ticks = _run(TICKS, text, start)
    begin = start + len(ticks)
    closing = re.compile(f"(?<!`){ticks}(?!`)").search(text, begin, begin + HOLD)
    if waits and (closing is None or closing.end() == len(text)):
        return None
    if closing is None:
        return [(style, ticks)], begin
    inside = text[begin : closing.start()]
    if inside.startswith(" ") and inside.endswith(" ") and inside.strip():
        inside = inside[1:-1]
    return [(_and(style, CODE), inside)], closing.end()


def _emphasis(
    text: str, start: int, style: str, *, before: str, waits: bool
) -> tuple[list[Span], int] | None:
    run = _run(RUN, text, start)
    begin = start + len(run)
    if begin == len(text) and waits:
        return None
    within_word = before.isascii() and before.isalnum()  # 2*3*4, snake_case
    if run not in CLOSING or within_word or not text[begin : begin + 1].strip():
        return [(style, run)], begin
    closing = CLOSING[run].search(text, begin + 1, begin + HOLD)
    if waits and (closing is None or closing.end() == len(text)):
        return None
    if closing is None or (run == "__" and NAME.fullmatch(text, begin, closing.start())):
        return [(style, run)], begin
    code = STRUCK if run == "~~" else STYLES[len(run)]
    inside, _ = settle(text[begin : closing.start()], _and(style, code), final=True)
    return inside, closing.end()


def _link(text: str, start: int, style: str, *, waits: bool) -> tuple[list[Span], int] | None:
    link = LINK.match(text, start, start + HOLD)
    if link is None:
        if waits and LINK_BEGUN.match(text, start):
            return None
        return [(style, text[start])], start + 1
    words, address = link[1], link[2]
    shown, _ = settle(words, _and(style, UNDERLINE), final=True)
    # Always in sight: words that name another place than the one they lead to are an old trick.
    return [*shown, (_and(style, DIM), f" ({address})")] if address not in ("", words) else shown, link.end()


def _run(pattern: re.Pattern[str], text: str, start: int) -> str:
    found = pattern.match(text, start)
    assert found is not None, "called at its first character"
    return found[0]


def _and(style: str, code: str) -> str:
    return f"{style};{code}" if style else code


def painted(style: str, text: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if style and text else text


def cells(text: str) -> int:
    """Columns that `text` takes on a terminal; our own colours take none."""
    if text.isascii() and "\x1b" not in text:
        return len(text)
    from rich.cells import cell_len

    return cell_len(SGR.sub("", text))


class Flow:
    """Spans -> text broken at words. `width` is asked anew for every word: a window may change at any time."""

    def __init__(self, width: Callable[[], int], rest: str = "", *, column: int = 0) -> None:
        self._width, self._rest, self._indent = width, rest, cells(rest)
        self._column = column
        self._space: Span = ("", "")
        self._word: list[Span] = []
        self._written = ""  # of the word that is coming, what is written: no line ends inside it any more

    def feed(self, spans: Iterable[Span]) -> str:
        """What can be written with these spans: all of it, but for a word that may have to go on the next line."""
        out: list[str] = []
        for style, text in spans:
            for piece in PIECE.findall(text):
                if piece.isspace():
                    self._write_word(out)
                    self._space = (style, self._space[1] + piece)
                    self._written = ""
                    continue
                before = self._word[-1][1] if self._word else self._written
                if before and not _belongs(before, piece):
                    self._write_word(out)
                    self._written = ""
                if self._word and self._word[-1][0] == style:
                    piece = self._word.pop()[1] + piece
                self._word.append((style, piece))
        if self._word and self._stays():
            self._write_word(out)
        return "".join(out)

    def end(self) -> str:
        out: list[str] = []
        self._write_word(out)
        return "".join(out)

    def _stays(self) -> bool:
        """Whether the coming word has its place on this line, however long it gets."""
        free = self._width() - self._column - len(self._space[1])
        return bool(self._written) or self._column <= self._indent or free >= ROOM

    def _write_word(self, out: list[str]) -> None:
        if not self._word:
            return
        style, space = self._space
        width, size = self._width(), sum(cells(text) for _, text in self._word)
        if self._column + len(space) + size > width and not self._stays():
            out.append(f"\n{self._rest}")
            self._column = self._indent
        elif space:
            out.append(painted(style, space) if style in (CODE, UNDERLINE) else space)
            self._column += len(space)
        out += [painted(*span) for span in self._word]
        # A word longer than a line is broken by the terminal: addresses stay whole where they are copied.
        end = self._column + size
        self._column = (end - 1) % width + 1 if end > width else end
        self._written = self._word[-1][1]
        self._space, self._word = ("", ""), []


def _belongs(word: str, piece: str) -> bool:
    """Whether a piece goes on a word: letters do, a sign of an unspaced script doesn't, its full stop does."""
    if SPACED.match(piece):
        return bool(SPACED.match(word[-1])) or not piece[0].isalnum()
    return False
