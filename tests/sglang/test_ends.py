"""How an answer ends is told alike by SGLang and by the local engine: its tokens, and why there are no more."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from tests.engines.serving import Running, running
from tests.sglang.asking import DEMO, GREEDY, asked, locally, remotely
from tests.sglang.servers import Server

pytestmark = pytest.mark.xdist_group("demo")
TEXT = "Hello.\nWhat do you know?"
ENDS: list[dict[str, Any]] = [
    {},  # by the model's own end of a turn
    {"stop": ["e"]},
    {"stop": ["nothing that it says"]},
    {"max_tokens": 2},
    {"max_tokens": 3, "ignore_eos": True},
]


@pytest.fixture(scope="module")
def local() -> Iterator[Running]:
    engine = LocalEngine.open(DEMO, LocalSettings(device="cpu", dtype="float32", threads=1))
    with running(engine, vocabulary=engine.tokenizer) as server:
        yield server


def told(server: Server | Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole answer, or the events of a stream."""
    if isinstance(server, Running):
        text = server.send("POST", path, body)[2].decode()
    else:
        text = server.send(path, body).body
    if not body.get("stream"):
        return [json.loads(text)]
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def counted(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What all of it adds up to."""
    [usage] = [event["usage"] for event in events if event.get("usage")]
    choices = [choice for event in events for choice in event["choices"]]
    scores = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    return {
        "reasons": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "ids": [id_ for choice in choices for id_ in choice.get("token_ids") or ()],
        "scores": sum(len(each.get("content") or each.get("tokens") or ()) for each in scores),
        "usage": [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")],
    }


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("end", ENDS, ids=str)
def test_both_servers_count_the_same_tokens_of_an_answer(
    local: Running, demo_server: Server, end: dict[str, Any], stream: bool
) -> None:
    common = {"temperature": 0, "max_tokens": 40, **end}
    common |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    chat = {"messages": [{"role": "user", "content": TEXT}], "logprobs": True, **common}
    text = {"prompt": TEXT, "logprobs": 1, "return_token_ids": True, **common}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", text)):
        ours, theirs = (counted(told(server, path, body)) for server in (local, demo_server))
        assert theirs == ours
        assert ours["scores"] == ours["usage"][1] == len(ours["ids"] or range(ours["scores"]))


def test_a_client_of_either_is_given_the_same_ids_and_counts(demo_server: Server) -> None:
    requests = [
        replace(asked(TEXT), sampling=replace(GREEDY, ignore_eos=False, max_tokens=limit))
        for limit in (2, 40)
    ]
    ours, theirs = locally(DEMO, requests), remotely(demo_server, requests)
    assert [done.finish_reason for done in ours] == ["length", "stop"]
    for mine, other in zip(ours, theirs, strict=True):
        assert (other.text, other.token_ids, other.finish_reason) == (
            mine.text, mine.token_ids, mine.finish_reason,
        )  # fmt: skip
        assert other.usage.completion_tokens == mine.usage.completion_tokens == len(mine.token_ids)


def test_a_client_that_asks_to_see_the_end_has_it_counted(demo_server: Server) -> None:
    messages = [{"role": "user", "content": TEXT}]
    hidden, shown = (
        demo_server.chat(messages, 40, no_stop_trim=asked_for).json for asked_for in (False, True)
    )
    assert shown["usage"]["completion_tokens"] == hidden["usage"]["completion_tokens"] + 1
