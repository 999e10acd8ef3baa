"""What RadixAttention keeps of an image, counted by the server itself. Page size 1: a count is exact.

A prompt of one image is BOS, user_start, 64 rows, a line break and the question, user_end, assistant_start. The
last token of a prompt is always computed, so that there is something to sample from.
"""

import asyncio
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.engines.base import Completion, GenerateRequest, complete
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
from ghostvis_cli.images import EncodedImage, load_image
from tests.sglang.asking import DEMO, GREEDY, ROWS, asked, conversation, encoded, in_order, scenes_from
from tests.sglang.servers import Server

TOKENIZER = Tokenizer.load(DEMO.tokenizer_path)
AHEAD = 2  # BOS and user_start, which every conversation begins with
QUESTIONS = tuple(f"{number} shapes, or how many?" for number in range(10))  # they part at their first token


@pytest.fixture
def server(demo_server: Server) -> Server:
    """One that remembers no more than what every conversation begins with."""
    demo_server.forget()
    in_order(demo_server, [asked("Hello!", max_tokens=1)])
    return demo_server


def cached(server: Server, *requests: tuple[str, tuple[EncodedImage, ...]]) -> list[int]:
    """Cached tokens of each, asked one after the other."""
    answers = in_order(server, [asked(question, *images, max_tokens=1) for question, images in requests])
    counts = [answer.usage.cached_tokens for answer in answers]
    assert None not in counts
    return [count or 0 for count in counts]


def length(answer: Completion) -> int:
    return answer.usage.prompt_tokens


@pytest.mark.xdist_group("demo")
def test_ten_questions_on_an_image_compute_its_positions_once(server: Server) -> None:
    image = next(scenes_from(101)).image
    answers = in_order(server, [asked(question, image, max_tokens=4) for question in QUESTIONS])
    assert sum(answer.usage.image_tokens for answer in answers) == 10 * ROWS
    # The line break behind the image is cached with it.
    assert [answer.usage.cached_tokens for answer in answers] == [AHEAD, *[AHEAD + ROWS + 1] * 9]
    from_images = [min((answer.usage.cached_tokens or 0) - AHEAD, ROWS) for answer in answers]
    assert 10 * ROWS - sum(from_images) == ROWS


@pytest.mark.xdist_group("demo")
def test_a_repeated_prompt_computes_its_last_token_alone(server: Server) -> None:
    image = next(scenes_from(102)).image
    first, second = in_order(server, [asked("What is it?", image, max_tokens=1)] * 2)
    assert first.usage.cached_tokens == AHEAD
    assert second.usage.cached_tokens == length(second) - 1
    assert first.token_ids == second.token_ids


def file_of(image: Image.Image, form: str, **options: Any) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, form, **options)
    content = file.getvalue()
    as_sent = replace(load_image(content), original=content)
    assert as_sent.data == content, "the server must get this file, and no PNG made of it"
    return as_sent


def rotated(image: Image.Image) -> EncodedImage:
    """A file of other pixels, whose EXIF says how to turn them to these."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees
    return file_of(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


def see_through(image: Image.Image) -> EncodedImage:
    image = image.copy()
    image.putalpha(255)
    return file_of(image, "PNG")


@pytest.mark.parametrize(
    "other",
    [
        lambda image: file_of(image, "PNG", compress_level=1),
        lambda image: file_of(image, "BMP"),
        see_through,
        rotated,
    ],
    ids=["png", "bmp", "rgba", "exif"],
)
@pytest.mark.xdist_group("demo")
def test_the_same_pixels_in_other_bytes_are_the_same_image(
    server: Server, other: Callable[[Image.Image], EncodedImage]
) -> None:
    image = next(scenes_from(103)).image
    again = other(image.pil())
    assert again.data != image.data
    assert cached(server, ("What?", (image,)), ("Really?", (again,))) == [AHEAD, AHEAD + ROWS + 1]


@pytest.mark.xdist_group("demo")
def test_another_image_is_never_taken_for_one_seen(server: Server) -> None:
    drawn = scenes_from(104)
    first = next(drawn).image
    nearly = first.pil().copy()
    center = (nearly.width // 2, nearly.height // 2)
    red, green, blue = nearly.getpixel(center)  # type: ignore[misc]
    nearly.putpixel(center, (red ^ 0x80, green, blue))
    others = [encoded(nearly), *(next(drawn).image for _ in range(3))]
    requests = [("What?", (image,)) for image in (first, *others)]
    assert cached(server, *requests) == [AHEAD] * 5


@pytest.mark.xdist_group("demo")
def test_an_image_behind_other_text_is_computed_anew(server: Server) -> None:
    image = next(scenes_from(105)).image

    def after(words: str) -> GenerateRequest:
        return conversation((words, []), "Yes.", ("What is it?", [image]))

    requests = [
        replace(after(words), sampling=replace(GREEDY, max_tokens=1)) for words in ("One", "Two", "One")
    ]
    _, second, third = in_order(server, requests)
    assert second.usage.cached_tokens == AHEAD
    assert third.usage.cached_tokens == length(third) - 1


@pytest.mark.xdist_group("demo")
def test_images_side_by_side_are_kept_apart_and_in_their_order(server: Server) -> None:
    drawn = scenes_from(106)
    a, b = next(drawn).image, next(drawn).image
    counts = cached(
        server, ("Q", (a,)), ("Q", (a, b)), ("Q", (a, b)), ("Q", (b, a)), ("Q", (a, a)), ("Q", (b,))
    )
    one, two = AHEAD + ROWS + 1, AHEAD + 2 * (ROWS + 1)
    # B,A: B was only ever second. A,A: its second A stands where B was. B: by now it was first as well.
    assert counts == [AHEAD, one, two + 2, AHEAD, one, one]


@pytest.mark.xdist_group("demo")
def test_the_next_turn_of_a_chat_begins_where_the_last_one_ended(server: Server) -> None:
    drawn = scenes_from(107)
    a, b = next(drawn).image, next(drawn).image
    first = conversation(("What is it?", [a]))
    (answer,) = in_order(server, [replace(first, sampling=replace(GREEDY, max_tokens=8, ignore_eos=False))])
    second = conversation(("What is it?", [a]), answer.text, ("And this?", [b]))
    (later,) = in_order(server, [second])
    assert (later.usage.cached_tokens or 0) >= length(answer) + answer.usage.completion_tokens - 1
    assert later.usage.image_tokens == 2 * ROWS


def kv_positions(server: Server) -> int:
    """Positions that the pool holds while ten questions on the same images are all being answered.

    The images were seen before: ten that arrive together with new ones each compute them. The answers are left
    once all ten have been seen to run; the last may begin long after the first where the machine is busy.
    """
    return asyncio.run(_kv_positions(server))


async def _kv_positions(server: Server) -> int:
    drawn = scenes_from(108)
    images = [next(drawn).image for _ in range(IMAGES)]
    async with await RemoteEngine.connect(RemoteSettings(server.url)) as engine:
        await complete(engine, asked("Look.", *images, max_tokens=1))
        requests = [asked(question, *images, max_tokens=ANSWER) for question in QUESTIONS]
        answers = [asyncio.create_task(complete(engine, request)) for request in requests]
        try:
            while not any(answer.done() for answer in answers):
                load = (await asyncio.to_thread(server.send, "/v1/loads")).json["loads"][0]
                if load["num_running_reqs"] == 10:
                    return int(load["num_used_tokens"])
        finally:
            for answer in answers:
                answer.cancel()
            await asyncio.gather(*answers, return_exceptions=True)
    raise AssertionError("an answer ended before the tenth began")


IMAGES = 6
ANSWER = 350  # positions that an answer takes at most: what its images would add is more
OWN = len(TOKENIZER.encode(QUESTIONS[0])) + 2  # a question, user_end, assistant_start
SHARED = AHEAD + IMAGES * (ROWS + 1)


@pytest.mark.xdist_group("demo")
def test_ten_answers_about_the_same_images_hold_their_positions_once(server: Server) -> None:
    assert SHARED + 10 * OWN <= kv_positions(server) <= SHARED + 10 * (OWN + ANSWER) < 10 * (SHARED + OWN)


@pytest.mark.xdist_group("bare")
def test_without_the_prefix_cache_they_are_computed_and_held_ten_times(bare_server: Server) -> None:
    answers = in_order(bare_server, [asked("What?", next(scenes_from(109)).image, max_tokens=1)] * 2)
    assert [answer.usage.cached_tokens for answer in answers] == [0, 0]
    assert kv_positions(bare_server) >= 10 * (SHARED + OWN)
