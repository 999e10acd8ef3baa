"""`ghostvis chat` without a terminal: what a script, cron or another program may rely on."""

import json
import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ghostvis_cli import demo
from ghostvis_cli.engines.fake import FakeEngine
from tests.chat.scripts import ANSWERS, DEMO, IMAGES, RED, THREE, lines, records, run
from tests.commands import processes
from tests.commands.processes import at, hanging, saying, scripted
from tests.engines.scripted import Reply, ending, refusal, usage
from tests.engines.scripted import lines as wire
from tests.engines.serving import running
from tests.limits import limit


@pytest.fixture(autouse=True)
def state(here: Path) -> Path:
    return here / "state"


# The conversation itself, on the built-in model


@pytest.fixture(scope="module")
def local_turns(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return records(run(IMAGES, *DEMO, "--json"))


def test_questions_two_turns_later_and_about_earlier_images_are_answered(
    local_turns: list[dict[str, Any]],
) -> None:
    assert [turn["text"] for turn in local_turns] == ANSWERS
    assert [turn["turn"] for turn in local_turns] == [1, 2, 3, 4, 5, 6, 5]
    assert [turn["images"] for turn in local_turns[:4]] == [[RED], [], [], [THREE]]


def test_the_same_script_says_the_same_over_a_server(local_turns: list[dict[str, Any]]) -> None:
    from ghostvis_cli.checkpoint import locate
    from ghostvis_cli.engines.local import LocalEngine, LocalSettings

    engine = LocalEngine.open(locate.find(demo.BASE_DIR, "sft", demo.MODEL_TAG), LocalSettings())
    with running(engine, vocabulary=engine.tokenizer) as server:
        over_server = records(run(IMAGES, "--base-url", server.url, "-t", "0", "--json"))
    for here, there in zip(local_turns, over_server, strict=True):
        assert (there["text"], there["finish_reason"]) == (here["text"], here["finish_reason"])
        ours, theirs = dict(here["usage"]), dict(there["usage"])
        assert theirs.pop("cached_tokens") >= ours.pop(
            "cached_tokens"
        )  # it warmed up with a prompt of its own
        assert theirs == ours
    assert {turn["engine"]["kind"] for turn in over_server} == {"remote"}


def test_from_the_second_turn_on_what_was_said_before_is_cached(local_turns: list[dict[str, Any]]) -> None:
    """All of the previous turn but its last few tokens, which were sampled and never became part of a prompt."""
    before = 0
    for turn in local_turns[:6]:
        usage = turn["usage"]
        assert usage["cached_tokens"] >= before - 2
        before = usage["prompt_tokens"] + usage["completion_tokens"]
    assert local_turns[1]["usage"]["cached_tokens"] > local_turns[1]["usage"]["prompt_tokens"] // 2


def test_image_tokens_are_counted_for_every_image_so_far(local_turns: list[dict[str, Any]]) -> None:
    assert [turn["usage"]["image_tokens"] for turn in local_turns] == [64, 64, 64, 128, 128, 128, 128]


# Answers of other servers


def events(*given: dict[str, Any]) -> Reply:
    stream = [{"choices": [{"index": 0, **each}]} for each in given]
    return Reply((b"".join(b"data: %s\n\n" % json.dumps(each).encode() for each in stream) + DONE,))


DONE = wire(ending(), usage(), "[DONE]")


def test_an_emoji_in_two_events_is_shown_exported_and_sent_again(tmp_path: Path) -> None:
    halves = events({"delta": {"content": "a\ud83d"}}, {"delta": {"content": "\ude00b"}})
    script = lines("hi", f"/export json {tmp_path / 'chat.json'}", "again")
    with scripted(halves) as server:
        done = run(script, *at(server))
    assert (done.exit_code, done.stdout) == (0, "a😀b\na😀b\n")
    assert server.posts[1].json["messages"][1]["content"] == "a😀b"
    assert json.loads((tmp_path / "chat.json").read_text())["messages"][1]["content"] == "a😀b"


def test_what_came_instead_of_text_is_told_recorded_kept_and_exported(tmp_path: Path) -> None:
    refused = events({"delta": {"refusal": "I can't"}}, {"delta": {"reasoning_content": "hm"}})
    exports = [tmp_path / f"chat.{style}" for style in ("md", "html", "json")]
    script = lines("hi", *(f"/export {path.suffix[1:]} {path}" for path in exports))
    with scripted(refused) as server:
        [record] = records(done := run(script, *at(server), "--json", "--session", "one"))
    said = "the answer has no text: the model refused: I can't"
    assert (record["text"], record["refusal"], record["reasoning"]) == ("", "I can't", "hm")
    assert said in done.stderr
    assert said in exports[0].read_text()
    assert "the model refused: I can&#x27;t" in exports[1].read_text()
    assert json.loads(exports[2].read_text())["beside"] == [
        {"message": 1, "reasoning": "hm", "refusal": "I can't"}
    ]
    again = tmp_path / "again.md"
    with scripted(saying("ok")) as server:
        run(lines(f"/export md {again}"), *at(server), "--session", "one")
    assert said in again.read_text()


# Streams


def test_stdout_is_one_answer_a_message_and_stderr_all_else() -> None:
    script = lines("Hello", "", "/stats", "/help", "/view", "again")
    with scripted(saying("Hel", "lo"), saying("two\nlines")) as server:
        done = run(script.replace("/view\n", ""), *at(server), "--stats")
    assert (done.exit_code, done.stdout) == (0, "Hello\ntwo\nlines\n")
    assert all(line.startswith("ghostvis: ") for line in done.stderr.splitlines())
    assert "ghostvis: replies: 1" in done.stderr and done.stderr.count("tokens") > 3


def test_quiet_leaves_only_errors_on_stderr() -> None:
    with scripted(saying("yes")) as server:
        done = run(lines("hi", "/show", "/stats", "/nothing"), *at(server), "-q")
    assert done.stdout == "yes\n"
    assert done.stderr.startswith("ghostvis: error: line 4: there is no command /nothing\nhint: ")


def test_an_exported_conversation_finds_stdout_by_its_name_too() -> None:
    with scripted(saying("hello")) as server:
        command = [processes.GHOSTVIS, "chat", *at(server)]
        given = lines("hi", "/export json -f /dev/stdout", "and?").encode()
        done = subprocess.run(command, input=given, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.count(b"hello"), done.stdout.count(b'"hi"')) == (0, 3, 1), (
        done.stderr
    )


def test_an_exported_conversation_may_go_to_stdout() -> None:
    with scripted(saying("yes")) as server:
        done = run(lines("hi", "/export json -"), *at(server))
    assert json.loads(done.stdout.removeprefix("yes\n"))["messages"][1]["content"] == "yes"


def test_a_record_is_one_line_a_turn() -> None:
    with scripted(saying("a\nb")) as server:
        [record] = records(run(lines("hi"), *at(server), "--json"))
    assert list(record) == [
        "schema_version", "turn", "prompt", "images", "text", "finish_reason", "usage", "timing", "model", "engine",
    ]  # fmt: skip
    assert (record["schema_version"], record["prompt"], record["text"]) == (1, "hi", "a\nb")


def test_each_line_is_answered_before_the_next_is_read() -> None:
    with (
        scripted(saying("one"), saying("two")) as server,
        processes.running("chat", *at(server), stdin=subprocess.PIPE) as started,
    ):
        for said in ("one", "two"):
            started.write("hi\n")
            started.read(f"{said}\n")
        assert started.end().code == 0


# Ends


@pytest.mark.parametrize("word", ["quit", "exit", "/quit", "/exit", "/QUIT  "])
def test_what_follows_quit_is_not_said(word: str) -> None:
    with scripted(saying("one")) as server:
        done = run(lines("hi", word, "never"), *at(server))
    assert (done.exit_code, done.stdout, len(server.posts)) == (0, "one\n", 1)


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("/imgae x.png", 2, "there is no command /imgae"),
        ("/image missing.png", 3, "missing.png"),
        (f"/image {__file__}", 3, "seems to be"),
        ("/set temperature=warm", 2, "temperature takes a number"),
        ("/profile nosuch", 2, "there is no profile"),
        ("/paste", 2, "no clipboard without a terminal"),
        ("/edit", 2, "no editor without a terminal"),
        ("/load missing.jsonl", 3, "missing.jsonl"),
    ],
)
def test_the_first_line_that_fails_ends_it_with_its_number_and_code(line: str, code: int, says: str) -> None:
    with scripted(saying("one"), saying("two")) as server:
        done = run(lines("hi", line, "never"), *at(server), "--json", "-q")
    assert (done.exit_code, len(server.posts)) == (code, 1)
    assert done.stderr.startswith("ghostvis: error: line 2: ") and says in done.stderr
    answer, error = (json.loads(each) for each in done.stdout.splitlines())
    assert answer["text"] == "one" and error["error"]["code"] == code


def test_what_the_server_refuses_is_code_6_and_no_server_code_5() -> None:
    with scripted(refusal(400, {"error": {"message": "too rude"}})) as server:
        assert run(lines("hi"), *at(server)).exit_code == 6
    assert run(lines("hi"), "--base-url", "http://127.0.0.1:1", "--set", "engine.retries=0").exit_code == 5


def test_without_a_message_nothing_is_loaded() -> None:
    for script in ("", b""):
        done = run(script, *DEMO)
        assert (done.exit_code, done.stdout) == (2, "") and "stdin holds no messages" in done.stderr
    ended = processes.run("chat", *DEMO)  # /dev/null, as from cron
    assert ended.returncode == 2


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--overflow", "maybe"], "--overflow is refuse or drop-oldest"),
        (["--session", "a", "--continue"], "exclude each other"),
        (["--session", "../x"], "no name of a session"),
        (["--continue"], "no earlier session"),
        (["--timeout", "0"], "--timeout"),
        (["--image", "-"], "stdin is not read for images"),
    ],
)
def test_options_that_make_no_sense_are_refused(args: list[str], says: str) -> None:
    done = run("hi\n", *args, *DEMO)
    assert done.exit_code == 2 and says in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_reply_and_the_session_has_the_part_that_came(
    number: signal.Signals, code: int, state: Path
) -> None:
    chat = ("chat", "-q", "--session", "cut")
    with (
        scripted(hanging("Hel"), saying("lo")) as server,
        processes.running(*chat, *at(server), stdin=subprocess.PIPE) as started,
    ):
        started.write("hi\n")
        started.read("Hel")
        ended = started.send(number)
        assert (ended.code, ended.err) == (code, "")
        turn = json.loads(session_file(state, "cut").read_text().splitlines()[1])
    assert (turn["text"], turn["reply"]["text"], turn["reply"]["finish_reason"]) == ("hi", "Hel", "abort")


def test_a_killed_process_loses_only_the_reply_in_flight() -> None:
    with (
        scripted(saying("one"), hanging("tw"), saying("three")) as server,
        processes.running("chat", *at(server), "--session", "cut", stdin=subprocess.PIPE) as started,
    ):
        started.write(lines(f"/image {RED}", "first", f"/image {THREE}", "second"))
        started.read("one\ntw")
        started.process.kill()
        started.process.wait()
        done = run(lines("/regen"), *at(server), "--continue", "--json")
    [record] = records(done)
    assert (record["turn"], record["prompt"], record["images"]) == (2, "second", [THREE])
    assert [len(m["content"]) for m in server.posts[-1].json["messages"] if m["role"] == "user"] == [2, 2]


def session_file(state: Path, name: str) -> Path:
    return state / "chats" / name / "session.jsonl"


def test_a_deadline_is_code_124_and_a_held_lock_code_10(tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    with scripted(hanging("Hel"), hanging("Hel")) as server:
        done = processes.run("chat", *at(server), "--timeout", "6", input=b"hi\n")
        assert (done.returncode, done.stdout) == (124, b"Hel")
        with processes.running("chat", *at(server), "--lock", lock, stdin=subprocess.PIPE) as started:
            started.write("hi\n")
            started.read("Hel")
            assert processes.run("chat", *at(server), "--lock", lock, input=b"hi\n").returncode == 10


# Sessions


def test_a_session_goes_on_where_it_stopped() -> None:
    with scripted(saying("one"), saying("two"), saying("three")) as server:
        run(lines(f"/image {RED}", "what?"), *at(server), "--session", "trip", "--system", "Be brief.")
        run(lines("and?"), *at(server), "--session", "trip")
        done = run(lines("now?"), *at(server), "--continue", "--system", "Be long.")
        assert done.exit_code == 0
        said = [(m["role"], m["content"]) for m in server.posts[-1].json["messages"]]
    assert said[0] == ("system", "Be long.") and said[2:] == [
        ("assistant", "one"), ("user", "and?"), ("assistant", "two"), ("user", "now?"),
    ]  # fmt: skip
    assert [part["type"] for part in said[1][1]] == ["image_url", "text"]
    assert server.posts[1].json["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_script_without_a_session_leaves_nothing_behind(state: Path) -> None:
    with scripted(saying("one")) as server:
        run(lines("hi"), *at(server))
    assert not state.exists()


def test_two_chats_can_not_share_a_session() -> None:
    with (
        scripted(saying("one"), saying("two")) as server,
        processes.running("chat", *at(server), "--session", "trip", stdin=subprocess.PIPE) as started,
    ):
        started.write("hi\n")
        started.read("one\n")
        done = run("hi\n", *at(server), "--session", "trip")
    assert done.exit_code == 10 and "another chat has the session trip open" in done.stderr


def test_a_damaged_session_is_refused_and_left_as_it_is(state: Path) -> None:
    path = session_file(state, "trip")
    path.parent.mkdir(parents=True)
    path.write_text('{"schema_version": 1, "kind": "ghostvis chat"}\n{"text": "a", "repl')
    before = path.read_bytes()
    for _ in range(2):  # nor is its lock kept
        done = run("hi\n", *DEMO, "--session", "trip")
        assert done.exit_code == 3
        assert done.stderr == (
            "ghostvis: error: session trip: line 2: not a line of JSON\n"
            "hint: ghostvis chat --session NEW; the file stays as it is\n"
        )
    assert path.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_that_can_not_be_written_costs_a_notice(state: Path) -> None:
    state.mkdir(mode=0o500)
    with scripted(saying("one")) as server:
        done = run("hi\n", *at(server), "--session", "trip")
    assert (done.exit_code, done.stdout) == (0, "one\n") and "will not be saved" in done.stderr


@pytest.mark.parametrize("home", ["none", "file"])
def test_no_home_costs_a_notice(home: str, state: Path) -> None:
    if home == "file":
        state.write_text("in the way")
        env = processes.environment()
    else:
        env = processes.environment(HOME="relative", XDG_STATE_HOME=None, GHOSTVIS_STATE_DIR=None)
    with scripted(saying("one")) as server:
        done = processes.run("chat", *at(server), "--session", "trip", input=b"hi\n", env=env)
    assert (done.returncode, done.stdout) == (0, b"one\n")
    assert done.stderr.decode().count("the conversation will not be saved") == 1


def test_a_full_disk_costs_a_notice_and_not_the_answer() -> None:
    with scripted(saying("one"), saying("two")) as server:
        chat = ("chat", *at(server), "--top-k", "0", "--session", "trip")
        done = processes.run(*chat, input=b"hi\nho\n", preexec_fn=limit(resource.RLIMIT_FSIZE, 300))
    assert (done.returncode, done.stdout) == (0, b"one\ntwo\n")
    assert done.stderr == b"ghostvis: the conversation is not being saved: File too large\n"


# What may come over stdin


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (b"\xef\xbb\xbfhi\r\nho\r\n", ["hi", "ho"]),
        (b"no line break", ["no line break"]),
        ("\ufeffhi\r\nho".encode("utf-16-le"), ["hi", "ho"]),
        ("\ufeffé\n".encode("utf-16-be"), ["é"]),
        ("hi\n".encode("utf-32"), ["hi"]),
        (b"one\rtwo\r\rthree", ["one", "two", "three"]),
        (b"a\0b\n", ["a\0b"]),
        ("Grüße, 世界 🎉\u2028same line\n".encode(), ["Grüße, 世界 🎉\u2028same line"]),
        (b"/home/x/y.png is a path\n", ["/home/x/y.png is a path"]),
        (b" /help\n", ["/help"]),
        (b"\x1b[2J\x07bell\n", ["\x1b[2J\x07bell"]),
    ],
)
def test_messages_arrive_as_they_were_written(script: bytes, said: list[str]) -> None:
    with scripted(*(saying("ok") for _ in said)) as server:
        done = run(script, *at(server))
    assert done.exit_code == 0
    assert [post.json["messages"][-1]["content"] for post in server.posts] == said


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (b"hi\nlatin \xff\n", "line 2 is not UTF-8 text: invalid start byte at byte 6"),
        (b"hi\n\xed\xa0\x80\n", "line 2 is not UTF-8 text"),
        (b"hi\n" + b"x" * (16 * 1024**2 + 1), "line 2 holds more than 16 MiB"),
    ],
)
def test_what_is_no_text_is_code_3(script: bytes, says: str) -> None:
    with scripted(saying("ok")) as server:
        done = run(script, *at(server))
    assert (done.exit_code, done.stdout) == (3, "ok\n") and says in done.stderr


def test_a_message_that_does_not_fit_says_the_arithmetic() -> None:
    done = run("word " * 20_000 + "\n", *DEMO)
    assert done.exit_code == 3 and "ghostvis: error: line 1: the message does not fit: " in done.stderr
    assert "+ 200 for the reply (max_tokens) = " in done.stderr and "the model has 10,240" in done.stderr


def test_the_oldest_turns_are_left_out_where_that_was_asked_for() -> None:
    script = lines("Hello " * 15, "Hello " * 22, "Hello")
    done = run(script, *DEMO, "--overflow", "drop-oldest", "--max-tokens", "10150")
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 3
    assert "95 tokens of conversation + 10,150 for the reply" in done.stderr
    assert done.stderr.count("the model no longer sees the oldest turn") == 1


def test_many_lines_are_answered_one_by_one() -> None:
    with running(FakeEngine(context_tokens=10**6)) as server:
        done = run("".join(f"line {number}\n" for number in range(120)), "--base-url", server.url, "-q")
    assert done.stdout.splitlines() == [f"line {number}" for number in range(120)]


def test_images_that_nobody_asked_about_are_mentioned() -> None:
    with scripted(saying("ok")) as server:
        done = run(lines("hi", f"/image {RED}"), *at(server))
    assert done.exit_code == 0 and "nothing was asked about them" in done.stderr
