"""What a line means: a command, a message, or a slip."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ghostvis_cli.chat import slash
from ghostvis_cli.chat.commands import ACTIONS
from ghostvis_cli.chat.slash import Command, Message, assignments, parse, words
from ghostvis_cli.errors import UsageError


def command(line: str) -> tuple[str, str]:
    found = parse(line)
    assert isinstance(found, Command)
    return found.slash.name, found.rest


@pytest.mark.parametrize("name", list(slash.BY_NAME))
def test_every_command_is_known_by_its_name_and_does_something(name: str) -> None:
    assert command(f"/{name}") == (name, "") and name in ACTIONS
    assert command(f"/{name.upper()}  a  b \r") == (name, "a  b")


@pytest.mark.parametrize("line", ["quit", "exit", " Quit ", "EXIT", "/quit", "/exit"])
def test_plain_words_leave_as_well(line: str) -> None:
    assert command(line)[0] in slash.LEAVE


@pytest.mark.parametrize(
    "line",
    [
        "/home/x/y.png",
        "/home/x/y.png what is this?",
        "/tmp.png",
        "/2 of 3",
        "/",
        "//",
        "/ help",
        "// a comment",
        "/image/of.png",
        "/Bilder/Grüße.png ?",
        "quit smoking",
        " /help is a command",
        "what does /help do?",
        "./image x",
        "/système",
    ],
)
def test_a_path_and_whatever_is_no_command_is_a_message(line: str) -> None:
    assert parse(line) == Message(line.strip())


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("/imgae x.png", "/image,"),
        ("/hlep", "/help,"),
        ("/reg", "/regen,"),
        ("/bye", "begin with a blank"),
        ("/sytsem You are.", "/system,"),
        ("/tmp what is in there?", "begin with a blank"),
    ],
)
def test_an_unknown_command_is_told_the_nearest_one(line: str, hint: str) -> None:
    with pytest.raises(UsageError, match="there is no command /") as caught:
        parse(line)
    assert hint in (caught.value.hint or "")


def test_a_command_stands_alone_unless_its_text_may_have_lines() -> None:
    assert command("/system Be brief.\nBe kind.") == ("system", "Be brief.\nBe kind.")
    assert command("/edit\nwhat?") == ("edit", "what?")
    with pytest.raises(UsageError, match="line of its own"):
        parse("/image a.png\nWhat is this?")
    assert command("/help\n") == ("help", "")


@pytest.mark.parametrize("line", ["", " ", "\t\n", "\u00a0"])
def test_a_blank_line_means_nothing(line: str) -> None:
    assert parse(line) is None


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("a.png b.png", ["a.png", "b.png"]),
        ("'my photo.png' x", ["my photo.png", "x"]),
        ('"it\'s.png"', ["it's.png"]),
        (r"my\ photo.png", ["my photo.png"]),
        ("it's mine.png", ["it's", "mine.png"]),
        ("a#1.png #2", ["a#1.png", "#2"]),
        ("a;b|c&d(e).png", ["a;b|c&d(e).png"]),
        ("'/x/a b'\\''c.png'", ["/x/a b'c.png"]),
        ("http://h/p?q=1&r=2#f", ["http://h/p?q=1&r=2#f"]),
        ("", []),
    ],
)
def test_arguments_are_split_as_a_shell_does(rest: str, expected: list[str]) -> None:
    assert words(rest) == expected


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("temperature=0", [("temperature", "0")]),
        ("temperature 0.5", [("temperature", "0.5")]),
        ("temperature = 0.5", [("temperature", "0.5")]),
        ("temperature=0 top_p=1", [("temperature", "0"), ("top_p", "1")]),
        ('stop=["a b", "c"]', [("stop", '["a b", "c"]')]),
        ("stop=User: hi", [("stop", "User: hi")]),
        ("seed=", [("seed", "")]),
    ],
)
def test_settings_are_read_as_key_and_value(rest: str, expected: list[tuple[str, str]]) -> None:
    assert assignments(rest) == expected


@pytest.mark.parametrize("rest", ["temperature", "=1", "0.5"])
def test_what_is_no_setting_is_refused(rest: str) -> None:
    with pytest.raises(UsageError, match="is not KEY=VALUE"):
        assignments(rest)


@given(st.text(max_size=200))
@example("/" + "a" * 100_000)
@example("/image \0")
@example("/set \ud800=1")
def test_no_line_is_too_odd_to_be_understood_or_refused(line: str) -> None:
    try:
        found = parse(line)
        if isinstance(found, Command):
            words(found.rest)
            if found.rest:
                assignments(found.rest)
    except UsageError as error:
        assert len(error.message) < 200
    else:
        assert not isinstance(found, Message) or found.text == line.strip()


def test_help_names_every_command_and_explains_one() -> None:
    whole = slash.help_text()
    assert all(f"/{name}" in whole for name in slash.BY_NAME)
    assert slash.help_text("/view") == slash.help_text("view") and "/view [N]" in slash.help_text("view")
    with pytest.raises(UsageError, match="no command /vew"):
        slash.help_text("vew")
