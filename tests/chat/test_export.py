"""A conversation for reading: whole, self-contained, and unable to do anything."""

import json
import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from ghostvis_cli import demo
from ghostvis_cli.chat.export import as_json, export, html, markdown
from ghostvis_cli.chat.session import Reply, Session
from ghostvis_cli.engines.base import Usage
from ghostvis_cli.images import from_bytes, load_image

RED = str(demo.EXAMPLES[0])
EVIL = "<script>alert(1)</script> <img src=x onerror=alert(1)> \"' & ![t](http://evil/track.png) \x1b]52;c;aGk=\x07"


def a_session(text: str = "What?", reply: str = "A red circle.", name: str = "red.png") -> Session:
    image = from_bytes(load_image(RED).data, name)
    session = Session(system="Be brief.", pending=[image])
    session.begin(text)
    session.answer(Reply(reply, "stop", Usage(75, 8, 0, 64), 8))
    session.begin("And?")
    session.answer(Reply("It is", "abort"))
    return session


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


KNOWN = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "section", "p", "div", "img", "footer"}


def test_html_shows_everything_and_holds_its_images() -> None:
    page = Page(html(a_session(), "Conversation with vlm_tiny"))
    for text in ("Conversation with vlm_tiny", "Be brief.", "What?", "A red circle.", "It is\n\n(stopped)"):
        assert text in page.text
    [image] = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["alt"] == "red.png" and (image["src"] or "").startswith("data:image/png;base64,")
    assert "11 text + 64 image prompt tokens" in page.text


def test_html_makes_no_markup_of_what_was_said() -> None:
    page = Page(html(a_session(EVIL, EVIL, EVIL), EVIL))
    assert {tag for tag, _ in page.tags} == KNOWN
    assert all(not any(name.startswith("on") for name in attributes) for _, attributes in page.tags)
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in page.text
    assert "default-src 'none'" in html(a_session(), "x")


@given(st.text(max_size=300))
def test_html_keeps_every_visible_character_and_nothing_becomes_a_tag(text: str) -> None:
    session = Session()
    session.begin("x" + text.encode(errors="replace").decode())
    page = Page(html(session, "t"))
    assert {tag for tag, _ in page.tags} == KNOWN - {"div", "img"}
    kept = "".join(char for char in session.turns[0].text if char.isprintable())
    assert kept in "".join(char for char in page.text if char.isprintable())


def test_markdown_keeps_markdown_and_neutralises_the_rest() -> None:
    text = markdown(a_session(reply=f"# Title\n\n* `<b>` in code\n\n```html\n<b>\n```\n{EVIL}"), "T")
    assert "* `<b>` in code" in text and "```html\n<b>\n```" in text
    outside = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    assert "<" not in outside and "&lt;script>" in outside and "\x1b" not in text
    assert [m[1][:5] for m in re.finditer(r"!\[[^\]]*\]\(([^)]*)", outside)] == ["data:"]


def test_markdown_closes_a_fence_that_the_model_left_open() -> None:
    session = a_session(reply="````py\nprint(1)\n```\nstill code")
    text = markdown(session, "T")
    assert "still code\n````\n\n## You\n\nAnd?" in text
    session = a_session(reply="~~~\n<b>\n~~~~ x\n~~~\n<i>")
    assert "~~~\n<b>\n~~~~ x\n~~~\n&lt;i>" in markdown(session, "T")


def test_an_image_s_name_can_not_leave_its_label() -> None:
    assert r"![a\](http://evil)\[.png](data:" in markdown(a_session(name="a](http://evil)[.png"), "T")


def test_json_can_be_sent_to_a_server_as_it_stands() -> None:
    whole = json.loads(as_json(a_session(EVIL), "T"))
    assert whole["schema_version"] == 1
    assert [message["role"] for message in whole["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    image, text = whole["messages"][1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,") and text["text"] == EVIL
    assert whole["tokens"] == {"prompt": 75, "image": 64, "cached": 0, "completion": 8}


def test_an_empty_conversation_can_be_exported() -> None:
    for style in ("md", "html"):
        assert "0 replies" in export(Session(), style, "T")
    assert json.loads(export(Session(), "json", "T"))["messages"] == []
