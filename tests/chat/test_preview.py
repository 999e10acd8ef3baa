"""Images on a terminal: what is written decodes to the image again, and suits the terminal that was asked."""

import base64
import re
from io import BytesIO

import pytest
from PIL import Image

from ghostvis_cli.chat import preview
from ghostvis_cli.chat.commands import as_seen
from ghostvis_cli.images import load_image

KITTY_ANSWER = "\x1b_Gi=31;OK\x1b\\\x1b[?62;c"
ROOM = (80, 24)


@pytest.fixture
def quarters() -> Image.Image:
    """Red and green above blue and white."""
    image = Image.new("RGB", (40, 40), "white")
    for color, corner in (("red", (0, 0)), ("lime", (20, 0)), ("blue", (0, 20))):
        image.paste(color, (*corner, corner[0] + 20, corner[1] + 20))
    return image


@pytest.mark.parametrize(
    ("env", "answer", "expected"),
    [
        ({}, KITTY_ANSWER, "kitty"),
        ({"TERM_PROGRAM": "WezTerm"}, KITTY_ANSWER, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "\x1b[?62;4c", "iterm2"),
        ({"LC_TERMINAL": "iTerm2"}, "", "iterm2"),
        ({}, "\x1b[?62;4;22c", "sixel"),
        ({}, "\x1b[?62;14;40c", "blocks"),
        ({}, "", "blocks"),
    ],
)
def test_the_terminal_says_what_it_can_show(env: dict[str, str], answer: str, expected: str) -> None:
    assert preview.protocol(env, answer) == expected


@pytest.mark.parametrize(
    ("size", "cells"), [((400, 400), (24, 12)), ((800, 200), (24, 3)), ((10, 400), (1, 12))]
)
def test_proportions_are_kept(size: tuple[int, int], cells: tuple[int, int]) -> None:
    assert preview.cells_of(Image.new("RGB", size), ROOM) == cells


def test_a_small_window_gets_a_small_image() -> None:
    columns, rows = preview.cells_of(Image.new("RGB", (400, 400)), (10, 6))
    assert columns <= 10 and rows <= 4


def test_kitty_gets_a_png_in_pieces_of_4096(quarters: Image.Image) -> None:
    noise = Image.effect_noise((120, 120), 80).convert("RGB")
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", preview.encoded(noise, "kitty", ROOM))
    assert len(pieces) > 1 and all(len(data) <= 4096 for _, data in pieces)
    assert [keys.endswith("m=1") for keys, _ in pieces] == [True] * (len(pieces) - 1) + [False]
    assert "c=24,r=12" in pieces[0][0]
    decoded = Image.open(BytesIO(base64.b64decode("".join(data for _, data in pieces))))
    assert decoded.tobytes() == noise.tobytes()


def test_iterm2_gets_a_png_with_its_size_in_cells(quarters: Image.Image) -> None:
    written = re.fullmatch(
        r"\x1b\]1337;File=inline=1;width=24;height=12;[^:]*:(.*)\x07\n",
        preview.encoded(quarters, "iterm2", ROOM),
    )
    assert written and Image.open(BytesIO(base64.b64decode(written[1]))).tobytes() == quarters.tobytes()


def test_sixels_paint_the_image(quarters: Image.Image) -> None:
    painted = decoded_sixels(preview.encoded(quarters, "sixel", ROOM))
    assert painted.size == (240, 240)
    for at in ((60, 60), (180, 60), (60, 180), (180, 180)):
        assert painted.getpixel(at) == quarters.getpixel((at[0] // 6, at[1] // 6))


@pytest.mark.parametrize("true_color", [True, False])
def test_half_blocks_have_a_pixel_above_a_pixel(quarters: Image.Image, true_color: bool) -> None:
    four = quarters.resize((2, 2), Image.Resampling.NEAREST)
    lines = preview.blocks(four, 2, 1, true_color=true_color).splitlines()
    codes = re.findall(r"\x1b\[38;([\d;]+);48;([\d;]+)m▀", lines[0])
    plain = {"2;255;0;0": "red", "2;0;255;0": "lime", "2;0;0;255": "blue", "2;255;255;255": "white"}
    cube = {"5;196": "red", "5;46": "lime", "5;21": "blue", "5;231": "white"}
    named = [tuple((plain if true_color else cube)[code] for code in pair) for pair in codes]
    assert named == [("red", "blue"), ("lime", "white")] and lines[0].endswith("\x1b[0m")


def test_what_is_shown_is_upright_and_cropped_as_the_model_sees_it() -> None:
    sideways = Image.new("RGB", (60, 40), "white")
    sideways.paste("red", (0, 0, 10, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: left is up
    file = BytesIO()
    sideways.save(file, "PNG", exif=exif)
    seen = as_seen(load_image(file.getvalue()))
    assert seen.size == (40, 40)
    assert seen.getpixel((20, 38)) == (255, 255, 255)
    assert seen.getpixel((20, 20)) == (255, 255, 255)  # the red edge is above the square that is left


def decoded_sixels(text: str) -> Image.Image:
    """A reader of as much of the format as is in use here."""
    head = re.match(r'\x1bPq"1;1;(\d+);(\d+)', text)
    assert head and text.endswith("\x1b\\\n")
    image = Image.new("RGB", (int(head[1]), int(head[2])))
    palette: dict[str, tuple[int, ...]] = {}
    color, x, y = "0", 0, 0
    for token in re.finditer(
        r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)(.)|([$-])|([?-~])", text[head.end() : -3]
    ):
        number, *rgb, count, repeated, step, single = token.groups()
        if number is not None and rgb[0] is not None:
            palette[number] = tuple(round(int(value) * 2.55) for value in rgb)
        elif number is not None:
            color = number
        elif step is not None:
            x, y = 0, y + 6 * (step == "-")
        else:
            for _ in range(int(count or 1)):
                for bit in range(6):
                    if (ord(repeated or single) - 63) >> bit & 1:
                        image.putpixel((x, y + bit), palette[color])
                x += 1  # noqa: SIM113 - a run moves it as well
    return image
