"""The batch without a process around it: rows, the journal after any crash, resuming, what ends a run."""

import asyncio
import json
import os
import resource
import shutil
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghostvis_cli import encoding
from ghostvis_cli.batch.journal import Journal, Progress
from ghostvis_cli.batch.manifest import Manifest
from ghostvis_cli.batch.rows import CHAT_URL, TEXT_URL, ImageSource, Row, RunSettings, Turn, read_row
from ghostvis_cli.batch.run import ENGINE_ERRORS_IN_A_ROW, Batch, JournalSink
from ghostvis_cli.batch.source import RowFile
from ghostvis_cli.checkpoint.fingerprint import fingerprint
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.engines.base import Chunk, GenerateRequest, Sampling, Usage
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.errors import (
    EngineError,
    GhostvisError,
    InputError,
    LockedError,
    OutputError,
    RequestError,
    UsageError,
)
from ghostvis_cli.images import EncodedImage
from ghostvis_cli.prompt import Text
from tests.limits import limited

SETTINGS = RunSettings(Sampling(max_tokens=20, temperature=0))
NO_IMAGE: Callable[[str], EncodedImage] = pytest.fail


def row(line: object, settings: RunSettings = SETTINGS, index: int = 0) -> Row:
    return read_row(json.dumps(line).encode(), index, index + 1, settings)


def refusal(line: object, settings: RunSettings = SETTINGS) -> str:
    with pytest.raises(InputError) as caught:
        row(line, settings)
    return caught.value.message


def openai(body: dict[str, Any], url: str = CHAT_URL, **changes: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "gpt-4o", **body}, **changes}


# --- rows


def test_a_short_row_puts_its_images_before_its_prompt() -> None:
    read = row(
        {"id": "a", "prompt": "What?", "images": ["x.png", "y.png"], "system": "Be brief.", "top_k": 3}
    )
    assert read.id == "a" and read.sampling.top_k == 3 and read.sampling.max_tokens == 20
    assert read.turns == (
        Turn("system", (Text("Be brief."),)),
        Turn("user", (ImageSource("x.png"), ImageSource("y.png"), Text("What?"))),
    )


def test_a_row_without_an_id_is_known_by_its_line() -> None:
    assert row({"prompt": "a"}, index=6).id == 7


def test_in_messages_an_image_stays_in_its_turn() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x.png"}}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": "And its colour?"},
    ]
    first, second, third = row({"messages": messages}).turns
    assert first == Turn("user", (ImageSource("x.png"), Text("What?")))
    assert (second.role, third.parts) == ("assistant", (Text("And its colour?"),))


def test_an_openai_row_means_what_the_short_one_means() -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 5, "stop": "\n", "n": 1,
            "logprobs": True, "top_logprobs": 2, "user": "me", "temperature": None}  # fmt: skip
    short = {"id": "a", "prompt": "Hi", "max_tokens": 5, "stop": ["\n"], "logprobs": 2}
    assert row(openai(body)) == row(short)
    assert row(openai({"prompt": "Once"}, TEXT_URL)).prompt == "Once"


def test_a_rows_grammar_is_an_object_or_text_and_replaces_the_runs() -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}
    expected = '{"type": "array"}'
    run = RunSettings(Sampling(max_tokens=20, temperature=0, regex="yes|no"))
    for line in (
        {"prompt": "a", "json_schema": {"type": "array"}},
        {"prompt": "a", "json_schema": expected},
        openai({"messages": [{"role": "user", "content": "a"}], "response_format": format_}),
    ):
        assert (row(line, run).sampling.json_schema, row(line, run).sampling.regex) == (expected, None)
    assert row({"prompt": "a"}, run).sampling.regex == "yes|no"
    assert "both given" in refusal({"prompt": "a", "regex": "a", "json_schema": {}})
    assert "is no JSON object" in refusal({"prompt": "a", "json_schema": "x"})


def test_settings_that_came_later_leave_the_hash_of_rows_that_do_not_use_them() -> None:
    assert (
        row({"prompt": "a"}).digest.hex()
        == "3cd335afb35073fad9daf8e0686bbb73f5ddb4f079cb6e3f7e04790f2ea948f1"
    )
    assert row({"prompt": "a", "presence_penalty": 1}).digest != row({"prompt": "a"}).digest


def test_the_run_gives_a_row_what_it_does_not_say_itself() -> None:
    run = RunSettings(Sampling(temperature=0.5, seed=10), system="Be brief.")
    assert row({"prompt": "a"}, run, index=3).sampling.seed == 13  # so that a row's draw is its own
    assert row({"prompt": "a", "seed": 1}, run, index=3).sampling.seed == 1
    assert row({"prompt": "a", "temperature": 0}, run).sampling.temperature == 0
    assert row({"prompt": "a", "system": ""}, run).turns[0].role == "user"
    assert row(
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}, run
    ).turns[0].parts == (Text("x"),)


def test_raw_continues_the_prompt_as_it_is() -> None:
    run = RunSettings(Sampling(), system="unused", raw=True)
    assert row({"prompt": "Once upon"}, run).request(NO_IMAGE).prompt == "Once upon"
    assert "no place with --raw" in refusal({"prompt": "a", "images": ["x.png"]}, run)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([1], "a row is a JSON object, not a list"),
        ({"id": 1}, "a row has either a prompt or messages"),
        ({"prompt": "a", "messages": []}, "a row has either a prompt or messages"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": 3}, "prompt is text, not 3"),
        ({"prompt": "a", "id": True}, "id is text or a whole number"),
        ({"prompt": "a", "id": ""}, "id is empty"),
        ({"promt": "a"}, "no field is called 'promt' (did you mean prompt?)"),
        ({"prompt": "a", "max_token": 1}, "did you mean max_tokens?"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0, outside 1 to 1000000"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens takes a whole number"),
        ({"prompt": "a", "temperature": "0"}, "temperature takes a number, not '0'"),
        ({"prompt": "a", "stop": [5]}, "stop takes text or a list of texts, not [5]"),
        ({"prompt": "a", "ignore_eos": {"a": 1}}, 'ignore_eos takes true or false, not {"a": 1}'),
        ({"prompt": "a", "max_tokens": True}, "max_tokens takes a whole number, not true"),
        ({"prompt": "a", "json_schema": 5}, "json_schema is a JSON object, not 5"),
        ({"prompt": "a", "images": "x.png"}, "images is a list, not text"),
        ({"prompt": "a", "images": ["-"]}, "images can't be -"),
        ({"messages": [], "images": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content is empty"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role is one of system"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no message is the user's"),
        ({"messages": [{"role": "user", "content": "a"}], "images": ["x"]}, "images goes with a prompt"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        (openai({"messages": [{"role": "user", "content": "a"}]}, url="/v1/embeddings"), "url is /v1/chat"),
        (openai({"messages": [{"role": "user", "content": "a"}]}, method="GET"), "method is POST"),
        (openai({"messages": [{"role": "user", "content": "a"}], "n": 2}), "n is not supported"),
        (openai({"messages": [{"role": "user", "content": "a"}], "tools": [1]}), "tools is not supported"),
        (openai({"messages": [{"role": "user", "content": "a"}], "temprature": 1}), "did you mean temperature?"),
        (openai({"messages": [{"role": "user", "content": "a"}], "guided_json": {}}), "body.guided_json is not a"),
        (openai({"messages": [{"role": "user", "content": "a", "images": ["x"]}]}), "messages[0].images is not"),
        (openai({"prompt": "a", "top_logprobs": 1}, url="/v1/completions"), "body.top_logprobs is not a field"),
        ({**openai({}), "body": "x"}, "body is a JSON object, not text 'x'"),
    ],
)  # fmt: skip
def test_a_faulty_row_says_what_is_wrong(line: object, said: str) -> None:
    assert said in refusal(line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a"', "not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no number"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_line_that_is_no_json_is_refused_with_the_reason(line: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_row(line, 0, 1, SETTINGS)


@given(st.binary(max_size=60) | st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
       lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
           st.sampled_from(["prompt", "messages", "role", "content", "images", "body", "custom_id", "url", "stop"])
           | st.text(max_size=3), inner, max_size=4)).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_line_is_a_row_or_an_input_error(line: bytes) -> None:
    try:
        assert isinstance(read_row(line, 0, 1, SETTINGS), Row)
    except InputError as error:
        assert error.message


def test_metadata_is_carried_along_and_decides_nothing() -> None:
    note = {"split": "dev", "n": [1, None]}
    plain = row({"prompt": "a"})
    short, long = (
        row({"prompt": "a", "metadata": note}),
        row(openai({"prompt": "a", "metadata": note}, TEXT_URL)),
    )
    assert short.metadata == long.metadata == note
    assert (short.digest, plain.metadata) == (plain.digest, None)
    assert "metadata is an object" in refusal({"prompt": "a", "metadata": "x"})
    assert "half a surrogate pair" in refusal({"prompt": "a", "metadata": {"k": "\ud800"}})
    with pytest.raises(InputError, match="metadata holds a number that is out of range"):
        read_row(b'{"prompt": "a", "metadata": {"k": 1e999}}', 0, 1, SETTINGS)


def test_a_digest_changes_with_everything_that_decides_the_answer() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "id": "x"}, {"prompt": "a", "top_k": 1},
            {"prompt": "a", "images": ["a"]}, {"prompt": "a", "system": "s"}]  # fmt: skip
    assert len({row(each).digest for each in rows}) == len(rows)
    assert row({"prompt": "a", "top_k": 1}).digest == row({"top_k": 1, "prompt": "a"}).digest


# --- the input file


def written(path: Path, *prompts: str) -> Path:
    path.write_text(
        "".join(json.dumps({"id": f"r{n}", "prompt": text}) + "\n" for n, text in enumerate(prompts))
    )
    return path


def rows_of(path: Path, settings: RunSettings = SETTINGS) -> list[Row]:
    with closing(RowFile.open(str(path), settings)) as file:
        return list(file.rows(b"\1" * len(file)))


def test_byte_order_mark_line_ends_blank_lines_and_a_missing_last_one_are_no_faults(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "\xc3\xa9\xf0\x9f\x98\x80"}')
    assert [(each.index, each.id) for each in rows_of(path)] == [(0, 1), (1, 4)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("form", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_rows_are_read_in_every_encoding_and_with_every_line_end(tmp_path: Path, form: str, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    mark = "\ufeff" if form.endswith("-be") else ""
    rows = ('{"prompt": "a"}', "", "  ", '{"prompt": "é😀"}')
    path.write_bytes((mark + end.join(rows)).encode(form))
    assert [(each.index, each.id) for each in rows_of(path)] == [(0, 1), (1, 4)]


def test_line_ends_and_characters_may_be_cut_by_any_piece() -> None:
    whole = "\ufeffé😀\r\n\rb\n\r".encode()
    for form in ("utf-8", "utf-16-le", "utf-32-be"):
        content = whole.decode().encode(form)
        for at in range(len(content)):
            found = list(encoding.lines([content[:at], b"", content[at:]], "x", 100))
            assert found == ["é😀".encode(), b"", b"b", b""], (form, at)


def test_a_line_that_is_too_long_is_none_however_it_comes() -> None:
    for at in range(12):
        content = b"12345\n123456\rab"
        assert list(encoding.lines([content[:at], content[at:]], "x", 5)) == [b"12345", None, b"ab"]


@pytest.mark.parametrize("form", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_rows_in_utf_16_without_a_mark_are_called_what_they_are(tmp_path: Path, form: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes('{"prompt": "a"}'.encode(form))
    with pytest.raises(InputError, match="seems to be UTF-16 or UTF-32 without a byte order mark"):
        rows_of(tmp_path / "rows.jsonl")


def test_broken_utf_16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes('{"prompt": "a"}'.encode("utf-16")[:-1])
    with pytest.raises(InputError, match="is not UTF-16 text: truncated data"):
        rows_of(tmp_path / "rows.jsonl")


def test_all_faults_are_told_with_their_lines_and_the_list_is_short(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "id": "1"}\n\n{"promt": 1}\n{"prompt": "c", "id": 1}\n' + "x\n" * 20)
    with pytest.raises(InputError) as caught:
        rows_of(path)
    headline, *faults = caught.value.message.split("\n")
    assert "22 of 23 rows can't be used, so none was run" in headline
    assert (
        faults[0].startswith("  line 3: no field") and "line 4: the id '1' is that of line 1 too" in faults[1]
    )
    assert len(faults) == 11 and faults[-1] == "  and 12 more"


def test_a_line_that_is_too_long_is_a_fault_and_the_next_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostvis_cli.batch.source.LONGEST_LINE_BYTES", 2**20)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "' + b"a" * 5 * 2**20 + b'"}\n{"prompt": "b"}\nx\n')
    with pytest.raises(InputError) as caught:
        rows_of(path)
    assert [line.split(":")[0] for line in caught.value.message.split("\n")[1:]] == ["  line 1", "  line 3"]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match="holds no rows"):
        rows_of(tmp_path / "rows.jsonl")


def test_a_file_that_changes_under_the_run_ends_it(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", "aaa", "bbb")
    with closing(RowFile.open(str(path), SETTINGS)) as file:
        path.write_text(path.read_text().replace("bbb", "ccc"))
        rows = file.rows(b"\1\1")
        assert next(rows).id == "r0"
        with pytest.raises(InputError, match="was changed while it was read, at line 2"):
            next(rows)


# --- a run


class Bench:
    """A directory with rows, and runs over them on the fake engine."""

    def __init__(self, directory: Path, *prompts: str) -> None:
        self.rows = written(directory / "rows.jsonl", *prompts)
        self.out = directory / "out.jsonl"
        self.failures: list[str] = []

    async def run(
        self,
        engine: Any = None,
        *,
        concurrency: int = 4,
        retry_errors: bool = False,
        settings: RunSettings = SETTINGS,
        load: Callable[[str], EncodedImage] = NO_IMAGE,
    ) -> Progress:
        engine = engine or FakeEngine()
        with (
            closing(RowFile.open(str(self.rows), settings)) as rows,
            closing(Journal.open(self.out)) as journal,
        ):
            journal.check(settings)
            manifest = Manifest.of(settings, engine.info)
            journal.check(settings, manifest)

            def row_hash(index: int) -> str:
                return manifest.row_hash(rows.digest(index))

            progress = journal.resume(len(rows), row_hash, retry_errors=retry_errors)
            journal.begin(manifest)
            sink, wanted = JournalSink(journal), rows.rows(progress.wanted)
            batch = Batch(engine, wanted, load, sink, row_hash, progress, self._failed)
            await batch.run(concurrency)
            return progress

    def _failed(self, row: Row, error: GhostvisError) -> None:
        self.failures.append(f"{row.id}: {error.message}")

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    @property
    def texts(self) -> dict[str, str]:
        return {record["id"]: record.get("text", "-") for record in self.records}


class Failing(FakeEngine):
    """Raises `error` for prompts that hold `word`; "hang" never ends."""

    def __init__(self, word: str, error: Exception, **options: Any) -> None:
        super().__init__(**options)
        self.word, self.error, self.asked = word, error, 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.asked += 1
        if "hang" in request.messages[-1].text:
            await asyncio.Event().wait()
        if self.word in request.messages[-1].text:
            raise self.error
        async for chunk in super().generate(request):
            yield chunk


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, *(f"say {number} é😀" for number in range(12)))


async def test_every_row_has_one_record_with_its_id_its_index_and_its_answer(bench: Bench) -> None:
    progress = await bench.run()
    assert (progress.finished, progress.failed, any(progress.wanted)) == (12, 0, False)
    assert sorted(record["index"] for record in bench.records) == list(range(12))
    assert bench.texts == {f"r{number}": f"say {number} é😀" for number in range(12)}
    assert {"schema_version", "token_ids", "usage", "finish_reason", "row_hash"} <= set(bench.records[0])


async def test_a_record_has_its_rows_metadata(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "a", "b")
    lines = bench.rows.read_text().splitlines()
    bench.rows.write_text(f'{lines[0][:-1]}, "metadata": {{"k": 1}}}}\n{lines[1]}\n')
    await bench.run()
    assert {record["id"]: record.get("metadata") for record in bench.records} == {"r0": {"k": 1}, "r1": None}


async def test_records_come_as_rows_end_not_as_they_stand(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "one two three four five six", "one")
    await bench.run(FakeEngine(delay_s=0.001), concurrency=2)
    assert [record["id"] for record in bench.records] == ["r1", "r0"]


async def test_a_second_run_has_nothing_to_do(bench: Bench) -> None:
    await bench.run()
    before, engine = bench.out.read_bytes(), Failing("say", RequestError("asked again"))
    assert (await bench.run(engine)).finished == 12
    assert bench.out.read_bytes() == before and engine.asked == 0


async def test_rows_added_at_the_end_are_run_and_the_others_are_not(bench: Bench) -> None:
    await bench.run()
    written(bench.rows, *(f"say {number} é😀" for number in range(14)))
    engine = Failing("nothing", RequestError("never"))
    assert (await bench.run(engine)).finished == 14 and engine.asked == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(cut=st.integers(0, 10**9), tail=st.sampled_from([b"", b"\0\0\0", b"\0" * 5000 + b"\n", b'{"x": 1}\n']))
def test_cut_anywhere_the_file_is_completed_to_every_row_once(
    tmp_path_factory: pytest.TempPathFactory, cut: int, tail: bytes
) -> None:
    bench = Bench(tmp_path_factory.mktemp("cut"), *(f"say {number} é" for number in range(4)))
    asyncio.run(bench.run())
    whole, texts = bench.out.read_bytes(), bench.texts
    torn = whole[: cut % len(whole)]
    bench.out.write_bytes(torn if torn.endswith(b"\n") and not tail else torn + tail)
    asyncio.run(bench.run())
    assert len(bench.records) == 4 and bench.texts == texts


async def test_a_cut_after_every_single_byte_is_repaired(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "a", "b")
    await bench.run()
    whole, texts = bench.out.read_bytes(), bench.texts
    for length in range(len(whole)):
        bench.out.write_bytes(whole[:length])
        progress = await bench.run()
        assert progress.repaired == length - (whole.rfind(b"\n", 0, length) + 1)
        assert len(bench.records) == 2 and bench.texts == texts


async def test_a_broken_line_before_others_is_not_a_crash_of_ours(bench: Bench) -> None:
    await bench.run()
    first, *others = bench.out.read_bytes().splitlines(keepends=True)
    bench.out.write_bytes(first[:-9] + b"\n" + b"".join(others))
    with pytest.raises(UsageError, match="line 1: no record of a batch"):
        await bench.run()
    bench.out.write_bytes(first * 2)
    with pytest.raises(UsageError, match="line 2: its row is there twice"):
        await bench.run()


async def test_another_run_is_refused_with_what_differs(bench: Bench) -> None:
    await bench.run()
    before = bench.out.read_bytes()
    with pytest.raises(UsageError, match=r"sampling\.temperature was 0 and is 0\.5; system was null and is "):
        await bench.run(settings=RunSettings(Sampling(max_tokens=20, temperature=0.5), system="x"))
    other = FakeEngine()
    other.info = type(other.info)("fake", "another", "none", "none", context_tokens=None)
    with pytest.raises(UsageError, match=r'model\.name was "fake" and is "another"'):
        await bench.run(other)
    assert bench.out.read_bytes() == before


async def test_a_file_that_is_no_batch_is_left_alone(bench: Bench) -> None:
    bench.out.write_text("my thesis\n")
    with pytest.raises(UsageError, match=r"there is no .* beside it"):
        await bench.run()
    assert bench.out.read_text() == "my thesis\n"


async def test_results_of_rows_that_changed_are_never_thrown_away(bench: Bench) -> None:
    await bench.run()
    before = bench.out.read_bytes()
    written(bench.rows, "changed", *(f"say {number} é😀" for number in range(1, 11)))
    with pytest.raises(UsageError, match="2 results of rows that are not in the input, or changed since"):
        await bench.run()
    assert bench.out.read_bytes() == before


async def test_a_row_that_fails_leaves_a_record_and_the_others_run(bench: Bench) -> None:
    progress = await bench.run(Failing("say 3", RequestError("too hot", hint="cool it")))
    assert (progress.finished, progress.failed, progress.failure_code) == (11, 1, 6)
    (failed,) = [record for record in bench.records if "error" in record]
    assert failed["id"] == "r3" and failed["index"] == 3
    assert failed["error"] == {"code": 6, "kind": "request", "message": "too hot", "hint": "cool it"}
    assert bench.failures == ["r3: too hot"]


async def test_an_image_that_is_not_there_is_its_rows_failure(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "a")
    bench.rows.write_text('{"id": "r0", "prompt": "a", "images": ["x.png"]}\n{"id": "r1", "prompt": "b"}\n')

    def missing(url: str) -> EncodedImage:
        raise InputError(f"{url}: No such file or directory")

    progress = await bench.run(load=missing)
    assert (progress.finished, progress.failed, progress.failure_code) == (1, 1, 3)


async def test_failures_run_again_only_when_asked_and_leave_one_record(bench: Bench) -> None:
    await bench.run(Failing("say 1", RequestError("no")))  # 1, 10 and 11
    engine = Failing("nothing", RequestError("never"))
    assert (await bench.run(engine)).failed == 3 and engine.asked == 0
    progress = await bench.run(engine, retry_errors=True)
    assert (progress.dropped, progress.finished, progress.failed, engine.asked) == (3, 12, 0, 3)
    assert len(bench.records) == 12 and bench.texts == {f"r{n}": f"say {n} é😀" for n in range(12)}


async def test_a_failed_row_that_was_put_right_runs_again_by_itself(bench: Bench) -> None:
    await bench.run(Failing("say 1 ", RequestError("no")))
    written(bench.rows, *(f"say {number} é😀".replace("say 1 ", "tell 1 ") for number in range(12)))
    progress = await bench.run()
    assert (progress.finished, progress.failed) == (12, 0) and bench.texts["r1"] == "tell 1 é😀"


async def test_an_engine_that_is_gone_ends_the_run_and_no_row_is_blamed(bench: Bench) -> None:
    engine = Failing("say", EngineError("not reachable"))
    with pytest.raises(EngineError, match="not reachable"):
        await bench.run(engine, concurrency=2)
    assert engine.asked <= ENGINE_ERRORS_IN_A_ROW + 1 and not bench.out.exists()
    assert (await bench.run()).finished == 12


async def test_a_row_the_engine_missed_is_left_for_the_next_run(bench: Bench) -> None:
    with pytest.raises(EngineError):
        await bench.run(Failing("say 3", EngineError("a hiccup")))
    assert len(bench.records) == 11
    assert (await bench.run()).finished == 12 and len(bench.records) == 12


async def test_a_cancelled_run_aborts_what_is_in_flight_and_keeps_what_is_done(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "a", "hang", "b", "hang")
    task = asyncio.create_task(bench.run(Failing("-", RequestError("-"))))
    while len(bench.records if bench.out.exists() else []) < 2:  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(bench.texts) == ["r0", "r2"]


async def test_a_bug_is_not_recorded_as_a_rows_failure(bench: Bench) -> None:
    with pytest.raises(ZeroDivisionError):
        await bench.run(Failing("say 5", ZeroDivisionError()))
    assert all("error" not in record for record in bench.records)


async def test_no_more_rows_are_in_flight_than_asked_for(bench: Bench) -> None:
    class Counting(FakeEngine):
        most = 0

        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            async for chunk in super().generate(request):
                self.most = max(self.most, self.running)
                yield chunk

    engine = Counting()
    await bench.run(engine, concurrency=3)
    assert engine.most == 3


async def test_an_answer_that_a_stopping_server_cut_short_is_left_to_the_next_run(tmp_path: Path) -> None:
    class Stopping(FakeEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            yield Chunk("half an", (1,))
            yield Chunk(finish_reason="abort", usage=Usage(1, 1))

    bench = Bench(tmp_path, "a", "b")
    with pytest.raises(EngineError, match="cut short"):
        await bench.run(Stopping())
    assert not bench.out.exists() or not bench.out.read_bytes()


async def test_half_a_surrogate_pair_in_an_answer_is_written_as_json_spells_it(tmp_path: Path) -> None:
    with closing(Journal.open(tmp_path / "out.jsonl")) as journal:
        await JournalSink(journal).add({"text": "é\ud800"})
    assert json.loads((tmp_path / "out.jsonl").read_bytes()) == {"text": "é\ud800"}


# --- the output file


class GatedJournal(Journal):
    """Lets one append through for each time the gate is opened."""

    def __init__(self, path: Path, descriptor: int) -> None:
        super().__init__(path, descriptor)
        self.gate, self.groups = threading.Semaphore(0), list[int]()

    def append(self, lines: Sequence[bytes]) -> None:
        self.groups.append(len(lines))
        assert self.gate.acquire(timeout=10)
        super().append(lines)


async def test_a_record_counts_once_it_is_synced_and_those_that_wait_share_the_next_sync(
    tmp_path: Path,
) -> None:
    with closing(GatedJournal.open(tmp_path / "out.jsonl")) as journal:
        assert isinstance(journal, GatedJournal)
        sink = JournalSink(journal)
        adds = [asyncio.create_task(sink.add({"n": number})) for number in range(4)]
        await asyncio.sleep(0)  # all four are handed over
        late = asyncio.create_task(sink.add({"n": 4}))
        while not journal.groups:  # noqa: ASYNC110 - it is another thread that gets there
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        assert not any(add.done() for add in [*adds, late])
        journal.gate.release()
        await asyncio.gather(*adds)
        assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 4 and not late.done()
        journal.gate.release()
        await late
        assert journal.groups == [4, 1]


def test_a_line_is_synced_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with closing(Journal.open(tmp_path / "out.jsonl")) as journal:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
        journal.append([b"one\n", b"two\n"])
    assert synced == [8]


def test_an_output_that_is_being_written_is_locked(tmp_path: Path) -> None:
    with (
        closing(Journal.open(tmp_path / "out.jsonl")),
        pytest.raises(LockedError, match="another run is writing"),
    ):
        Journal.open(tmp_path / "out.jsonl")
    Journal.open(tmp_path / "out.jsonl").close()


async def test_the_lock_holds_after_the_file_was_written_anew(bench: Bench) -> None:
    await bench.run(Failing("say 1", RequestError("no")))
    with closing(Journal.open(bench.out)) as journal:
        hashes = {record["index"]: record["row_hash"] for record in bench.records}
        assert journal.resume(12, hashes.__getitem__, retry_errors=True).dropped == 3
        with pytest.raises(LockedError):
            Journal.open(bench.out)


async def test_a_full_disk_while_failures_are_taken_out_leaves_all_of_them_and_nothing_else(
    bench: Bench,
) -> None:
    """What an earlier run was killed in, the next removes."""
    await bench.run(Failing("say 1", RequestError("no")))
    (bench.out.parent / f".{bench.out.name}.ghostvis-0123abcd").write_bytes(b"half of it")
    there = {bench.out.name, f"{bench.out.name}.manifest.json", bench.rows.name}
    before = bench.out.read_bytes()
    hashes = {record["index"]: record["row_hash"] for record in bench.records}
    with (
        closing(Journal.open(bench.out)) as journal,
        limited(resource.RLIMIT_FSIZE, 100),
        pytest.raises(OutputError, match=r"out.jsonl can't be written: File too large"),
    ):
        journal.resume(12, hashes.__getitem__, retry_errors=True)
    assert bench.out.read_bytes() == before
    assert {path.name for path in bench.out.parent.iterdir()} == there


def test_a_full_disk_loses_nothing_that_was_there(tmp_path: Path) -> None:
    with closing(Journal.open(tmp_path / "out.jsonl")) as journal:
        journal.append([b"whole\n"])
        unharmed = pytest.raises(OutputError, match="what it held is unharmed")
        with limited(resource.RLIMIT_FSIZE, 10), unharmed:  # the next write stops after 4 bytes
            journal.append([b"too much\n"])
    assert (tmp_path / "out.jsonl").read_bytes() == b"whole\n"


def test_an_output_nothing_was_written_to_goes_again(tmp_path: Path) -> None:
    Journal.open(tmp_path / "out.jsonl").close()
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_a_link_and_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out.jsonl")
    with closing(Journal.open(tmp_path / "link")) as journal:
        assert journal.path == (tmp_path / "out.jsonl").resolve()
    with pytest.raises(UsageError, match="not a regular file"):
        Journal.open(tmp_path)


def test_an_output_without_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can't be written: No such file"):
        Journal.open(tmp_path / "none" / "out.jsonl")


def test_a_checkpoint_keeps_its_fingerprint_when_moved_and_loses_it_with_one_weight(tmp_path: Path) -> None:
    import torch

    def saved(name: str, weight: float) -> str:
        (tmp_path / name).mkdir()
        torch.save(
            {"a": torch.zeros(1000), "b": torch.tensor([1.0, weight])}, tmp_path / name / "model_000001.pt"
        )
        return fingerprint(Checkpoint(tmp_path / name / "model_000001.pt"))

    one, other = saved("one", 1.0), saved("other", 1.0001)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert fingerprint(Checkpoint(tmp_path / "moved" / "model_000001.pt")) == one != other
