"""The SGLang engine's two translations, without SGLang: what is asked of it, and what its replies become."""

import asyncio
import socket
from typing import Any

import pytest

from ghostvis_cli.checkpoint import tokenizer_json as written
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.convert.tokenizer import tokenizer_json
from ghostvis_cli.engines.base import Completion, Sampling, Usage, gather
from ghostvis_cli.errors import InputError, ModelError, RequestError
from ghostvis_cli.images import load_image
from ghostvis_cli.model.config import Layout
from ghostvis_cli.prompt import Message, Prompt, render_for_reply, render_text
from ghostvis_cli.sglang import channel
from ghostvis_cli.sglang.engine import _ReplyReader, marked
from ghostvis_cli.sglang.plugin.expand import expand
from ghostvis_cli.sglang.worker import failure
from tests.conftest import DATA
from tests.pictures import png

TOKENIZER = Tokenizer.load(DATA / "_tok_ghost" / "tokenizer" / "tokenizer.pkl")
PROMPT = render_text("hello", TOKENIZER)
IMAGE_ID = TOKENIZER.special("<|image|>")
ROWS = 6


def reply(
    *ids: int, end: dict[str, Any] | None = None, logprobs: Any = None, cached: int = 3
) -> dict[str, Any]:
    return {"ids": list(ids), "end": end, "logprobs": logprobs, "cached": cached}


def answered(replies: list[dict[str, Any]], **sampling: Any) -> Completion:
    """What the replies add up to; those behind the end are not read."""
    answer = _ReplyReader(PROMPT, Sampling(**sampling), TOKENIZER)
    read = (answer.read(each) for each in replies if not answer.ended)
    return gather([chunk for chunk in read if chunk is not None])


def bytewise(text: str) -> list[int]:
    """A token for each byte, the worst that a model could do."""
    return [TOKENIZER.ranks[bytes([byte])] for byte in text.encode()]


def test_the_token_that_ends_a_turn_is_neither_text_nor_counted() -> None:
    word, end = TOKENIZER.encode("yes")[0], TOKENIZER.special("<|assistant_end|>")
    done = answered([reply(word), reply(end, end={"type": "stop", "matched": end})])
    assert (done.text, done.token_ids, done.finish_reason) == (TOKENIZER.decode([word]), (word,), "stop")
    assert done.usage == Usage(len(PROMPT.ids), 1, cached_tokens=3)


def test_an_end_that_is_to_be_ignored_is_a_token_without_text() -> None:
    end = TOKENIZER.special("<|assistant_end|>")
    done = answered([reply(end), reply(end, end={"type": "length", "length": 2})], ignore_eos=True)
    assert (done.text, done.token_ids, done.finish_reason) == ("", (end, end), "length")


def test_a_character_of_several_tokens_comes_whole() -> None:
    answer = _ReplyReader(PROMPT, Sampling(), TOKENIZER)
    texts = [chunk.text for id_ in bytewise("é🙂") if (chunk := answer.read(reply(id_))) is not None]
    assert [text for text in texts if text] == ["é", "🙂"]


def test_a_stop_string_ends_the_answer_where_it_begins_and_the_rest_is_dropped() -> None:
    ids = bytewise("one two three")
    done = answered([reply(*ids[:5]), reply(*ids[5:], end={"type": "length"})], stop=(" two",))
    assert (done.text, done.finish_reason) == ("one", "stop")
    assert done.token_ids == tuple(ids[: len("one two")])  # through the token that completed it
    assert done.usage.completion_tokens == len("one two")


def test_log_probabilities_belong_to_the_tokens_that_are_told() -> None:
    word, end = TOKENIZER.encode("yes")[0], TOKENIZER.special("<|assistant_end|>")
    told = [[-0.5, [[-0.5, word], [-1.0, end]]], [-0.1, [[-0.1, end]]]]
    done = answered([reply(word, end, end={"type": "stop"}, logprobs=told)])
    assert [(one.token_id, one.logprob) for one in done.logprobs] == [(word, -0.5)]
    assert done.logprobs[0].top == ((word, -0.5), (end, -1.0))


@pytest.mark.parametrize(("status", "error"), [(400, InputError), (500, RequestError)])
def test_what_sglang_refuses_is_an_error_in_its_words_and_one_line(status: int, error: type) -> None:
    with pytest.raises(error, match=r"SGLang: too\? long"):
        answered([reply(end={"type": "abort", "message": "too\x07\n long", "status_code": status})])


def test_an_abort_that_somebody_asked_for_is_an_end() -> None:
    assert answered([reply(end={"type": "abort", "message": "aborted"})]).finish_reason == "abort"


@pytest.mark.parametrize("layout", ["inline", "prepend", "prepend_slots", "prepend_literal"])
def test_the_plug_in_makes_the_prompt_of_what_it_is_sent(layout: Layout) -> None:
    image = load_image(png("red"))
    turns = [
        Message.of("user", "Look <|image|> here", [image, image]),
        Message.of("assistant", "Yes."),
        Message.of("user", "And this?", [image]),
    ]
    prompt = render_for_reply(turns, TOKENIZER, layout, ROWS)
    sent = marked(prompt, IMAGE_ID, ROWS)
    ids, spans = expand(sent, IMAGE_ID, ROWS, len(prompt.images), layout)
    assert ids == [IMAGE_ID if id_ < 0 else id_ for id_ in prompt.ids]
    rows = {at for first, last in spans for at in range(first, last + 1)}
    assert rows == {at for at, id_ in enumerate(prompt.ids) if id_ < 0}


def test_a_prompt_without_images_is_sent_as_it_is() -> None:
    prompt = Prompt((5, IMAGE_ID, 6), (0, 0, 0))
    assert marked(prompt, IMAGE_ID, 0) == [5, IMAGE_ID, 6]


@pytest.mark.parametrize("layout", ["inline", "prepend_literal", None])
def test_the_converted_tokenizer_is_the_checkpoints(layout: Layout | None) -> None:
    found = written.encoding(tokenizer_json(TOKENIZER, layout))
    assert found == (TOKENIZER.pattern, TOKENIZER.ranks, TOKENIZER.specials)


async def test_messages_and_images_cross_the_channel_and_its_end_is_told() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    images = (b"", b"\0" * 100_000, b"{}")
    theirs.setblocking(True)
    writer.write(channel.packed({"do": "é🙂"}, images) + channel.packed({"n": 1}))
    waiting = [await asyncio.to_thread(channel.read_waiting, theirs) for _ in range(2)]
    assert waiting == [channel.Frame({"do": "é🙂"}, images), channel.Frame({"n": 1})]
    theirs.sendall(channel.packed({"n": 2}, images) + b"\0\0")
    theirs.close()
    assert await channel.read(reader) == channel.Frame({"n": 2}, images)
    assert await channel.read(reader) is None  # half a frame is no frame
    writer.close()


def test_an_error_of_the_worker_is_the_same_error_here() -> None:
    from ghostvis_cli.sglang.process import _error

    told = failure(ModelError("no weights", hint="look"))
    error = _error(told)
    assert (type(error), error.message, error.hint) == (ModelError, "no weights", "look")
    refused = _error(failure(ValueError("The input is\ntoo long")))
    assert (type(refused), refused.message) == (RequestError, "SGLang: The input is too long")
