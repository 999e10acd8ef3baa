"""`ghostvis chat` as a person meets it: a real process in a real terminal."""

import random
import re
import shlex
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from PIL import Image

from ghostvis_cli import demo
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.prompt import Message
from tests.chat.window import CTRL_C, CTRL_D, ENTER, TAB, Window, chat
from tests.commands.processes import at, hanging, saying, scripted
from tests.engines.serving import Recorder, eventually, running

IMAGES = Path(demo.__file__).parent
RED_CIRCLE, THREE_SHAPES = IMAGES / "red-circle.png", IMAGES / "three-shapes.jpg"
GREEDY = ("--temperature", "0", "--no-preview")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture(scope="module")
def demo_url() -> Iterator[str]:
    """The built-in model behind a local server: one load for all tests."""
    from ghostvis_cli.engines.factory import make_engine
    from ghostvis_cli.profile import resolve
    from ghostvis_cli.serve.settings import Served

    async def load() -> Any:
        engine = await make_engine(resolve(None, flags={"model.source": "demo"}).profile)
        return Served(engine, engine.tokenizer)

    with running(load=load) as server:
        assert server.ready.wait(60)
        yield server.url


def with_server(server: Any, *args: str) -> list[str]:
    return ["--base-url", server.url, "--set", "engine.retries=0", "--no-preview", *args]


def with_script(server: Any, *args: str) -> list[str]:
    """For servers that know OpenAI's fields alone."""
    return [*at(server), "--top-k", "0", *args]


def last_turn(state: Path) -> dict[str, Any]:
    """The newest message with its reply, as it lies on disk."""
    from ghostvis_cli.chat.store import SESSION, read_file
    from ghostvis_cli.image_limits import DEFAULT_LIMITS

    (file,) = (state / "chats").glob(f"*/{SESSION}")
    turn = read_file(file, DEFAULT_LIMITS).turns[-1]
    return {"text": turn.text, "reply": turn.reply.text if turn.reply else None}


# Images


def test_an_image_is_still_known_two_turns_later_and_beside_a_second_one(demo_url: str, state: Path) -> None:
    with chat("--base-url", demo_url, *GREEDY, state=state) as window:
        assert "attached: red-circle.png 320x320" in window.ask(f"/image {RED_CIRCLE}")
        assert window.ask("What is in this picture?") == "A red circle on a white background."
        assert window.ask("Is there a star?") == "No, there is no star."
        assert window.ask("What colour is it?") == "It is red."
        window.ask(f"/image {THREE_SHAPES}")
        assert "[three-shapes.jpg 400x400]" in window.text
        assert window.ask("How many shapes are there?") == "There are three shapes."
        assert window.ask("What was in the first picture?") == "A red circle on a white background."


def test_the_model_loads_in_the_process_itself_while_the_message_is_typed(state: Path) -> None:
    with chat("--source", "demo", "-i", str(RED_CIRCLE), *GREEDY, "--stats", state=state) as window:
        window.prompts()
        assert window.ask("What is in this picture?").startswith("A red circle on a white background.\n")
        assert re.search(r"\nttft \d+ ms · .*75 \+ 8 tokens · 64 image · 0 cached\n", window.text)
        window.until(
            lambda: re.search(r"vlm_tiny · 83 of 10,240 tokens · 0 cached", window.bottom), "the bar"
        )


def test_undo_and_regen_ask_again_with_the_same_image(demo_url: str, state: Path) -> None:
    with chat("--base-url", demo_url, *GREEDY, "-i", str(RED_CIRCLE), state=state) as window:
        first = window.ask("What is in this picture?")
        assert window.ask("/regen") == first
        assert window.ask("How many shapes are there?") == "There is one shape."
        assert window.ask("/undo") == "taken back: How many shapes are there?"
        assert last_turn(state)["text"] == "What is in this picture?"


@pytest.mark.parametrize(
    "name", ['it\'s a "photo".png', "two  blanks.png", "résumé (1).png", "$HOME `x`.png"]
)
def test_tab_completes_any_name_so_that_it_is_found(name: str, state: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "a.txt").touch()
    with running() as server, chat(*with_server(server), state=state, cwd=folder) as window:
        window.prompts()
        window.keys("/image ", TAB)
        window.shows("a.txt")  # the menu: images, then folders, then the rest
        window.keys(TAB, ENTER, ENTER)
        window.shows("8x8]")


def test_a_file_dropped_on_the_window_is_attached_if_one_says_so(state: Path) -> None:
    # In a folder of a short name: the window would break a long one anywhere.
    with (
        TemporaryDirectory() as folder,
        running() as server,
        chat(*with_server(server), state=state) as window,
    ):
        path = Path(folder, "my photo.png")
        Image.new("RGB", (8, 8)).save(path)
        window.prompts()
        window.paste(f"{shlex.quote(str(path))} ")
        window.keys(ENTER)
        window.shows("Attach my photo.png? [Y/n]")
        window.keys(ENTER)
        window.shows("[my photo.png 8x8]")
        window.prompts()
        window.paste(str(path).replace(" ", "\\ "))
        window.keys(ENTER)
        window.shows("Attach my photo.png? [Y/n]", times=2)
        window.keys("n", ENTER)
        window.shows("\\ photo.png", times=2)  # a message like any other: the model repeats it


def test_images_that_are_missing_or_broken_cost_a_line_each(state: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(RED_CIRCLE.read_bytes()[:300])
    with running() as server, chat(*with_server(server), state=state, cwd=tmp_path) as window:
        assert "error: missing.png:" in window.ask("/image missing.png")
        assert "error: broken.png: broken or truncated PNG" in window.ask("/image broken.png")
        assert window.ask("still here") == "still here"


def test_an_attached_image_is_shown_in_two_pixels_a_character(state: Path) -> None:
    with running() as server, chat("--base-url", server.url, state=state) as window:
        assert window.ask(f"/image {RED_CIRCLE}").count("▀" * 24) == 12


# Replies


def test_ctrl_c_stops_the_reply_keeps_the_part_and_frees_the_engine(state: Path) -> None:
    engine, moments = FakeEngine(delay_s=0.002, context_tokens=100_000), random.Random(8)
    words = [f"word{n}" for n in range(1000)]
    with running(engine) as server, chat(*with_server(server, "--max-tokens", "1000"), state=state) as window:
        window.prompts()
        for number in range(20):
            window.paste(f"round{number} {' '.join(words)}")
            stop_the_reply(window, engine, number, moments.randrange(60))
        kept = last_turn(state)["reply"]
        assert kept and f"round19 {' '.join(words)}".startswith(kept) and len(kept.split()) < len(words)
        assert window.ask("and now") == "and now"


def stop_the_reply(window: Window, engine: FakeEngine, number: int, moment: int) -> None:
    """Send the message and stop the answer after so many words. `number` replies were stopped before."""
    window.keys(ENTER)
    window.until(lambda: not window.is_reading and engine.running, "the reply")
    seen = len(window.raw)
    window.until(lambda: window.raw.count("word", seen) >= moment, f"{moment} words")
    window.keys(CTRL_C)
    window.shows("stopped", times=number + 1)
    window.until(lambda: window.is_reading, "the next line")
    eventually(lambda: engine.running == 0 and engine.aborted == number + 1)
    window.keys(CTRL_C)  # where no word came, the message stands on the line again
    window.prompts()


def test_a_ctrl_c_right_behind_enter_is_not_lost(state: Path) -> None:
    with running() as server, chat(*with_server(server), state=state) as window:
        window.prompts()
        window.keys("hello", ENTER, CTRL_C)
        window.shows("stopped")
        window.prompts("hello")


def test_an_idle_ctrl_c_clears_the_line_and_a_second_one_says_how_to_leave(state: Path) -> None:
    with running() as server, chat(*with_server(server), state=state) as window:
        window.prompts()
        window.keys("half a thought")
        window.prompts("half a thought")
        window.keys(CTRL_C)
        window.prompts()
        assert "leaves" not in window.text
        window.keys(CTRL_C)
        window.shows("Ctrl-D or /quit leaves")
        window.keys(CTRL_D)
        assert window.ends() == 0


@pytest.mark.parametrize("columns", [100, 40])
def test_a_window_may_change_while_a_reply_is_written(columns: int, state: Path) -> None:
    words = [f"w{n:03}" for n in range(200)]
    with running(FakeEngine(delay_s=0.002)) as server, chat(*with_server(server), state=state) as window:
        window.prompts()
        window.paste(" ".join(words))
        window.keys(ENTER)
        window.until(lambda: not window.is_reading, "the reply")
        before = len(window.raw)
        window.until(lambda: "w040" in window.raw[before:], "the 40th word")
        window.resize(columns, 24)
        after = len(window.raw)
        window.until(lambda: "w199" in window.raw[before:], "the last word")
        window.prompts()
        reply = window.raw[before : window.raw.index("w199", before) + 4]
        assert re.findall(r"w\d{3}", reply) == words
        assert "w120" in window.raw[after:]  # most of it came after the change
        late = window.raw[window.raw.index("w120", before) : window.raw.index("w199", before)].split("\r\n")[
            1:-1
        ]
        assert {len(line) for line in late} == {columns // 5 * 5 - 1}


def test_two_hundred_pasted_lines_are_one_message(state: Path) -> None:
    text = "\n".join(f"line {number}\tof it" for number in range(200))
    engine = Recorder()
    with running(engine) as server, chat(*with_server(server), state=state) as window:
        window.prompts()
        window.paste(text)
        window.keys(ENTER)
        eventually(lambda: len(engine.requests) > 1)  # the first is the server's own, to warm up
        assert engine.requests[-1].messages == (Message.of("user", text),)


def test_five_thousand_lines_scroll_by_whole(state: Path) -> None:
    told = [f"line {number}\n" for number in range(5000)]
    reply = saying(*("".join(told[n : n + 50]) for n in range(0, 5000, 50)))
    with scripted(reply) as server, chat(*with_script(server), state=state) as window:
        assert window.ask("go on").splitlines() == [line.rstrip() for line in told]


def test_a_reply_is_markdown_unless_raw_and_gives_the_terminal_no_orders(state: Path) -> None:
    reply = "# Title\n\n* **bold** \x1b[2J\x1b]0;owned\x07[/INST] [red]x[/red] \u202egnp.exe\n"
    for args, shown in (((), "• bold [2J]0;owned[/INST]"), (("--raw",), "* **bold** [2J]0;owned[/INST]")):
        with scripted(saying(*reply)) as server, chat(*with_script(server), *args, state=state) as window:
            assert f"{shown} [red]x[/red] gnp.exe" in window.ask("hi")
            assert "owned\x07" not in window.raw and "\u202e" not in window.raw


def test_a_spinner_turns_until_the_first_word_and_leaves_no_trace(state: Path) -> None:
    with scripted(hanging()) as server, chat(*with_script(server), state=state) as window:
        window.prompts()
        window.type("hello")
        window.until(lambda: re.fullmatch(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] \d+ s", window.current), "the spinner")
        window.keys(CTRL_C)
        window.shows("stopped")
        window.prompts("hello")
        assert not re.search(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", window.text)


def test_nothing_typed_during_a_reply_is_swallowed_however_long(state: Path) -> None:
    engine, words = FakeEngine(delay_s=0.01, context_tokens=100_000), " ".join(f"w{n}" for n in range(150))
    with running(engine) as server, chat(*with_server(server), state=state) as window:
        window.prompts()
        window.type(words)
        window.shows("w9 w10", times=2)
        window.keys("a" * 5000, "b", ENTER, CTRL_D)
        assert window.ends() == 0
    assert last_turn(state)["text"] == "a" * 5000 + "b"


def test_what_is_typed_during_a_reply_stands_on_the_next_line(state: Path) -> None:
    with scripted(hanging("begun ")) as server, chat(*with_script(server), state=state) as window:
        window.prompts()
        window.type("hello")
        window.until(lambda: not window.is_reading, "the reply")
        window.keys("and then")
        window.child.kill(signal.SIGINT)  # Ctrl-C would have the terminal throw away what was typed
        window.shows("stopped")
        window.until(lambda: window.current.endswith("and then"), "what was typed")
        assert window.text.count("and then") == 1


# Faults


def test_a_dead_server_costs_a_line_and_its_return_goes_on_with_everything(state: Path) -> None:
    with ExitStack() as alive:
        server = alive.enter_context(running())
        port = int(server.url.rpartition(":")[2])
        with chat(*with_server(server), state=state) as window:
            assert window.ask("one") == "one"
            alive.close()
            window.prompts()
            window.type("two")
            window.shows("Connection refused")
            window.prompts("two")
            assert window.text.count("error:") == 1
            engine = Recorder()
            with running(engine, port=port):
                window.keys(ENTER)
                window.shows("two", times=3)
                assert [message.text for message in engine.requests[-1].messages] == ["one", "one", "two"]


def test_a_conversation_that_grew_too_long_goes_on_without_its_oldest_turns(state: Path) -> None:
    engine = Recorder(context_tokens=60)
    with running(engine) as server, chat(*with_server(server, "--max-tokens", "20"), state=state) as window:
        window.ask("a " * 15)
        window.ask("b " * 5)
        window.prompts()
        window.type("c " * 10)
        window.shows("[Y/n]")
        window.keys(ENTER)
        window.shows("c c c c c c c c c c", times=2)
        assert not any(message.text.startswith("a ") for message in engine.requests[-1].messages)


def test_a_model_that_can_not_be_found_ends_the_chat_before_it_began(state: Path) -> None:
    with chat("--source", "demo", "--model-tag", "nope", state=state) as window:
        assert window.ends() == 4
        assert "no sft checkpoint tagged 'nope'" in window.text


# Coming and going


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("replying", [False, True])
def test_a_signal_saves_and_leaves_with_its_code(
    number: signal.Signals, code: int, replying: bool, state: Path
) -> None:
    with (
        scripted(saying("first"), hanging("second begins ")) as server,
        chat(*with_script(server), state=state) as window,
    ):
        assert window.ask("one") == "first"
        if replying:
            window.prompts()
            window.type("two")
            window.shows("second")
        window.child.kill(number)
        assert window.ends() == code
        wanted = {"text": "two", "reply": "second begins "} if replying else {"text": "one", "reply": "first"}
        assert last_turn(state) == wanted


def test_a_chat_goes_on_after_it_was_left(demo_url: str, state: Path) -> None:
    with chat("--base-url", demo_url, *GREEDY, "-i", str(RED_CIRCLE), state=state) as window:
        window.ask("What is in this picture?")
        window.ask("/save")
        window.keys(CTRL_D)
        assert window.ends() == 0
    with chat("--base-url", demo_url, *GREEDY, "--continue", state=state) as window:
        window.prompts()
        assert "> What is in this picture?\nA red circle on a white background." in window.text
        assert window.ask("What colour is it?") == "It is red."


def test_typed_lines_come_back_from_a_file_that_only_its_owner_reads(state: Path) -> None:
    with running() as server:
        with chat(*with_server(server), state=state) as window:
            window.ask("something secret")
        with chat(*with_server(server), state=state) as window:
            window.prompts()
            window.keys("\x1b[A")
            window.prompts("something secret")
    (file,) = [path for path in state.iterdir() if path.is_file()]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_no_history_writes_none(state: Path) -> None:
    with running() as server, chat(*with_server(server, "--no-history"), state=state) as window:
        window.ask("something secret")
        assert not [path for path in state.iterdir() if path.is_file()]


def test_edit_opens_the_editor_and_answers_the_changed_message(state: Path) -> None:
    with running() as server, chat(*with_server(server), state=state, EDITOR="sed -i s/one/two/") as window:
        window.ask("one hat")
        assert window.ask("/edit") == "two hat"
        assert last_turn(state) == {"text": "two hat", "reply": "two hat"}


def test_paste_attaches_an_image_or_inserts_text(state: Path, tmp_path: Path) -> None:
    tools, clip = tmp_path / "tools", tmp_path / "clip"
    tools.mkdir()
    script = f"""#!/bin/sh
[ "$1" = --list-types ] && {{ [ -e {clip}.png ] && echo image/png; exit; }}
[ "$1" = --type ] && exec cat {clip}.png
exec cat {clip}.txt
"""
    (tools / "wl-paste").write_text(script)
    (tools / "wl-paste").chmod(0o755)
    Path(f"{clip}.txt").write_text("from afar")
    env: Any = {"PATH": f"{tools}:/usr/bin:/bin", "WAYLAND_DISPLAY": "wayland-0"}
    with running() as server, chat(*with_server(server), state=state, **env) as window:
        window.prompts()
        window.type("/paste")
        window.prompts("from afar")
        window.keys(CTRL_C)
        Path(f"{clip}.png").write_bytes(RED_CIRCLE.read_bytes())
        window.prompts()
        assert "attached: clipboard 320x320" in window.ask("/paste")


def test_the_statistics_of_a_reply_are_not_part_of_it(state: Path) -> None:
    with running() as server, chat(*with_server(server, "--stats"), state=state) as window:
        assert re.fullmatch(r"a word\nttft \d+ ms · .*2 \+ 2 tokens · 0 cached", window.ask("a word"))


def test_nothing_heavy_is_loaded_before_the_first_line_is_typed(state: Path) -> None:
    program = (
        "import sys, atexit\n"
        "from ghostvis_cli.cli.app import build\n"
        "heavy = {'torch', 'PIL', 'numpy', 'transformers', 'pydantic'}\n"
        "atexit.register(lambda: print('LOADED', sorted(heavy & set(sys.modules))))\n"
        "build()(sys.argv[1:])\n"
    )
    with (
        running() as server,
        chat(*with_server(server), state=state, command=(sys.executable, "-c", program, "chat")) as window,
    ):
        window.prompts()
        window.keys(CTRL_D)
        assert window.ends() == 0
        assert "LOADED []" in window.text


def test_a_terminal_without_colours_gets_none(state: Path) -> None:
    with (
        scripted(saying("**bold** `code`")) as server,
        chat(*with_script(server), state=state, NO_COLOR="1") as window,
    ):
        assert window.ask("hi") == "**bold** `code`"
        assert not re.search(r"\x1b\[[\d;]*3[1-7]", window.raw)
