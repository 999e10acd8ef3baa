"""The line being typed: keys, completion, history, dropped files."""

import asyncio
import shlex
import shutil
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from ghostvis_cli.chat import slash
from ghostvis_cli.chat.completion import Completions, quoted, unquoted
from ghostvis_cli.chat.editor import Editor, dropped_image

NAMES = {
    "profile": lambda: ["demo", "lab"],
    "setting": lambda: ["temperature=", "top_p="],
    "session": lambda: ["trip"],
}
ODD_NAMES = [
    "plain.png",
    "two  blanks.png",
    "it's.png",
    'a "b".png',
    'it\'s "c".png',
    "back\\slash.png",
    "$X `y`.png",
]


def typed(
    *keys: str, history: Path | None = None, then: Callable[[Editor], Awaitable[str]] | None = None
) -> str:
    """The line that these keys make."""

    async def read() -> str:
        with create_pipe_input() as pipe:
            editor = Editor(
                history=history, names=NAMES, chips=list, bar=str, input=pipe, output=DummyOutput()
            )
            pipe.send_text("".join(keys))
            return await (then(editor) if then else editor.read())

    return asyncio.run(read())


def offers(line: str) -> list[str]:
    """What Tab makes of a line."""
    document = Document(line)
    found = Completions(NAMES).get_completions(document, CompleteEvent())
    return [line[: len(line) + offer.start_position] + offer.text for offer in found]


def test_enter_sends_and_alt_enter_begins_a_line() -> None:
    assert typed("one\x1b\rtwo\r") == "one\ntwo"


def test_a_paste_keeps_its_lines_and_is_not_sent_by_them() -> None:
    assert typed("\x1b[200~a\r\nb\n\x1b[201~c\r") == "a\nb\nc"


def test_ctrl_d_on_an_empty_line_leaves() -> None:
    with pytest.raises(EOFError):
        typed("\x04")


def test_ctrl_c_clears_the_line() -> None:
    assert typed("half a thought\x03whole\r") == "whole"


def test_ctrl_c_typed_behind_enter_is_told_and_the_rest_is_kept_for_the_next_line() -> None:
    async def twice(editor: Editor) -> str:
        first, interrupted = await editor.read(), editor.interrupted
        return f"{first} {interrupted} {await editor.read()} {editor.interrupted}"

    assert typed("one\r\x03two\r", then=twice) == "one True two False"


def test_history_outlives_the_process_in_a_file_of_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "state" / "chat_history"
    typed("remember\x1b\rme\r", history=file)
    assert typed("\x1b[A\r", history=file) == "remember\nme"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_history_that_can_not_be_written_is_forgotten_quietly(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert typed("hello\r", history=tmp_path / "file" / "history") == "hello"

    async def read_once_it_is_gone(editor: Editor) -> str:
        shutil.rmtree(tmp_path / "state")
        return await editor.read()

    assert typed("hello\r", history=tmp_path / "state" / "history", then=read_once_it_is_gone) == "hello"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/re", ["/regen"]),
        ("/set te", ["/set temperature="]),
        ("/set temperature=0 to", ["/set temperature=0 top_p="]),
        ("/profile ", ["/profile demo", "/profile lab"]),
        ("/export h", ["/export html"]),
        ("/help und", ["/help undo"]),
        ("/nothing ", []),
        ("a message with /image ", []),
    ],
)
def test_tab_completes_commands_profiles_and_settings(line: str, expected: list[str]) -> None:
    assert offers(line) == expected


def test_images_are_offered_first_then_folders_then_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "albums").mkdir()
    for name in ("a.txt", "z.png", "b.JPG", ".hidden.png"):
        (tmp_path / name).touch()
    assert offers("/image ") == ["/image b.JPG", "/image z.png", "/image albums/", "/image a.txt"]
    assert offers("/image z.png .h") == ["/image z.png .hidden.png"]
    assert offers("/load tr") == ["/load trip"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_completed_path_is_the_path_that_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my folder"
    folder.mkdir()
    (folder / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    (line,) = offers("/image ~/my")
    assert offers(line) == [f"/image {quoted(f'~/my folder/{name}')}"]
    assert slash.words(offers(line)[0].removeprefix("/image ")) == [f"~/my folder/{name}"]


@pytest.mark.parametrize("path", ODD_NAMES)
def test_half_a_quoted_path_means_its_beginning(path: str) -> None:
    assert unquoted(quoted(path, is_open=True)) == f"{path}/"
    assert slash.words(quoted(path)) == [path]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_dropped_image_is_known_however_the_terminal_quotes_it(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.touch()
    escaped = "".join(char if char.isalnum() or char in "/._-" else f"\\{char}" for char in str(file))
    for line in (shlex.quote(str(file)), f"{shlex.quote(str(file))} ", escaped, file.as_uri()):
        assert dropped_image(line) == str(file), line


@pytest.mark.parametrize(
    "line", ["", "/image x.png", "what is /tmp/x.png", "x.png", "'", "/tmp/none.png", "file://"]
)
def test_other_lines_are_no_dropped_images(line: str) -> None:
    assert dropped_image(line) is None
