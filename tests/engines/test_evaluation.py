"""/v1/completions as evaluation harnesses use it: the prompt's own probabilities, prompts as ids, no answer."""

import asyncio
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from ghostvis_cli.engines.base import GenerateRequest, Sampling, complete
from ghostvis_cli.engines.fake import FakeEngine
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.errors import RequestError
from ghostvis_cli.serve.settings import Served
from tests.engines.serving import PATIENCE_S, Letters, Running, running
from tests.engines.tiny import TOKENIZER, tiny_model

BOS = TOKENIZER.special("<|bos|>")
TEXT = "The cat sät on it"
IDS = [BOS, *TOKENIZER.encode(TEXT)]


def engine() -> LocalEngine:
    return LocalEngine(tiny_model(), LocalSettings(device="cpu"))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    async def load() -> Served:
        return Served(engine(), TOKENIZER)

    with running(load=load) as started:
        assert started.ready.wait(PATIENCE_S)
        yield started


def asked(server: Running, **fields: Any) -> dict[str, Any]:
    status, _, body = server.send("POST", "/v1/completions", {"temperature": 0, "max_tokens": 0, **fields})
    answer: dict[str, Any] = json.loads(body)
    assert status == 200, answer
    return answer


def expected(ids: list[int]) -> torch.Tensor:
    """Log-probabilities (T-1, V) of what follows each id, by one plain forward."""
    decoder = tiny_model().model.decoder
    with torch.inference_mode():
        return torch.log_softmax(decoder(decoder.embed(torch.tensor([ids])))[0, :-1], dim=-1)


def test_a_prompts_tokens_have_the_models_own_probabilities(server: Running) -> None:
    answer = asked(server, prompt=TEXT, echo=True, logprobs=2)
    [choice] = answer["choices"]
    told, all_ = choice["logprobs"], expected(IDS)
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    chosen = all_.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()
    assert told["token_logprobs"][1:] == pytest.approx(chosen, abs=1e-5)
    for best, row in zip(told["top_logprobs"][1:], all_, strict=True):
        assert list(best.values()) == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)
    assert told["tokens"] == [TOKENIZER.token_bytes(id_).decode(errors="replace") for id_ in IDS]
    pieces = [TEXT[a:b] for a, b in pairwise(told["text_offset"][1:5])]
    assert (told["text_offset"][0], pieces) == (0, told["tokens"][1:4])
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        len(IDS),
        0,
        len(IDS),
    )


def test_ids_are_taken_as_they_are_alone_and_in_lists(server: Running) -> None:
    text = asked(server, prompt=TEXT, echo=True, logprobs=1)["choices"][0]["logprobs"]["token_logprobs"]
    alone = asked(server, prompt=IDS, echo=True, logprobs=1)["choices"][0]
    first, without_bos = asked(server, prompt=[IDS, IDS[1:]], echo=True, logprobs=1)["choices"]
    assert alone["logprobs"]["token_logprobs"] == first["logprobs"]["token_logprobs"] == text
    assert alone["text"] == "<|bos|>" + TEXT and without_bos["text"] == TEXT
    assert without_bos["logprobs"]["tokens"] == alone["logprobs"]["tokens"][1:]
    assert without_bos["logprobs"]["token_logprobs"][0] is None
    assert without_bos["logprobs"]["token_logprobs"][1:] != pytest.approx(text[2:], abs=1e-3)


def test_an_answer_behind_an_echo_is_the_answer_without_one(server: Running) -> None:
    plain = asked(server, prompt=TEXT, max_tokens=5, logprobs=1, ignore_eos=True)
    echoed = asked(server, prompt=TEXT, max_tokens=5, logprobs=1, ignore_eos=True, echo=True)
    [choice], [before] = echoed["choices"], plain["choices"]
    assert choice["text"] == TEXT + before["text"]
    assert choice["logprobs"]["tokens"][len(IDS) :] == before["logprobs"]["tokens"]
    assert choice["logprobs"]["text_offset"][len(IDS)] == len(TEXT)
    assert echoed["usage"]["completion_tokens"] == 5
    # What the answer's tokens were drawn with is what they have as a prompt's.
    whole = [*IDS, *TOKENIZER.encode(before["text"])]
    again = asked(server, prompt=whole, echo=True, logprobs=1)["choices"][0]["logprobs"]["token_logprobs"]
    if len(again) == len(choice["logprobs"]["token_logprobs"]):
        assert again[1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-4)
    silent = asked(server, prompt=TEXT, max_tokens=5, ignore_eos=True, echo=True)["choices"][0]
    assert (silent["text"], silent["logprobs"]) == (choice["text"], None)


def test_a_stream_says_the_same(server: Running) -> None:
    fields = {"prompt": [TEXT, "x"], "max_tokens": 3, "logprobs": 1, "echo": True, "ignore_eos": True}
    whole = asked(server, **fields)["choices"]
    body = server.send("POST", "/v1/completions", {**fields, "temperature": 0, "stream": True})[2].decode()
    events = [json.loads(line[6:]) for line in body.split("\n\n") if line.startswith("data: {")]
    for choice in whole:
        own = [each for event in events for each in event["choices"] if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        told = [value for each in own if each["logprobs"] for value in each["logprobs"]["token_logprobs"]]
        assert told == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)


def test_a_client_of_openais_reads_it(server: Running) -> None:
    answer = server.client().completions.create(model="d2", prompt=IDS, echo=True, logprobs=1, max_tokens=1)
    assert (
        len(answer.choices[0].logprobs.token_logprobs) == len(IDS) + 1 or answer.usage.completion_tokens == 0
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [BOS, "a"]}, "prompt"),
        ({"prompt": [[BOS], "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [TOKENIZER.vocab_size]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [BOS] * 5000}, "prompt"),
        ({"prompt": "a", "echo": "yes"}, "echo"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused(server: Running, fields: dict[str, Any], param: str) -> None:
    status, _, body = server.send("POST", "/v1/completions", fields)
    error = json.loads(body)["error"]
    assert (status, error["param"]) == (400, param)
    assert (
        param != "prompt" or "list of strings" not in error["message"]
    )  # what it says is wanted is all of it


def test_max_tokens_0_is_for_this_route_alone(server: Running) -> None:
    status, body = server.chat(max_tokens=0)
    assert (status, body["error"]["param"]) == (400, "max_tokens")


async def test_scores_wait_for_nobody_and_disturb_nobody() -> None:
    async with engine() as local:
        plain = GenerateRequest(
            prompt="a b c", sampling=Sampling(max_tokens=20, temperature=0, ignore_eos=True)
        )
        scored = GenerateRequest(prompt_ids=tuple(IDS), prompt_logprobs=0, answer=False)
        alone = await complete(local, plain)
        both = await asyncio.gather(*(complete(local, each) for each in [plain, scored] * 4))
        assert all(each.token_ids == alone.token_ids for each in both[::2])
        assert {each.usage.prompt_tokens for each in both[1::2]} == {len(IDS)}
        assert not local._scheduler.busy


def test_an_engine_that_can_not_score_says_so() -> None:
    with running(FakeEngine(), vocabulary=Letters()) as server:
        for fields in ({"echo": True, "logprobs": 1}, {"max_tokens": 0}, {"prompt": [1, 2]}):
            status, _, body = server.send("POST", "/v1/completions", {"prompt": "a", **fields})
            assert (status, "only the local engine" in json.loads(body)["error"]["message"]) == (400, True)


async def test_other_engines_refuse_what_they_would_drop() -> None:
    async with FakeEngine() as fake:
        with pytest.raises(RequestError, match="only the local engine"):
            await complete(fake, GenerateRequest(prompt="a", prompt_logprobs=1))
