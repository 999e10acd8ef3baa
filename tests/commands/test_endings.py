"""Whatever ends a command early, and whenever: its documented code, one line at most, and nothing left behind.

benchmarks/signal_trial.py tries random moments by the hundred; here are the moments that went wrong.
"""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import signal_trial
from ghostvis_cli import scratch
from ghostvis_cli.errors import GhostvisError, limit_reached
from tests.commands.processes import (
    GHOSTVIS,
    PATIENCE_S,
    at,
    environment,
    hanging,
    run,
    running,
    saying,
    scripted,
    until,
)
from tests.limits import limit

DEMO = ("generate", "--source", "demo", "-q", "-t", "0", "Hi")
SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)


def stuck(tmp_path: Path, module: str, code: str) -> tuple[dict[str, str], Path]:
    """An environment in which `import module` runs this code, which may `wait()`; the file that says it does."""
    ready = tmp_path / "ready"
    lines = ("import pathlib, time", f"pathlib.Path({str(ready)!r}).touch()", "time.sleep(1000)")
    wait = "".join(f"    {line}\n" for line in lines)
    (tmp_path / f"{module}.py").write_text(f"def wait():\n{wait}{code}")
    return environment(PYTHONPATH=str(tmp_path)), ready


# Signals and deadlines


@SIGNALS
def test_a_signal_ends_a_command_that_still_imports(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    env, ready = stuck(tmp_path, "typer", "wait()")
    with running(*DEMO, env=env) as started:
        until(ready.exists)
        ended = started.send(number)
    assert (ended.code, ended.out, ended.err) == (code, "", "")


# Where an exception is not raised but told on stderr and dropped, as in a callback of a library's C code.
IN_A_FINALIZER = "class Fragile:\n    def __del__(self):\n        wait()\nFragile()\n"


@SIGNALS
def test_a_signal_in_a_finalizer_of_a_library_ends_the_command(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    env, ready = stuck(tmp_path, "filelock", IN_A_FINALIZER)
    with running(*DEMO, "--lock", "any", env=env) as started:
        until(ready.exists)
        ended = started.send(number)
    assert (ended.code, ended.out, ended.err) == (code, "", "")


def test_a_deadline_in_a_finalizer_of_a_library_ends_the_command(tmp_path: Path) -> None:
    env, _ = stuck(tmp_path, "filelock", IN_A_FINALIZER)
    done = run(*DEMO, "--lock", "any", "--timeout", "1", env=env)
    assert (done.returncode, done.stdout) == (124, b"")
    assert done.stderr == b"ghostvis: error: not done after 1 s (--timeout)\nhint: --timeout 2\n"


@pytest.mark.parametrize("command", [DEMO, ("convert", "--source", "demo", "--out", "model")])
def test_a_deadline_covers_the_import_of_torch(tmp_path: Path, command: tuple[str, ...]) -> None:
    env, _ = stuck(tmp_path, "torch", "wait()")
    done = run(*command, "--timeout", "2", env=env, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (124, b"")
    assert done.stderr == b"ghostvis: error: not done after 2 s (--timeout)\nhint: --timeout 4\n"


def test_one_signal_that_comes_twice_lets_a_batch_unwind(tmp_path: Path) -> None:
    """`timeout` signals the process, and then its group."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi"}\n{"prompt": "Ho"}\n')
    options = ("--input", str(rows), "--output", str(tmp_path / "out.jsonl"), "--concurrency", "1")
    with (
        scripted(saying("one"), hanging("two")) as server,
        running("generate", *options, *at(server)) as started,
    ):
        until(lambda: len(server.posts) == 2)
        started.process.send_signal(signal.SIGTERM)
        ended = started.send(signal.SIGTERM)
    assert ended.code == 143
    assert "1 of 2 rows are recorded; the same command goes on with the rest" in ended.err


def test_a_reply_that_a_signal_cuts_off_is_kept_in_its_session(tmp_path: Path) -> None:
    env = environment(GHOSTVIS_STATE_DIR=str(tmp_path))
    with (
        scripted(hanging("Hel")) as server,
        running("chat", *at(server), "--session", "s", env=env, stdin=subprocess.PIPE) as started,
    ):
        started.write("hi\n")
        started.read("Hel")
        assert started.send(signal.SIGTERM).code == 143
    assert "Hel" in (tmp_path / "chats/s/session.jsonl").read_text()


@SIGNALS
def test_a_conversion_that_a_signal_ends_leaves_nothing(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """While it is verified: the weights are there, under another name."""
    with running("convert", "--source", "demo", "-q", "--out", "model", cwd=tmp_path) as started:
        until(lambda: list(tmp_path.glob(".model.*/generation_config.json")))
        ended = started.send(number)
    assert (ended.code, ended.err) == (code, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", signal_trial.COMMANDS)
@pytest.mark.parametrize("end", signal_trial.ENDS)
def test_at_random_moments_every_command_ends_as_documented(tmp_path: Path, name: str, end: str) -> None:
    command = signal_trial.COMMANDS[name]
    if command.serves and end == "--timeout":
        return
    for moment_s in (0.2, 0.7, 1.9):
        tried = signal_trial.attempt(command, end, tmp_path, moment_s)
        assert tried.good, tried


# Running out of something


@pytest.mark.parametrize("unbuffered", ["1", None])
@pytest.mark.parametrize("more", [[], ["--stream"], ["--json"], ["--jsonl", "again"]])
def test_a_disk_that_fills_in_an_answer_is_code_1(
    tmp_path: Path, unbuffered: str | None, more: list[str]
) -> None:
    env = environment(PYTHONUNBUFFERED=unbuffered)
    answer = saying("word " * 1300)
    with scripted(answer, answer) as server, (tmp_path / "out").open("wb") as out:
        done = subprocess.run(
            [GHOSTVIS, "generate", *at(server), "-q", "hi", *more],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            env=env,
            preexec_fn=limit(resource.RLIMIT_FSIZE, 4096),
            timeout=PATIENCE_S,
        )
    assert done.returncode == 1
    assert done.stderr == b"ghostvis: error: the output could not be written: File too large\n"


@pytest.mark.parametrize("command", [DEMO, ("convert", "--source", "demo", "--out", "model")])
@pytest.mark.parametrize("mib", [60, 300, 600])
def test_too_little_address_space_is_code_7_and_no_bug(
    tmp_path: Path, command: tuple[str, ...], mib: int
) -> None:
    done = run(*command, cwd=tmp_path, preexec_fn=limit(resource.RLIMIT_AS, mib << 20))
    assert (done.returncode, done.stdout) == (7, b"")
    assert done.stderr.startswith(b"ghostvis: error: out of memory") and b"\nhint: " in done.stderr
    assert done.stderr.count(b"\n") == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("unable to mmap 1234 bytes from file <model.pt>: Cannot allocate memory (12)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        ImportError("a long story\n  libtorch_cpu.so: failed to map segment from shared object"),
        OSError(24, "Too many open files"),
    ],
)
def test_every_way_to_run_out_is_told_as_that(error: Exception) -> None:
    found = limit_reached(error)
    assert found is not None and found.code == 7 and found.hint and "\n" not in found.message


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libgomp.so: cannot allocate memory in static TLS block"),
        ImportError("x.so: failed to map segment from shared object: Operation not permitted"),
        OSError(2, "No such file"),
        GhostvisError("a prompt about how to allocate memory"),
        RuntimeError("shapes differ"),
    ],
)
def test_what_is_no_lack_of_memory_is_not_called_so(error: Exception) -> None:
    assert limit_reached(error) is None


TOO_FEW = b"ghostvis: error: too many files are open for the system's limit\nhint: ulimit -n 1024\n"


@pytest.mark.parametrize("most", [5, 6])  # with fewer there is no Python
def test_too_few_open_files_are_code_7_with_what_to_raise(most: int, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hi"}\n')
    with scripted(saying("hi")) as server:
        for given in (["hi"], ["--input", str(rows)]):
            done = run("generate", *at(server), *given, preexec_fn=limit(resource.RLIMIT_NOFILE, most))
            assert (done.returncode, done.stderr) == (7, TOO_FEW)


def test_too_few_open_files_are_no_fault_of_where_a_conversion_goes(tmp_path: Path) -> None:
    few, place = limit(resource.RLIMIT_NOFILE, 7), ("--out", str(tmp_path / "out"))
    done = run("convert", "--source", "demo", "-q", "--no-verify", *place, preexec_fn=few)
    assert (done.returncode, done.stderr) == (7, TOO_FEW)


def test_a_place_that_cannot_be_made_is_told_with_the_reason() -> None:
    done = run("convert", "--source", "demo", "-q", "--no-verify", "--out", "/proc/x")
    assert done.returncode == 1
    assert done.stderr == b"ghostvis: error: /proc/x can't be written: No such file or directory\n"


# Temporary folders

HOLDS_ONE = """
import sys
from ghostvis_cli import scratch
with scratch.folder() as folder:
    (folder / "socket").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_is_in_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_ONE],
        stdin=pipe,
        stdout=pipe,
        text=True,
        env=environment(TMPDIR=str(tmp_path)),
    ) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with scratch.folder() as mine:
            assert left.exists() and mine.exists()
        assert list(tmp_path.iterdir()) == [left]
        process.kill()
    with scratch.folder() as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []
