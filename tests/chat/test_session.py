"""Turns, images and second thoughts, without an engine, a terminal or a disk."""

import pytest

from ghostvis_cli import demo
from ghostvis_cli.chat.session import Reply, Session
from ghostvis_cli.engines.base import Usage
from ghostvis_cli.errors import InputError, UsageError
from ghostvis_cli.images import EncodedImage, load_image

RED, THREE = (str(path) for path in demo.EXAMPLES[:2])


@pytest.fixture(scope="module")
def red() -> EncodedImage:
    return load_image(RED)


@pytest.fixture(scope="module")
def three() -> EncodedImage:
    return load_image(THREE)


def said(text: str = "yes", prompt: int = 10, cached: int | None = 4, image: int = 0) -> Reply:
    return Reply(text, "stop", Usage(prompt, 2, cached, image), completion_tokens=2, ttft_s=0.1, total_s=0.2)


def talk(*texts: str) -> Session:
    session = Session()
    for text in texts:
        session.begin(text)
        session.answer(said(f"re {text}"))
    return session


def roles(session: Session, skip: int = 0) -> list[tuple[str, str, int]]:
    return [(m.role, m.text.strip(), len(m.images)) for m in session.messages(skip)]


def test_a_turn_is_made_into_messages_once_however_often_it_is_sent() -> None:
    session = talk("one", "two")
    before = session.messages()
    session.begin("three")
    after = session.messages()
    assert len(after) == 5 and all(a is b for a, b in zip(before, after, strict=False))


def test_images_stay_with_the_message_they_were_attached_to(red: EncodedImage, three: EncodedImage) -> None:
    session = talk("hello")
    session.attach([red])
    session.begin("what?")
    session.answer(said())
    session.attach([three])
    session.begin("and this?")
    assert roles(session) == [
        ("user", "hello", 0),
        ("assistant", "re hello", 0),
        ("user", "what?", 1),
        ("assistant", "yes", 0),
        ("user", "and this?", 1),
    ]
    assert session.pending == [] and session.images == [red, three]


def test_an_image_is_taken_off_by_its_number(red: EncodedImage, three: EncodedImage) -> None:
    session = Session(pending=[red, three])
    assert session.detach(1) is red and session.pending == [three]
    for number in (0, 2, -1):
        with pytest.raises(UsageError, match="1 to 1"):
            session.detach(number)


def test_an_unanswered_message_becomes_the_draft_and_keeps_its_images(
    red: EncodedImage, three: EncodedImage
) -> None:
    session = talk("hello")
    session.attach([red])
    session.begin("what?")
    session.attach([three])
    session.take_back()
    assert (session.draft, session.pending, len(session.turns)) == ("what?", [red, three], 1)
    assert session.reopen().images == (red, three) and session.draft is None


def test_another_message_instead_of_the_draft_takes_its_images(red: EncodedImage) -> None:
    session = Session(pending=[red])
    session.begin("lost")
    session.take_back()
    assert session.begin("another").images == (red,) and session.draft is None


def test_undo_takes_message_reply_and_image_out(red: EncodedImage) -> None:
    session = talk("one")
    session.attach([red])
    session.begin("two")
    session.answer(said())
    assert session.undo().text == "two"  # type: ignore[union-attr]
    assert session.images == [] and roles(session)[-1] == ("assistant", "re one", 0)
    session.undo()
    with pytest.raises(UsageError, match="nothing to undo"):
        session.undo()


def test_undo_takes_the_draft_before_the_last_turn() -> None:
    session = talk("one")
    session.begin("two")
    session.take_back()
    assert session.undo().text == "two" and len(session.turns) == 1  # type: ignore[union-attr]


def test_undo_brings_back_what_clear_took_until_something_new_is_said() -> None:
    session = talk("one", "two")
    session.system = "Be brief."
    session.clear()
    assert session.empty and session.system == "Be brief."
    session.clear()  # twice is once
    assert session.undo() is None and len(session.turns) == 2
    session.clear()
    session.begin("new")
    session.answer(said())
    session.undo()
    with pytest.raises(UsageError):
        session.undo()


def test_a_reply_asked_for_again_stays_until_there_is_another() -> None:
    session = talk("one")
    before = session.turns[-1]
    session.reopen()
    assert not session.answered and roles(session) == [("user", "one", 0)]
    session.take_back()
    assert session.turns == [before] and session.draft is None
    session.reopen()
    session.answer(said("better"))
    assert roles(session)[-1] == ("assistant", "better", 0)


def test_an_edited_message_keeps_its_images_and_loses_its_reply(red: EncodedImage) -> None:
    session = Session(pending=[red])
    session.begin("waht?")
    session.answer(said())
    assert session.reopen("what?").images == (red,)
    assert roles(session) == [("user", "what?", 1)]
    session.take_back()  # what was typed is not lost, and the old words were not meant
    assert (session.draft, session.pending, session.turns) == ("what?", [red], [])


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_message_is_refused(text: str, red: EncodedImage) -> None:
    session = Session(pending=[red])
    with pytest.raises(InputError, match="empty"):
        session.begin(text)
    assert session.pending == [red]


def test_half_a_surrogate_pair_is_refused_before_anything_changes() -> None:
    session = talk("one")
    for change in (session.begin, session.reopen):
        with pytest.raises(InputError, match="Unicode"):
            change("\ud83d")
    assert session.answered and len(session.turns) == 1


def test_forgotten_turns_are_kept_but_not_sent(red: EncodedImage) -> None:
    session = Session(system="Be brief.", pending=[red])
    session.begin("one")
    session.answer(said())
    session.begin("two")
    session.answer(said())
    session.begin("three")
    assert [turn.text for turn in session.forget(1)] == ["one"]
    assert roles(session) == [
        ("system", "Be brief.", 0),
        ("user", "two", 0),
        ("assistant", "yes", 0),
        ("user", "three", 0),
    ]
    assert len(session.turns) == 3 and session.images == [red]


def test_the_message_on_its_way_is_never_forgotten() -> None:
    session = talk("one", "two")
    session.begin("three")
    assert len(session.forget(99)) == 2
    assert roles(session) == [("user", "three", 0)] and session.forget(1) == []


def test_a_turn_that_is_answered_again_is_sent_again() -> None:
    session = talk("one", "two")
    session.forget(2)
    session.reopen()
    assert roles(session) == [("user", "two", 0)]
    session.answer(said())
    session.undo()
    session.undo()
    session.begin("new")
    assert roles(session) == [("user", "new", 0)]


def test_totals_tell_text_from_image_and_not_reported_from_zero() -> None:
    session = Session()
    assert session.totals.cached is None
    session.begin("a")
    session.answer(said(prompt=75, cached=None, image=64))
    assert session.totals.cached is None
    session.begin("b")
    session.answer(said(prompt=90, cached=70, image=64))
    totals = session.totals
    assert (totals.replies, totals.prompt, totals.text, totals.image) == (2, 165, 37, 128)
    assert (totals.cached, totals.completion) == (70, 4)


def test_statistics_are_one_line_and_say_what_nobody_counted() -> None:
    reply = Reply("a b c", "stop", Usage(128, 58, 96, 64), completion_tokens=58, ttft_s=0.041, total_s=0.241)
    assert reply.statistics() == "ttft 41 ms · 285 tok/s · 128 + 58 tokens · 64 image · 96 cached"
    assert said(cached=None).statistics().endswith("cached not reported")
    assert Reply("a", "abort", completion_tokens=1).statistics() == "1 tokens · stopped"
