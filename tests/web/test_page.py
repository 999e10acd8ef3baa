"""The page in a real browser. What every test here holds: no error on the console, no request to another host."""

import base64
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.chat.window import chat
from tests.commands.processes import at, environment, hanging, run, saying, scripted, until
from tests.engines.scripted import Reply, ScriptedServer
from tests.web.browsing import CIRCLE, SHAPES, Open, expect
from tests.web.pages import DEMO, Page, page

# --- with the built-in model


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with page(tmp_path_factory.mktemp("demo"), *DEMO, "--session", "trip") as started:
        yield started


def test_a_conversation_of_six_turns_goes_on_after_a_reload_and_at_a_terminal(demo: Page, open_: Open):
    shown = open_(demo)
    shown.ask("What can you do?")
    shown.bring("drop", SHAPES)
    shown.ask("What is in this picture?")
    assert "blue square" in shown.replies.last.inner_text()
    assert shown.captions.all_inner_texts() == ["three-shapes.jpg 400x400 · all of it · 64 tokens"]
    shown.ask("Which shapes are there?")
    shown.bring("paste", CIRCLE)
    shown.ask("What is in this picture?")
    assert "red circle" in shown.replies.last.inner_text()
    shown.ask("What color is it?")
    shown.ask("Who are you?")
    said = r"ttft \d+ ms · (\d+ tok/s · )?\d+ \+ \d+ tokens · 128 image · \d+ cached"
    assert re.fullmatch(said, shown.statistics.last.inner_text())
    assert "of 10,240 tokens" in shown.tab.locator("#status").inner_text()
    before = shown.texts()
    shown.tab.reload()
    shown.statistics.nth(5).wait_for()
    assert shown.texts() == before

    terminal = {"env": environment(GHOSTVIS_STATE_DIR=str(demo.state)), "input": b"Which shapes are there?\n"}
    assert run("chat", "--session", "trip", *DEMO, **terminal).returncode == 10  # the page has it
    shown.renew()
    assert run("chat", "--session", "trip", *DEMO, **terminal).returncode == 0
    shown.choose("Session", "trip")
    expect(shown.statistics).to_have_count(7)
    assert shown.texts()[: len(before)] == before


def test_sampling_says_where_it_comes_from_and_refuses_what_is_out_of_range(demo: Page, open_: Open):
    shown = open_(demo)
    shown.menu()
    field = shown.tab.get_by_label("temperature")
    expect(field).to_have_value("0")
    expect(shown.tab.get_by_text("flag --temperature")).to_be_visible()
    field.fill("0.5")
    field.press("Enter")
    expect(shown.tab.get_by_text("set in this chat")).to_be_visible()
    field.fill("-1")
    field.press("Enter")
    expect(shown.notices).to_contain_text("temperature")
    expect(field).to_have_value("0.5")


def test_a_session_is_renamed_and_deleted(demo: Page, open_: Open):
    shown = open_(demo)
    shown.renew()
    shown.ask("What can you do?")
    shown.menu()
    name = shown.tab.get_by_label("Name")
    before = name.input_value()
    name.fill("../up")
    name.press("Enter")
    expect(shown.notices).to_contain_text("is no name of a session")
    expect(name).to_have_value(before)
    name.fill("walk-2")
    name.press("Enter")
    expect(name).to_have_value("walk-2")
    until(lambda: (demo.state / "chats" / "walk-2" / "session.jsonl").exists())
    shown.tab.get_by_role("button", name="Delete", exact=True).click()
    shown.tab.get_by_role("button", name="Delete it").click()
    expect(shown.statistics).to_have_count(0)
    assert not (demo.state / "chats" / "walk-2").exists()


def test_a_conversation_is_saved_as_markdown_json_and_html_by_a_click(demo: Page, open_: Open):
    shown = open_(demo)
    shown.renew()
    shown.bring("drop", CIRCLE)
    shown.ask("What is in this picture?")
    image = base64.b64encode(CIRCLE.read_bytes()).decode()
    answer = shown.replies.last.inner_text()
    assert "red circle" in answer
    messages = json.loads(shown.export("json"))["messages"]
    assert messages[0]["content"][0]["image_url"]["url"] == f"data:image/png;base64,{image}"
    assert messages[1] == {"role": "assistant", "content": answer}
    for style in ("md", "html"):
        saved = shown.export(style)
        assert image in saved
        assert saved.index("What is in this picture?") < saved.index(answer)


def test_a_session_that_a_terminal_has_open_is_refused_and_the_conversation_stays(demo: Page, open_: Open):
    shown = open_(demo)
    shown.renew()
    shown.ask("What can you do?")
    with chat("--session", "held", *DEMO, state=demo.state) as terminal:
        terminal.ask("Who are you?")
        shown.tab.reload()  # its list has the new session then
        shown.statistics.wait_for()
        shown.choose("Session", "held")
        expect(shown.notices).to_contain_text("another chat has the session held open")
        expect(shown.asked).to_have_text(["What can you do?"])
        expect(shown.tab.get_by_label("Session", exact=True)).not_to_have_value("held")
    shown.choose("Session", "held")
    expect(shown.asked).to_have_text(["Who are you?"])


def test_on_a_phone_nothing_is_wider_than_the_window_with_twenty_images(demo: Page, open_: Open):
    shown = open_(demo, 390, 844)
    shown.renew()
    shown.tab.set_input_files("#box input[type=file]", [SHAPES, CIRCLE] * 10)
    expect(shown.tab.locator("#box .thumbnail-item")).to_have_count(20)
    shown.ask("What is in this picture?")
    assert shown.captions.count() == 20
    assert shown.tab.evaluate("document.documentElement.scrollWidth") <= 390


# --- with a server that says what the test wants


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A page on a server with these replies."""
    with ExitStack() as stack:

        def begin(*replies: Reply, **variables: str) -> tuple[Page, ScriptedServer]:
            server = stack.enter_context(scripted(*replies))
            return stack.enter_context(page(tmp_path, *at(server), **variables)), server

        yield begin


def test_stop_regenerate_edit_and_undo_do_what_they_do_at_a_terminal(talk: Any, open_: Open):
    served, server = talk(
        saying("one"), hanging("two", " and"), saying("three"), saying("four"), saying("five")
    )
    shown = open_(served)
    shown.ask("first <b>")
    shown.type("second")
    expect(shown.replies.last).to_have_text("two and")
    shown.tab.locator("#box .stop-button").click()
    expect(shown.statistics.last).to_contain_text("stopped")
    shown.press("Retry")
    expect(shown.replies.last).to_have_text("three")
    shown.ask("third")
    shown.press("Undo")
    expect(shown.asked).to_have_count(2)
    shown.edit_first("first &lt;i> changed")
    expect(shown.replies).to_have_text(["five"])
    assert server.posts[-1].json["messages"] == [{"role": "user", "content": "first <i> changed"}]


def test_a_tab_that_shows_what_is_past_changes_nothing_and_catches_up(talk: Any, open_: Open):
    served, server = talk(saying("one"), saying("two"), saying("three"))
    behind, ahead = open_(served), open_(served)
    behind.ask("first")
    ahead.tab.reload()
    ahead.statistics.wait_for()
    ahead.renew()
    ahead.ask("another subject")
    behind.box.fill("half a")
    behind.edit_first("first, changed")
    expect(behind.notices).to_contain_text("went on in another tab")
    expect(behind.asked).to_have_text(["another subject"])
    expect(behind.box).to_have_value("first, changed\n\nhalf a")  # nothing typed is lost
    assert len(server.posts) == 2
    behind.ask("and now")
    assert [each["content"] for each in server.posts[-1].json["messages"]][::2] == [
        "another subject",
        "and now",
    ]
    ahead.press("Undo")
    expect(ahead.notices).to_contain_text("went on in another tab")
    expect(ahead.statistics).to_have_count(2)


def test_what_there_is_to_say_to_one_tab_is_not_said_in_another(talk: Any, open_: Open):
    served, _ = talk(hanging("once", " upon"))
    asking, looking = open_(served), open_(served)
    looking.type("/show")
    expect(looking.notices).to_contain_text("profile: default")
    asking.type("Tell")
    expect(asking.replies.last).to_have_text("once upon")
    looking.tab.reload()
    expect(looking.replies.last).to_have_text("once upon")
    looking.menu()
    looking.tab.get_by_role("button", name="New", exact=True).click()
    expect(looking.notices).to_contain_text("a reply is still on its way")
    asking.tab.locator("#box .stop-button").click()
    expect(asking.notices).to_contain_text("stopped")
    expect(asking.notices).not_to_contain_text("on its way")
    expect(looking.statistics.last).to_contain_text("stopped")


def test_a_system_message_that_is_typed_while_a_reply_comes_is_not_lost(talk: Any, open_: Open):
    served, server = talk(hanging("once", " upon"), saying("two"))
    shown = open_(served)
    shown.type("Tell")
    expect(shown.replies.last).to_have_text("once upon")
    shown.menu()
    field = shown.tab.get_by_label("System message")
    field.fill("You are careful.")
    shown.tab.get_by_label("temperature").fill("0.5")
    shown.tab.get_by_label("temperature").press("Enter")
    expect(shown.notices).to_contain_text("a reply is still on its way")
    expect(shown.tab.get_by_label("temperature")).not_to_have_value("0.5")
    shown.tab.locator("#box .stop-button").click()
    expect(shown.statistics.last).to_contain_text("stopped")
    expect(field).to_have_value("You are careful.")
    field.focus()
    field.blur()
    shown.ask("Go on")
    assert server.posts[-1].json["messages"][0] == {"role": "system", "content": "You are careful."}


def test_what_is_typed_after_enter_stays_in_the_box(talk: Any, open_: Open):
    served, server = talk(hanging("once", " upon"), saying("two"))
    shown = open_(served)
    shown.type("first")
    expect(shown.box).to_have_value("")
    shown.box.press_sequentially("second")
    expect(shown.replies.last).to_have_text("once upon")
    shown.tab.locator("#box .stop-button").click()
    expect(shown.statistics.last).to_contain_text("stopped")
    shown.tab.wait_for_timeout(500)  # all has been settled
    expect(shown.box).to_have_value("second")
    shown.box.press("Enter")
    expect(shown.replies.last).to_have_text("two")
    assert [post.json["messages"][-1]["content"] for post in server.posts] == ["first", "second"]


def test_what_was_refused_goes_back_into_the_box_before_what_was_typed_since():
    from ghostvis_cli.web.page import Tab

    def typed(text: str, *files: str) -> dict[str, Any]:
        return {"text": text, "files": list(files)}

    tab = Tab(refused=[typed("ok", "a.png"), typed("and this?")])
    assert tab.settle(typed("okay"), typed("")) == typed("ok\n\nand this?\n\nokay", "a.png")
    assert "value" not in tab.settle(typed("okay"), typed(""))  # once
    tab.refused = [typed("hi there")]
    assert tab.settle(typed(""), typed("hi")) == typed("hi\n\nhi there")  # beside a draft
    assert Tab().settle(typed("hi, again"), typed("hi")) == typed("hi, again")  # which is there already


def test_a_message_that_comes_during_a_reply_is_given_back(talk: Any, open_: Open):
    served, server = talk(hanging("once", " upon"), saying("two"))
    shown = open_(served)
    shown.type("first")
    expect(shown.replies.last).to_have_text("once upon")
    shown.type("second")
    expect(shown.notices).to_contain_text("a reply is still on its way")
    expect(shown.box).to_have_value("second")
    shown.tab.locator("#box .stop-button").click()
    expect(shown.statistics.last).to_contain_text("stopped")
    shown.box.press("Enter")
    expect(shown.replies.last).to_have_text("two")
    assert [post.json["messages"][-1]["content"] for post in server.posts] == ["first", "second"]


def test_enter_twice_sends_a_message_once(talk: Any, open_: Open):
    served, server = talk(saying("one"), saying("two"))
    shown = open_(served)
    shown.type("first")
    shown.box.press("Enter")
    expect(shown.replies.last).to_have_text("one")
    shown.tab.wait_for_timeout(500)  # whatever the second one did, it has been done
    shown.ask("second")
    assert [post.json["messages"][-1]["content"] for post in server.posts] == ["first", "second"]


def test_help_names_what_can_be_typed_in_the_page(talk: Any, open_: Open):
    shown = open_(talk()[0])
    shown.type("/help")
    expect(shown.notices).to_contain_text("/undo [N]")
    expect(shown.notices).not_to_contain_text("/save")
    shown.type("/save x.md")
    expect(shown.notices).to_contain_text("/save is for terminals")
    expect(shown.box).to_have_value("/save x.md")
    shown.type("/help save")
    expect(shown.notices).to_contain_text("there is no command /save")


def test_a_message_that_a_dead_server_did_not_answer_stands_in_the_box_again(talk: Any, open_: Open):
    served, server = talk(saying("one"), Reply((), end="reset"), saying("two"))
    shown = open_(served)
    shown.ask("first")
    shown.bring("drop", SHAPES)
    shown.type("second")
    expect(shown.notices).to_contain_text("closed the connection")
    expect(shown.box).to_have_value("second")
    expect(shown.tab.locator("#box .thumbnail-item")).to_have_count(1)
    shown.menu()
    shown.tab.get_by_label("temperature").fill("0.5")
    shown.tab.get_by_label("temperature").press("Enter")
    expect(shown.tab.get_by_text("set in this chat")).to_be_visible()
    expect(shown.box).to_have_value("second")  # once
    shown.type("")  # loses nothing
    expect(shown.notices).to_contain_text("the message is empty")
    expect(shown.tab.locator("#box .thumbnail-item")).to_have_count(1)
    shown.type("second")
    expect(shown.replies.last).to_have_text("two")
    assert len(server.posts[-1].json["messages"][-1]["content"]) == 2


def test_what_is_typed_before_a_message_is_there_stays_in_the_box(talk: Any, open_: Open):
    shown = open_(talk(saying("one"))[0])
    shown.bring("drop", SHAPES)

    def go_on(sent: Any) -> None:
        shown.box.press_sequentially(" And")
        sent.continue_()

    shown.tab.route("**/queue/join*", go_on, times=1)
    shown.ask("What?")
    expect(shown.asked).to_have_text(["What?"])
    expect(shown.box).to_have_value(" And")
    expect(shown.tab.locator("#box .thumbnail-item")).to_have_count(0)


def test_a_draft_is_put_into_the_box_once_and_goes_when_it_is_sent(talk: Any, open_: Open):
    dead = Reply((), end="reset")
    served, _ = talk(saying("one"), dead, dead, saying("two"))
    shown = open_(served)
    shown.ask("first")
    shown.type("sceond")
    expect(shown.notices).to_contain_text("closed the connection")
    shown.tab.reload()
    expect(shown.box).to_have_value("sceond")
    shown.box.fill("The second")
    shown.menu()
    shown.tab.get_by_label("temperature").fill("0.5")
    shown.tab.get_by_label("temperature").press("Enter")
    expect(shown.tab.get_by_text("set in this chat")).to_be_visible()
    expect(shown.box).to_have_value("The second")
    shown.type("The second")
    expect(shown.notices).to_contain_text("closed the connection")
    expect(shown.box).to_have_value("The second")
    shown.press("Retry")
    expect(shown.replies).to_have_text(["one", "two"])
    expect(shown.asked).to_have_text(["first", "The second"])
    expect(shown.box).to_have_value("")


def test_an_edit_that_a_dead_server_did_not_answer_takes_nothing_back(talk: Any, open_: Open):
    served, server = talk(
        saying("one"), saying("two"), saying("three"), Reply((), end="reset"), saying("four")
    )
    shown = open_(served)
    for text in ("first", "second", "third"):
        shown.ask(text)
    shown.edit_first("first, changed")
    expect(shown.notices).to_contain_text("closed the connection")
    expect(shown.asked).to_have_text(["first", "second", "third"])
    expect(shown.replies).to_have_text(["one", "two", "three"])
    expect(shown.box).to_have_value("first, changed")
    shown.edit_first("first, again")
    expect(shown.replies).to_have_text(["four"])
    assert server.posts[-1].json["messages"] == [{"role": "user", "content": "first, again"}]


def test_a_message_stopped_before_its_first_word_gives_its_images_back(talk: Any, open_: Open):
    shown = open_(talk(Reply((), silent=True))[0])
    shown.bring("drop", SHAPES)
    shown.type("What")
    expect(shown.asked).to_have_text(["What"])
    shown.box.fill("What is it?")  # begins as the message does
    shown.tab.locator("#box .stop-button").click()
    expect(shown.tab.locator("#box .thumbnail-item")).to_have_count(1)
    expect(shown.box).to_have_value("What is it?")
    expect(shown.asked).to_have_count(0)


def test_a_page_that_is_loaded_again_shows_the_reply_that_is_coming(talk: Any, open_: Open):
    served, _ = talk(hanging("once", " upon"))
    shown = open_(served)
    shown.type("Tell")
    expect(shown.replies.last).to_have_text("once upon")
    shown.tab.reload()
    expect(shown.replies.last).to_have_text("once upon")
    shown.tab.locator("#box .stop-button").click()
    expect(shown.statistics.last).to_contain_text("stopped")


def test_a_profile_changes_the_model_and_keeps_the_conversation(tmp_path: Path, talk: Any, open_: Open):
    profiles = tmp_path / "config" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "down.yaml").write_text(
        "engine: {kind: remote, base_url: 'http://127.0.0.1:9', retries: 0}\n"
    )
    served, server = talk(saying("one"), saying("two"), GHOSTVIS_CONFIG_DIR=str(tmp_path / "config"))
    shown = open_(served)
    shown.ask("first")
    shown.choose("Profile", "down")
    expect(shown.notices).to_contain_text("127.0.0.1:9")
    expect(shown.tab.get_by_label("Profile", exact=True)).not_to_have_value("down")
    shown.ask("second")
    assert shown.replies.all_inner_texts() == ["one", "two"]
    shown.choose("Profile", "demo")
    expect(shown.notices).to_contain_text("profile demo")
    expect(shown.tab.locator("#status")).to_contain_text("local")
    shown.ask("What can you do?")
    expect(shown.asked).to_have_text(["first", "second", "What can you do?"])
    assert shown.replies.count() == 3
    assert len(server.posts) == 2


# The last three are code to our reading of Markdown, and none to Gradio's.
HOSTILE = r"""<script>alert(1)</script> <img src=x onerror=alert(2)> <svg onload=alert(3)><circle r=9 /></svg>
[link](javascript:alert(4)) ![far](http://192.0.2.1/far.png) <iframe src=http://192.0.2.1></iframe>
<a href="http://192.0.2.1" onclick=alert(5)>go</a> <form action=http://192.0.2.1><button>send</button></form>
<style>body { display: none }</style> <details open ontoggle=alert(6)> $$\href{javascript:alert(7)}{x}$$

```mermaid
graph TD; A["<img src=http://192.0.2.1/a onerror=alert(8)>"] --> B; click A "javascript:alert(9)"
```

\`<img src=http://192.0.2.1/b onerror=alert(10)>\`

`
` <video src=http://192.0.2.1/c onerror=alert(11)> `

- list
  ```
<img src=http://192.0.2.1/d onerror=alert(12)>
"""
ELEMENTS = (
    "script, img, iframe, form, style, details, video, [onclick], [onload], [onerror], a[href^=javascript]"
)


def test_what_a_model_writes_never_becomes_html(talk: Any, open_: Open):
    served, _ = talk(saying(HOSTILE + "\x1b[31mred \u202eback"))
    shown = open_(served)
    shown.ask("Show me")
    reply = shown.replies.last
    expect(reply).to_contain_text("<script>alert(1)</script>")
    expect(reply).to_contain_text("graph TD")
    expect(reply.locator(ELEMENTS)).to_have_count(0)
    assert not {"\x1b", "\u202e"} & set(reply.inner_text())


def test_a_long_reply_in_markdown_is_shown_as_it_comes(talk: Any, open_: Open):
    words = [f"* **point {n}** with `code {n}`\n" for n in range(400)]
    served, _ = talk(saying(*words))
    shown = open_(served)
    shown.ask("List")
    expect(shown.replies.last.locator("li")).to_have_count(400)
    expect(shown.replies.last.locator("strong").last).to_have_text("point 399")


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Page]:
    with page(tmp_path, *DEMO, "--max-tokens", "10210") as started:
        yield started


def test_what_does_not_fit_is_said_and_sent_without_the_oldest_turns(full: Page, open_: Open):
    shown = open_(full)
    shown.ask("What can you do?")
    shown.type("Which shapes are there?")
    expect(shown.notices).to_contain_text("does not fit")
    expect(shown.box).to_have_value("Which shapes are there?")
    shown.tab.get_by_role("button", name="Leave out the oldest turns").click()
    expect(shown.statistics).to_have_count(2)
    expect(shown.box).to_have_value("")
