"""`generate --input`, as real processes that are killed, stopped, locked out and read by others."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pexpect
import pyte
import pytest

from ghostvis_cli import demo
from ghostvis_cli.batch.run import ENGINE_ERRORS_IN_A_ROW
from ghostvis_cli.engines.fake import FakeEngine
from tests.cli import invoke
from tests.commands.processes import (
    GHOSTVIS,
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
from tests.conftest import DATA
from tests.engines import serving
from tests.engines.scripted import Reply, ending, lines, refusal, usage, words
from tests.limits import limit

LOCAL = ("--source", "demo", "--temperature", "0")
IMAGE = Path(demo.__file__).parent / "red-circle.png"
WORD_S = 0.004  # the server's time for a word: a run of 36 rows lasts long enough to be killed in the middle


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, ...]]:
    """The options that reach a server that repeats what it is told."""
    with serving.running(FakeEngine(delay_s=WORD_S)) as running_server:
        yield "--base-url", running_server.url, "--temperature", "0"


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answers(path: Path) -> dict[Any, Any]:
    """What must not depend on how often a run was killed. Fails on a row that is there twice."""
    found = {record["id"]: (record["index"], record["text"], record["token_ids"]) for record in records(path)}
    assert len(found) == len(records(path))
    return found


def generate(
    rows: Path | str, out: Path | None, *options: str, **more: Any
) -> subprocess.CompletedProcess[bytes]:
    return run(*command(rows, out, *options), **more)


def command(rows: Path | str, out: Path | None, *options: str) -> list[str]:
    return ["generate", "--input", str(rows), *(["--output", str(out)] if out else []), *options]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(
        tmp_path / "rows.jsonl", *({"id": f"é{n}", "prompt": f"Count {n} 😀 shapes"} for n in range(36))
    )


def kill(rows: Path, out: Path, after_s: float, *options: str) -> None:
    """Start a run, and kill it that long after its first new record."""
    before = len(content(out))
    with running(*command(rows, out, "--concurrency", "2", *options)) as process:
        until(lambda: len(content(out)) > before)
        time.sleep(after_s)  # the moment is what is tested
        assert process.send(signal.SIGKILL).code == -signal.SIGKILL


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def test_killed_at_random_moments_every_row_is_there_once_as_in_a_calm_run(
    rows: Path, tmp_path: Path, server: tuple[str, ...]
) -> None:
    calm, killed, dice = tmp_path / "calm.jsonl", tmp_path / "killed.jsonl", random.Random(4)
    assert generate(rows, calm, *server).returncode == 0
    for _ in range(6):
        kill(rows, killed, dice.uniform(0, 0.03), *server)
    killed.write_bytes(killed.read_bytes() + b'{"schema_version": 1, "id": "torn')
    last = generate(rows, killed, *server)
    assert last.returncode == 0 and "an unfinished last line (33 bytes) was cut off" in last.stderr.decode()
    assert answers(killed) == answers(calm) and len(answers(calm)) == 36
    done = generate(rows, killed, *server)
    assert "there was nothing left to run" in done.stderr.decode() and done.returncode == 0


def test_a_model_in_this_process_survives_kills_too(tmp_path: Path) -> None:
    images = {"images": [str(IMAGE)]}
    questions = [{"prompt": f"How many shapes? {n}", **(images if n % 3 else {})} for n in range(24)]
    path = write(tmp_path / "rows.jsonl", *questions)
    assert generate(path, tmp_path / "calm", *LOCAL).returncode == 0
    kill(path, tmp_path / "killed", 0.01, *LOCAL)
    assert 0 < len(records(tmp_path / "killed")) < 24
    assert generate(path, tmp_path / "killed", *LOCAL).returncode == 0
    assert (
        answers(tmp_path / "killed") == answers(tmp_path / "calm") and len(answers(tmp_path / "calm")) == 24
    )


def test_images_are_found_beside_the_rows_and_a_missing_one_is_code_8(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(IMAGE.read_bytes())
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What is it?"}]
    path = write(
        tmp_path / "sub" / "rows.jsonl",
        {"id": "short", "prompt": "What is it?", "images": ["a.png"]},
        {
            "custom_id": "openai",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": parts}]},
        },
        {"id": "none", "prompt": "What?", "images": ["b.png"]},
    )
    out = tmp_path / "out.jsonl"
    ended = generate(path, out, *LOCAL, cwd=tmp_path)
    assert ended.returncode == 8 and ended.stdout == b""
    said = ended.stderr.decode()
    assert "row 'none' failed" in said and "3 rows: 2 done, 1 failed" in said and "--retry-errors" in said
    found = {record["id"]: record for record in records(out)}
    assert found["short"]["token_ids"] == found["openai"]["token_ids"]
    assert found["short"]["usage"]["image_tokens"] > 0
    assert found["none"]["error"]["code"] == 3 and "b.png" in found["none"]["error"]["message"]


def test_without_an_output_results_go_to_stdout_and_nothing_else_does(
    tmp_path: Path, server: tuple[str, ...]
) -> None:
    lines = b'\xef\xbb\xbf{"prompt": "Hi"}\r\n\r\n{"id": "two", "prompt": "Ho"}'
    ended = generate("-", None, "--quiet", *server, input=lines, cwd=tmp_path)
    assert ended.returncode == 0 and ended.stderr == b"" and list(tmp_path.iterdir()) == []
    found = {record["id"]: record["index"] for record in map(json.loads, ended.stdout.splitlines())}
    assert found == {1: 0, "two": 1}


def test_a_shells_streams_are_read_and_written_and_images_are_found_from_where_it_was_typed(
    tmp_path: Path, server: tuple[str, ...]
) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE.read_bytes())
    write(tmp_path / "rows.jsonl", {"prompt": "Hi", "images": ["a.png"]}, {"prompt": "Ho"})
    typed = f"ghostvis generate {' '.join(server)} --quiet --input"
    process = (
        f"{typed} <(cat rows.jsonl) --output >(cat > out) && until [ $(wc -l < out) = 2 ]; do sleep 0.1; done"
    )
    assert bash(f"touch out; {process}", cwd=tmp_path).returncode == 0
    assert {record["text"] for record in records(tmp_path / "out")} == {"\nHi", "Ho"}
    for device in ("/dev/stdout", "/dev/fd/1"):
        ended = bash(f"{typed} /dev/stdin --output {device} < rows.jsonl | cat", cwd=tmp_path)
        assert {json.loads(line)["text"] for line in ended.stdout.splitlines()} == {"\nHi", "Ho"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "rows.jsonl", "out"}


def test_an_output_that_takes_nothing_is_said_and_one_that_left_is_not(
    tmp_path: Path, server: tuple[str, ...]
) -> None:
    path = write(tmp_path / "rows.jsonl", *({"prompt": "x " * 50} for _ in range(100)))
    full = generate(path, Path("/dev/full"), *server)
    assert (
        full.returncode == 1 and "/dev/full can't be written: No space left on device" in full.stderr.decode()
    )
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["head", "-c", "5", str(tmp_path / "pipe")], stdout=subprocess.DEVNULL):
        left = generate(path, tmp_path / "pipe", "--quiet", *server)
    assert (left.returncode, left.stderr) == (141, b"")


@pytest.mark.parametrize(
    "option", ["--base-dir={place}", "--set=model.tokenizer_path={place}/tokenizer/tokenizer.pkl"]
)
def test_a_run_is_refused_when_the_tokenizer_it_was_given_has_changed(tmp_path: Path, option: str) -> None:
    place = tmp_path / "place"
    shutil.copytree(DATA / "text_swiglu" / "base_checkpoints" / "d4", tmp_path / "model")
    shutil.copytree(DATA / "text_swiglu" / "tokenizer", place / "tokenizer")
    path, out = write(tmp_path / "rows.jsonl", {"prompt": "Hi"}), tmp_path / "out.jsonl"
    model = ("--checkpoint-path", str(tmp_path / "model"), option.format(place=place), "--max-tokens", "2")
    assert generate(path, out, *model).returncode == 0
    tokenizer = place / "tokenizer" / "tokenizer.pkl"
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")  # pickle reads no further than its end
    ended = generate(path, out, *model)
    assert ended.returncode == 2 and "model.checkpoint was" in ended.stderr.decode()


def test_rows_from_a_pipe_can_be_resumed_too(rows: Path, tmp_path: Path, server: tuple[str, ...]) -> None:
    out = tmp_path / "out.jsonl"
    whole = rows.read_bytes()
    assert generate("-", out, *server, input=whole.splitlines(keepends=True)[0]).returncode == 0
    ended = generate("-", out, *server, input=whole)
    assert ended.returncode == 0 and "1 of 36 rows are there already" in ended.stderr.decode()
    assert len(answers(out)) == 36


def test_faulty_rows_are_told_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"promt": "b"}\nnonsense\n')
    ended = generate(path, tmp_path / "out.jsonl", "--source", "rl")  # of which there is no model
    said = ended.stderr.decode()
    assert ended.returncode == 3 and "line 2: no field is called 'promt' (did you mean prompt?)" in said
    assert "line 3: not JSON" in said and list(tmp_path.iterdir()) == [path]


def test_other_sampling_is_refused_and_what_is_there_stays(tmp_path: Path, server: tuple[str, ...]) -> None:
    path, out = write(tmp_path / "rows.jsonl", {"prompt": "Hi"}), tmp_path / "out.jsonl"
    assert generate(path, out, *server).returncode == 0
    before = out.read_bytes()
    ended = generate(path, out, *server, "--top-k", "1")
    assert ended.returncode == 2 and "sampling.top_k was 50 and is 1" in ended.stderr.decode()
    assert "--output OTHER.jsonl" in ended.stderr.decode() and out.read_bytes() == before


def test_another_model_is_refused(tmp_path: Path, server: tuple[str, ...]) -> None:
    path, out = write(tmp_path / "rows.jsonl", {"prompt": "Hi"}), tmp_path / "out.jsonl"
    assert generate(path, out, *server).returncode == 0
    with scripted() as another:
        ended = generate(path, out, *at(another), "--temperature", "0")
    assert ended.returncode == 2 and 'model.name was "fake" and is "ghost"' in ended.stderr.decode()


@pytest.mark.parametrize(
    "option", ["a prompt", "--prompt=x", "--image=x", "--json", "--stats", "--stream", "--prompt-file=x"]
)
def test_what_rows_hold_can_not_be_typed_too(option: str) -> None:
    ended = invoke("generate", "--input", "rows.jsonl", option)
    assert ended.exit_code == 2 and "has no place beside --input" in ended.stderr


def test_options_of_a_batch_want_rows_and_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "Hi"})
    for options in (["--output=x", "Hi"], ["--retry-errors", "Hi"], ["--concurrency=2", "Hi"]):
        ended = invoke("generate", *options)
        assert ended.exit_code == 2 and "go with --input" in ended.stderr
    for rest in (["--retry-errors"], [f"--output={path}"]):
        assert invoke("generate", "--input", path, *rest).exit_code == 2
    assert json.loads(path.read_text()) == {"prompt": "Hi"}


def test_sigterm_keeps_what_is_recorded_and_a_second_run_is_locked_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *({"id": n, "prompt": "Hi"} for n in range(3)))
    out = tmp_path / "out.jsonl"
    with scripted(saying("one"), saying("two"), hanging("three")) as server:
        options = ("--concurrency", "1", *at(server))
        with running(*command(path, out, *options)) as process:
            until(lambda: len(content(out).splitlines()) == 2)
            locked = generate(path, out, *options)
            assert locked.returncode == 10 and "another run is writing" in locked.stderr.decode()
            ended = process.send(signal.SIGTERM)
    assert ended.code == 143 and "2 of 3 rows are recorded; the same command goes on" in ended.err
    assert [record["text"] for record in records(out)] == ["one", "two"]
    with scripted(saying("three")) as server:
        assert generate(path, out, *at(server)).returncode == 0
    assert [record["text"] for record in records(out)] == ["one", "two", "three"]


def test_a_server_that_goes_away_ends_the_run_with_code_5_and_no_row_is_blamed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *({"id": n, "prompt": "Hi"} for n in range(30)))
    out = tmp_path / "out.jsonl"
    gone = refusal(503, {"detail": "shutting down"})
    with scripted(saying("one"), saying("two"), gone) as server:
        ended = generate(path, out, "--concurrency", "1", *at(server))
        assert len(server.posts) == 2 + ENGINE_ERRORS_IN_A_ROW
    assert ended.returncode == 5 and "2 of 30 rows are recorded; the same" in ended.stderr.decode()
    assert [record["id"] for record in records(out)] == [0, 1]


@pytest.mark.parametrize("end", ["reset", "whole"])
def test_a_server_that_dies_in_the_middle_of_answers_leaves_their_rows_to_the_next_run(
    tmp_path: Path, end: Literal["reset", "whole"]
) -> None:
    path = write(tmp_path / "rows.jsonl", *({"id": n, "prompt": "Hi"} for n in range(3)))
    out, begun = tmp_path / "out.jsonl", (lines(*words("half an")),)
    with scripted(saying("one"), Reply(begun, end=end)) as server:
        ended = generate(path, out, "--concurrency", "1", *at(server))
    assert ended.returncode == 5 and "in the middle of the answer" in ended.stderr.decode()
    assert [record["id"] for record in records(out)] == [0]
    with scripted(saying("two")) as server:
        assert generate(path, out, "--concurrency", "1", *at(server)).returncode == 0
    assert [record["text"] for record in records(out)] == ["one", "two", "two"]


def test_an_error_that_the_server_reported_in_the_middle_stays_recorded(tmp_path: Path) -> None:
    path, out = write(tmp_path / "rows.jsonl", {"id": 1, "prompt": "Hi"}), tmp_path / "out.jsonl"
    with scripted(Reply((lines(*words("half"), {"error": {"message": "CUDA error"}}),))) as server:
        assert generate(path, out, *at(server)).returncode == 6
    assert "CUDA error" in records(out)[0]["error"]["message"]


def test_rows_without_text_are_told_of_and_their_records_hold_what_came(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *({"id": n, "prompt": "Hi"} for n in range(3)))
    thought = lines(
        {"choices": [{"delta": {"reasoning_content": "hm"}}]}, ending("length"), usage(), "[DONE]"
    )
    with scripted(saying("text"), Reply((thought,))) as server:
        ended = generate(path, tmp_path / "out.jsonl", "--concurrency", "1", *at(server))
    assert ended.returncode == 0
    assert "row '1': the answer has no text: 2 characters of reasoning came, cut off" in ended.stderr.decode()
    assert "so have 1 more" in ended.stderr.decode()
    assert [record.get("reasoning") for record in records(tmp_path / "out.jsonl")] == [None, "hm", "hm"]


def test_when_every_row_fails_the_code_is_theirs(tmp_path: Path) -> None:
    path, out = write(tmp_path / "rows.jsonl", {"prompt": "Hi"}, {"prompt": "Ho"}), tmp_path / "out.jsonl"
    with scripted(refusal(400, {"error": {"message": "no"}})) as server:
        ended = generate(path, out, *at(server))
    assert ended.returncode == 6
    assert [record["error"]["code"] for record in records(out)] == [6, 6]


def test_a_terminal_sees_one_line_that_goes_away_in_the_end(
    rows: Path, tmp_path: Path, server: tuple[str, ...]
) -> None:
    args = command(rows, tmp_path / "out.jsonl", "--concurrency", "1", *server)
    child = pexpect.spawn(GHOSTVIS, args, env=environment(TERM="xterm"), dimensions=(10, 100), timeout=60)
    child.expect(pexpect.EOF)
    seen = child.before
    screen = pyte.Screen(100, 10)
    pyte.ByteStream(screen).feed(seen)
    assert b"/36 rows" in seen and b" rows/s" in seen and b"left" in seen
    shown = [line.rstrip() for line in screen.display if line.strip()]
    assert len(shown) == 1 and shown[0].startswith("ghostvis: 36 rows: 36 done, 0 failed; 36 in ")


def test_with_a_full_disk_the_run_says_so_and_goes_on_later(
    rows: Path, tmp_path: Path, server: tuple[str, ...]
) -> None:
    out = tmp_path / "out.jsonl"
    ended = generate(rows, out, "--concurrency", "1", *server, preexec_fn=limit(resource.RLIMIT_FSIZE, 5000))
    assert ended.returncode == 1 and b"File too large; what it held is unharmed" in ended.stderr
    assert b"Traceback" not in ended.stderr and 0 < len(answers(out)) < 36
    assert generate(rows, out, *server).returncode == 0
    assert len(answers(out)) == 36
