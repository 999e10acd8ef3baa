"""Markdown as it comes: the same for any pieces, at any width, in lines that stay as they were written."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ghostvis_cli.chat.inline import HOLD, SGR, cells
from ghostvis_cli.chat.render import LONG_CODE, Markdown, Plain
from ghostvis_cli.chat.tables import FIRST_ROWS

EVERYTHING = """# Heading

A paragraph with **bold words**, *italic*, `code`, ~~gone~~, snake_case, 2*3*4 and [a link](http://x.y/z_(1)).
Its second line.

1. First:
   ```python
   def f(x):
       \"\"\"Text
       over lines\"\"\"
       return x  # note
   ```
2. Second
   - [ ] open, with words enough that it has to be broken somewhere on the way to its end
   - [x] done

> quoted, with words enough that it has to be broken somewhere on the way to its end

| Shape | Count |
|:--|--:|
| **circle** | 3 |
| square | 12 |

---
Last words, without a line feed **and unclosed"""


def shown(text: str, width: int = 80, *, styled: bool = False, step: int | None = None) -> str:
    renderer = Markdown(lambda: width, styled=styled)
    pieces = [text] if step is None else [text[n : n + step] for n in range(0, len(text), step)]
    return "".join(renderer.feed(piece) for piece in pieces) + renderer.finish()


def seen(text: str, width: int = 80, step: int | None = None) -> str:
    """What of the styled text can be read."""
    return SGR.sub("", shown(text, width, styled=True, step=step))


def colors_of(text: str, word: str) -> str:
    """The SGR codes in front of a word."""
    found = re.search(rf"\x1b\[([\d;]*)m[^\x1b]*{word}", text)
    return found[1] if found else ""


@pytest.mark.parametrize("step", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("width", [80, 33])
def test_how_a_text_is_cut_into_pieces_does_not_show(step: int, width: int) -> None:
    assert seen(EVERYTHING, width, step) == seen(EVERYTHING, width)
    assert shown(EVERYTHING, width, step=step) == shown(EVERYTHING, width)


MARKS = st.sampled_from(
    [*"*_`~[]()!|>#-+.1 \n\\", "**", "```", "word ", "红色", "| a | b |\n|--|--|\n", "- "]
)


@example("``````| a | b |\n|--|--|\n", 1, 1)  # a fence of more than three marks
@given(st.lists(MARKS, max_size=60).map("".join), st.integers(1, 9), st.integers(1, 50))
def test_no_text_shows_its_pieces_or_loses_its_words(text: str, step: int, width: int) -> None:
    whole = seen(text, width)
    assert seen(text, width, step) == whole
    assert whole == "" or whole.endswith("\n")
    for word in ("word", "红", "色"):  # whichever way the marks around them are meant
        assert whole.replace("\n", "").count(word) >= text.count(word)


@given(st.text(max_size=200), st.integers(1, 9), st.booleans())
def test_no_text_gives_the_terminal_an_order(text: str, step: int, raw: bool) -> None:
    renderer = Plain() if raw else Markdown(lambda: 40)
    pieces = [text[n : n + step] for n in range(0, len(text), step)]
    out = SGR.sub("", "".join(renderer.feed(piece) for piece in pieces) + renderer.finish())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", out)


@pytest.mark.parametrize("width", [10, 20, 40, 79, 200])
def test_no_line_of_text_is_wider_than_the_window(width: int) -> None:
    text = "Some words of *many* lengths, `code` and **bold ones**, " * 8 + "\n\n- 一二三四五六七八九十" * 3
    assert max(cells(line) for line in shown(text, width, styled=True).splitlines()) <= width


def test_text_shows_as_it_comes() -> None:
    renderer = Markdown(lambda: 80)
    assert [renderer.feed(piece) for piece in ("A par", "agraph", " that", " go")] == [
        "A par",
        "agraph",
        " that",
        " go",
    ]


def test_near_the_edge_a_word_waits_for_its_end() -> None:
    renderer = Markdown(lambda: 40)
    assert renderer.feed("twelve chars and 10") == "twelve chars and"
    assert renderer.feed("00 more") == " 1000"


def test_the_window_is_measured_anew_for_every_word() -> None:
    width = 20
    renderer = Markdown(lambda: width)
    out = renderer.feed("aaaa bbbb cccc dddd eeee ")
    width = 9
    out += renderer.feed("ffff gggg hhhh ")
    assert out == "aaaa bbbb cccc dddd\neeee ffff\ngggg hhhh"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a **bold** word", "a bold word"),
        ("***both***", "both"),
        ("这是**粗体**文字", "这是粗体文字"),
        ("**unclosed", "**unclosed"),
        ("2*3*4 snake_case_name __init__.py", "2*3*4 snake_case_name __init__.py"),
        ("5 * 3 and * alone", "5 * 3 and * alone"),
        ("`a*b*c` and ``a`b``", "a*b*c and a`b"),
        (r"\*literal\* \(x^2\) \[y\]", r"*literal* \(x^2\) \[y\]"),
        ("[/INST] [red]x[/red] <|image|>", "[/INST] [red]x[/red] <|image|>"),
        ("[here](http://a.b/c_(d)) and [http://e.f](http://e.f)", "here (http://a.b/c_(d)) and http://e.f"),
        ("## Title ##", "Title ##"),
        ("- a\n  - b\n* c\n+ d", "• a\n  • b\n• c\n• d"),
        ("12) twelve", "12) twelve"),
        ("- [ ] open\n- [x] done", "• ☐ open\n• ☑ done"),
        ("> a\n> > b", "│ a\n│ │ b"),
        ("a\nb\n\n\n\nc", "a\nb\n\nc"),
        ("\n\nfirst", "first"),
        ("| no table", "| no table"),
        ("2024 was", "2024 was"),
        ("3.14 is", "3.14 is"),
        ("-1 degrees", "-1 degrees"),
    ],
)
def test_marks_become_what_they_mean_and_other_signs_stay(text: str, plain: str) -> None:
    assert seen(text).rstrip("\n") == plain


def test_emphasis_that_never_closes_is_held_back_no_longer_than_it_may_be() -> None:
    renderer = Markdown(lambda: 80)
    assert renderer.feed("*" + "word " * (HOLD // 5 - 1)) == ""
    assert renderer.feed("word word ").startswith("*word word")


def test_a_wrapped_item_hangs_under_its_text() -> None:
    assert shown("10. one two three four five", 14) == "10. one two\n    three four\n    five\n"


def test_code_keeps_its_lines_and_its_colours_over_them() -> None:
    code = "```python\ns = '''a\nb'''\n" + "x = 1  # " + "long " * 60 + "\n```\nafter"
    out = shown(code, 40, styled=True)
    assert SGR.sub("", out) == f"{code}\n"
    assert colors_of(out, "b'''") == "32"  # the second line of a string
    assert colors_of(out, "after") != "32"


def test_a_long_line_of_code_shows_before_it_ends() -> None:
    renderer = Markdown(lambda: 80)
    renderer.feed("```\n")
    assert renderer.feed("x" * (LONG_CODE + 1)) == "x" * LONG_CODE


def test_an_unknown_language_is_shown_as_it_is() -> None:
    assert SGR.sub("", shown("```no-such\na < b\n```", styled=True)) == "```no-such\na < b\n```\n"


def test_code_in_an_item_stays_indented_and_ends_where_its_fence_does() -> None:
    text = "- a\n  ````\n  ```\n  x\n  ````\n- b"
    assert seen(text) == "• a\n  ````\n  ```\n  x\n  ````\n• b\n"


def test_columns_of_a_table_line_up() -> None:
    text = "| Shape | Count |\n|:--|--:|\n| **circle** | 3 |\n| `sq` | 12 |\n"
    assert seen(text) == "Shape  │ Count\n───────┼──────\ncircle │     3\nsq     │    12\n"


def test_a_table_too_wide_for_the_window_is_broken_inside_its_cells() -> None:
    text = "| Name | What it is |\n|--|--|\n| cat | a small animal that sleeps most of the day |\n"
    lines = seen(text, 30).splitlines()
    assert max(map(len, lines)) <= 30 and len(lines) == 4
    assert [line.split(" │ ")[1] for line in lines if " │ " in line][1:] == [
        "a small animal that",
        "sleeps most of the day",
    ]


def test_a_long_table_shows_once_its_first_rows_are_there() -> None:
    renderer = Markdown(lambda: 80)
    assert renderer.feed("| a | b |\n|--|--|\n" + "| 1 | 2 |\n" * (FIRST_ROWS - 1)) == ""
    assert renderer.feed("| 1 | 2 |\n") != ""
    assert SGR.sub("", renderer.feed("| 33333 | 4 |\n")) == "33333 │ 4\n"


def test_without_colours_a_text_is_laid_out_alike_and_keeps_its_marks() -> None:
    assert shown("# T\n\n- **b** `c`\n") == "# T\n\n• **b** `c`\n"
    assert "\x1b" not in shown(EVERYTHING)


def test_raw_is_the_text_itself() -> None:
    plain = Plain()
    assert plain.feed("**a**\tb\r\n") + plain.feed("\x1b[31mc") + plain.finish() == "**a**\tb\n[31mc\n"


def test_a_second_reply_begins_afresh() -> None:
    renderer = Markdown(lambda: 80)
    renderer.feed("```python\nx = '''")
    renderer.finish()
    assert renderer.feed("*a* ") == "\x1b[3ma\x1b[0m"
