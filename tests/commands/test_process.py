"""The contract with shells, cron and systemd, kept by real processes: codes, signals, streams, locks, deadlines."""

import json
import re
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from tests.commands.processes import (
    GHOSTVIS,
    PATIENCE_S,
    at,
    bash,
    environment,
    hanging,
    run,
    running,
    saying,
    scripted,
    until,
)
from tests.engines.scripted import Reply, refusal
from tests.limits import limit
from tests.sites import nobody_listens

UNICODE = "Grüße, 世界 🎉"
QUICKLY_S = 30.0  # on a busy machine; what is not ended hangs twice as long
DEMO = ("generate", "--source", "demo", "--temperature", "0", "Hello")


# Exit codes


@pytest.mark.parametrize(
    ("code", "kind", "args"),
    [
        (2, "usage", ["--bogus"]),
        (2, "usage", []),
        (3, "input", ["hi", "--image", "missing.png"]),
        (4, "checkpoint", ["hi", "--source", "base"]),
        (5, "engine", ["hi", "--base-url", nobody_listens(), "--set", "engine.retries=0"]),
    ],
)
def test_an_error_is_one_line_a_hint_a_record_and_its_code(code: int, kind: str, args: list[str]) -> None:
    done = run("generate", "--json", *args)
    assert done.returncode == code
    assert re.fullmatch(r"ghostvis: error: [^\n]+\n(hint: [^\n]+\n)?", done.stderr.decode())
    [record] = [json.loads(line) for line in done.stdout.splitlines()]
    assert (record["schema_version"], record["error"]["code"], record["error"]["kind"]) == (1, code, kind)


def test_what_the_server_refuses_is_code_6_and_for_one_prompt_of_two_code_8() -> None:
    no = refusal(400, {"error": {"message": "no"}})
    with scripted(no, saying("yes"), no) as server:
        assert run("generate", *at(server), "hi").returncode == 6
        done = run("generate", *at(server), "--jsonl", "one", "two")
    assert done.returncode == 8
    assert sorted("error" in json.loads(line) for line in done.stdout.splitlines()) == [False, True]


def test_too_little_memory_is_code_7(tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("a" * 16_000_000)
    little = limit(
        resource.RLIMIT_AS, 80 << 20
    )  # enough to start, too little for several copies of the prompt
    with scripted(saying("hi")) as server:
        done = run("generate", *at(server), "--prompt-file", str(long), preexec_fn=little)
    assert (done.returncode, done.stdout) == (7, b"")
    assert done.stderr.startswith(b"ghostvis: error: out of memory\nhint: ")


def test_a_bug_is_code_1_with_a_traceback_and_a_record(tmp_path: Path) -> None:
    (tmp_path / "httpx2.py").write_text("raise ZeroDivisionError('in a library\\nat its second line')")
    done = run(
        "generate", "--json", "--base-url", "http://x", "hi", env=environment(PYTHONPATH=str(tmp_path))
    )
    assert done.returncode == 1
    assert b"Traceback (most recent call last)" in done.stderr
    assert b"\nghostvis: error: a bug: ZeroDivisionError: in a library\nhint: please report" in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == 1


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("generat", "ghostvis generate"), ("modles", "ghostvis models"), ("xyzzy", "ghostvis --help")],
)
def test_a_mistyped_command_is_told_the_nearest_one(typed: str, hint: str) -> None:
    done = run(typed)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"ghostvis: error: no command named '{typed}'\nhint: {hint}\n"


def test_an_unknown_option_of_the_whole_is_an_error_like_all_others() -> None:
    done = run("--bogus")
    assert done.returncode == 2
    assert done.stderr.decode() == "ghostvis: error: no such option: --bogus\nhint: ghostvis --help\n"


@pytest.mark.parametrize("args", [[], ["profile"]])
def test_a_group_without_a_command_explains_itself(args: list[str]) -> None:
    done = run(*args)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"Usage: ghostvis") and b"error" not in done.stderr


@pytest.mark.parametrize("args", [["-h"], ["generate", "-h"], ["profile", "show", "-h"]])
def test_h_is_help(args: list[str]) -> None:
    assert run(*args).stdout.startswith(f"Usage: {' '.join(['ghostvis', *args[:-1]])}".encode())


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("prompts", [["one"], ["one", "two", "three"]])
def test_a_signal_ends_an_answer_at_once_and_in_silence(
    number: signal.Signals, code: int, prompts: list[str]
) -> None:
    with (
        scripted(hanging("Hel")) as server,
        running("generate", *at(server), "--stream", *prompts) as started,
    ):
        until(lambda: len(server.posts) == len(prompts))
        if len(prompts) == 1:
            started.read("Hel")
        ended = started.send(number)
    assert (ended.code, ended.out, ended.err) == (code, "", "")
    assert ended.took_s < QUICKLY_S and not ended.left_processes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_loading_of_a_model(number: signal.Signals, code: int) -> None:
    with running(*DEMO) as started:
        maps = Path(f"/proc/{started.process.pid}/maps")
        until(lambda: "libtorch" in maps.read_text())
        ended = started.send(number)
    assert (ended.code, ended.out, ended.err) == (code, "", "")
    assert ended.took_s < QUICKLY_S and not ended.left_processes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_generation_in_this_process(number: signal.Signals, code: int) -> None:
    with running(*DEMO, "--stream", "--ignore-eos", "--max-tokens", "10000") as started:
        started.read("H")
        ended = started.send(number)
    assert (ended.code, ended.err) == (code, "")
    assert ended.took_s < QUICKLY_S and not ended.left_processes


def with_interrupts() -> None:
    """A shell that is told to ignore Ctrl-C from its start, as by nohup or &, never changes that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_at_a_terminal_stops_the_shells_loop_too() -> None:
    with scripted(hanging("Hel")) as server:
        loop = f"for i in 1 2 3; do {GHOSTVIS} generate {' '.join(at(server))} hi; echo on; done"
        shell = pexpect.spawn(
            "bash",
            ["-c", loop],
            env=environment(),
            encoding="utf-8",
            timeout=PATIENCE_S,
            preexec_fn=with_interrupts,
        )
        shell.expect_exact("Hel")
        shell.sendintr()
        rest = shell.read()
        shell.close()
        assert len(server.posts) == 1
    assert rest.replace("^C", "") == "\r\n"  # the cut line is ended, and nothing else is said
    assert shell.signalstatus == signal.SIGINT


@pytest.mark.parametrize("unbuffered", ["1", None])
def test_a_reader_that_leaves_ends_the_run_with_141_and_in_silence(unbuffered: str | None) -> None:
    env = environment(PYTHONUNBUFFERED=unbuffered)
    words = [f"{number} " for number in range(200)]
    with scripted(saying(*words, pause_s=0.01)) as server:
        command = f"generate {' '.join(at(server))} -q hi"
        for line in (f"{command} --stream | head -c 1", f"{command} --json | true", "--help | true"):
            done = bash(f"ghostvis {line}; echo ${{PIPESTATUS[0]}} >&2", env=env)
            assert done.stderr == b"141\n", line


# --timeout


def test_timeout_ends_an_answer_with_124_one_line_and_a_record() -> None:
    with scripted(hanging("Hel")) as server:
        command = [
            "generate",
            *at(server),
            "hi",
            "--timeout",
            "6",
        ]  # the text comes first on a busy machine too
        with running(*command, "--stream") as plain, running(*command, "--json") as as_record:
            text, record = plain.end(), as_record.end()
    line = "ghostvis: error: not done after 6 s (--timeout)\nhint: --timeout 12\n"
    assert (text.code, text.out, text.err) == (124, "Hel", line)
    assert (record.code, record.err) == (124, line)
    assert json.loads(record.out)["error"] | {"hint": None} == {
        "code": 124,
        "kind": "timeout",
        "message": "not done after 6 s (--timeout)",
        "hint": None,
    }


def test_timeout_covers_the_loading_of_a_model() -> None:
    done = run(*DEMO, "--timeout", "0.5")
    assert (done.returncode, done.stdout) == (124, b"")
    assert done.stderr.startswith(b"ghostvis: error: not done after 0.5 s")


def test_timeout_ends_a_run_whose_reader_sleeps() -> None:
    with (
        scripted(saying("a" * 1_000_000)) as server,  # more than a pipe holds
        running("generate", *at(server), "-q", "hi", "--json", "--timeout", "1") as started,
    ):
        assert started.process.wait(PATIENCE_S) == 124
        assert started.process.stderr is not None
        assert started.process.stderr.read().startswith(b"ghostvis: error: not done after 1 s")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_that_is_no_time_is_refused(seconds: str) -> None:
    assert run("generate", "hi", "--timeout", seconds).returncode == 2


# --lock


def test_a_lock_keeps_a_second_run_out_until_the_first_is_gone_however_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "job.lock"
    with scripted(hanging()) as server, running("generate", *at(server), "hi", "--lock", str(file)) as first:
        until(lambda: server.posts)
        second = run("generate", *at(server), "hi", "--json", "--lock", str(file))
        assert second.returncode == 10
        assert second.stderr.decode() == f"ghostvis: error: another run holds the lock {file}\n"
        assert json.loads(second.stdout)["error"]["kind"] == "locked"
        first.send(signal.SIGKILL)
    with scripted(saying("hi")) as server:
        assert run("generate", *at(server), "hi", "--lock", str(file)).returncode == 0


def test_an_automatic_lock_is_one_for_the_same_command_line_in_the_same_directory(tmp_path: Path) -> None:
    env = environment(GHOSTVIS_STATE_DIR=str(tmp_path / "state"))
    with scripted(hanging()) as server:
        line = ["generate", *at(server), "hi", "--lock", "auto"]
        with running(*line, env=env):
            until(lambda: server.posts)
            assert run(*line, "--quiet", "--timeout", "9", env=env).returncode == 10  # does the same work
            assert run(*line, "--set", "sampling.top_k=1", "--timeout", "1", env=env).returncode == 124
            assert run(*line, "--timeout", "1", env=env, cwd=tmp_path).returncode == 124
    assert len(list((tmp_path / "state" / "locks").iterdir())) == 3


@pytest.mark.parametrize(
    ("lock", "env"),
    [("auto", {"HOME": "/proc", "XDG_STATE_HOME": None}), ("/proc/nowhere/job.lock", {}), ("/", {})],
)
def test_a_lock_without_a_place_is_refused(lock: str, env: dict[str, str | None]) -> None:
    done = run("generate", "hi", "--lock", lock, env=environment(**env))
    assert done.returncode == 2
    assert re.fullmatch(rb"ghostvis: error: --lock [^\n]+\n(hint: --lock FILE[^\n]+\n)?", done.stderr)


# --log-file


def test_the_log_holds_what_stderr_said_with_times_and_how_the_run_ended(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    always = ["--log-file", str(log), "--color", "always"]
    with scripted(saying("hi")) as server:
        told = run("generate", *at(server), "hi", "--stats", *always)
        quiet = run("generate", *at(server), "hi", "--stats", "--quiet", *always)
    failed = run("generate", "hi", "--image", "missing.png", *always)
    assert [done.returncode for done in (told, quiet, failed)] == [0, 0, 3]
    assert quiet.stderr == b"" and b"\x1b[" in told.stderr and b"\x1b[" in failed.stderr
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \d+ ", line) for line in lines)
    texts = [line.split(" ", 2)[2] for line in lines]
    assert [text for text in texts if text.startswith("started")] == ["started: ghostvis generate"] * 3
    assert [text[:13] for text in texts if text.startswith("ended")] == ["ended: code 0"] * 2 + [
        "ended: code 3"
    ]
    assert sum(text.startswith("ghostvis: ttft") for text in texts) == 2
    assert texts[-2].startswith("ghostvis: error: missing.png")


def test_the_log_tells_of_a_signal_and_of_a_bug(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    with (
        scripted(hanging("Hel")) as server,
        running("generate", *at(server), "hi", "--stream", "--log-file", str(log)) as started,
    ):
        started.read("Hel")
        started.send(signal.SIGTERM)
    assert "ended: code 143 after " in log.read_text().splitlines()[-1]
    (tmp_path / "httpx2.py").write_text("raise ZeroDivisionError")
    env = environment(PYTHONPATH=str(tmp_path))
    run("generate", "--base-url", "http://x", "hi", "--log-file", str(log), env=env)
    assert "Traceback (most recent call last)" in log.read_text()


def test_a_log_that_cannot_be_opened_is_refused() -> None:
    done = run("generate", "hi", "--log-file", "/proc/run.log")
    assert done.returncode == 2
    assert b"--log-file /proc/run.log can't be opened" in done.stderr


# Closed, full and foreign streams


def test_closed_streams_are_nobodys_fault() -> None:
    with scripted(saying("hi")) as server:
        command = f"ghostvis generate {' '.join(at(server))} -q hi"
        done = bash(f"{command} >&-; echo $?; {command} 2>&-; echo $?; {command} <&-; echo $?")
    assert (done.stdout, done.stderr) == (b"0\nhi\n0\nhi\n0\n", b"")
    done = bash("ghostvis --bogus 2>&-; echo $?; ghostvis --version >&-; ghostvis --help >&-; echo $?")
    assert (done.stdout, done.stderr) == (b"2\n0\n", b"")


def test_the_number_of_a_closed_stream_is_not_given_to_a_file(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    with scripted(hanging()) as server:
        line = f"exec ghostvis generate {' '.join(at(server))} hi --log-file {log} <&- >&- 2>&-"
        process = subprocess.Popen(["bash", "-c", line], env=environment())
        try:
            until(lambda: server.posts)
            streams = [Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in (0, 1, 2)]
        finally:
            process.kill()
            process.wait()
    assert streams == [Path("/dev/null")] * 3
    assert log.read_text()


def test_a_bug_does_not_go_to_stdout_when_stderr_is_closed(tmp_path: Path) -> None:
    (tmp_path / "httpx2.py").write_text("raise ZeroDivisionError")
    done = bash(
        "ghostvis generate --base-url http://x hi 2>&-; echo $?", env=environment(PYTHONPATH=str(tmp_path))
    )
    assert done.stdout == b"1\n"


def test_a_full_disk_is_an_error_on_one_line() -> None:
    with scripted(saying("hi")) as server:
        answers = [f"generate {' '.join(at(server))} -q hi {how}" for how in ("", "--json", "--stream")]
        for command in (*answers, "--version", "--help", "models"):
            done = bash(f"ghostvis {command} >/dev/full", env=environment(PYTHONUNBUFFERED=None))
            assert done.returncode == 1, command
            message = b"ghostvis: error: the output could not be written: No space left on device\n"
            assert done.stderr.endswith(message) and b"Traceback" not in done.stderr, command


@pytest.mark.parametrize(
    "env",
    [
        {"LANG": "C"},
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"},
        {"HOME": None},
        {"HOME": "/proc"},
    ],
)
def test_an_answer_is_exact_in_a_poor_environment(env: dict[str, str | None]) -> None:
    with scripted(saying(UNICODE + "\r\x1b[2J")) as server:
        done = run("generate", *at(server), "--top-k", "0", "hi", env=environment(**env))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == UNICODE + "\r\x1b[2J\n"


def test_an_encoding_without_the_letters_gets_escapes_and_valid_json() -> None:
    env = environment(PYTHONIOENCODING="latin-1")
    with scripted(saying(UNICODE)) as server:
        text = run("generate", *at(server), "-q", "hi", env=env).stdout
        record = run("generate", *at(server), "-q", "--json", "hi", env=env).stdout
    assert text.decode("latin-1") == "Grüße, \\u4e16\\u754c \\U0001f389\n"
    assert json.loads(record.decode("ascii"))["text"] == UNICODE


# stdin


def test_stdin_is_read_where_it_is_a_pipe_or_a_file_and_no_prompt_was_typed(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("from a file\n")
    with scripted(saying("hi")) as server:
        command = ["generate", *at(server)]
        run(*command, input=b"from a pipe\n")
        with (tmp_path / "prompt.txt").open() as file:
            run(*command, stdin=file)
        run(*command, "typed", "-", input=b"from -")
        with running(*command, "typed", stdin=subprocess.PIPE) as started:  # a pipe that nobody closes
            assert started.process.wait(PATIENCE_S) == 0
        asked = [post.json["messages"][-1]["content"] for post in server.posts]
    texts = [a if isinstance(a, str) else a[0]["text"] for a in asked]
    assert [texts[0], texts[1], *sorted(texts[2:4]), texts[4]] == [
        "from a pipe",
        "from a file",
        "from -",
        "typed",
        "typed",
    ]


@pytest.mark.parametrize(
    ("redirect", "code"), [("</dev/null", 2), ("<&-", 2), ("- <&-", 3), ("< <(true)", 3)]
)
def test_a_stdin_without_a_prompt_is_an_error_and_never_a_wait(redirect: str, code: int) -> None:
    done = bash(f"ghostvis generate {redirect}")
    assert done.returncode == code
    assert done.stderr.startswith(b"ghostvis: error: ")


# Terminals and colour


def on_a_terminal(*args: str, **env: str | None) -> str:
    """All that `ghostvis ARGS` writes to a terminal."""
    plain = environment(**{"TERM": "xterm", "LANG": "C.UTF-8", **env})
    child = pexpect.spawn(GHOSTVIS, list(args), env=plain, encoding="utf-8", timeout=PATIENCE_S)
    written = child.read()
    child.close()
    return str(written)


def in_a_pipe(*args: str, **env: str | None) -> str:
    done = run(*args, env=environment(**{"TERM": "xterm", **env}))
    return (done.stdout + done.stderr).decode()


@pytest.mark.parametrize(
    ("where", "colored", "color", "env"),
    [
        (on_a_terminal, True, None, {}),
        (on_a_terminal, False, None, {"TERM": "dumb"}),
        (on_a_terminal, False, None, {"NO_COLOR": "1"}),
        (on_a_terminal, True, None, {"TERM": "dumb", "FORCE_COLOR": "1"}),
        (on_a_terminal, False, "never", {"FORCE_COLOR": "1"}),
        (in_a_pipe, False, None, {}),
        (in_a_pipe, True, None, {"FORCE_COLOR": "1"}),
        (in_a_pipe, False, None, {"FORCE_COLOR": "1", "NO_COLOR": "1"}),
        (in_a_pipe, True, "always", {"NO_COLOR": "1"}),
    ],
)
def test_colour_is_decided_by_option_then_environment_then_stream(
    where: Callable[..., str], colored: bool, color: str | None, env: dict[str, str | None]
) -> None:
    said = where("generate", "hi", "--image", "missing.png", *(["--color", color] if color else []), **env)
    assert "error:" in said
    assert ("\x1b[31m" in said) is colored and ("\x1b" in said) is colored


def test_what_goes_to_a_pipe_has_no_escapes_and_no_carriage_returns() -> None:
    with scripted(saying("Hel", "lo")) as server:
        runs = [
            ["generate", *at(server), "hi", "--stream", "--stats", "-v"],
            ["models"],
            ["--help"],
            ["generate", "--help"],
        ]
        for args in runs:
            done = run(*args, env=environment(TERM="xterm-256color"))
            assert done.returncode == 0
            assert not re.search(rb"[\r\x1b]", done.stdout + done.stderr), args


def test_a_terminal_shows_text_as_it_comes_and_takes_no_orders_from_the_model() -> None:
    orders = Reply(
        (saying("a\x1b[2Jb\x07\x9b1mc", "\rd").chunks[0], *hanging("\rd", "END").chunks), end="hang"
    )
    with scripted(orders, saying("\x1b[31mred\x07")) as server:
        child = pexpect.spawn(
            GHOSTVIS, ["generate", *at(server), "hi"], env=environment(), encoding="utf-8", timeout=PATIENCE_S
        )
        child.expect_exact("END")  # while the answer is still under way
        assert child.isalive() and child.before.endswith("a[2Jb1mcd")
        child.sendintr()
        child.expect(pexpect.EOF)
        child.close()
        assert on_a_terminal("generate", *at(server), "-q", "hi") == "[31mred\r\n"


def test_a_record_on_a_terminal_is_valid_and_harmless() -> None:
    with scripted(saying("\x9b31mred\x7f")) as server:
        written = on_a_terminal("generate", *at(server), "-q", "--json", "hi")
    assert json.loads(written)["text"] == "\x9b31mred\x7f"
    assert "\x9b" not in written and "\x7f" not in written
