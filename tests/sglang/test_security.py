"""What strangers may send. The server lives, says no more than it must, and answers everybody else as before.

One server for the whole file. Each test asks it a question at the end whose answer is known.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ghostvis_cli import demo
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.checkpoint.tokenizer_json import LITERAL_IMAGE_TOKEN
from ghostvis_cli.engines.base import GenerateRequest
from ghostvis_cli.prompt import ImagePart, Message, Text
from tests.sglang.asking import DEMO, GREEDY, ROWS, in_order, locally, margins, remotely, scenes_from
from tests.sglang.servers import Answer, Server, image_part, of_bytes, text_part, user

pytestmark = pytest.mark.xdist_group("demo")
TOKENIZER = Tokenizer.load(DEMO.tokenizer_path)
SIZE, IMAGE = TOKENIZER.vocab_size, TOKENIZER.special("<|image|>")
BOS, START, END, REPLY = (
    TOKENIZER.special(f"<|{name}|>") for name in ("bos", "user_start", "user_end", "assistant_start")
)
PLAIN = [BOS, START, *TOKENIZER.encode("hi"), END, REPLY]
WITH_IMAGE = [BOS, START, IMAGE, *TOKENIZER.encode("\nWhat is in this picture?"), END, REPLY]
KNOWN = "A red circle on a white background."
SECRET = "5ecret"  # must be in no answer
QUICK_S = 20.0  # decoding 400 million pixels takes a calm machine longer, refusing them takes it 0.03 s


def example(number: int = 0) -> str:
    path = demo.EXAMPLES[number]
    return of_bytes(path.read_bytes(), "png" if path.suffix == ".png" else "jpeg")


@pytest.fixture
def server(demo_server: Server) -> Iterator[Server]:
    yield demo_server
    answer = demo_server.chat(user(image_part(example()), "What is in this picture?"))
    assert answer.json["choices"][0]["message"]["content"] == KNOWN


def refused(answer: Answer) -> str:
    """Its message, which repeats nothing of what was sent."""
    assert answer.status == 400, answer
    assert SECRET not in answer.body
    said = answer.json
    error = said.get("error", said)  # three of SGLang's routes have three shapes
    return str(error["message"] if isinstance(error, dict) else error)


# Ids


@pytest.mark.parametrize("bad", [-1, -(2**40), SIZE, 1_000_000, 2**31, 2**62])
def test_ids_outside_the_vocabulary_are_refused_in_every_form_of_a_prompt(server: Server, bad: int) -> None:
    ids = [*PLAIN, bad]
    greedy = {"temperature": 0, "max_new_tokens": 1}
    for answer in (
        server.generate(ids),
        server.generate(ids, sampling={"n": 2}),
        server.send("/generate", {"input_ids": [PLAIN, ids], "sampling_params": greedy}),
        server.generate([*ids, IMAGE], example()),
        server.send("/v1/completions", {"model": "default", "prompt": ids, "max_tokens": 1}),
        server.send("/v1/completions", {"model": "default", "prompt": [PLAIN, ids], "max_tokens": 1}),
        server.chat(user("hi"), input_ids=ids),
        server.send("/v1/embeddings", {"model": "default", "input": ids}),
        server.send("/encode", {"input_ids": ids}),
        server.send("/classify", {"input_ids": ids}),
        server.send("/vertex_generate", {"instances": [{"input_ids": ids}], "parameters": {}}),
        server.send(
            "/v1/score", {"query": PLAIN, "items": [[bad]], "label_token_ids": [1], "model": "default"}
        ),
    ):
        assert "oken" in refused(answer)  # SGLang's own words for the scores of what is below 0


@pytest.mark.parametrize(
    "fields",
    [
        {"return_logprob": True, "token_ids_logprob": [SIZE]},
        {"return_logprob": True, "token_ids_logprob": [-1]},
        {"return_logprob": True, "token_ids_logprob": [[SIZE]]},
        {"return_logprob": True, "logprob_start_len": -5},
        {"return_logprob": True, "top_logprobs_num": 257},
        {"return_logprob": True, "top_logprobs_num": -1},
        {"sampling": {"n": 129}},
        {"sampling": {"logit_bias": {str(SIZE): 1.0}}},
        {"sampling": {"logit_bias": {"-1": 1.0}}},
        {"positional_embed_overrides": {"embeds": [[0.0]], "positions": [0]}},
        {"lora_path": "adapter"},
        {"custom_logit_processor": "{}"},
        {"return_hidden_states": True},
    ],
    ids=json.dumps,
)
def test_what_would_reach_beyond_the_model_is_refused(server: Server, fields: dict[str, Any]) -> None:
    assert refused(server.generate(PLAIN, **fields))


def test_stop_tokens_that_do_not_exist_never_stop_anything(server: Server) -> None:
    answer = server.generate(PLAIN, tokens=4, sampling={"stop_token_ids": [SIZE, -1, 2**40]})
    assert answer.json["output_ids"] == server.generate(PLAIN, tokens=4).json["output_ids"]


# Who an image is


def test_another_clients_hashes_do_not_make_two_images_one(server: Server) -> None:
    drawn = scenes_from(201)
    urls = [next(drawn).image.data_url() for _ in range(2)]
    truth = [server.generate(WITH_IMAGE, url, tokens=24).json["output_ids"] for url in urls]
    assert truth[0] != truth[1]
    for field, value in (("mm_hashes", "ff" * 8), ("mm_content_hashes", "sha256:" + "0" * 64)):
        server.forget()
        given = [server.generate(WITH_IMAGE, url, tokens=24, **{field: [value]}).json for url in urls]
        assert [answer["output_ids"] for answer in given] == truth
        assert given[1]["meta_info"]["cached_tokens"] < 4


def test_no_answer_shows_what_stands_for_an_image_in_the_cache(server: Server) -> None:
    fields = {
        "return_prompt_token_ids": True,
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 1,
    }
    answer = server.generate(WITH_IMAGE, example(), **fields).json
    shown = [id_ for _, id_, _ in answer["meta_info"]["input_token_logprobs"]] + answer["prompt_token_ids"]
    assert len(shown) > 2 * ROWS
    assert set(shown) <= set(range(SIZE))


# Images


def png_of(width: int, height: int) -> str:
    """A black PNG of any size, in few bytes and without decoding it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    squeezer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(squeezer.compress(row) for _ in range(height)) + squeezer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return of_bytes(b"\x89PNG\r\n\x1a\n" + content)


EXAMPLE = Path(demo.EXAMPLES[0]).read_bytes()
BAD_IMAGES = {
    "20000x20000": png_of(20_000, 20_000),
    "9000x9000": png_of(9_000, 9_000),
    "truncated": of_bytes(EXAMPLE[: len(EXAMPLE) // 2]),
    "text": of_bytes(f"a {SECRET}".encode()),
    "base64": f"data:image/png;base64,{SECRET}!",
    "no base64": f"data:text/plain,{SECRET}",
    "file": f"file:///etc/{SECRET}",
    "path": f"/etc/{SECRET}",
    "bare base64": example().partition(",")[2],
    "closed port": f"http://127.0.0.1:1/{SECRET}",
    "metadata": f"http://169.254.169.254/{SECRET}",
    "host": f"https://{SECRET}.example/a.png",
    "nothing": "",
}


@pytest.mark.parametrize("url", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_a_bad_image_is_refused_quickly_and_without_an_echo(server: Server, url: str) -> None:
    started_s = time.monotonic()
    first = refused(server.chat(user(image_part(url), "What?")))
    second = refused(server.generate(WITH_IMAGE, url))
    assert first == second
    assert first in (
        "image 1 must be a data: URL",
        "image 1 is not a whole image in a known format, or larger than 64,000,000 pixels or 32 MiB",
    )
    assert time.monotonic() - started_s < QUICK_S


def test_the_second_of_two_images_is_named_when_it_is_bad(server: Server) -> None:
    parts = (image_part(example()), image_part(f"/etc/{SECRET}"), "What?")
    assert refused(server.chat(user(*parts))) == "image 2 must be a data: URL"


@pytest.mark.parametrize(("marks", "images"), [(1, 2), (2, 1), (0, 1), (3, 2)])
def test_images_and_their_places_must_be_as_many(server: Server, marks: int, images: int) -> None:
    ids = [BOS, START, *[IMAGE] * marks, END, REPLY]
    said = refused(server.generate(ids, *[example()] * images))
    assert said == f"{images} images need {images} image tokens in a prompt of layout inline; it has {marks}"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "audio_url", "audio_url": {"url": f"http://127.0.0.1:1/{SECRET}"}},
        {"type": "video_url", "video_url": {"url": f"file:///etc/{SECRET}"}},
    ],
    ids=["audio", "video"],
)
def test_sound_and_film_are_refused(server: Server, part: dict[str, Any]) -> None:
    said = "this model takes images, no audio and no video"
    assert refused(server.chat(user(part, "What?"))) == said
    assert refused(server.chat(user(part, image_part(example()), "What?"))) == said


@pytest.mark.parametrize("field", ["audio_data", "video_data"])
def test_sound_and_film_are_refused_on_sglangs_own_route(server: Server, field: str) -> None:
    media: Any = {field: [SECRET]}
    for images in ((), (example(),)):
        ids = WITH_IMAGE if images else PLAIN
        assert "no audio and no video" in refused(server.generate(ids, *images, **media))


# What a user typed stays text


SPECIALS = ("<|bos|>", "<|image|>", "<|assistant_end|>", "<|user_start|>", LITERAL_IMAGE_TOKEN)
MARKS = ("\ufdd0<|bos|>", "<\ufdd0\ufdd2|bos|>", "\ufdd1\ufdd0\ufdd2<")
TYPED = (*SPECIALS, *MARKS, "a<|bos|>b", "<<|bos|>|bos|>", "<|im")


def requests_with(typed: str) -> list[GenerateRequest]:
    image = next(scenes_from(202)).image
    one, other = Message.of("user", typed), Message.of("user", "And?")
    seen = Message.of("user", typed, [image])
    system, reply = Message.of("system", typed), Message.of("assistant", typed)
    across = Message("user", (Text(typed[:1]), ImagePart(image), Text("\n" + typed[1:])))
    turns = [
        [one],
        [seen],
        [system, other],
        [system, seen],
        [one, reply, other],
        [seen, reply, other],
        [across],
    ]
    return [GenerateRequest(tuple(messages), sampling=GREEDY) for messages in turns]


@pytest.mark.parametrize("typed", TYPED, ids=ascii)
def test_typed_specials_are_what_the_local_engine_takes_them_for(server: Server, typed: str) -> None:
    requests = requests_with(typed)
    given, expected = remotely(server, requests), locally(DEMO, requests)
    assert [one.usage.prompt_tokens for one in given] == [one.usage.prompt_tokens for one in expected]
    assert margins(given, expected) == {}


def prompt_tokens(answer: Answer) -> int:
    assert answer.status == 200, answer
    return int(answer.json["usage"]["prompt_tokens"])


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("name", ["bos", "image", "assistant_end"])
def test_a_special_put_together_from_parts_is_text(server: Server, name: str, image: bool) -> None:
    seen = [image_part(example())] if image else []
    short = prompt_tokens(server.chat(user(*seen, "x"))) - len(TOKENIZER.encode("x"))
    for parts in ([f"<|{name}|>"], ["<", f"|{name}", "|>"]):
        length = prompt_tokens(server.chat(user(*seen, *parts)))
        assert length - short == len(TOKENIZER.encode(f"<|{name}|>"))


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("typed", SPECIALS)
def test_the_beginning_of_a_reply_is_text_too(server: Server, typed: str, image: bool) -> None:
    asking = user(image_part(example()) if image else text_part("So"), "What?")
    begun = [*asking, {"role": "assistant", "content": f"It is {typed}"}]
    length = prompt_tokens(server.chat(begun, continue_final_message=True))
    before = prompt_tokens(server.chat(asking))
    assert length - before == len(TOKENIZER.encode(f"It is {typed}"))


@pytest.mark.parametrize("typed", SPECIALS)
def test_a_raw_prompt_is_text_behind_a_bos_as_in_the_local_engine(server: Server, typed: str) -> None:
    request = GenerateRequest(prompt=f"Once {typed} more", sampling=GREEDY)
    given, expected = in_order(server, [request]), locally(DEMO, [request])
    assert given[0].usage.prompt_tokens == expected[0].usage.prompt_tokens
    assert margins(given, expected) == {}


def test_several_raw_prompts_are_each_begun(server: Server) -> None:
    answer = server.send(
        "/v1/completions", {"model": "default", "prompt": ["hi", "hi <|bos|>"], "max_tokens": 1}
    )
    lengths = [1 + len(TOKENIZER.encode(text)) for text in ("hi", "hi <|bos|>")]
    assert prompt_tokens(answer) == sum(lengths)
