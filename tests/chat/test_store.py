"""Sessions on disk: whole at every moment, private, one chat at a time, and read with suspicion."""

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostvis_cli import demo
from ghostvis_cli.chat import store
from ghostvis_cli.chat.session import Reply, Session, Turn
from ghostvis_cli.chat.store import SessionStore, read_file, write_file
from ghostvis_cli.chat.transcript import lines
from ghostvis_cli.engines.base import Usage
from ghostvis_cli.errors import InputError, LockedError, UsageError
from ghostvis_cli.image_limits import DEFAULT_LIMITS, ImageLimits
from ghostvis_cli.images import load_image
from tests.limits import limited

RED, THREE = (str(path) for path in demo.EXAMPLES[:2])
ABOUT = {"profile": "default", "model": "m"}
USAGE = Usage(75, 8, 60, 64)


def a_session() -> Session:
    red, three = load_image(RED), load_image(THREE)
    session = Session(system="Be brief.", pending=[red])
    session.begin("What?\nGrüße, 世界\u2028🎉\0")
    session.answer(Reply("A red circle.\n", "stop", USAGE, 8, 0.1, 0.5, "m"))
    session.begin("And?")
    session.answer(Reply("Ro", "abort", None, 1))
    session.attach([three, red])
    return session


def said(session: Session) -> Any:
    """All of it, images by their pixels."""
    return (
        session.system,
        [(turn.text, [image.digest for image in turn.images], turn.reply) for turn in session.turns],
        [(image.digest, image.name) for image in session.pending],
        session.draft,
        session.forgotten,
    )


@pytest.fixture
def sessions(tmp_path: Path) -> SessionStore:
    return SessionStore(tmp_path / "state" / "chats")


def kept(sessions: SessionStore, name: str = "trip", session: Session | None = None) -> Path:
    """A session written and let go; its directory."""
    file = sessions.open(name)
    file.save(session or a_session(), ABOUT)
    file.close()
    return file.directory


def test_a_session_comes_back_as_it_was(sessions: SessionStore) -> None:
    session = a_session()
    kept(sessions, session=session)
    assert said(sessions.open("trip").load(DEFAULT_LIMITS)) == said(session)


def test_what_is_saved_again_and_again_is_what_was_said_last(sessions: SessionStore) -> None:
    file, session = sessions.open("trip"), a_session()

    def saved() -> Any:
        file.save(session, ABOUT)
        return said(file.load(DEFAULT_LIMITS))

    assert saved() == said(session)
    session.begin("third")
    session.answer(Reply("3", "stop", USAGE))
    assert saved() == said(session)
    session.undo()
    session.undo()
    assert saved() == said(session)
    session.begin("another second")  # in the place of the one taken back
    session.answer(Reply("2", "stop", USAGE))
    assert saved() == said(session)
    session.reopen("edited")
    session.answer(Reply("2b", "stop", USAGE))
    assert saved() == said(session)
    session.clear()
    assert saved() == said(session)


def test_a_file_with_its_images_inside_needs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "copy.jsonl"
    write_file(path, a_session(), ABOUT)
    assert said(read_file(path, DEFAULT_LIMITS)) == said(a_session())
    assert path.read_text().count('"data"') == 2  # the red one is shown twice and stored once


def test_what_can_not_be_sent_as_it_is_comes_back_with_the_same_pixels(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (40, 20), (255, 0, 0, 99)).save(tmp_path / "a.png", exif=exif)
    session = Session(pending=[load_image(str(tmp_path / "a.png"))])
    write_file(tmp_path / "s.jsonl", session, ABOUT)
    [back] = read_file(tmp_path / "s.jsonl", DEFAULT_LIMITS).pending
    assert (back.digest, back.width, back.height) == (session.pending[0].digest, 20, 40)


def test_a_message_whose_reply_was_lost_comes_back_as_the_draft(sessions: SessionStore) -> None:
    session = a_session()
    session.begin("lost?")
    kept(sessions, session=session)
    back = sessions.open("trip").load(DEFAULT_LIMITS)
    assert (back.draft, len(back.pending), len(back.turns), back.answered) == ("lost?", 2, 2, True)


def test_everything_is_for_its_owner_alone(sessions: SessionStore) -> None:
    before = os.umask(0)
    try:
        directory = kept(sessions)
    finally:
        os.umask(before)
    found = [directory, *directory.rglob("*")]
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in found}
    assert modes == {(True, 0o700), (False, 0o600)} and len(found) == 5


def test_images_are_written_once_and_removed_when_nothing_shows_them(sessions: SessionStore) -> None:
    file, session = sessions.open("trip"), a_session()
    file.save(session, ABOUT)
    images = {path.name: path.stat().st_ino for path in (file.directory / "images").iterdir()}
    assert len(images) == 2
    file.save(session, ABOUT)
    assert {path.name: path.stat().st_ino for path in (file.directory / "images").iterdir()} == images
    session.clear()
    file.save(session, ABOUT)
    assert list((file.directory / "images").iterdir()) == []
    session.undo()
    file.save(session, ABOUT)
    assert said(file.load(DEFAULT_LIMITS))[1] == said(a_session())[1]


def test_names_come_newest_first_and_only_those_that_hold_something(sessions: SessionStore) -> None:
    assert sessions.names() == []
    for number, name in enumerate(("old", "new", "middle")):
        path = kept(sessions, name) / "session.jsonl"
        os.utime(path, (0, (0, 9, 5)[number]))
    sessions.open("empty")
    assert sessions.names() == ["new", "middle", "old"]
    assert sessions.newest().name == "new"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", ".hidden", "a\0b", "x" * 65, "-x", "a\nb", "é"]
)
def test_a_name_is_never_a_path(sessions: SessionStore, name: str) -> None:
    with pytest.raises(UsageError, match="no name of a session"):
        sessions.open(name)


def test_two_chats_never_have_one_session_open(sessions: SessionStore) -> None:
    first = sessions.open("trip")
    with pytest.raises(LockedError, match="another chat has the session trip open"):
        sessions.open("trip")
    first.close()
    sessions.open("trip").close()


def test_a_session_that_stayed_empty_leaves_nothing_behind(sessions: SessionStore) -> None:
    sessions.open("trip").close()
    unnamed = sessions.unnamed()
    unnamed.save(Session(system="x"), ABOUT)
    unnamed.close()
    assert list((sessions.directory or Path()).iterdir()) == []


def test_the_oldest_unnamed_sessions_go_and_named_and_open_ones_stay(
    sessions: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "UNNAMED_KEPT", 2)
    session = Session(turns=[Turn("a", (), Reply("b", "stop"))])
    for number in range(5):
        path = kept(sessions, f"20260101-00000{number}-7", session) / "session.jsonl"
        os.utime(path, (0, number))
    os.utime(kept(sessions, "named", session) / "session.jsonl", (0, 0))
    still_open = sessions.open("20260101-000000-7")
    sessions.prune()
    assert sessions.names() == ["20260101-000004-7", "20260101-000003-7", "named", "20260101-000000-7"]
    still_open.close()


def test_what_killed_chats_left_goes_whichever_session_is_opened_next(sessions: SessionStore) -> None:
    """Temporary files in other sessions, and unnamed ones that were killed before they held anything."""
    trip, home = kept(sessions), sessions.directory or Path()
    begun, mine = home / "20260101-000000-7", home / "mine"
    for folder in (begun, mine):
        (folder / "images").mkdir(parents=True)
    left = [
        trip / ".session.jsonl.ghostvis-0123abcd",
        trip / "images" / f".{PNG[:40]}.ghostvis-0123abcd",
        begun / ".session.jsonl.ghostvis-0123abcd",
        begun / "images" / PNG,
    ]
    for path in (*left, mine / "images" / "notes"):
        path.write_text("half of it")
    sessions.prune()
    assert not any(path.exists() for path in (*left, begun))
    assert (mine / "images" / "notes").exists() and said(read_file(trip / "session.jsonl", DEFAULT_LIMITS))


# When the disk says no


def test_a_renamed_session_stays_locked_and_goes_on_under_its_new_name(sessions: SessionStore) -> None:
    file, session = sessions.open("trip"), a_session()
    file.save(session, ABOUT)
    file.rename("walk")
    with pytest.raises(LockedError):
        sessions.open("walk")
    session.begin("More?")
    session.answer(Reply("Yes.", "stop", USAGE))
    file.save(session, ABOUT)
    file.close()
    assert sessions.names() == ["walk"]
    assert said(sessions.open("walk").load(DEFAULT_LIMITS)) == said(session)


def test_a_session_takes_no_name_that_another_has_or_that_is_a_path(sessions: SessionStore) -> None:
    sessions.open("walk").save(a_session(), ABOUT)
    file = sessions.open("trip")
    for name in ("walk", "../walk", "", "a/b"):
        with pytest.raises(UsageError):
            file.rename(name)
    assert file.name == "trip"


def test_a_session_without_a_name_gets_one_before_anything_is_written(sessions: SessionStore) -> None:
    file = sessions.unnamed()
    file.rename("trip")
    file.save(a_session(), ABOUT)
    assert sessions.names() == ["trip"]


def test_a_removed_session_is_gone_with_its_images_and_free(sessions: SessionStore) -> None:
    file = sessions.open("trip")
    file.save(a_session(), ABOUT)
    file.remove()
    assert not file.directory.exists()
    sessions.open("trip").close()


def test_sessions_begun_in_one_second_have_names_of_their_own(sessions: SessionStore) -> None:
    names = []
    for _ in range(3):
        file = sessions.unnamed()
        file.save(a_session(), ABOUT)
        file.close()
        names.append(file.name)
    assert sorted(sessions.names()) == sorted(set(names))
    assert all(store.UNNAMED.fullmatch(name) for name in names)


def test_a_full_disk_loses_the_change_and_not_the_session(sessions: SessionStore) -> None:
    file, session = sessions.open("trip"), a_session()
    file.save(session, ABOUT)
    session.begin("x" * 50_000)
    with limited(resource.RLIMIT_FSIZE, 10_000), pytest.raises(OSError) as caught:
        file.save(session, ABOUT)
    assert caught.value.errno == errno.EFBIG
    assert said(file.load(DEFAULT_LIMITS)) == said(a_session())
    assert sorted(path.name for path in file.directory.iterdir()) == ["images", "session.jsonl"]


def test_without_a_home_there_is_no_place_and_an_os_error_says_so() -> None:
    nowhere = SessionStore(None)
    assert nowhere.names() == []
    for attempt in (lambda: nowhere.open("trip"), nowhere.unnamed):
        with pytest.raises(OSError, match="there is no home directory"):
            attempt()


@pytest.mark.parametrize("steps", range(1, 40, 3))
def test_killed_at_any_moment_the_session_is_the_one_before_or_after(steps: int, tmp_path: Path) -> None:
    """A child saves two states in turn and is killed after a number of system calls that write."""
    program = f"""
import os, sys
from pathlib import Path
from tests.chat.test_store import ABOUT, a_session
from ghostvis_cli.chat.store import SessionStore
file, one, two = SessionStore(Path({str(tmp_path)!r})).open("trip"), a_session(), a_session()
two.clear()
file.save(one, ABOUT)
left = {steps}
def watch(event, args):
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(watch)
while True:
    file.save(two, ABOUT)
    file.save(one, ABOUT)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == -signal.SIGKILL
    back = said(
        SessionStore(tmp_path).open("trip").load(DEFAULT_LIMITS)
    )  # the dead child's lock is gone, too
    two = a_session()
    two.clear()
    assert back in (said(a_session()), said(two))
    SessionStore(tmp_path).prune()
    assert not list(tmp_path.rglob(".*"))


# What somebody else wrote

HEAD = {"schema_version": 1, "kind": "ghostvis chat", "system": None, "forgotten": 0}
REPLY = {"text": "b", "finish_reason": "stop"}


def written(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows))
    return path


def test_less_than_we_write_is_enough(tmp_path: Path) -> None:
    path = written(tmp_path, {"schema_version": 1, "kind": "ghostvis chat"}, {"text": "a", "reply": REPLY})
    [turn] = read_file(path, DEFAULT_LIMITS).turns
    assert (turn.text, turn.reply.text, turn.reply.usage) == ("a", "b", None)  # type: ignore[union-attr]


PNG = sha256(Path(RED).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "empty"),
        ([b"\xff\xfe"], "empty"),
        ([b"\xff\xfd"], "line 1: not a line of JSON"),
        ([b"\0" * 5000], "line 1: not a line of JSON"),
        ([b"[" * 200_000], "line 1: not a line of JSON"),
        ([b'{"schema_version": ' + b"9" * 5000 + b"}"], "line 1: not a line of JSON"),
        ([[1]], "line 1: no JSON object"),
        ([{"text": "a"}], "line 1: this is no conversation of ghostvis chat"),
        ([{**HEAD, "schema_version": 2}], "line 1: written by another version"),
        ([{**HEAD, "system": 3}], "line 1: system is a int, not text"),
        ([{**HEAD, "forgotten": -1}], "line 1: forgotten is no count"),
        ([{**HEAD, "forgotten": True}], "line 1: forgotten is no count"),
        ([HEAD, {"text": "a", "reply": REPLY}, b'{"text": "torn'], "line 3: not a line of JSON"),
        ([HEAD, {"reply": REPLY}], "line 2: text is missing"),
        ([HEAD, b'{"text": "\\ud800"}\n'], "line 2: text is not valid Unicode"),
        ([HEAD, {"text": "a", "reply": "b"}], "line 2: reply is no dict"),
        ([HEAD, {"text": "a", "reply": {"text": "b"}}], "line 2: a reply has no finish_reason"),
        ([HEAD, {"text": "a", "reply": {**REPLY, "total_s": float("nan")}}], "line 2: total_s is no number"),
        ([HEAD, {"text": "a", "reply": {**REPLY, "usage": {"prompt_tokens": 1e99}}}], "prompt_tokens is no"),
        ([HEAD, {"text": "a"}, {"text": "b", "reply": REPLY}], "line 3: comes after the last message"),
        ([HEAD, {"draft": "a"}, {"draft": "b"}], "line 3: comes after the last message"),
        ([HEAD, {"text": "a", "images": ["x"]}], "line 2: an image is no JSON object"),
        ([HEAD, {"text": "a", "images": {"sha256": PNG}}], "line 2: images is no list"),
        ([HEAD, {"text": "a", "images": [{"sha256": "../../etc/passwd", "name": "x"}]}], "sha256 is none"),
        ([HEAD, {"text": "a", "images": [{"sha256": PNG, "name": "x"}]}], "an image can't be read"),
        ([HEAD, {"text": "a", "images": [{"sha256": PNG, "name": "x", "data": "!"}]}], "no base64"),
        ([HEAD, {"text": "a", "images": [{"sha256": PNG, "name": "x", "data": "aGk="}]}], "is damaged"),
        ([HEAD, {"text": "a", "images": [{"sha256": PNG, "name": "x", "data": "A" * 10**7}]}], "larger than"),
        (
            [
                HEAD,
                {
                    "text": "a",
                    "images": [{"sha256": sha256(b"hi").hexdigest(), "name": "x\x1b[2J", "data": "aGk="}],
                },
            ],
            "x?[2J: seems to be a text file",
        ),
    ],
)
def test_a_hostile_file_is_refused_with_its_line(rows: list[Any], says: str, tmp_path: Path) -> None:
    path = written(tmp_path, *rows)
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        read_file(path, ImageLimits(max_bytes=1_000_000))
    assert says in caught.value.message and "\n" not in caught.value.message
    assert caught.value.hint and path.read_bytes() == before


def test_a_file_names_no_other_file(tmp_path: Path) -> None:
    """A link in the place of an image leads to bytes with another hash."""
    secret = tmp_path / "secret"
    secret.write_text("hush")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / PNG).symlink_to(secret)
    path = written(tmp_path, HEAD, {"text": "a", "images": [{"sha256": PNG, "name": "x"}]})
    with pytest.raises(InputError, match="damaged") as caught:
        read_file(path, DEFAULT_LIMITS)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "pipe", "a\0b", "no-such-directory/x"])
def test_what_is_no_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="can't be read"):
        read_file(tmp_path / name, DEFAULT_LIMITS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["text", "images", "reply", "draft", "system", "usage", "finish_reason", "sha256", "name", "data"]


@given(st.lists(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4), max_size=4))
def test_any_rows_make_a_conversation_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = written(tmp_path_factory.getbasetemp(), HEAD, *rows)
    try:
        session = read_file(path, DEFAULT_LIMITS)
    except InputError:
        return
    assert session.answered
    assert [message.role for message in session.messages()] == ["user", "assistant"] * len(session.turns)
    assert list(lines(session, ABOUT))
