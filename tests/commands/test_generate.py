"""`ghostvis generate`: what it sends, what it prints, what it refuses."""

import json
import signal
from base64 import b64decode
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ghostvis_cli import demo
from tests.cli import invoke
from tests.commands.processes import at, hanging, saying, scripted
from tests.conftest import DATA
from tests.engines.scripted import Reply, ScriptedServer, ending, lines, refusal, usage

IMAGE = str(demo.BASE_DIR.parent / "red-circle.png")
FAULTS = DATA / "faults"
run = partial(invoke, "generate")
TEXT_MODEL = ("--base-dir", str(DATA / "text_swiglu"), "--source", "base")


def asked(server: ScriptedServer) -> list[Any]:
    """The messages of each request, text alone where a message is nothing else."""
    return [[(m["role"], m["content"]) for m in post.json["messages"]] for post in server.posts]


# Prompts


def test_every_prompt_is_answered_in_the_order_typed(tmp_path: Path) -> None:
    (tmp_path / "third.txt").write_text("third\n")
    with scripted(saying("one")) as server:
        done = run(
            *at(server), "-q", "first", "--prompt", "second", "--prompt-file", str(tmp_path / "third.txt")
        )
    assert (done.exit_code, done.stdout) == (0, "one\none\none\n")
    assert sorted(map(str, asked(server))) == sorted(str([("user", t)]) for t in ("first", "second", "third"))


def test_a_system_prompt_goes_before_the_first_message() -> None:
    with scripted(saying("yes")) as server:
        run(*at(server), "--system", "Be brief.", "hi")
    assert asked(server) == [[("system", "Be brief."), ("user", "hi")]]


def test_a_schema_from_a_file_goes_to_the_server_and_a_pattern_only_where_there_is_a_field_for_it(
    tmp_path: Path,
) -> None:
    file = tmp_path / "shape.json"
    file.write_text('\ufeff{"type": "object"}\n')
    penalty = ("--set", "sampling.presence_penalty=1")
    with scripted(saying("{}")) as server:
        assert run(*at(server), *penalty, "--schema", str(file), "hi").exit_code == 0
        plain = run(*at(server), "--regex", "a+", "hi")
    format_ = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
    sent = server.posts[0].json
    assert (sent["response_format"], sent["presence_penalty"]) == (format_, 1)
    assert plain.exit_code == 6 and "no field for a regular expression" in plain.stderr


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("[1]", [], "json_schema is no JSON object"),
        ("{", [], "json_schema is no JSON object"),
        ("{}", ["--regex", "a"], "leave out --regex"),
        (None, [], "can't be read"),
    ],
)
def test_a_schema_that_is_none_is_refused(
    tmp_path: Path, content: str | None, options: list[str], said: str
) -> None:
    if content is not None:
        (tmp_path / "shape.json").write_text(content)
    done = run("--source", "demo", "--schema", str(tmp_path / "shape.json"), *options, "hi")
    assert (done.exit_code, said in done.stderr) == (3, True), done.stderr


def test_the_demo_answers_by_a_schema(tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text('{"enum": ["red", {"n": [1, 2]}]}')
    done = run(
        "--source", "demo", "-q", "--schema", str(tmp_path / "shape.json"), "--seed", "1", "What is it?"
    )
    assert json.loads(done.stdout) in ("red", {"n": [1, 2]}), done.stderr


def test_an_answer_by_a_schema_that_was_cut_off_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text('{"enum": ["a long answer indeed"]}')
    ask = ("--source", "demo", "--schema", str(tmp_path / "shape.json"), "What is it?")
    assert "cut off and is not whole" in run("--max-tokens", "2", *ask).stderr
    assert "cut off" not in run("--max-tokens", "90", *ask).stderr


@pytest.mark.parametrize("typed", ["-", None])
def test_a_prompt_may_come_over_stdin(typed: str | None) -> None:
    with scripted(saying("yes")) as server:
        done = run(*at(server), *([typed] if typed else ["--prompt", "-"]), input="Grüße\nhier\r\n")
    assert done.exit_code == 0
    assert asked(server) == [[("user", "Grüße\nhier")]]


@pytest.mark.parametrize("form", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path, form: str) -> None:
    content = "Grüße 😀\n".encode(form)
    (tmp_path / "prompt.txt").write_bytes(content)
    (tmp_path / "key").write_bytes("abc\n".encode(form))
    key = ("--set", f"engine.api_key_file={tmp_path / 'key'}")
    with scripted(saying("yes")) as server:
        assert run(*at(server), *key, "--prompt-file", str(tmp_path / "prompt.txt")).exit_code == 0
        assert run(*at(server), "-", input=content).exit_code == 0
    assert asked(server) == [[("user", "Grüße 😀")]] * 2
    assert server.posts[0].headers["authorization"] == "Bearer abc"


def test_utf_16_without_a_byte_order_mark_is_refused() -> None:
    done = run("-", input="Hello".encode("utf-16-le"))
    assert done.exit_code == 3 and "seems to be UTF-16 or UTF-32 without a byte order mark" in done.stderr
    assert "hint: iconv -f UTF-16LE -t UTF-8" in done.stderr


def test_images_go_to_every_prompt() -> None:
    with scripted(saying("a circle")) as server:
        done = run(*at(server), "-i", IMAGE, "what?", "where?")
    assert done.exit_code == 0
    for [(_, content)] in asked(server):
        assert [part["type"] for part in content] == ["image_url", "text"]


def sent_image(server: ScriptedServer) -> Image.Image:
    """What a server makes of the image it was sent, alpha dropped."""
    [part, _] = server.posts[-1].json["messages"][-1]["content"]
    return Image.open(BytesIO(b64decode(part["image_url"]["url"].partition(",")[2]))).convert("RGB")


@pytest.mark.parametrize(("options", "corner"), [([], 255), (["--images-background", "#010203"], 1)])
def test_a_transparent_image_is_sent_on_its_ground(options: list[str], corner: int) -> None:
    with scripted(saying("a circle")) as server:
        quiet = run(*at(server), *options, "-i", str(FAULTS / "black_icon.png"), "what?")
        assert sent_image(server).getpixel((0, 0))[0] == corner  # type: ignore[index]
        loud = run(*at(server), "-v", "-i", str(FAULTS / "black_icon.png"), "what?")
    assert "transparent" not in quiet.stderr
    assert (
        "black_icon.png: transparent parts are shown on white; images.background sets another" in loud.stderr
    )


def test_an_animation_is_announced_as_its_first_frame() -> None:
    with scripted(saying("nothing")) as server:
        done = run(*at(server), "-i", str(FAULTS / "fade.gif"), "what?")
        silent = run(*at(server), "-q", "-i", str(FAULTS / "fade.gif"), "what?")
    assert "fade.gif: an animation: the model sees its first frame" in done.stderr
    assert silent.stderr == ""


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["a", "--images-background", "clear"], 2, "background"),
        ([], 2, "no prompt"),
        (["-", "--image", "-"], 2, "there is one stdin"),
        (["-", "-"], 2, "there is one stdin"),
        (["a", "b", "--json"], 2, "--json prints one object, and there are 2 prompts"),
        (["a", "--json", "--jsonl"], 2, "exclude each other"),
        (["a", "--raw", "--image", "x.png"], 2, "--raw takes no images"),
        (["a", "--color", "mauve"], 2, "--color"),
        (["a", "--timeout", "0"], 2, "--timeout"),
        (["a", "--temperature", "-1"], 2, "temperature"),
        (["a", "--set", "sampling.topk=3"], 2, "top_k"),
        (["--prompt-file", "missing.txt"], 3, "missing.txt can't be read: No such file or directory"),
        (["a", "--image", "missing.png"], 3, "missing.png"),
        (["a", "--source", "rl"], 4, "rl"),
        (["a", "--checkpoint-path", "missing.pt"], 4, "missing.pt"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_a_model_is_loaded(
    args: list[str], code: int, says: str
) -> None:
    done = run(*args)
    assert done.exit_code == code
    assert bool(done.stdout) is ("--json" in args)  # its record, or nothing
    assert done.stderr.startswith("ghostvis: error: ") and says in done.stderr


def test_an_empty_prompt_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    assert run("--prompt-file", str(tmp_path / "empty.txt")).exit_code == 3
    (tmp_path / "latin.txt").write_bytes(b"Gr\xfc\xdfe")
    done = run("--prompt-file", str(tmp_path / "latin.txt"))
    assert done.exit_code == 3 and "is not UTF-8 text" in done.stderr


# Answers


def test_streamed_and_whole_answers_are_the_same_bytes() -> None:
    with scripted(saying("Hel", "lo\n", "you", "")) as server:
        streamed, whole = run(*at(server), "--stream", "hi"), run(*at(server), "--no-stream", "hi")
    assert streamed.stdout == whole.stdout == "Hello\nyou\n"


def test_an_answer_without_text_says_what_came_instead() -> None:
    call = {"index": 0, "id": "7", "function": {"name": "look", "arguments": "{}"}}
    events = ({"choices": [{"delta": {"tool_calls": [call]}}]}, ending("tool_calls"), usage(), "[DONE]")
    with scripted(Reply((lines(*events),))) as server:
        shown, record = run(*at(server), "hi"), run(*at(server), "--json", "hi")
    assert (shown.exit_code, shown.stdout) == (0, "\n")
    assert "ghostvis: the answer has no text: the model calls look" in shown.stderr
    assert json.loads(record.stdout)["tool_calls"] == [{"id": "7", "name": "look", "arguments": "{}"}]


def test_a_record_says_what_answered_and_what_it_cost() -> None:
    with scripted(saying("Hel", "lo")) as server:
        done = run(*at(server), "--json", "hi")
    record = json.loads(done.stdout)
    assert list(record) == [
        "schema_version",
        "id",
        "text",
        "token_ids",
        "finish_reason",
        "usage",
        "timing",
        "model",
        "engine",
    ]
    assert (record["schema_version"], record["text"], record["finish_reason"]) == (1, "Hello", "stop")
    assert record["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "cached_tokens": None,
        "image_tokens": 0,
    }


def test_jsonl_is_one_record_a_line_and_says_which_prompt_failed() -> None:
    with scripted(saying("yes"), refusal(400, {"error": {"message": "too rude"}})) as server:
        done = run(*at(server), "-q", "--jsonl", "one", "two")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 8
    assert sorted("error" in record for record in records) == [False, True]
    [error] = [record["error"] for record in records if "error" in record]
    assert (error["code"], error["kind"]) == (6, "request")
    assert "too rude" in error["message"] and "too rude" in done.stderr


def test_json_after_two_dashes_is_a_prompt() -> None:
    with scripted(refusal(400, {"error": {"message": "no"}})) as server:
        done = run(*at(server), "--", "--json")
    assert (done.exit_code, done.stdout) == (6, "")
    assert asked(server) == [[("user", "--json")]]


def test_quiet_leaves_only_errors_and_stats_are_one_line() -> None:
    with scripted(saying("yes")) as server:
        assert run(*at(server), "-q", "--stats", "hi").stderr == ""
        told = run(*at(server), "--stats", "--top-k", "0", "hi").stderr
    assert told.startswith("ghostvis: ttft ") and told.count("\n") == 1


def test_verbose_shows_where_an_error_is_from() -> None:
    done = run("hi", "--image", "missing.png", "-v")
    assert done.exit_code == 3 and "Traceback (most recent call last)" in done.stderr


def test_a_deadline_inside_another_program_is_code_124_and_leaves_its_handlers_alone() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM)]
    with scripted(hanging("Hel")) as server:
        done = run(*at(server), "hi", "--json", "--timeout", "0.3")
    assert done.exit_code == 124
    assert json.loads(done.stdout)["error"]["kind"] == "timeout"
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM)]


def test_a_lock_is_free_again_after_the_command(tmp_path: Path) -> None:
    with scripted(saying("yes")) as server:
        codes = [run(*at(server), "hi", "--lock", str(tmp_path / "lock")).exit_code for _ in range(2)]
    assert codes == [0, 0]


# A model in this process


def test_the_same_seed_gives_the_same_answer_and_the_record_names_the_checkpoint() -> None:
    command = ["--raw", "Once upon a time", *TEXT_MODEL, "--max-tokens", "8", "--ignore-eos", "--json"]
    first, again, other = (json.loads(run(*command, "--seed", seed).stdout) for seed in ("1", "1", "2"))
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]
    assert len(first["token_ids"]) == first["usage"]["completion_tokens"] == 8
    assert first["finish_reason"] == "length"
    assert (first["model"]["source"], first["model"]["tag"], first["engine"]["kind"]) == (
        "base",
        "d4",
        "local",
    )


def test_logprobs_are_in_the_record() -> None:
    done = run("--raw", "Once", *TEXT_MODEL, "--max-tokens", "2", "--ignore-eos", "--json", "--logprobs", "3")
    entries = json.loads(done.stdout)["logprobs"]
    assert [len(entry["top"]) for entry in entries] == [3, 3]


def test_an_image_for_a_text_model_is_refused() -> None:
    done = run("what?", "--image", IMAGE, *TEXT_MODEL)
    assert (done.exit_code, done.stdout) == (6, "")


def test_without_a_checkpoint_the_built_in_model_answers_and_says_so() -> None:
    done = run("What is in this picture?", "--image", IMAGE, "--temperature", "0")
    assert done.exit_code == 0
    assert "circle" in done.stdout and done.stdout.count("\n") == 1
    assert "the built-in demo model answers" in done.stderr


def test_a_prompt_beyond_the_models_positions_is_an_input_error_with_a_hint() -> None:
    done = run("hi", *TEXT_MODEL, "--max-tokens", "900000")
    assert done.exit_code == 3
    assert "hint: --max-tokens " in done.stderr
