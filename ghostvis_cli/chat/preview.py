"""A small image on a terminal: the protocol of kitty or iTerm2, sixels, or two pixels a character.

Takes pixels, gives text; `ask_terminal` is the only part that talks to one. Cells are taken to be twice as high as
they are wide.
"""

import base64
import os
import re
import select
import sys
import time
from collections.abc import Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

Protocol: TypeAlias = Literal["kitty", "iterm2", "sixel", "blocks"]

COLUMNS, ROWS = 24, 12  # at most
CELL_PIXELS = (10, 20)  # for sixels, which know no cells
SIXEL_COLORS = 64
ANSWER_WITHIN_S = 0.3
# A query for kitty's image protocol, then one that every terminal answers: no answer to the first is a no.
QUESTION = "\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[c"
ATTRIBUTES = re.compile(r"\x1b\[\?([\d;]*)c")


def protocol(env: Mapping[str, str], answer: str) -> Protocol:
    """What the terminal says it can show: by its name for iTerm2's protocol, by its `answer` for the others."""
    if "_Gi=31;OK" in answer:
        return "kitty"
    if env.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm") or env.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    attributes = ATTRIBUTES.search(answer)
    return "sixel" if attributes and "4" in attributes[1].split(";") else "blocks"


def ask_terminal() -> str:
    """The terminal's answer to QUESTION, empty without one. Needs a terminal on stdin and stdout."""
    if os.environ.get("TERM", "dumb") in ("dumb", "linux"):
        return ""
    with _keys_unread() as number:
        sys.stdout.write(QUESTION)
        sys.stdout.flush()
        answer = ""
        give_up_s = time.monotonic() + ANSWER_WITHIN_S
        while not ATTRIBUTES.search(answer) and (left_s := give_up_s - time.monotonic()) > 0:
            if select.select([number], [], [], left_s)[0]:
                answer += os.read(number, 1024).decode("ascii", "replace")
        return answer


@contextmanager
def _keys_unread() -> "Iterator[int]":
    """stdin without echo and without waiting for the end of a line."""
    import termios

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    now = [*before]
    now[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(number, termios.TCSADRAIN, now)
    try:
        yield number
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def cells_of(image: "Image.Image", room: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows for an image, its proportions kept, in a window of `room` columns and rows."""
    most_columns, most_rows = max(1, min(COLUMNS, room[0])), max(1, min(ROWS, room[1] - 2))
    scale = min(most_columns / image.width, 2 * most_rows / image.height)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale / 2))


def encoded(image: "Image.Image", how: Protocol, room: tuple[int, int], *, true_color: bool = True) -> str:
    """What to write so that the image stands on lines of its own."""
    columns, rows = cells_of(image, room)
    match how:
        case "kitty":
            return kitty(image, columns, rows)
        case "iterm2":
            return iterm2(image, columns, rows)
        case "sixel":
            return sixel(image, columns, rows)
    return blocks(image, columns, rows, true_color=true_color)


def kitty(image: "Image.Image", columns: int, rows: int) -> str:
    """A PNG in pieces of 4,096 characters, silent about errors, the cursor left after its last row."""
    text = _png(image)
    pieces = [text[at : at + 4096] for at in range(0, len(text), 4096)]
    out = []
    for number, piece in enumerate(pieces):
        more = int(number < len(pieces) - 1)
        keys = f"a=T,f=100,q=2,c={columns},r={rows},m={more}" if number == 0 else f"q=2,m={more}"
        out.append(f"\x1b_G{keys};{piece}\x1b\\")
    return "".join(out) + "\n"


def iterm2(image: "Image.Image", columns: int, rows: int) -> str:
    return f"\x1b]1337;File=inline=1;width={columns};height={rows};preserveAspectRatio=1:{_png(image)}\x07\n"


def sixel(image: "Image.Image", columns: int, rows: int) -> str:
    """Six rows of pixels a band, one pass a colour that the band has."""
    small = image.convert("RGB").resize((columns * CELL_PIXELS[0], rows * CELL_PIXELS[1]))
    indexed = small.quantize(SIXEL_COLORS)
    palette = indexed.getpalette() or []
    out = [f'\x1bPq"1;1;{small.width};{small.height}']
    for color in range(len(palette) // 3):
        red, green, blue = (round(value * 100 / 255) for value in palette[3 * color : 3 * color + 3])
        out.append(f"#{color};2;{red};{green};{blue}")
    pixels = indexed.tobytes()
    for top in range(0, small.height, 6):
        band = [
            pixels[y * small.width : (y + 1) * small.width] for y in range(top, min(top + 6, small.height))
        ]
        out.append("$".join(f"#{color}{_band(band, color)}" for color in sorted(set(b"".join(band)))) + "-")
    return "".join(out) + "\x1b\\\n"


def _band(band: list[bytes], color: int) -> str:
    """One colour of a band: a character for each column, its six bits for the pixels that have the colour."""
    bits = [sum((row[x] == color) << y for y, row in enumerate(band)) for x in range(len(band[0]))]
    text = "".join(chr(63 + value) for value in bits)
    return re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", text)


def blocks(image: "Image.Image", columns: int, rows: int, *, true_color: bool = True) -> str:
    """The upper half of each cell in the foreground, the lower half in the background."""
    pixels = image.convert("RGB").resize((columns, 2 * rows)).tobytes()
    color = _true_color if true_color else _nearest_of_256
    at = [tuple(pixels[n : n + 3]) for n in range(0, len(pixels), 3)]
    out = []
    for row in range(rows):
        upper, lower = at[2 * row * columns :][:columns], at[(2 * row + 1) * columns :][:columns]
        line = [
            f"\x1b[38;{color(top)};48;{color(bottom)}m▀" for top, bottom in zip(upper, lower, strict=True)
        ]
        out.append("".join(line) + "\x1b[0m\n")
    return "".join(out)


def _true_color(rgb: tuple[int, ...]) -> str:
    return "2;" + ";".join(map(str, rgb))


def _nearest_of_256(rgb: tuple[int, ...]) -> str:
    """In the 6 x 6 x 6 cube of colours that starts at 16."""
    red, green, blue = (round(value / 51) for value in rgb)
    return f"5;{16 + 36 * red + 6 * green + blue}"


def _png(image: "Image.Image") -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
