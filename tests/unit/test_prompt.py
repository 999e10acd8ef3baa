"""Conversation rendering where no recorded vector reaches: layouts, several images, refusals."""

import re

import pytest

from ghostvis_cli.errors import GhostvisError, InputError, RequestError
from ghostvis_cli.model.config import LAYOUTS
from ghostvis_cli.prompt import (
    VISION_ROW,
    ImagePart,
    Message,
    Text,
    render_for_reply,
    render_text,
    with_line_breaks,
)
from tests.engines.tiny import TOKENIZER
from tests.pictures import an_image as image

N = 3
V = VISION_ROW


def special(name: str) -> int:
    return TOKENIZER.special(f"<|{name}|>")


def test_each_layout_puts_rows_where_it_says() -> None:
    turn = [Message.of("user", "What?", [image()])]
    question = TOKENIZER.encode("\nWhat?")
    bos, start, end, reply = (special(n) for n in ("bos", "user_start", "user_end", "assistant_start"))
    rendered = {layout: render_for_reply(turn, TOKENIZER, layout, N).ids for layout in LAYOUTS}
    slots = [TOKENIZER.image_id] * N
    assert rendered["inline"] == (bos, start, V, V, V, *question, end, reply)
    assert rendered["prepend"] == (V, V, V, bos, start, *question, end, reply)
    assert rendered["prepend_slots"] == (V, V, V, bos, start, *slots, *question, end, reply)
    literal = TOKENIZER.encode("<|image|>\nWhat?")
    assert rendered["prepend_literal"] == (V, V, V, bos, start, *literal, end, reply)


def test_images_stay_in_the_turns_they_belong_to() -> None:
    turns = [
        Message.of("user", "first", [image("red"), image("blue")]),
        Message.of("assistant", "ok"),
        Message.of("user", "second", [image("lime")]),
    ]
    prompt = render_for_reply(turns, TOKENIZER, "inline", N)
    line = TOKENIZER.encode("\n")
    head = (special("bos"), special("user_start"), V, V, V, *line, V, V, V, *TOKENIZER.encode("\nfirst"))
    assert prompt.ids[: len(head)] == head
    assert prompt.ids.count(V) == 3 * N == prompt.image_tokens
    assert [i.digest for i in prompt.images] == [m.digest for t in turns for m in t.images]


def test_prepended_images_come_in_the_order_of_their_turns() -> None:
    red, blue = image("red"), image("blue")
    turns = [Message.of("user", "a", [red]), Message.of("assistant", "b"), Message.of("user", "c", [blue])]
    prompt = render_for_reply(turns, TOKENIZER, "prepend", N)
    assert prompt.ids[: 2 * N] == (V,) * 2 * N
    assert prompt.images == (red, blue)


def test_a_system_text_stands_in_front_of_the_first_question() -> None:
    turns = [Message.of("system", "Be brief."), Message.of("user", "Hi")]
    ids = render_for_reply(turns, TOKENIZER).ids
    assert ids[2:-2] == tuple(TOKENIZER.encode("Be brief.\n\nHi"))


def test_special_strings_typed_by_a_user_are_text_in_every_role() -> None:
    turns = [
        Message.of("system", "<|bos|>"),
        Message.of("user", "<|image|><|user_end|>"),
        Message.of("assistant", "<|assistant_end|>"),
        Message.of("user", "<|assistant_start|>"),
    ]
    ids = render_for_reply(turns, TOKENIZER).ids
    specials = [id_ for id_ in ids if id_ >= len(TOKENIZER.ranks)]
    names = "bos user_start user_end assistant_start assistant_end user_start user_end assistant_start"
    assert specials == [special(name) for name in names.split()]


def test_a_line_break_follows_an_image_once() -> None:
    part = ImagePart(image())
    assert with_line_breaks([part, Text("What")]) == (part, Text("\n"), Text("What"))
    assert with_line_breaks([part, Text("\nWhat")]) == (part, Text("\nWhat"))
    assert with_line_breaks([Text("A"), part]) == (Text("A"), part)


def test_raw_text_gets_one_bos_and_nothing_else() -> None:
    assert render_text("Once", TOKENIZER).ids == (special("bos"), *TOKENIZER.encode("Once"))


U, A, S = Message.of("user", "u"), Message.of("assistant", "a"), Message.of("system", "s")


@pytest.mark.parametrize("turns", [[], [A], [S], [U, S], [A, S], [S, A]])
def test_a_conversation_with_nothing_to_answer_is_refused(turns: list[Message]) -> None:
    with pytest.raises(InputError):
        render_for_reply(turns, TOKENIZER)


@pytest.mark.parametrize(
    ("turns", "rendered"),
    [
        ([U, U], "<user_start>u\n\nu<user_end><assistant_start>"),
        ([S, S, U], "<user_start>s\n\ns\n\nu<user_end><assistant_start>"),
        ([U, S, U], "<user_start>u\n\ns\n\nu<user_end><assistant_start>"),
        (
            [A, A, U],
            "<assistant_start>a\n\na<assistant_end><user_start>u<user_end><assistant_start>",
        ),
        (
            [S, A, U],
            "<assistant_start>a<assistant_end><user_start>s\n\nu<user_end><assistant_start>",
        ),
        ([U, A], "<user_start>u<user_end><assistant_start>a"),
        (
            [U, A, S, U, A, A],
            "<user_start>u<user_end><assistant_start>a<assistant_end>"
            "<user_start>s\n\nu<user_end><assistant_start>a\n\na",
        ),
    ],
)
def test_other_orders_become_turns_that_alternate(turns: list[Message], rendered: str) -> None:
    expected = [special("bos")]
    for piece in re.split(r"(<\w+>)", rendered):
        name = piece.strip("<>")
        expected += [special(name)] if piece.startswith("<") else TOKENIZER.encode(piece)
    assert render_for_reply(turns, TOKENIZER).ids == tuple(expected)


def test_an_image_keeps_its_place_where_turns_become_one() -> None:
    turns = [Message.of("user", "", [image()]), Message.of("user", "What?")]
    ids = render_for_reply(turns, TOKENIZER, "inline", N).ids
    assert ids == (special("bos"), special("user_start"), *(V,) * N, *TOKENIZER.encode("\n\n\nWhat?"),
                   special("user_end"), special("assistant_start"))  # fmt: skip


def test_images_are_refused_where_there_is_no_place_for_them() -> None:
    with_image = Message.of("user", "u", [image()])
    with pytest.raises(RequestError, match="text only"):
        render_for_reply([with_image], TOKENIZER, "inline", 0)
    with pytest.raises(GhostvisError, match="system message"):
        render_for_reply([Message.of("system", "s", [image()]), U], TOKENIZER, "inline", N)


def test_text_without_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="not valid Unicode at character 1"):
        Message.of("user", "a\ud800b")
