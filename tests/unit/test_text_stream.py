"""Streaming text: whole characters, and never any part of a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from ghostvis_cli.engines.text_stream import TextStream


def pieces(content: bytes, sizes: list[int]) -> list[bytes]:
    """Content cut at these sizes, over and over."""
    found, at = [], 0
    while at < len(content):
        for size in sizes or [1]:
            found.append(content[at : at + size])
            at += size
    return found


@given(st.text(), st.lists(st.integers(1, 5)))
def test_every_cut_of_the_bytes_gives_the_text_in_whole_characters(text: str, sizes: list[int]) -> None:
    stream = TextStream(())
    shown = [stream.push(piece) for piece in pieces(text.encode(), sizes)] + [stream.finish()]
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown) or "\ufffd" in text


@given(
    st.text("ab<|>"),
    st.lists(st.text("ab<|>", min_size=1), min_size=1, max_size=3),
    st.lists(st.integers(1, 4)),
)
def test_text_ends_where_the_first_stop_string_completes(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    stream = TextStream(stops)
    shown = ""
    for piece in pieces(text.encode(), sizes):
        shown += stream.push(piece)
        assert not any(stop in shown for stop in stops)
        if stream.stopped:
            break
    shown += stream.finish()
    assert text.startswith(shown)
    assert stream.stopped == any(stop in text for stop in stops)
    if not stream.stopped:
        assert shown == text


def test_a_beginning_of_a_stop_string_is_held_back_and_released() -> None:
    stream = TextStream(("END",))
    assert stream.push(b"the E") == "the "
    assert stream.push(b"N") == ""
    assert stream.push(b"ough") == "ENough"


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    stream = TextStream(())
    assert stream.push(b"a\xffb") == "a\ufffdb"
    assert stream.push(b"\xe2\x82") == ""
    assert stream.finish() == "\ufffd"


def test_nothing_comes_after_a_stop_string() -> None:
    stream = TextStream(("x",))
    assert stream.push(b"abxcd") == "ab"
    assert (stream.push(b"more"), stream.finish()) == ("", "")
