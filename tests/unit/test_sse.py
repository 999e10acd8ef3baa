"""Server-sent events: the same events come out however the bytes are cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostvis_cli.engines.sse import SSEParser

TEXT = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def parse(*pieces: bytes) -> list[str]:
    parser = SSEParser()
    return [event for piece in pieces for event in parser.feed(piece)]


@given(st.lists(st.lists(TEXT, min_size=1, max_size=3), max_size=5), LINE_ENDS, st.lists(st.integers(0, 400)))
def test_events_do_not_depend_on_where_the_bytes_are_cut(
    events: list[list[str]], line_end: str, cuts: list[int]
) -> None:
    lines = [[*(f"data: {line}" for line in event), ": a comment", ""] for event in events]
    stream = "".join(line + line_end for line in itertools.chain.from_iterable(lines)).encode()
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[start:end] for start, end in itertools.pairwise(edges)]
    assert parse(*pieces) == ["\n".join(event) for event in events]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", ["a"]),
        (b"data:a\n\n", ["a"]),
        (b"data:  a\n\n", [" a"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
        (b"data: a\rdata: b\r\r", ["a\nb"]),
        (b"data: a\r\ndata: b\r\n\r\n", ["a\nb"]),
        (b": keep-alive\n\ndata: a\n\n", ["a"]),
        (b"event: error\nid: 7\nretry: 10\ndata: a\n\n", ["a"]),
        (b"data\n\n", [""]),
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b"\n\n\n", []),
        (b"nonsense\n\n", []),
    ],
)
def test_fields_are_read_as_the_standard_says(stream: bytes, events: list[str]) -> None:
    assert parse(stream) == events
    assert parse(*(stream[index : index + 1] for index in range(len(stream)))) == events


def test_an_event_that_the_stream_ends_within_is_not_given_out() -> None:
    assert parse(b"data: whole\n\ndata: half\n") == ["whole"]
    assert parse(b'data: {"choices": [{"de') == []


def test_bytes_that_are_no_utf8_do_not_stop_the_stream() -> None:
    assert parse(b"data: \xff\xfe\n\n", b"data: b\n\n") == ["��", "b"]


def test_an_event_without_an_end_is_refused_before_it_fills_the_memory() -> None:
    parser = SSEParser(limit_bytes=100)
    for _ in range(50):  # many whole events are no large event
        assert parser.feed(b"data: 0123456789\n\n") == ["0123456789"]
    with pytest.raises(ValueError, match="more than 100 bytes"):
        for _ in range(50):
            parser.feed(b"data: 0123456789\n")
