"""Between a message and its reply: streaming, stopping, room, settings, servers that die, engines that change."""

import asyncio
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ghostvis_cli import demo
from ghostvis_cli.chat.commands import attach, described, perform
from ghostvis_cli.chat.context import TooLongError, measure
from ghostvis_cli.chat.conversation import Conversation
from ghostvis_cli.chat.script import ScriptSurface
from ghostvis_cli.chat.session import Reply, Session
from ghostvis_cli.chat.slash import BY_NAME, Command, parse
from ghostvis_cli.chat.store import SessionFile, SessionStore
from ghostvis_cli.engines.base import CHAT_MAX_TOKENS, Chunk, GenerateRequest, Usage
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.errors import EngineError, GhostvisError, InputError, OutputError, RequestError, UsageError
from ghostvis_cli.image_limits import DEFAULT_LIMITS
from ghostvis_cli.profile import Resolved, resolve
from tests.engines.serving import PATIENCE_S, running

RED, THREE = (str(path) for path in demo.EXAMPLES[:2])


class Surface(ScriptSurface):
    """Keeps what it is told."""

    def __init__(self, edited: str | None = None) -> None:
        self.said: list[str] = []
        self.notes: list[str] = []
        self.shown: list[tuple[tuple[int, int], str]] = []
        self.edited = edited

    def say(self, text: str) -> None:
        self.said.append(text)

    answer = say

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show_image(self, image: Any, caption: str) -> None:
        self.shown.append((image.size, caption))

    def edit_text(self, text: str) -> str | None:
        self.said.append(text)
        return self.edited


def settled(**flags: object) -> Resolved:
    return resolve(flags=flags, env={})


def talking(engine: Any = None, **options: Any) -> Conversation:
    conversation = Conversation(options.pop("resolved", None) or settled(), **options)
    conversation.engine = engine or FakeEngine()
    return conversation


async def heard(stream: AsyncGenerator[Chunk, None]) -> str:
    async with aclosing(stream) as chunks:
        return "".join([chunk.text async for chunk in chunks])


async def do(conversation: Conversation, line: str, surface: Surface) -> str | None:
    """What a script would do with a line; the reply if there was one."""
    meant = parse(line)
    if not isinstance(meant, Command):
        return await heard(conversation.send(line))
    outcome = await perform(conversation, meant, surface)
    return await heard(outcome.reply) if outcome.reply else None


def texts(session: Session) -> list[str]:
    return [turn.text for turn in session.turns]


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Replies


async def test_a_reply_streams_and_is_kept_with_what_it_cost() -> None:
    conversation = talking()
    assert await heard(conversation.send("one two three")) == "one two three"
    reply = conversation.last
    assert reply is conversation.session.turns[0].reply and reply is not None
    assert (reply.finish_reason, reply.usage, reply.model) == ("stop", Usage(3, 3, 0), "fake")
    assert reply.ttft_s is not None and 0 < reply.ttft_s <= reply.total_s
    assert conversation.context_used() == 6


async def test_longer_answers_unless_somebody_chose_how_long() -> None:
    assert talking().profile.sampling.max_tokens == CHAT_MAX_TOKENS
    chosen = talking(resolved=settled(**{"sampling.max_tokens": 100}))
    assert chosen.profile.sampling.max_tokens == 100


@pytest.mark.parametrize("way", ["close", "cancel"])
async def test_a_stopped_reply_keeps_what_came_and_the_engine_is_told(way: str) -> None:
    engine = FakeEngine(delay_s=0.01)
    conversation, came = talking(engine), asyncio.Event()

    async def listen() -> None:
        async with aclosing(conversation.send("one two " * 1000)) as chunks:
            async for chunk in chunks:
                if chunk.text.strip() == "two":
                    came.set()
                    if way == "close":
                        break

    listener = asyncio.create_task(listen())
    await came.wait()
    if way == "cancel":
        listener.cancel()
    await asyncio.wait([listener])
    assert (engine.running, engine.aborted) == (0, 1)
    [turn] = conversation.session.turns
    assert turn.reply is not None and turn.reply.text.startswith("one two")
    assert (turn.reply.finish_reason, turn.reply.usage) == ("abort", None)
    assert turn.reply.completion_tokens >= 2
    assert await heard(conversation.send("still there?")) == "still there?"


async def test_stopped_before_the_first_word_the_message_is_the_draft() -> None:
    started = asyncio.Event()

    class Slow(FakeEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            started.set()
            async with aclosing(super().generate(request)) as chunks:
                async for chunk in chunks:
                    yield chunk

    conversation = talking(Slow(delay_s=60))
    listener = asyncio.create_task(heard(conversation.send("wait")))
    await started.wait()
    listener.cancel()
    await asyncio.wait([listener])
    assert (conversation.session.draft, conversation.session.turns) == ("wait", [])


async def test_a_failure_gives_message_and_images_back() -> None:
    conversation, surface = talking(FakeEngine(failure=RequestError("no"))), Surface()
    await attach(conversation, [RED], surface)
    with pytest.raises(RequestError):
        await heard(conversation.send("what?"))
    assert (conversation.session.draft, len(conversation.session.pending)) == ("what?", 1)
    conversation.engine = FakeEngine()
    assert await do(conversation, "/regen", surface) == "\nwhat?"
    assert len(conversation.session.turns[0].images) == 1 and conversation.session.pending == []


# Room


def wordy(count: int) -> str:
    return " ".join(["word"] * count)


async def test_the_server_s_refusal_says_how_much_would_have_to_go() -> None:
    conversation = talking(FakeEngine(context_tokens=300))
    await heard(conversation.send(wordy(40)))
    with pytest.raises(TooLongError, match="the model has 300 positions") as caught:
        await heard(conversation.send(wordy(70)))
    assert caught.value.drop == 1 and "drop-oldest" in (caught.value.hint or "")
    assert conversation.session.draft == wordy(70)
    conversation.forget(caught.value.drop)
    assert await heard(conversation.regenerate()) == wordy(70)


async def test_the_oldest_turns_go_with_their_images_where_that_was_allowed() -> None:
    notes: list[str] = []
    conversation = talking(FakeEngine(context_tokens=300), overflow="drop-oldest", note=notes.append)
    await attach(conversation, [RED], Surface())
    for _ in range(8):
        assert (await heard(conversation.send(wordy(30)))).strip() == wordy(30)
    session = conversation.session
    assert session.forgotten > 0 and len(session.turns) == 8
    assert not any(message.images for message in session.messages())
    assert any("no longer sees the oldest turn with 1 image" in note for note in notes)


async def test_a_message_too_long_by_itself_is_refused_whatever_is_dropped() -> None:
    conversation = talking(FakeEngine(context_tokens=300), overflow="drop-oldest")
    await heard(conversation.send("hello"))
    with pytest.raises(TooLongError) as caught:
        await heard(conversation.send(wordy(400)))
    assert caught.value.drop == 0


async def test_other_refusals_are_not_taken_for_a_full_context() -> None:
    conversation = talking(FakeEngine(failure=InputError("the image is too dark")), overflow="drop-oldest")
    conversation.session = Session()
    with pytest.raises(InputError, match="too dark"):
        await heard(conversation.send("x"))


async def test_nothing_is_counted_while_it_certainly_fits() -> None:
    session = Session()
    session.begin("short")
    assert await measure(session, FakeEngine(), 100) is None


# Settings and profiles


async def test_set_takes_all_or_nothing_by_the_profile_s_rules() -> None:
    conversation, surface = talking(), Surface()
    await do(conversation, '/set temperature=0 top_p=0.5 stop=["three"]', surface)
    sampling = conversation.profile.sampling
    assert (sampling.temperature, sampling.top_p, sampling.stop) == (0.0, 0.5, ("three",))
    assert await do(conversation, "one two three", surface) == "one two "
    for line, says in [
        ("/set top_k=3 temperature=warm", "temperature takes a number, not 'warm'"),
        ("/set tempreature=1", "did you mean temperature"),
        ("/set temperature=-1", "outside 0 to 100"),
        ("/set max_tokens=1.5", "whole number"),
        ("/set logprobs=3", "no setting 'logprobs'"),
        ("/set engine.base_url=http://x", "no setting"),
    ]:
        with pytest.raises(UsageError, match=says):
            await do(conversation, line, surface)
    assert conversation.profile.sampling == sampling
    await do(conversation, "/set seed null", surface)
    await do(conversation, "/set", surface)
    assert 'stop = ["three"]' in surface.said[-1] and "seed = null" in surface.said[-1]


async def test_a_profile_changes_the_engine_and_keeps_the_conversation(here: Path) -> None:
    config = here / "config" / "profiles"
    config.mkdir(parents=True)
    old, surface = FakeEngine(), Surface()
    flags = {"sampling.seed": 7, "model.source": "demo", "engine.device": "cpu"}
    conversation = talking(old, resolved=settled(**flags))
    with running(FakeEngine()) as server:
        (config / "lab.yaml").write_text(
            f"engine: {{base_url: '{server.url}'}}\nsampling: {{temperature: 0.3, top_p: 0.2}}\nsystem: Hm.\n"
        )
        async with conversation:
            await do(conversation, "hello", surface)
            await do(conversation, "/set temperature=0", surface)
            await do(conversation, "/profile lab", surface)
            assert await do(conversation, "again", surface) == "again"
            sampling, info = conversation.profile.sampling, conversation.engine.info  # type: ignore[union-attr]
            assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.0, 0.2, 7)
            assert (sampling.max_tokens, info.kind) == (CHAT_MAX_TOKENS, "remote")
            assert conversation.profile.model.source is None
            assert texts(conversation.session) == ["hello", "again"]
            assert conversation.session.system == "Hm." and old.failure is not None  # closed
            for name in ("nosuch", "../lab"):
                with pytest.raises(UsageError, match="there is no profile"):
                    await do(conversation, f"/profile {name}", surface)
            assert await do(conversation, "still", surface) == "still"


async def test_a_typed_system_message_stays_when_the_profile_changes() -> None:
    conversation = talking(resolved=settled(system="Be brief."))
    await do(conversation, "/profile demo", Surface())
    assert (conversation.session.system, conversation.profile.name) == ("Be brief.", "demo")
    await conversation.aclose()


async def test_a_profile_whose_server_is_down_changes_nothing(here: Path) -> None:
    config = here / "config" / "profiles"
    config.mkdir(parents=True)
    (config / "down.yaml").write_text("engine: {base_url: 'http://127.0.0.1:1', retries: 0}\n")
    conversation = talking()
    with pytest.raises(EngineError):
        await do(conversation, "/profile down", Surface())
    assert conversation.profile.name == "default" and await heard(conversation.send("hi")) == "hi"


# A server that dies and comes back


async def test_a_server_that_died_costs_one_message_that_can_be_sent_again() -> None:
    surface = Surface()
    with running(FakeEngine()) as server:
        port = int(server.url.rpartition(":")[2])
        conversation = talking(resolved=settled(**{"engine.base_url": server.url, "engine.retries": 0}))
        conversation.engine = None
        async with conversation:
            assert await do(conversation, "one", surface) == "one"
            server.stop()
            for _ in range(2):
                with pytest.raises((EngineError, RequestError)):
                    await do(conversation, "two", surface)
                assert conversation.session.draft == "two" and len(conversation.session.turns) == 1
            with running(FakeEngine(), port=port):
                async with asyncio.timeout(PATIENCE_S):
                    assert await do(conversation, "/regen", surface) == "two"
                    assert await do(conversation, "three", surface) == "three"
    assert texts(conversation.session) == ["one", "two", "three"]


# Commands


async def test_images_are_attached_listed_and_taken_off(tmp_path: Path) -> None:
    conversation, surface = talking(), Surface()
    odd = tmp_path / 'it\'s a "photo" #1.png'
    shutil.copy(RED, odd)
    await do(conversation, f"/image {RED} '{THREE}'", surface)
    await do(conversation, f"/image {odd}", surface)  # the whole line names a file
    await do(conversation, f'/image {str(odd).replace(" ", chr(92) + " ").replace(chr(39), chr(92) + chr(39))}'
             .replace('"', '\\"'), surface)  # fmt: skip
    assert [image.name for image in conversation.session.pending] == [RED, THREE, str(odd), str(odd)]
    await do(conversation, "/image -4", surface)
    await do(conversation, "/image", surface)
    assert surface.said[-1].splitlines()[0] == "1. red-circle.png 320x320"
    assert len(surface.said[-1].splitlines()) == 3


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("/image missing.png", InputError),
        (f"/image {RED} missing.png", InputError),
        (f"/image {__file__}", InputError),
        ("/image -", UsageError),
        (f"/image {RED} -", UsageError),
        ("/image -1", UsageError),
        ("/image -0", UsageError),
        ("/image --", UsageError),
        ("/image a\0b", InputError),
        ("/view", UsageError),
        ("/view x", UsageError),
        ("/undo", UsageError),
        ("/undo 0", UsageError),
        ("/undo 99999999999", UsageError),
        ("/regen", UsageError),
        ("/edit x", UsageError),
        ("/save", UsageError),
        ("/save /", UsageError),
        ("/load missing", InputError),
        ("/export", UsageError),
        ("/export pdf", UsageError),
        ("/help nothing", UsageError),
        ("/paste", UsageError),
    ],
)
async def test_what_can_not_be_done_is_said_and_changes_nothing(
    line: str, kind: type[Exception], here: Path
) -> None:
    conversation = talking()
    with pytest.raises(kind):
        await do(conversation, line, Surface())
    assert conversation.session.empty and names_in(here) == []


async def test_view_shows_the_square_that_the_model_sees_of_any_image_so_far() -> None:
    conversation, surface = talking(), Surface()
    await do(conversation, f"/image {demo.PHOTO}", surface)
    await do(conversation, "what?", surface)
    await do(conversation, f"/image {RED}", surface)
    for line in ("/view", "/view 1", "/view 2"):
        await do(conversation, line, surface)
    assert [size[0] == size[1] for size, _ in surface.shown] == [True] * 3
    (_, last), (_, first), (_, second) = surface.shown
    assert last == second and "all of it" in last and "the central square" in first
    with pytest.raises(UsageError, match="1 to 2"):
        await do(conversation, "/view 3", surface)


async def test_second_thoughts_undo_edit_regen_and_clear() -> None:
    conversation, surface = talking(), Surface(edited="four five\n")
    for line in ("one", "two", "three"):
        await do(conversation, line, surface)
    await do(conversation, "/undo", surface)
    assert await do(conversation, "/edit", surface) == "four five" and surface.said == ["two"]
    assert await do(conversation, "/edit six", surface) == "six"
    assert await do(conversation, "/regen", surface) == "six"
    assert texts(conversation.session) == ["one", "six"]
    with pytest.raises(UsageError, match="has 2 messages, not 3"):
        await do(conversation, "/undo 3", surface)
    await do(conversation, "/clear", surface)
    assert conversation.session.turns == []
    await do(conversation, "/undo", surface)
    await do(conversation, "/undo 2", surface)
    assert conversation.session.turns == []


async def test_an_editor_left_without_a_text_changes_nothing() -> None:
    conversation, surface = talking(), Surface(edited=None)
    await do(conversation, "one", surface)
    assert await do(conversation, "/edit", surface) is None
    assert conversation.session.turns[0].reply is not None


async def test_the_system_message_is_shown_set_and_taken_away() -> None:
    conversation, surface = talking(), Surface()
    for line in ("/system Be brief.\nBe kind.", "/system", "/system -", "/system"):
        await do(conversation, line, surface)
    assert surface.said == ["Be brief.\nBe kind.", "there is no system message"]
    assert conversation.session.system is None


async def test_a_conversation_is_saved_loaded_and_exported(here: Path) -> None:
    conversation, surface = talking(), Surface()
    for line in (f"/image {RED}", "what?", "/save my chat.jsonl", "/export md", "/export html page.html"):
        await do(conversation, line, surface)
    await do(conversation, "/export json -", surface)
    assert '"data:image/png;base64,' in surface.said[-1]
    assert [name.partition("-")[0] for name in names_in(here)] == ["chat", "my chat.jsonl", "page.html"]
    other = talking()
    await do(other, "/load my chat.jsonl", surface)
    assert texts(other.session) == ["what?"] and len(other.session.images) == 1


async def test_only_what_this_chat_wrote_is_written_over(tmp_path: Path) -> None:
    conversation, surface = talking(), Surface()
    diary = tmp_path / "diary.md"
    diary.write_text("dear")
    for line in (f"/export md {diary}", f"/save {diary}"):
        with pytest.raises(UsageError, match="exists"):
            await do(conversation, line, surface)
    assert diary.read_text() == "dear"
    await do(conversation, f"/export md -f {diary}", surface)
    await do(conversation, f"/export md {diary}", surface)
    assert diary.read_text().startswith("# Conversation")


# What is written stays in one directory.
NO_PATHS = st.text(st.characters(exclude_characters="/~"), max_size=40)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(sorted(set(BY_NAME) - {"profile"})), NO_PATHS), max_size=6))
@example([(name, bad) for bad in ("\0", "\ud800") for name in ("save", "export", "load", "image")])
@pytest.mark.usefixtures("here")
def test_any_arguments_work_or_are_refused_with_a_message(typed: list[tuple[str, str]]) -> None:
    async def converse() -> None:
        conversation, surface = talking(), Surface(edited="again")
        await attach(conversation, [RED], surface)
        await do(conversation, "what?", surface)
        for name, rest in typed:
            with suppress(GhostvisError):
                await do(conversation, f"/{name} {rest}", surface)
            assert conversation.session.answered

    asyncio.run(converse())


async def test_every_change_is_on_disk_at_once(tmp_path: Path) -> None:
    sessions = SessionStore(tmp_path)
    conversation, surface = talking(file=sessions.open("trip")), Surface()

    def on_disk() -> Session:
        return SessionFile(tmp_path / "trip", lazy=True).load(DEFAULT_LIMITS)

    await do(conversation, f"/image {RED}", surface)
    assert len(on_disk().pending) == 1
    async with aclosing(conversation.send("what?")) as chunks:
        await anext(chunks)
        assert (on_disk().draft, len(on_disk().pending)) == ("what?", 1)  # if it crashed now
    assert on_disk().turns[0].reply.text == conversation.last.text  # type: ignore[union-attr]
    await do(conversation, "/system Be brief.", surface)
    assert on_disk().system == "Be brief."
    await do(conversation, "/clear", surface)
    assert on_disk().turns == []


@pytest.mark.usefixtures("here")
async def test_loading_another_session_leaves_both_as_they_are() -> None:
    sessions, surface = SessionStore.of_user(), Surface()
    first = talking(file=sessions.open("first"))
    await do(first, "in the first", surface)
    await first.aclose()
    second = talking(file=sessions.open("second"))
    await do(second, "in the second", surface)
    await do(second, "/load", surface)
    assert surface.said[-1].splitlines() == ["second", "first"]
    await do(second, "/load first", surface)
    await do(second, "more", surface)
    assert texts(sessions.open("second").load(DEFAULT_LIMITS)) == ["in the second"]
    await second.aclose()
    assert texts(sessions.open("first").load(DEFAULT_LIMITS)) == ["in the first", "more"]


@pytest.mark.parametrize("command", ["/save -f", "/export md -f"])
async def test_what_is_no_regular_file_is_written_straight_and_stays(tmp_path: Path, command: str) -> None:
    conversation, surface = talking(), Surface()
    await do(conversation, "hello there", surface)
    os.mkfifo(tmp_path / "pipe")
    got = asyncio.create_task(asyncio.to_thread((tmp_path / "pipe").read_text))
    await do(conversation, f"{command} {tmp_path / 'pipe'}", surface)
    assert "hello there" in await got and (tmp_path / "pipe").is_fifo()
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    await do(conversation, f"{command} {tmp_path / 'link'}", surface)
    assert "hello there" in (tmp_path / "file").read_text() and (tmp_path / "link").is_symlink()
    if os.access("/dev/full", os.W_OK):
        with pytest.raises(OutputError, match="/dev/full can't be written: No space left"):
            await do(conversation, f"{command} /dev/full", surface)


async def test_a_disk_that_can_not_be_written_costs_one_notice(tmp_path: Path) -> None:
    file = SessionStore(tmp_path).open("trip")
    notes: list[str] = []
    conversation = talking(file=file, note=notes.append)
    await heard(conversation.send("one"))
    (tmp_path / "trip").rename(tmp_path / "gone")
    for text in ("two", "three"):
        assert await heard(conversation.send(text)) == text
    assert notes == ["the conversation is not being saved: No such file or directory"]
    (tmp_path / "gone").rename(tmp_path / "trip")
    await heard(conversation.send("four"))
    assert conversation.saved and len(file.load(DEFAULT_LIMITS).turns) == 4


async def test_what_is_not_on_disk_is_never_called_saved_nor_left_for_another_session(tmp_path: Path) -> None:
    sessions, surface = SessionStore(tmp_path), Surface()
    conversation = talking(file=sessions.open("trip"))
    await do(conversation, "precious", surface)
    await do(conversation, f"/save {tmp_path / 'other.jsonl'}", surface)
    (tmp_path / "trip").rename(tmp_path / "gone")
    with pytest.raises(OutputError, match="can't be written"):
        await do(conversation, "/save", surface)
    with pytest.raises(OutputError, match="said until now is not saved"):
        await do(conversation, f"/load {tmp_path / 'other.jsonl'}", surface)
    assert texts(conversation.session) == ["precious"]


@pytest.mark.usefixtures("here")
async def test_another_conversation_begins_beside_the_saved_one_and_a_deleted_one_is_gone() -> None:
    sessions = SessionStore.of_user()
    conversation = talking(file=sessions.open("trip"))
    await heard(conversation.send("Hello"))
    conversation.renew()
    assert conversation.session.empty
    await heard(conversation.send("Other"))
    conversation.rename("walk")
    assert sorted(sessions.names()) == ["trip", "walk"]
    conversation.delete()
    assert sessions.names() == ["trip"]
    await heard(conversation.send("A third"))
    assert len(sessions.names()) == 2


def test_a_setting_says_where_it_comes_from() -> None:
    conversation = talking(resolved=settled(**{"sampling.top_k": 5}))
    assert conversation.origin("max_tokens") == "default of chats"
    assert conversation.origin("temperature") == "default"
    assert "top" in conversation.origin("top_k")
    conversation.set([("top_k", "7")])
    assert conversation.origin("top_k") == "set in this chat"


async def test_view_says_the_model_s_own_size_where_the_engine_knows_it() -> None:
    engine, surface = FakeEngine(), Surface()
    conversation = talking(engine)
    await do(conversation, f"/image {RED}", surface)
    await do(conversation, "what?", surface)
    known, unknown = (64, 64, "all of it, as 64x64 pixels"), (None, 320, "all of it")
    nonsense: Any = ("x", 320, "all of it")  # from a server
    for pixels, shown, says in (known, unknown, nonsense):
        engine.info = replace(engine.info, image_pixels=pixels)
        await do(conversation, "/view", surface)
        size, caption = surface.shown[-1]
        assert size == (shown, shown) and caption.endswith(says)


async def test_the_model_s_own_size_is_known_over_our_server() -> None:
    engine = FakeEngine()
    engine.info = replace(engine.info, image_pixels=64)
    with running(engine) as server:
        async with Conversation(settled(**{"engine.base_url": server.url})) as conversation:
            assert (await conversation.connect()).info.image_pixels == 64


def test_counts_are_said_as_people_say_them() -> None:
    conversation = talking()
    conversation.session.begin("one")
    conversation.session.answer(Reply("1", "stop"))
    assert described(conversation) == "conversation: 1 message"
