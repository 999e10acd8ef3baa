"""What the remote engine sends, and what it makes of the answers, over real sockets."""

import asyncio
import json
import logging
import re
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from ghostvis_cli.engines.base import Chunk, GenerateRequest, Server, TokenLogprob, ToolCall, Usage, complete
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
from ghostvis_cli.errors import EngineError, ExitCode, InputError, RequestError, UsageError
from ghostvis_cli.images import EncodedImage, load_image
from ghostvis_cli.prompt import ImagePart, Message, Text, Tool, with_line_breaks
from tests.engines.scripted import (
    CARD,
    HELLO,
    KEY,
    QUICK,
    Reply,
    ScriptedServer,
    Serve,
    answer_to,
    ask,
    connected,
    ending,
    engine_for,
    lines,
    refusal,
    usage,
    words,
)
from tests.engines.serving import running

CAT = EncodedImage("/home/me/private/cat.png", b"\x89PNG cat", "image/png", 2, 2)
DOG = EncodedImage("https://internal.example/dog.jpg", b"\xff\xd8 dog", "image/jpeg", 2, 2)


# What is sent


async def test_images_stay_in_their_places_and_go_as_bytes(serve: Serve) -> None:
    server = await serve()
    parts = with_line_breaks(
        [Text("Compare "), ImagePart(CAT), Text(" with "), ImagePart(DOG), Text("please")]
    )
    request = GenerateRequest((Message("user", parts),), sampling=QUICK)
    async with engine_for(server) as engine:
        await complete(engine, request)
    [seen] = server.posts
    assert seen.target == "/v1/chat/completions"
    [message] = seen.json["messages"]
    assert message["content"] == [
        {"type": "text", "text": "Compare "},
        {"type": "image_url", "image_url": {"url": CAT.data_url()}},
        {"type": "text", "text": " with "},
        {"type": "image_url", "image_url": {"url": DOG.data_url()}},
        {"type": "text", "text": "please"},
    ]
    assert b"/home/me" not in seen.body and b"internal.example" not in seen.body


async def test_base64_that_was_made_ahead_is_what_is_sent(serve: Serve) -> None:
    server = await serve()
    async with engine_for(server) as engine:
        await complete(engine, ask("what?", replace(CAT, encoded=b"MADEahead"), DOG))
    urls = [part["image_url"]["url"] for part in server.posts[0].json["messages"][0]["content"][:2]]
    assert urls == ["data:image/png;base64,MADEahead", DOG.data_url()]


CALL = {"index": 0, "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        ({"reasoning_content": "hm"}, Chunk(reasoning="hm")),
        ({"reasoning": "hm", "content": None}, Chunk(reasoning="hm")),
        ({"reasoning": "hm", "reasoning_content": "hm"}, Chunk(reasoning="hm")),
        ({"reasoning_details": ["hm"]}, Chunk(reasoning='["hm"]')),
        ({"content": "so", "reasoning_content": ""}, Chunk("so")),
        ({"content": "so", "reasoning": "hm"}, Chunk("so", reasoning="hm")),
        ({"tool_calls": [CALL]}, Chunk(tool_calls=(ToolCall(name="f", arguments="{}"),))),
        ({"function_call": {"name": "f"}}, Chunk(tool_calls=(ToolCall(name="f"),))),
        ({"refusal": "I won't"}, Chunk(refusal="I won't")),
    ],
)
async def test_what_a_model_generates_beside_the_text_is_a_chunk(
    delta: dict[str, Any], expected: Chunk, serve: Serve
) -> None:
    empty = {"role": "assistant", "content": "", "tool_calls": None, "refusal": None}
    events = [{"choices": [{"index": 0, "delta": each}]} for each in (empty, delta)]
    server = await serve(Reply((lines(*events, ending(), usage(), "[DONE]"),)))
    async with engine_for(server) as engine:
        first, last = [chunk async for chunk in engine.generate(ask())]
    assert (first, first.generated) == (expected, True)
    assert (last.generated, last.reasoning_tokens) == (False, None)


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ({"completion_tokens_details": {"reasoning_tokens": 5}}, 5),  # OpenAI, vLLM
        ({"reasoning_tokens": 5}, 5),  # SGLang
        ({"completion_tokens_details": None, "reasoning_tokens": 0}, 0),
        ({"reasoning_tokens": "many"}, None),
        ({}, None),
    ],
)
async def test_reasoning_tokens_are_what_the_server_counts(
    reported: dict[str, Any], expected: int | None, serve: Serve
) -> None:
    server = await serve(Reply((lines(ending(), usage(**reported), "[DONE]"),)))
    async with engine_for(server) as engine:
        (last,) = [chunk async for chunk in engine.generate(ask())]
    assert last.reasoning_tokens == expected


@pytest.mark.parametrize(
    ("parts", "sent"),
    [
        ((ImagePart(CAT), Text("\nWhat?")), ["image_url", "What?"]),
        ((ImagePart(CAT), Text("\n"), Text("What?")), ["image_url", "What?"]),
        ((ImagePart(CAT), Text("\n"), Text("\nWhat?")), ["image_url", "\nWhat?"]),
        ((ImagePart(CAT), Text("\n"), ImagePart(DOG), Text("\n")), ["image_url", "image_url"]),
        ((Text("a\n"), ImagePart(CAT)), ["a\n", "image_url"]),
    ],
)
async def test_the_line_break_after_an_image_is_left_to_the_servers_template(
    parts: Any, sent: list[str], serve: Serve
) -> None:
    server = await serve()
    async with engine_for(server) as engine:
        await complete(engine, GenerateRequest((Message("user", parts),), sampling=QUICK))
    content = server.posts[0].json["messages"][0]["content"]
    assert [part.get("text", part["type"]) for part in content] == sent


async def test_turns_without_images_are_plain_text_and_keep_their_roles(serve: Serve) -> None:
    server = await serve()
    turns = [("system", "Be brief."), ("user", "\nhi"), ("assistant", "Hello."), ("user", "more")]
    messages = tuple(Message.of(role, text) for role, text in turns)  # type: ignore[arg-type]
    async with engine_for(server) as engine:
        await complete(engine, GenerateRequest(messages, sampling=QUICK))
    assert server.posts[0].json["messages"] == [{"role": role, "content": text} for role, text in turns]


async def test_a_raw_prompt_goes_to_the_completion_route(serve: Serve) -> None:
    server = await serve(
        Reply((lines({"choices": [{"index": 0, "text": " sat", "finish_reason": "stop"}]}),))
    )
    async with engine_for(server) as engine:
        done = await complete(engine, GenerateRequest(prompt="The cat", sampling=QUICK))
    assert done.text == " sat"
    assert server.posts[0].target == "/v1/completions"
    assert server.posts[0].headers["accept-encoding"] == "identity"  # or tokens wait in a compressor
    assert server.posts[0].json["prompt"] == "The cat"
    assert "messages" not in server.posts[0].json


async def test_a_plain_server_is_sent_openai_fields_alone_and_the_user_is_told_once(serve: Serve) -> None:
    server = await serve()
    sampling: Any = {
        "top_k": 50,
        "min_p": 0.1,
        "stop": ("###",),
        "seed": 3,
        "temperature": 0.5,
        "logprobs": 2,
    }
    async with engine_for(server) as engine:
        await complete(engine, ask(**sampling))
        await complete(engine, ask(**sampling))
        assert [re.sub(r": it is .*", "", notice) for notice in engine.info.notices] == [
            "this server was not sent top_k = 50",
            "this server was not sent min_p = 0.1",
        ]
    sent = server.posts[0].json
    assert sent.pop("messages") and sent == {
        "model": "ghost",
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 1.0,
        "stop": ["###"],
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("kind", "ids"), [("sglang", "return_output_ids_in_sglext"), ("ghostvis", "return_token_ids")]
)
async def test_servers_we_know_are_sent_every_field_also_those_without_effect(
    kind: str, ids: str, serve: Serve
) -> None:
    server = await serve()
    async with engine_for(server, kind) as engine:
        await complete(engine, ask())
        await complete(engine, ask(top_k=7, min_p=0.1, repetition_penalty=1.2, ignore_eos=True))
        assert engine.info.notices == ()
    standard = {"model", "max_tokens", "temperature", "top_p", "stream", "stream_options", "messages"}
    extra = [
        {name: value for name, value in seen.json.items() if name not in standard} for seen in server.posts
    ]
    assert extra == [
        {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": False, ids: True},
        {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, ids: True},
    ]


def routing_key(server: ScriptedServer, number: int) -> str | None:
    return server.posts[number].headers.get("x-smg-routing-key")


async def test_questions_about_one_image_carry_one_routing_key(serve: Serve) -> None:
    server = await serve()
    later = (Message.of("user", "What?", [CAT]), Message.of("assistant", "A."), Message.of("user", "", [DOG]))
    async with engine_for(server) as engine:
        for request in (ask("What?", CAT), ask("Why?", CAT), GenerateRequest(later), ask("What?", DOG)):
            await complete(engine, request)
    first, *same, other = (routing_key(server, number) for number in range(4))
    assert first is not None and same == [first, first]
    assert other not in (None, first)


async def test_the_turns_of_a_conversation_carry_the_key_of_its_first_question(serve: Serve) -> None:
    server = await serve()
    turns = [("system", "Be brief."), ("user", "hi"), ("assistant", "Hello."), ("user", "more")]
    messages = tuple(Message.of(role, text) for role, text in turns)  # type: ignore[arg-type]
    async with engine_for(server) as engine:
        await complete(engine, ask("hi"))
        await complete(engine, GenerateRequest(messages))
        await complete(engine, ask("more"))
        await complete(engine, GenerateRequest(prompt="The cat", sampling=QUICK))
    first, later, other, raw = (routing_key(server, number) for number in range(4))
    assert first is not None and later == first != other
    assert raw is None


async def test_a_routing_key_is_too_short_to_tell_what_was_asked(serve: Serve) -> None:
    server = await serve()
    async with engine_for(server) as engine:
        await complete(engine, ask("my secret"))
    assert re.fullmatch(r"[0-9a-f]{4}", routing_key(server, 0) or "")


NOT_PERMITTED = {"detail": [{"loc": ["body", "stream_options"], "msg": "extra fields not permitted"}]}
USE_NEWER = {
    "error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}
}
TOO_LARGE = {"message": "'max_tokens' or 'max_completion_tokens' is too large: 5. The maximum is 4."}


@pytest.mark.parametrize(
    ("status", "words_"), [(400, {"message": "unknown field: stream_options"}), (422, NOT_PERMITTED)]
)
async def test_a_server_that_refuses_stream_options_is_asked_without_them(
    serve: Serve, status: int, words_: Any
) -> None:
    server = await serve(refusal(status, words_), Reply((lines(ending()),)))
    async with engine_for(server) as engine:
        done = await complete(engine, ask())
        assert done.usage == Usage(0, 0, None)
        assert engine.info.notices == (
            "this server does not count tokens: a count of 0 means that it is not known",
        )
        await complete(engine, ask())
    assert ["stream_options" in seen.json for seen in server.posts] == [True, False, False]


@pytest.mark.parametrize("status", [400, 422])
async def test_a_server_that_has_another_name_for_max_tokens_is_asked_by_that(
    serve: Serve, status: int
) -> None:
    server = await serve(refusal(422, NOT_PERMITTED), refusal(status, USE_NEWER), Reply((HELLO,)))
    async with engine_for(server) as engine:
        for _ in range(2):
            assert (await complete(engine, ask())).text == "Hello"
    limits = [{name: seen.json[name] for name in seen.json if "tokens" in name} for seen in server.posts]
    assert limits == [{"max_tokens": 5}] * 2 + [{"max_completion_tokens": 5}] * 2


async def test_a_refusal_of_the_limits_value_is_not_one_of_its_name(serve: Serve) -> None:
    server = await serve(refusal(400, TOO_LARGE))
    async with engine_for(server) as engine:
        with pytest.raises(RequestError, match="too large"):
            await complete(engine, ask())
    assert len(server.posts) == 1


@pytest.mark.parametrize("type_", ["application/json", "application/json; charset=utf-8"])
async def test_an_answer_that_is_no_stream_is_read_all_the_same(serve: Serve, type_: str) -> None:
    choice = {"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "length"}
    body = {"choices": [{"index": 0, **choice}], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    reply = Reply((json.dumps(body).encode(),), headers={"Content-Type": type_})
    answer = await answer_to(reply, serve)
    assert (answer.text, answer.finish_reason, answer.usage.prompt_tokens) == ("Hello", "length", 7)


async def test_an_error_with_status_200_and_no_stream_is_an_error(serve: Serve) -> None:
    body = json.dumps({"error": {"message": "model overloaded"}}).encode()
    with pytest.raises(RequestError, match="model overloaded"):
        await answer_to(Reply((body,), headers={"Content-Type": "application/json"}), serve)


async def test_what_no_server_can_be_sent_is_refused_before_anything_is_sent(serve: Serve) -> None:
    server = await serve()
    tool = Message("user", (Text("run "), Tool("python", "1 + 1")))
    async with engine_for(server) as engine:
        with pytest.raises(RequestError, match="tool"):
            await complete(engine, GenerateRequest((tool,)))
        with pytest.raises(InputError, match="does not continue an assistant's message"):
            await complete(engine, GenerateRequest((Message.of("user", "a"), Message.of("assistant", "b"))))
        with pytest.raises(InputError, match="a system message can't hold an image"):
            await complete(
                engine, GenerateRequest((Message.of("system", "a", [CAT]), Message.of("user", "b")))
            )
    assert server.seen == []


async def test_the_key_is_in_one_header_and_nowhere_else(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = await serve(Reply(), refusal(401, {"error": {"message": f"Incorrect API key: {KEY}"}}))
    async with engine_for(server, api_key=KEY) as engine:
        await complete(engine, ask())
        with pytest.raises(RequestError, match=r"401: Incorrect API key: \*\*\*") as refused:
            await complete(engine, ask())
        shown = repr(engine.settings) + str(refused.value) + str(refused.value.hint) + caplog.text
    assert "GHOSTVIS_API_KEY" in str(refused.value.hint)
    assert KEY not in shown
    for seen in server.seen:
        assert seen.headers["authorization"] == f"Bearer {KEY}"
        assert KEY.encode() not in seen.body and KEY not in seen.target


async def test_a_key_that_no_header_may_carry_is_refused_without_being_shown() -> None:
    with pytest.raises(UsageError) as refused:
        RemoteSettings("http://gpu:30000", api_key=KEY + "\n")
    assert KEY not in str(refused.value)


# What comes back


async def test_text_comes_in_pieces_as_the_server_sends_them(serve: Serve) -> None:
    chunks = [lines(piece) for piece in [*words("", "one", " two"), ending(), usage(), "[DONE]"]]
    server = await serve(Reply(tuple(chunks)))
    async with engine_for(server) as engine, aclosing(engine.generate(ask())) as stream:
        got = [chunk async for chunk in stream]
    assert got == [Chunk("one"), Chunk(" two"), Chunk(finish_reason="stop", usage=Usage(7, 2))]


@pytest.mark.parametrize(
    "stream",
    [
        lines(*words("Hel", "lo"), ending(), usage(), "[DONE]", end="\r\n"),
        lines(*words("Hel", "lo"), ending(), usage(), "[DONE]", end="\r"),
        b": ping\n\n" + HELLO.replace(b"\n\n", b"\n: ping\n\n"),
        HELLO.replace(b'"choices"', b'\ndata: "choices"'),
        b"\xef\xbb\xbf" + HELLO.replace(b"data: ", b"event: message\nid: 1\ndata:"),
        HELLO.replace(b"data: [DONE]\n\n", b""),
        HELLO.removesuffix(b"\n\n"),
        HELLO + lines(*words("after the end")),
    ],
    ids=[
        "crlf",
        "cr",
        "comments",
        "multi-line",
        "other fields",
        "no DONE",
        "no last line end",
        "text after DONE",
    ],
)
async def test_every_framing_that_servers_use_gives_the_same_answer(stream: bytes, serve: Serve) -> None:
    done = await answer_to(stream, serve)
    assert (done.text, done.finish_reason, done.usage) == ("Hello", "stop", Usage(7, 2))


async def test_a_stream_may_be_cut_anywhere_also_within_a_character(serve: Serve) -> None:
    stream = lines(*words("né ", "👻"), ending(), "[DONE]", end="\r\n")
    cuts = [Reply((stream[:at], stream[at:])) for at in range(1, len(stream))]
    server = await serve(*cuts, Reply(tuple(stream[at : at + 1] for at in range(len(stream)))))
    async with engine_for(server) as engine:
        answers = [await complete(engine, ask()) for _ in range(len(stream))]
    assert {answer.text for answer in answers} == {"né 👻"}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


def called(arguments: str, **more: Any) -> dict[str, Any]:
    return delta(tool_calls=[{"index": 0, "function": {"name": "look", "arguments": arguments} | more}])


# As json.dumps with ensure_ascii spells them, half a character in each event.
async def test_a_character_in_two_events_is_one_character_wherever_it_stands(serve: Serve) -> None:
    events = [
        *words("a\ud83d", "\ude00b"),
        delta(reasoning_content="r\ud83d"),
        delta(reasoning_content="\ude00"),
        delta(refusal="\ud83d"),
        delta(refusal="\ude00!"),
        called("\ud83d", id="x"),
        called("\ude00", name=""),
    ]
    stream = b"".join(
        b"data: " + json.dumps(each).encode() + b"\n\n" for each in [*events, ending(), usage()]
    )
    done = await answer_to(stream + b"data: [DONE]\n\n", serve)
    beside = done.beside
    assert (done.text, beside.reasoning, beside.refusal) == ("a😀b", "r😀", "😀!")
    assert [(call.name, call.arguments) for call in beside.tool_calls] == [("look", "😀")]


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (("a\ud83d",), "a\ufffd"),
        (("\ude00b",), "\ufffdb"),
        (("a\ud83d", "b"), "a\ufffdb"),
        (("\ud83d\ud83d", "\ude00"), "\ufffd😀"),
        (("x\ud83d", "", "\ude00"), "x😀"),
    ],
)
async def test_half_a_character_alone_is_a_replacement_character(
    pieces: tuple[str, ...], text: str, serve: Serve
) -> None:
    events = [*words(*pieces), ending(), usage()]
    stream = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in events)
    assert (await answer_to(stream + b"data: [DONE]\n\n", serve)).text == text


@pytest.mark.parametrize(
    ("events", "reason", "notice"),
    [
        ([delta(reasoning_content="think"), delta(reasoning="more")], "length",
         "the answer has no text: 9 characters of reasoning came, cut off at max_tokens"),
        ([called("{}", id="7")], "tool_calls", "the answer has no text: the model calls look"),
        ([delta(refusal="I can't")], "content_filter", "the answer has no text: the model refused: I can't"),
        ([], "content_filter", "the answer has no text: the server cut it off"),
        ([], "stop", "the answer has no text: the model ended it at once"),
        (words(" ", "\n"), "stop", "the answer has no text: only white space came"),
        ([delta(reasoning="think"), *words("\n\n")], "stop",
         "the answer has no text: 5 characters of reasoning came"),
        ([delta(reasoning="think"), *words("Hi")], "stop", None),
    ],
)  # fmt: skip
async def test_an_answer_without_text_says_what_came_instead(
    events: list[Any], reason: str, notice: str | None, serve: Serve
) -> None:
    done = await answer_to(lines(*events, ending(reason), usage(), "[DONE]"), serve)
    assert done.notice == notice


@pytest.mark.parametrize(
    ("sent", "understood"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("abort", "abort"),
        ("content_filter", "abort"),
        ("tool_calls", "stop"),
        ("something new", "stop"),
        ({"type": "stop", "matched": 5}, "stop"),
        ({"type": "abort", "message": "asked for"}, "abort"),
    ],
)
async def test_finish_reasons_of_all_servers_become_three(sent: Any, understood: str, serve: Serve) -> None:
    done = await answer_to(lines(*words("a"), ending(sent), usage(), "[DONE]"), serve)
    assert done.finish_reason == understood


async def test_an_end_without_a_reason_is_a_stop(serve: Serve) -> None:
    assert (await answer_to(lines(*words("a"), "[DONE]"), serve)).finish_reason == "stop"


@pytest.mark.parametrize(
    ("details", "kind", "cache_report", "understood"),
    [
        (None, "openai", None, Usage(7, 2, None, 0)),
        ({"cached_tokens": 0}, "openai", None, Usage(7, 2, 0, 0)),
        ({"cached_tokens": 5, "image_tokens": 4}, "sglang", True, Usage(7, 2, 5, 4)),
        ({"cached_tokens": 0, "image_tokens": 4}, "sglang", False, Usage(7, 2, None, 4)),
        ({"cached_tokens": 0, "image_tokens": 4}, "sglang", True, Usage(7, 2, 0, 4)),
        ({"cached_tokens": None}, "openai", None, Usage(7, 2, None, 0)),
    ],
)
async def test_cached_tokens_that_nobody_counted_are_none_and_not_zero(
    details: Any, kind: str, cache_report: bool | None, understood: Usage, serve: Serve
) -> None:
    stream = lines(*words("a"), ending(), usage(prompt_tokens_details=details), "[DONE]")
    async with engine_for(await serve(Reply((stream,))), kind) as engine:
        engine.server = replace(engine.server, cache_report=cache_report)
        assert (await complete(engine, ask("what?", CAT))).usage == understood
        assert engine.info.notices == ()


async def test_an_image_that_sglang_counted_no_tokens_for_is_told_of(serve: Serve) -> None:
    async with engine_for(await serve(), "sglang") as engine:
        await complete(engine, ask("what?"))
        assert engine.info.notices == ()
        await complete(engine, ask("what?", CAT))
        assert "may not have seen it" in str(engine.info.notices)


async def test_token_ids_are_taken_from_wherever_a_server_puts_them(serve: Serve) -> None:
    at_the_end = {"choices": [], "sglext": {"output_ids": [[11, 12]]}}
    done = await answer_to(lines(*words("a", "b"), ending(), at_the_end, usage(), "[DONE]"), serve)
    assert done.token_ids == (11, 12)
    pieces = [
        {"choices": [{"text": text, "token_ids": ids}]}
        for text, ids in (("a", [1]), ("", [2]), ("b", [3, 4]))
    ]
    done = await answer_to(lines(*pieces, ending()), serve, GenerateRequest(prompt="x", sampling=QUICK))
    assert (done.text, done.token_ids) == ("ab", (1, 2, 3, 4))


async def test_log_probabilities_of_both_routes_are_read(serve: Serve) -> None:
    entry = {
        "token": "a",
        "logprob": -0.5,
        "top_logprobs": [{"token": "a", "logprob": -0.5}, {"logprob": -2}],
    }
    chat = {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [entry]}}]}
    done = await answer_to(lines(chat, ending()), serve, ask(logprobs=2))
    assert done.logprobs == (TokenLogprob(-1, -0.5, ((-1, -0.5), (-1, -2.0))),)
    lists = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -2}]}
    raw = {"choices": [{"text": "a", "token_ids": [9], "logprobs": lists}]}
    done = await answer_to(lines(raw, ending()), serve, GenerateRequest(prompt="x", sampling=QUICK))
    assert done.logprobs == (TokenLogprob(9, -0.5, ((-1, -0.5), (-1, -2.0))),)


# Failures in the middle of an answer


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"error": {"object": "error", "message": "out of pages", "code": 503}}, "out of pages"),
        ({"object": "error", "message": "flat", "type": "BadRequest", "code": 400}, "flat"),
        ({"error": {"message": "native", "type": "x", "code": 500, "retryable": True}}, "native"),
        ({"error": "only words"}, "only words"),
        ({"message": "of an event named error"}, "of an event named error"),
        ({"detail": "FastAPI's"}, "FastAPI's"),
        (
            ending(
                {
                    "type": "abort",
                    "message": "timed out",
                    "status_code": 503,
                    "err_type": "ServiceUnavailable",
                }
            ),
            "timed out",
        ),
    ],
)
async def test_an_error_within_the_stream_is_raised_after_the_text_before_it(
    event: Any, message: str, serve: Serve
) -> None:
    server = await serve(Reply((lines(*words("a", "b"), event, usage(), "[DONE]"),)))
    got = ""
    async with engine_for(server, retries=3) as engine:
        with pytest.raises(RequestError, match=f"broke the answer off: {message}") as failure:
            async for chunk in engine.generate(ask()):
                got += chunk.text
    assert (got, failure.value.code, len(server.posts)) == ("ab", ExitCode.REQUEST, 1)


@pytest.mark.parametrize("end", ["whole", "reset"])
@pytest.mark.parametrize("body", [lines(*words("a")), lines(*words("a")) + b'data: {"choi', b""])
async def test_a_stream_that_just_ends_is_an_error_and_not_repeated(
    body: bytes, end: Any, serve: Serve
) -> None:
    server = await serve(Reply((body,) if body else (), end=end))
    async with engine_for(server, retries=3) as engine:
        with pytest.raises(EngineError, match="closed the connection in the middle of the answer"):
            await complete(engine, ask())
    assert len(server.posts) == 1


@pytest.mark.parametrize(
    "event",
    [
        "no json",
        "[]",
        "7",
        '{"choices": 7}',
        '{"choices": [{"delta": {"content": [1]}}]}',
        '{"usage": {"x": 1}}',
        '{"usage": {"prompt_tokens": -7}}',
        '{"usage": {"prompt_tokens": true}}',
        '{"usage": {"prompt_tokens": 7, "completion_tokens": 1.5}}',
        '{"usage": {"completion_tokens": 2, "prompt_tokens": 1%s}}' % ("0" * 400),
        '{"usage": {"prompt_tokens": 7, "prompt_tokens_details": {"image_tokens": -3}}}',
        '{"usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": false}}}',
        "[" * 9999,
    ],
)
async def test_an_event_of_an_unknown_shape_is_an_error_that_shows_it(event: str, serve: Serve) -> None:
    with pytest.raises(RequestError, match=re.escape(f"unknown shape: {event[:100]}")) as failure:
        await answer_to(lines(event), serve)
    assert len(failure.value.message) < 800


async def test_an_answer_that_is_no_stream_is_an_error_that_shows_it(serve: Serve) -> None:
    page = Reply((b"<html>Please log in</html>",), headers={"Content-Type": "text/html"})
    with pytest.raises(RequestError, match="text/html, no stream: <html>Please log in"):
        await answer_to(page, serve)


async def test_a_stream_that_stalls_ends_at_the_time_limit(serve: Serve) -> None:
    server = await serve(Reply((lines(*words("a")), lines(*words("b"))), pause_s=0.2, end="hang"))
    async with engine_for(server, timeout_s=2) as engine:
        # Less than 2 s, for the last piece came after the first: how much less is the machine's affair.
        with pytest.raises(
            EngineError, match=r"was given 2 s, and has sent no data for [01](\.\d)? s"
        ) as failure:
            await complete(engine, ask())
        await asyncio.wait_for(server.left.wait(), 60)
    assert (failure.value.code, failure.value.hint is not None) == (ExitCode.ENGINE, True)


async def test_a_trickle_of_data_does_not_outlast_the_time_limit(serve: Serve) -> None:
    server = await serve(Reply((b": ping\n\n",) * 3000, pause_s=0.02))
    started = time.monotonic()
    async with engine_for(server, timeout_s=0.2) as engine:
        with pytest.raises(EngineError, match=r"was given 0\.2 s"):
            await complete(engine, ask())
    assert time.monotonic() - started < 30  # half of what it lasts


async def test_a_server_that_takes_the_request_and_says_nothing_is_given_up(serve: Serve) -> None:
    with pytest.raises(EngineError, match=r"has not answered /v1/chat/completions for 0\.2 s"):
        await answer_to(Reply(silent=True), serve, timeout_s=0.2)


async def test_a_server_that_closes_without_an_answer_is_named(serve: Serve) -> None:
    server = await serve(Reply(silent=True, end="reset"))
    async with engine_for(server, retries=3) as engine:
        with pytest.raises(EngineError, match="gave no answer to /v1/chat/completions"):
            await complete(engine, ask())
    assert len(server.posts) == 1  # it may have begun to answer: only what was surely not taken is repeated


# Getting to know the server

SGLANG_PAGES: dict[str, Any] = {
    "/v1/models": {"data": [CARD | {"owned_by": "sglang"}, CARD | {"id": "lora", "parent": "ghost"}]},
    "/model_info": {"model_path": "/m", "tokenizer_path": "/m", "is_generation": True},
    "/ready": Reply((), 200, {}),
    "/server_info": {"version": "0.5.23", "dtype": "bfloat16", "enable_cache_report": False},
}


async def test_sglang_is_recognised_and_tells_about_itself(serve: Serve) -> None:
    server = await serve(pages=SGLANG_PAGES)
    async with await connected(server, api_key=KEY) as engine:
        assert engine.server == Server("sglang", "0.5.23", cache_report=False)
        info = engine.info
        assert (info.kind, info.model, info.context_tokens, info.dtype) == (
            "remote",
            "ghost",
            2048,
            "bfloat16",
        )
    assert {seen.headers["authorization"] for seen in server.seen} == {f"Bearer {KEY}"}
    assert server.connections == 1


async def test_sglang_of_an_older_release_has_no_ready_route(serve: Serve) -> None:
    pages = {path: page for path, page in SGLANG_PAGES.items() if path != "/ready"}
    async with await connected(await serve(pages=pages)) as engine:
        assert engine.server.kind == "sglang"


async def test_sglang_behind_a_gateway_is_recognised_by_its_own_route(serve: Serve) -> None:
    pages = {"/v1/models": {"data": [CARD]}, "/model_info": SGLANG_PAGES["/model_info"]}
    async with await connected(await serve(pages=pages)) as engine:
        assert engine.server == Server("sglang")


async def test_sglang_behind_a_gateway_that_knows_older_names_of_its_routes_is_recognised(
    serve: Serve,
) -> None:
    card = {**CARD, "owned_by": "self_hosted"}
    pages = {f"/get{path.replace('/', '_')}": SGLANG_PAGES[path] for path in ("/model_info", "/server_info")}
    async with await connected(await serve(pages={"/v1/models": {"data": [card]}, **pages})) as engine:
        assert engine.server == Server("sglang", "0.5.23", cache_report=False)


async def test_sglang_that_is_still_loading_is_not_ready(serve: Serve) -> None:
    server = await serve(pages=SGLANG_PAGES | {"/ready": Reply((), 503, {})})
    with pytest.raises(EngineError, match="/ready with 503") as failure:
        await connected(server)
    assert "wait" in str(failure.value.hint)
    await asyncio.wait_for(server.empty.wait(), 5)  # a connection that came to nothing is closed


async def test_vllm_is_recognised_and_sent_what_it_knows_beyond_openai(serve: Serve) -> None:
    card = {"id": "text-hf", "owned_by": "vllm", "max_model_len": 2048}
    server = await serve(pages={"/v1/models": {"data": [card]}, "/version": {"version": "0.32.0"}})
    async with await connected(server) as engine:
        assert engine.server == Server("vllm", "0.32.0")
        await complete(engine, ask(top_k=0, ignore_eos=True))
        assert not engine.info.notices
    sent = server.posts[0].json
    assert (sent["ignore_eos"], sent["top_k"], sent["return_token_ids"]) == (True, -1, True)


@pytest.mark.parametrize(
    ("page", "version"),
    [(None, None), ([1], None), (42, None), ({"version": 10**400}, None), ({"version": "\ud800\n1"}, "??1")],
)
async def test_a_version_that_is_no_line_of_text_is_not_taken_for_one(
    page: Any, version: str | None, serve: Serve
) -> None:
    pages = {"/v1/models": {"data": [CARD | {"owned_by": "vllm"}]}, "/version": page}
    async with await connected(await serve(pages=pages)) as engine:
        assert engine.server == Server("vllm", version)


async def test_other_servers_are_taken_for_plain_openai(serve: Serve) -> None:
    async with await connected(await serve(pages={"/v1/models": {"data": [{"id": "llama"}]}})) as engine:
        assert (engine.server, engine.info.model, engine.info.context_tokens) == (Server(), "llama", None)


async def test_our_own_server_is_recognised_by_its_signature(serve: Serve) -> None:
    about: dict[str, Any] = {
        "image_tokens": 64,
        "layout": "inline",
        "trained_tokens": 1024,
        "dtype": "float32",
    }
    about |= {"tag": "d4", "step": None}
    server = await serve(pages={"/v1/models": {"data": [CARD | {"owned_by": "ghostvis", "ghostvis": about}]}})
    async with await connected(server) as engine:
        info = engine.info
        assert engine.server.kind == "ghostvis"
        assert (info.image_tokens, info.layout, info.trained_tokens) == (64, "inline", 1024)
        assert (info.dtype, info.tag, info.step, info.device) == ("float32", "d4", None, "remote")
    assert [seen.target for seen in server.seen] == ["/v1/models"]


@pytest.mark.parametrize("length", [True, -1, 10**30, "2048"])
@pytest.mark.parametrize("about", [[1], "x", {"image_tokens": 10**30, "layout": 7, "kv_token_bytes": -1}])
async def test_what_a_card_tells_of_a_model_that_cannot_be_so_is_not_known(
    about: Any, length: Any, serve: Serve
) -> None:
    card = CARD | {"owned_by": "ghostvis", "ghostvis": about, "max_model_len": length}
    async with await connected(await serve(pages={"/v1/models": {"data": [card]}})) as engine:
        assert (engine.server.kind, engine.info.context_tokens) == ("ghostvis", None)
        assert (engine.info.image_tokens, engine.info.layout, engine.info.kv_token_bytes) == (0, None, None)


async def test_a_server_of_many_models_wants_one_chosen(serve: Serve) -> None:
    server = await serve(pages={"/v1/models": {"data": [CARD, CARD | {"id": "other", "max_model_len": 99}]}})
    with pytest.raises(UsageError, match="2 models, and none was chosen: ghost, other") as failure:
        await connected(server)
    assert failure.value.hint == "--set engine.model=ghost"
    async with await connected(server, model="other") as engine:
        assert (engine.info.model, engine.info.context_tokens) == ("other", 99)
    async with await connected(
        server, model="alias"
    ) as engine:  # lists need not be complete: the server decides
        assert engine.info.model == "alias"


async def test_a_server_without_a_list_of_models_is_used_when_the_model_is_named(serve: Serve) -> None:
    server = await serve()
    with pytest.raises(RequestError, match="/v1/models with 404"):
        await connected(server)
    async with await connected(server, model="ghost") as engine:
        assert (await complete(engine, ask())).text == "Hello"


@pytest.mark.parametrize(
    "page", [{"hello": 1}, [], {"data": [7]}, Reply((b"<html>",), 200, {}), {"data": []}]
)
async def test_an_address_of_something_else_is_told_apart(page: Any, serve: Serve) -> None:
    with pytest.raises(EngineError, match=r"no OpenAI-compatible server|serves no model"):
        await connected(await serve(pages={"/v1/models": page}))


async def test_a_key_that_is_refused_is_noticed_at_once(serve: Serve) -> None:
    server = await serve(pages={"/v1/models": refusal(401, {"error": "Unauthorized"})})
    with pytest.raises(RequestError, match="401") as failure:
        await connected(server)
    assert "GHOSTVIS_API_KEY" in str(failure.value.hint)


async def test_our_own_server_answers_as_the_engine_behind_it() -> None:
    from PIL import Image

    engine, image = FakeEngine(), load_image(Image.new("RGB", (40, 30), "red"))
    requests = [
        ask("one two three"),
        ask("what is it?", image, image),
        ask("one two three", max_tokens=2),
        GenerateRequest(prompt="to be continued", sampling=QUICK),
    ]
    with running(engine) as server:
        async with await RemoteEngine.connect(RemoteSettings(server.url, retries=0)) as remote:
            for request in requests:
                expected = await complete(engine, request)
                assert await complete(remote, request) == expected
            assert remote.info.image_tokens == engine.info.image_tokens
            assert remote.info.notices == ()
