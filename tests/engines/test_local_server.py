"""What the local server answers and refuses, over a real socket: the official openai client and raw HTTP."""

import asyncio
import gzip
import inspect
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import openai
import pytest

from ghostvis_cli.engines.base import Chunk, Completion, GenerateRequest, Sampling, Usage, complete
from ghostvis_cli.engines.fake import IMAGE_TOKENS, FakeEngine
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
from ghostvis_cli.errors import (
    EngineError,
    InputError,
    MemoryLimitError,
    ModelError,
    RequestError,
    UsageError,
)
from ghostvis_cli.images import load_image
from ghostvis_cli.openai.schema import BODY, Kind
from ghostvis_cli.prompt import Message
from ghostvis_cli.serve.admission import interleaved
from ghostvis_cli.serve.settings import Served
from tests.engines.serving import (
    PATIENCE_S,
    USER,
    BreaksLater,
    Letters,
    Recorder,
    Running,
    WithLogprobs,
    image_part,
    image_url_of,
    running,
    user,
)
from tests.pictures import data_url, png

# --- answers


def test_a_chat_answer_has_text_finish_reason_and_usage(server: Running) -> None:
    answer = server.create()
    assert (answer.object, answer.model) == ("chat.completion", "fake")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one two three", "stop")
    assert answer.usage.to_dict() == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 0},
    }


def test_a_stream_begins_with_the_role_and_ends_with_reason_and_usage(server: Running) -> None:
    chunks = list(server.create(max_tokens=2, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta.to_dict() for chunk in chunks[:-1]]
    role = {"role": "assistant", "content": "", "refusal": None}
    assert deltas == [role, {"content": "one"}, {"content": " two"}, {}]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "length"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_on_the_wire_is_events_and_done(server: Running) -> None:
    status, headers, body = server.send("POST", "/v1/chat/completions", {"messages": USER, "stream": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = body.decode("ascii").split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] for event in events[:-2])
    assert "usage" not in events[0]


async def test_the_async_client_gets_many_answers_at_once(server: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        create: Any = client.chat.completions.create
        calls = [
            create(model="fake", messages=[{"role": "user", "content": f"number {n}"}]) for n in range(20)
        ]
        answers = await asyncio.gather(*calls)
    assert [answer.choices[0].message.content for answer in answers] == [f"number {n}" for n in range(20)]


@pytest.mark.parametrize("stop", ["three", ["nothing", "three"]])
def test_stop_strings_end_the_answer(server: Running, stop: Any) -> None:
    answer = server.create(stop=stop)
    assert answer.choices[0].message.content == "one two "


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_have_seeds_of_their_own_and_one_prompt(stream: bool) -> None:
    engine = Recorder()
    with running(engine) as server:
        call = partial(server.create, n=3, seed=2**63 - 2)
        if stream:
            chunks = list(call(stream=True, stream_options={"include_usage": True}))
            usage, indices = chunks[-1].usage, {c.choices[0].index for c in chunks[:-1]}
        else:
            answer = call()
            usage, indices = answer.usage, {choice.index for choice in answer.choices}
    assert indices == {0, 1, 2}
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 9)
    assert {r.sampling.seed for r in engine.requests[1:]} == {2**63 - 2, 2**63 - 1, 0}


def test_what_a_request_leaves_out_comes_from_the_settings() -> None:
    engine = Recorder()
    defaults = Sampling(max_tokens=7, temperature=0.1, top_k=3, stop=("x",))
    with running(engine, sampling=defaults) as server:
        server.create()
        server.create(
            max_tokens=1,
            max_completion_tokens=9,
            temperature=0,
            top_p=0.5,
            seed=None,
            stop="y",
            extra_body={"top_k": -1, "min_p": 0.25, "repetition_penalty": 1.5, "ignore_eos": True},
        )
    plain, full = (request.sampling for request in engine.requests[1:])
    assert plain == replace(defaults, max_tokens=4096)  # the model's context: see the next test
    assert full == Sampling(9, 0, 0.5, 0, 0.25, 1.5, ("y",), None, None, True)


@pytest.mark.parametrize(("started_with", "tokens"), [(None, 20 - 6), (3, 3), (50, 20 - 6)])
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_an_answer_without_a_limit_takes_the_rest_of_the_context(
    started_with: int | None, tokens: int, route: str
) -> None:
    asked = {"messages": [{"role": "user", "content": "one two three four five six"}]}
    body = asked if "chat" in route else {"prompt": "one two three four five six"}
    with running(Endless(context_tokens=20), max_tokens=started_with) as server:
        choice = json.loads(server.send("POST", route, body)[2])
    assert choice["choices"][0]["finish_reason"] == "length"
    assert choice["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w " * 50}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w"}] * 50}, "messages"),
        ("/v1/chat/completions", {"messages": USER, "max_tokens": 50}, "messages"),
        ("/v1/completions", {"prompt": "w " * 50}, "prompt"),
        ("/v1/completions", {"prompt": "w" * 2_000_000}, None),
        ("/tokenize", {"prompt": "w" * 2_000_000}, None),
    ],
)
def test_what_is_too_long_has_openais_code(
    route: str, body: dict[str, Any], param: str | None, stream: bool
) -> None:
    with running(Endless(context_tokens=20), vocabulary=Letters()) as server:
        status, _, answer = server.send(
            "POST", route, body | ({"stream": True} if stream and "v1" in route else {})
        )
    error = json.loads(answer)["error"]
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)


def test_roles_and_content_parts_reach_the_engine_in_order() -> None:
    engine = Recorder()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                image_part(image_url_of()),
                image_part(image_url_of()),
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": "c", "name": "someone"},
    ]
    with running(engine) as server:
        answer = server.create(messages=messages)
    system, first, reply, last = engine.requests[-1].messages
    assert [system.role, first.role, reply.role, last.role] == ["system", "user", "assistant", "user"]
    assert [type(part).__name__ for part in first.parts] == ["Text", "ImagePart", "Text", "ImagePart"]
    assert (first.text, [image.width for image in first.images]) == ("a\n", [8, 8])
    assert answer.usage.prompt_tokens_details.to_dict()["image_tokens"] == 2 * IMAGE_TOKENS


def test_a_transparent_image_of_a_request_is_laid_on_white() -> None:
    engine, part = Recorder(), image_part(data_url(png((200, 0, 0, 0), mode="RGBA")))
    with running(engine) as server:
        server.create(messages=user(part, {"type": "text", "text": "what?"}))
    [image] = engine.requests[-1].messages[-1].images
    assert image.pil().getextrema() == ((255, 255),) * 3


def test_text_completions_take_several_prompts_and_stream(server: Running) -> None:
    completions = server.client().completions
    answer = completions.create(model="fake", prompt=["a b", "c"], n=2)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "a b"), (1, "a b"), (2, "c"), (3, "c")]
    assert answer.object == "text_completion"
    chunks = list(completions.create(model="fake", prompt="a b c", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a b c"
    assert (chunks[-1].choices[0].text, chunks[-1].choices[0].finish_reason) == ("", "stop")


class Endless(FakeEngine):
    """Repeats the prompt's first word as often as it is let."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        text = request.messages[-1].text if request.messages else request.prompt or ""
        words = len(" ".join(message.text for message in request.messages).split()) or len(text.split())
        sampling = request.fitted(words, self.info.context_tokens or 0)
        for _ in range(sampling.max_tokens):
            yield Chunk("w ", (2,))
        yield Chunk(finish_reason="length", usage=Usage(words, sampling.max_tokens))


class Stalls(FakeEngine):
    """Says two words and then nothing more."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk("a", (1,))
        await asyncio.sleep(0)
        yield Chunk(" b", (1,))
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("engine", "pause_s", "expected"),
    [(FakeEngine(), 60.0, ["a", " b c"]), (Stalls(), 0.01, ["a", " b"])],
    ids=["the last token waits for no pause", "a pause ends without a further token"],
)
async def test_tokens_that_follow_each_other_closely_are_handed_on_together(
    engine: Any, pause_s: float, expected: list[str]
) -> None:
    seen: list[Chunk] = []
    request = GenerateRequest(prompt="a b c")
    groups = interleaved(engine, [request], lambda _, chunk: seen.append(chunk), lambda: pause_s)
    async with asyncio.timeout(PATIENCE_S), aclosing(groups):
        for text in expected:
            assert "".join(chunk.text for _, chunk in await anext(groups)) == text
    assert "".join(chunk.text for chunk in seen) == "".join(expected)


def test_log_probabilities_have_tokens_bytes_and_alternatives() -> None:
    with running(WithLogprobs(), vocabulary=Letters()) as server:
        chat = server.create(logprobs=True, top_logprobs=2, extra_body={"return_token_ids": True})
        streamed = list(server.create(logprobs=True, stream=True))
        text = server.client().completions.create(model="fake", prompt="one two", logprobs=2)
    entry = chat.choices[0].logprobs.content[0]
    assert (entry.token, entry.logprob, entry.bytes) == ("a", -0.5, [97])
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("a", -0.5), ("\ufffd", -9999.0)]
    assert chat.choices[0].to_dict()["token_ids"] == [3, 4, 6]
    assert sum(len(c.choices[0].logprobs.content) for c in streamed if c.choices[0].logprobs) == 3
    assert text.choices[0].logprobs.to_dict() == {
        "tokens": ["a", "a"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5, "\ufffd": -9999.0}] * 2,
        "text_offset": [0, 1],
    }


def test_models_are_listed_with_what_a_client_must_know(server: Running) -> None:
    (card,) = server.client().models.list().data
    assert (card.id, card.owned_by, card.to_dict()["max_model_len"]) == ("fake", "ghostvis", 4096)
    assert card.to_dict()["ghostvis"]["image_tokens"] == IMAGE_TOKENS
    assert server.client().models.retrieve("fake") == card
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("other")


def test_a_model_answers_to_its_aliases_too() -> None:
    with running(served_model_name="ghost", aliases=("gpt-4o", "org/other")) as server:
        names = [card.id for card in server.client().models.list().data]
        for name in names:
            answer = server.create(model=name)
            assert (answer.model, server.client().models.retrieve(name).id) == ("ghost", "ghost")
        assert server.chat(model="gpt-4")[0] == 404
        # A client of ours that takes the only model there is still finds one.
        done = asyncio.run(_asked(server.url))
    assert (names, done.text) == (["ghost", "gpt-4o", "org/other"], "hi")


async def _asked(url: str) -> Completion:
    async with await RemoteEngine.connect(RemoteSettings(url)) as engine:
        return await complete(engine, GenerateRequest((Message.of("user", "hi"),)))


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_other_apis_are_refused_with_the_way_to_them(server: Running, path: str) -> None:
    status, _, body = server.send("POST", path, {"model": "fake", "input": "hi"})
    error = json.loads(body)["error"]
    assert (status, error["code"], "litellm --model openai/" in error["message"]) == (
        501,
        "not_supported",
        True,
    )


def test_tokenize_counts_and_says_when_it_cannot(server: Running) -> None:
    status, _, body = server.send("POST", "/tokenize", {"prompt": "héj"})
    assert (status, json.loads(body)) == (
        200,
        {"tokens": [104, 195, 169, 106], "count": 4, "max_model_len": 4096},
    )
    assert server.send("POST", "/tokenize", {})[0] == 400
    with running() as without:
        assert without.send("POST", "/tokenize", {"prompt": "a"})[0] == 501


async def test_a_real_model_answers_over_http_as_it_does_directly() -> None:
    from ghostvis_cli.engines.local import LocalEngine, LocalSettings
    from tests.engines.tiny import IMAGE_TOKENS as ROWS
    from tests.engines.tiny import TOKENIZER, tiny_model

    url, text = image_url_of((30, 20)), "What is it?"
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=5, ignore_eos=True, logprobs=2)
    question = Message.of("user", text, [load_image(url)])
    async with LocalEngine(tiny_model(), LocalSettings(device="cpu")) as engine:
        direct = await complete(engine, GenerateRequest((question,), sampling=sampling))

    async def load() -> Served:
        return Served(LocalEngine(tiny_model(), LocalSettings(device="cpu")), TOKENIZER)

    with running(load=load) as server:
        assert await asyncio.to_thread(server.ready.wait, PATIENCE_S)
        answer = server.create(
            model="d2",
            messages=user(image_part(url), {"type": "text", "text": text}),
            max_tokens=8,
            temperature=1.0,
            seed=5,
            logprobs=True,
            top_logprobs=2,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    choice = answer.choices[0].to_dict()
    assert (choice["message"]["content"], choice["token_ids"]) == (direct.text, list(direct.token_ids))
    entries = choice["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode(errors="replace") == direct.text
    # Not exactly: the warm-up left <|bos|> in the prefix cache, so the prompt is summed up in other pieces.
    logprobs = [entry.logprob for entry in direct.logprobs]
    assert [entry["logprob"] for entry in entries] == pytest.approx(logprobs, abs=1e-5)
    assert answer.usage.prompt_tokens_details.to_dict()["image_tokens"] == ROWS


def test_an_answer_goes_on_from_the_assistants_own_words() -> None:
    engine = Recorder()
    turns = [{"role": "assistant", "content": "Hello!"}, *USER, {"role": "assistant", "content": "It is"}]
    with running(engine) as server:
        for also in ({}, {"continue_final_message": True}):
            assert server.chat(messages=turns, **also)[0] == 200
        status, body = server.chat(continue_final_message=True)
    assert [message.role for message in engine.requests[-1].messages] == ["assistant", "user", "assistant"]
    assert (status, body["error"]["param"]) == (400, "continue_final_message")


# --- refusals

# Of other servers and of slips, in each place of a body that has fields.
STRAY = [
    *(
        "guided_json",
        "guided_regex",
        "structured_outputs",
        "grammar",
        "stop_sequences",
        "n_predict",
        "options",
    ),
    *("truncate_prompt_tokens", "images", "image_data", "prompt", "max_new_tokens", "typical_p", "mirostat"),
]


@pytest.mark.parametrize("field", STRAY)
def test_a_field_that_is_not_honoured_is_refused_by_its_name(server: Running, field: str) -> None:
    status, body = server.chat(**{field: "x"})
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, field, "unknown_parameter")
    assert field in body["error"]["message"]


URL = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "a", "images": ["AAAA"]}, "images"),
        ({"content": "a", "image_data": "AAAA"}, "image_data"),
        ({"content": "a", "image_url": URL}, "image_url"),
        ({"content": "a", "prefix": True}, "prefix"),
        ({}, "content"),
        ({"content": None}, "content"),
        ({"content": [{"type": "text", "content": "a"}]}, "content[0].content"),
        ({"content": [{"type": "text"}]}, "content[0].text"),
        ({"content": [{"type": "text", "text": "a", "image_url": {"url": URL}}]}, "content[0].image_url"),
        (
            {"content": [{"type": "image_url", "image_url": {"url": URL, "crop": 1}}]},
            "content[0].image_url.crop",
        ),
        ({"content": [{"type": "image_url", "image_url": {"url": URL}, "url": URL}]}, "content[0].url"),
    ],
)
def test_fields_within_a_message_are_held_to_the_same(
    server: Running, message: dict[str, Any], param: str
) -> None:
    status, body = server.chat(messages=[{"role": "user", **message}])
    assert (status, body["error"]["param"]) == (400, f"messages[0].{param}")


@pytest.mark.parametrize(
    ("create", "kind"),
    [
        (openai.resources.chat.completions.Completions.create, "chat"),
        (openai.resources.completions.Completions.create, "text"),
    ],
)
def test_every_parameter_of_the_openai_client_has_its_place_in_the_tables(create: Any, kind: Kind) -> None:
    of_the_client_itself = {"self", "timeout", "extra_headers", "extra_query", "extra_body"}
    known = BODY[kind].known()
    parameters = set(inspect.signature(create).parameters) - of_the_client_itself
    assert parameters <= known.read | known.ignored | set(known.neutral)


def test_what_clients_send_along_is_no_reason_to_refuse(server: Running) -> None:
    """The fields of the openai client's own answers, sent back as they came, and those of its callers."""
    said = server.create().choices[0].message
    turn = {**said.model_dump(), "annotations": [], "provider_specific_fields": None, "reasoning_content": ""}
    parts = [
        {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}},
        image_part(image_url_of()),
    ]
    status, _ = server.chat(
        messages=[*USER, turn, {"role": "user", "content": parts}],
        stream_options={"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": False},
        store=False,
        prompt_cache_key="a",
        safety_identifier="b",
        reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": False},
        parallel_tool_calls=True,
        tool_choice="auto",
    )
    assert status == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": user({"type": "input_audio"})}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "assistant", "content": [image_part("data:,x")]}]},
            "messages[0].content[0].type",
        ),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"temperature": 101}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": -1}, "max_completion_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"regex": "a+"}, "regex"),
        ({"temprature": 0.5}, "temprature"),
        ({"max_tokens": 5000}, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_and_names_the_field(
    server: Running, fields: dict[str, Any], param: str | None
) -> None:
    status, body = server.chat(**fields)
    assert status == 400
    assert (body["error"]["type"], body["error"]["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": [5, "a"]}, "stop must be a string or a list of strings, not a list of integers and strings"),
        ({"stop": {}}, "stop must be a string or a list of strings, not an object"),
        ({"stream": "yes"}, "stream must be true or false, not a string"),
        ({"max_tokens": 5.5}, "max_tokens must be an integer, not 5.5"),
        ({"n": True}, "n must be an integer, not true"),
        ({"top_p": 5}, "top_p is 5, more than 1"),
        ({"temperature": [1]}, "temperature must be a number, not a list of integers"),
        ({"messages": {}}, "messages must be a list, not an object"),
        ({"messages": [{"role": 5, "content": "a"}]}, "messages[0].role is one of system"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content must be a string or a list of parts, not 5",
        ),
        (
            {"messages": user({"type": "text", "text": False})},
            "messages[0].content[0].text must be a string, not false",
        ),
        (
            {"messages": user({"type": "image_url", "image_url": 5})},
            "messages[0].content[0].image_url must be a string or a JSON object with url, not 5",
        ),
        (
            {"messages": user({"type": "image_url", "image_url": {"url": [1]}})},
            "messages[0].content[0].image_url.url must be a string, not a list of integers",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is required"),
        ({"response_format": "json"}, "response_format must be a JSON object, not a string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_value_of_another_type_is_told_as_json_shows_it(
    server: Running, fields: dict[str, Any], message: str
) -> None:
    status, body = server.chat(**fields)
    assert (status, body["error"]["message"][: len(message)]) == (400, message)


def test_fields_that_change_nothing_are_accepted(server: Running) -> None:
    neutral = {"tools": [], "response_format": {"type": "text"}, "presence_penalty": 0.0, "logit_bias": {}}
    ignored = {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "n": None, "n_predict": None}
    assert server.chat(**neutral, **ignored)[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"temperature": -Infinity}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_bodies_that_are_no_valid_request_get_400(server: Running, body: bytes) -> None:
    status, _, answer = server.send("POST", "/v1/chat/completions", body)
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_a_refusal_never_repeats_what_was_sent(server: Running) -> None:
    secret = "c2VjcmV0" * 50
    attempts: list[dict[str, Any]] = [
        {"messages": user(image_part(f"data:image/png;base64,{secret}"))},
        {"messages": user(image_part(f"https://{secret}.example/"))},
        {"messages": user({"type": secret})},
        {"messages": [{"role": secret, "content": ""}]},
        {"model": secret},
        {"temprature": secret, secret: secret, "tools": [secret]},
    ]
    for fields in attempts:
        status, body = server.chat(**fields)
        assert status in (400, 404)
        assert secret[:20] not in json.dumps(body)


def test_errors_outside_the_api_have_its_shape_too(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        server.create(model="gpt-4")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    for path, expected in (
        ("/v1/nothing", (404, "unknown_url")),
        ("/v1/completions", (405, "method_not_allowed")),
    ):
        status, _, body = server.send("GET", path)
        assert (status, json.loads(body)["error"]["code"]) == expected
    status, _, body = server.send("POST", "/v1/completions", {"prompt": "a"}, content_type="text/plain")
    assert (status, json.loads(body)["error"]["message"]) == (
        400,
        "the content type must be application/json",
    )


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (InputError("too long"), 400, None),
        (UsageError("not so"), 400, None),
        (RequestError("cannot"), 400, None),
        (EngineError("gone"), 503, "engine_unavailable"),
        (MemoryLimitError("full"), 503, "out_of_memory"),
        (ModelError("/home/someone/model is damaged"), 500, "internal_error"),
        (ValueError("/home/someone"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_gives_a_status_and_hides_only_bugs(
    failure: Exception, status: int, code: str | None, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    with running(engine) as server:
        engine.failure = failure
        answer = server.send(
            "POST", "/v1/chat/completions", {"messages": USER, "stream": stream}, x_request_id="r-1"
        )
    error = json.loads(answer[2])["error"]
    assert (answer[0], error["code"]) == (status, code)
    assert ("/home" not in error["message"]) and (status == 500 or error["message"] == str(failure))
    assert status != 500 or ("r-1" in error["message"] and "id=r-1" in caplog.text)


def test_what_the_engine_finds_wrong_with_a_conversation_is_a_fault_of_its_messages() -> None:
    engine = FakeEngine()
    with running(engine) as server:
        engine.failure = InputError("two answers in a row")
        assert server.chat()[1]["error"]["param"] == "messages"


def test_a_value_out_of_range_is_named_as_it_was_sent(server: Running) -> None:
    _, body = server.chat(max_completion_tokens=0)
    assert body["error"]["message"].startswith("max_completion_tokens is 0")


def test_a_compressed_body_is_refused_as_what_it_is(server: Running) -> None:
    path, body = "/v1/chat/completions", gzip.compress(json.dumps({"messages": USER}).encode())
    assert server.send("POST", path, body, content_encoding="gzip")[0] == 415
    assert server.send("POST", path, {"messages": USER}, content_encoding="identity")[0] == 200


def test_a_failure_within_a_stream_is_its_last_event() -> None:
    with running(BreaksLater()) as server:
        stream = server.create(stream=True)
        seen = ""
        with pytest.raises(openai.APIError, match="the model gave up"):
            for chunk in stream:
                seen += chunk.choices[0].delta.content or ""
        body = server.send("POST", "/v1/chat/completions", {"messages": USER, "stream": True})[2]
    assert seen == "one two"
    assert b"[DONE]" not in body
