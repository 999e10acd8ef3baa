"""Answers by a schema or a pattern on the local engine, and over its server."""

import asyncio
import json
import subprocess
import sys
from typing import Any

import jsonschema_rs
import openai
import pytest

from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.engines.base import GrammarError, complete
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.engines.local.grammar import Grammars
from ghostvis_cli.sampling import Sampling
from ghostvis_cli.serve.settings import Served
from tests.engines.serving import PATIENCE_S, running
from tests.engines.test_contract import ask
from tests.engines.tiny import TOKENIZER, tiny_model

SHAPE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["circle", "square"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "name": {"type": "string", "maxLength": 5},
    },
    "required": ["kind", "count", "name"],
    "additionalProperties": False,
}
HOT: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0}


def engine(**settings: Any) -> LocalEngine:
    return LocalEngine(tiny_model(), LocalSettings(device="cpu", **settings))


async def test_answers_fit_their_schema_and_their_neighbours_are_none_the_wiser() -> None:
    async with engine() as local:
        plain = ask("question", max_tokens=30, ignore_eos=True)
        alone = await complete(local, plain)
        schema = json.dumps(SHAPE)
        many = [ask(f"q {n}", json_schema=schema, max_tokens=55, seed=n, **HOT) for n in range(12)]
        beside, *answers = await asyncio.gather(*(complete(local, each) for each in (plain, *many)))
    assert beside.token_ids == alone.token_ids
    for done in answers:
        assert done.finish_reason == "stop", done.text
        jsonschema_rs.validate(SHAPE, json.loads(done.text))
        assert all(id_ < len(TOKENIZER.ranks) for id_ in done.token_ids)
    assert len({done.text for done in answers}) > 6


async def test_a_grammar_ends_an_answer_even_where_the_models_end_is_ignored() -> None:
    async with engine() as local:
        done = await complete(local, ask("q", regex="ab{2,4}", ignore_eos=True, max_tokens=30))
    assert (done.finish_reason, done.text.rstrip("b")) == ("stop", "a")


async def test_markup_is_never_what_a_pattern_means() -> None:
    async with engine() as local:
        for seed in range(6):
            done = await complete(local, ask("q", regex=r"<\|bos\|>|<\|user_end\|>", seed=seed, **HOT))
            assert done.text in ("<|bos|>", "<|user_end|>") or done.finish_reason == "length"
            assert all(id_ < len(TOKENIZER.ranks) for id_ in done.token_ids)


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ({"json_schema": '{"type": "nonsense"}'}, "the JSON schema can't be followed"),
        ({"json_schema": '{"$ref": "https://example.com/x"}'}, "the JSON schema can't be followed"),
        ({"json_schema": '{"type": "string", "minLength": 5, "maxLength": 2}'}, "the JSON schema can't"),
        ({"json_schema": '{"const": 1e999}'}, "the JSON schema is not valid JSON: number out of range"),
        ({"json_schema": '{"multipleOf": 1e999}'}, "the JSON schema is not valid JSON"),
        ({"json_schema": '{"const": "\\ud800"}'}, "the JSON schema is not valid JSON"),
        ({"json_schema": f'{{"maximum": {10**310}}}'}, "the JSON schema is not valid JSON"),
        ({"json_schema": '{"type": "integer", "multipleOf": 100000007}'}, "more than 100000 remainders"),
        ({"json_schema": '{"type": "number", "multipleOf": 12345.6789}'}, "more than 100000 remainders"),
        (
            {"json_schema": '{"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}'},
            "more than 100000 remainders",
        ),
        ({"json_schema": '{"$ref": "#"}'}, "the JSON schema can't be followed: no text fits it$"),
        ({"regex": r"[^\s\S]"}, "the regular expression can't be followed: no text fits it$"),
        ({"regex": "(a"}, "the regular expression can't be followed"),
        ({"regex": "(?=a)b"}, "the regular expression can't be followed"),
    ],
)
async def test_what_is_no_grammar_is_refused_and_the_engine_goes_on(
    grammar: dict[str, str], said: str
) -> None:
    async with engine() as local:
        with pytest.raises(GrammarError, match=said):
            await complete(local, ask("q", **grammar))
        assert (await complete(local, ask("q", regex="ok"))).text == "ok"


def test_a_grammar_allows_what_the_text_so_far_allows() -> None:
    grammar = Grammars(TOKENIZER).of(Sampling(regex="a1?"))
    assert grammar is not None

    def allowed(tokenizer: Tokenizer) -> set[bytes]:
        return {
            tokenizer.token_bytes(id_)
            for id_ in grammar.allowed(tokenizer.vocab_size + 7).nonzero().flatten().tolist()
        }

    assert allowed(TOKENIZER) <= {b"a", b"a1"} and b"a" in allowed(TOKENIZER)
    grammar.take(TOKENIZER.encode("a")[0])
    assert allowed(TOKENIZER) == {b"1", b"<|assistant_end|>"}


def test_the_library_is_imported_for_those_who_ask() -> None:
    code = "import sys, ghostvis_cli.engines.local.engine; assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_a_schema_over_http_is_followed_or_refused_by_its_fields_name() -> None:
    async def load() -> Served:
        return Served(engine(), TOKENIZER)

    shape: dict[str, Any] = {"name": "shape", "strict": True, "schema": SHAPE}
    with running(load=load) as server:
        assert await asyncio.to_thread(server.ready.wait, PATIENCE_S)
        create: Any = server.client().chat.completions.create
        asked = {"model": "d2", "messages": [{"role": "user", "content": "q"}], "max_tokens": 55}
        for format_ in ({"type": "json_schema", "json_schema": shape}, {"type": "json_object"}):
            answer = create(**asked, seed=3, response_format=format_).choices[0]
            if answer.finish_reason == "stop":
                assert isinstance(json.loads(answer.message.content), dict)
        assert create(**asked, extra_body={"regex": "yes|no"}).choices[0].message.content in ("yes", "no")
        create(**asked, presence_penalty=1.5, frequency_penalty=-0.5)
        for fields, param in (
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
                "response_format",
            ),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 10**310}}}},
                "response_format",
            ),
            ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
            ({"response_format": {"type": "xml"}}, "response_format.type"),
            ({"extra_body": {"regex": "("}}, "regex"),
            ({"extra_body": {"regex": "a"}, "response_format": {"type": "json_object"}}, "regex"),
            ({"presence_penalty": 3}, "presence_penalty"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                create(**asked, **fields)
            assert refused.value.param == param
