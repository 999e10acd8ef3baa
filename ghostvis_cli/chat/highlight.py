"""Code -> coloured code, a line at a time: Pygments' lexers, with the state kept from one line to the next.

Pygments itself takes whole texts only. Lexing the whole block anew for each line would be quadratic, lexing each
line alone would lose strings and comments that span lines.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ghostvis_cli.chat.inline import painted

if TYPE_CHECKING:
    from pygments.lexer import Lexer

# Token type -> SGR codes; the nearest ancestor counts.
COLORS = {
    "Token.Comment": "2;3",
    "Token.Keyword": "35",
    "Token.Literal.String": "32",
    "Token.Literal.Number": "36",
    "Token.Name.Function": "34",
    "Token.Name.Class": "34;1",
    "Token.Name.Builtin": "36",
    "Token.Name.Decorator": "33",
    "Token.Name.Tag": "34",
    "Token.Operator.Word": "35",
    "Token.Generic.Deleted": "31",
    "Token.Generic.Inserted": "32",
    "Token.Generic.Heading": "1",
}


class Highlighter:
    """Colours the lines of one block. An unknown language stays as it is."""

    def __init__(self, language: str) -> None:
        self._lexer = _lexer(language)
        self._stack = ["root"]

    def line(self, text: str) -> str:
        """One line, without its line feed, or a part of one."""
        if self._lexer is None or not text:
            return text
        out: list[list[str]] = []  # pairs of colour and text, neighbours of one colour joined
        for _, kind, value in _lexed(self._lexer, f"{text}\n", self._stack):
            color = _color(str(kind))
            if out and out[-1][0] == color:
                out[-1][1] += value
            else:
                out.append([color, value])
        return "".join(painted(color, value.replace("\n", "")) for color, value in out)


def _lexer(language: str) -> "Lexer | None":
    """A lexer whose rules are a plain table; others can't go on from a state."""
    if not language:
        return None
    from pygments.lexer import RegexLexer
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        return None
    plain = (
        isinstance(lexer, RegexLexer)
        and type(lexer).get_tokens_unprocessed is RegexLexer.get_tokens_unprocessed
    )
    return lexer if plain else None


def _lexed(lexer: Any, text: str, stack: list[str]) -> Iterator[tuple[int, Any, str]]:
    """RegexLexer's own loop, which starts at the state on `stack` and leaves there the one it ends in."""
    from pygments.token import Text, _TokenType

    position = 0
    while position < len(text):
        for matches, action, new_state in lexer._tokens[stack[-1]]:
            if match := matches(text, position):
                if isinstance(action, _TokenType):
                    yield position, action, match[0]
                elif action is not None:
                    yield from action(lexer, match)
                position = match.end()
                _enter(new_state, stack)
                break
        else:
            if text[position] == "\n":
                stack[:] = ["root"]
            yield position, Text, text[position]
            position += 1


def _enter(new_state: Any, stack: list[str]) -> None:
    """What Pygments' tables say of states: names, "#pop", "#push", a number of states to leave, or several."""
    for state in new_state if isinstance(new_state, tuple) else (new_state,):
        if state is None:
            continue
        if state == "#push":
            stack.append(stack[-1])
        elif state == "#pop" or isinstance(state, int):
            leave = 1 if state == "#pop" else abs(state)
            del stack[max(1, len(stack) - leave) :]
        else:
            stack.append(state)


def _color(kind: str) -> str:
    while kind:
        if kind in COLORS:
            return COLORS[kind]
        kind = kind.rpartition(".")[0]
    return ""
