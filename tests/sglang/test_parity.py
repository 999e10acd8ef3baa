"""SGLang's greedy tokens are the local engine's: both decoders, every layout, two ranks; and where `fast` differs.

In float32 with `exact` numerics every token over 64, whatever the end token says. No tolerance: the two differ by
rounding, near 1e-5 in a logit, and a tie that close would be named by its margin.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.engines.base import GenerateRequest, Sampling
from ghostvis_cli.engines.local import LocalEngine, LocalSettings
from ghostvis_cli.model.config import Layout
from ghostvis_cli.prompt import Message, Role
from ghostvis_cli.serve.settings import Served
from tests.conftest import Reference
from tests.engines.serving import PATIENCE_S, running
from tests.sglang.asking import (
    DEMO,
    TOKENS,
    about_images,
    about_text,
    directory,
    locally,
    margins,
    remotely,
)
from tests.sglang.servers import Server, serving

# Unrounded rotary tables move a logit of these models by 0.05 at most (docs/measurements.md, Converting), and two
# logits may move against each other.
FAST_MARGIN = 0.1
ROLES: tuple[Role, ...] = ("user", "assistant", "system")


def assert_equal(
    server: Server, checkpoint: Checkpoint, requests: Sequence[GenerateRequest], layout: Layout | None = None
) -> None:
    """Cold, and again where everything is cached."""
    expected = locally(checkpoint, requests, layout)
    assert {len(answer.token_ids) for answer in expected} == {TOKENS}
    for _ in range(2):
        given = remotely(server, requests)
        assert margins(given, expected) == {}
        assert [one.usage.prompt_tokens for one in given] == [one.usage.prompt_tokens for one in expected]
        assert [one.usage.image_tokens for one in given] == [one.usage.image_tokens for one in expected]


@pytest.mark.xdist_group("demo")
def test_the_demo_model_answers_about_twenty_images_as_the_local_engine_does(demo_server: Server) -> None:
    assert_equal(demo_server, DEMO, about_images(seed=1, images=20))


@pytest.mark.xdist_group("layouts")
@pytest.mark.parametrize("layout", ["prepend", "prepend_slots", "prepend_literal"])
def test_every_other_layout_is_served_as_the_local_engine_reads_it(layout: Layout, tmp_path: Path) -> None:
    with serving(directory(DEMO, tmp_path, layout=layout)) as server:
        assert_equal(server, DEMO, about_images(seed=2, images=4), layout)


@pytest.mark.xdist_group("ranks")
def test_two_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    ranks = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with serving(directory(DEMO, tmp_path), "--tp", "2", **ranks) as server:
        assert_equal(server, DEMO, about_images(seed=3, images=3))


def assert_scored_alike(server: Server, checkpoint: Checkpoint) -> None:
    """A prompt's own probabilities: the same ids, counts and shift, whether it comes as text or as ids."""
    tokenizer = Tokenizer.load(checkpoint.tokenizer_path)
    ids = [tokenizer.special("<|bos|>"), *tokenizer.encode("The <|bos|> cat sät")]

    async def load() -> Served:
        return Served(await LocalEngine.load(checkpoint, LocalSettings(device="cpu", threads=1)), tokenizer)

    with running(load=load) as local:
        assert local.ready.wait(PATIENCE_S)
        for prompt in ("The <|bos|> cat sät", ids, [ids, ids[1:]]):
            body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
            ours = json.loads(local.send("POST", "/v1/completions", body)[2])
            theirs = server.send("/v1/completions", {"model": "default", **body}).json
            for one, other in zip(ours["choices"], theirs["choices"], strict=True):
                expected = one["logprobs"]["token_logprobs"][: len(ids)]
                told = other["logprobs"]["token_logprobs"][: len(expected)]
                assert expected[0] is None and told[0] is None
                assert told[1:] == pytest.approx(expected[1:], abs=1e-3)
            assert ours["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]


def out_of_order() -> list[GenerateRequest]:
    """Conversations that training had none of; the last one begins the assistant's answer."""
    user, assistant, system = (Message.of(role, f"the {role}'s <|bos|>") for role in ROLES)
    turns = (
        [user, user],
        [system, system, user],
        [assistant, user],
        [user, assistant, assistant, system, user],
    )
    settings = Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return [GenerateRequest(tuple(each), sampling=settings) for each in (*turns, [user, assistant])]


OURS = '{"architectures": ["GhostVisForCausalLM"]}'


@pytest.mark.xdist_group("text")
@pytest.mark.parametrize(
    ("case", "flags"),
    [("text_swiglu", ("--json-model-override-args", OURS)), ("text_relu2_nano1_pad", ())],
    ids=["swiglu", "relu2"],
)
def test_text_models_give_the_local_engines_tokens(case: str, flags: Sequence[str], tmp_path: Path) -> None:
    checkpoint = Reference(case).checkpoint()
    with serving(directory(checkpoint, tmp_path), *flags) as server:
        assert_equal(server, checkpoint, about_text())
        assert_scored_alike(server, checkpoint)
        assert_equal(server, checkpoint, out_of_order())


@pytest.mark.xdist_group("text")
def test_a_swiglu_text_directory_needs_none_of_our_code_to_differ_by_near_ties_alone(tmp_path: Path) -> None:
    checkpoint = Reference("text_swiglu").checkpoint()
    with serving(directory(checkpoint, tmp_path), SGLANG_PLUGINS="none") as server:
        assert "ghostvis" not in server.log.read_text().split("Loaded plugin", 1)[-1]
        parted = margins(remotely(server, about_text()), locally(checkpoint, about_text()))
    assert all(margin < FAST_MARGIN for margin in parted.values()), parted


@pytest.mark.xdist_group("bare")
def test_fast_numerics_part_from_the_local_engine_only_at_near_ties(bare_server: Server) -> None:
    """A server without a prefix cache as well: nothing here may depend on one."""
    requests = about_images(seed=1, images=20)
    parted = margins(remotely(bare_server, requests), locally(DEMO, requests))
    assert all(margin < FAST_MARGIN for margin in parted.values()), parted
    assert len(parted) < len(requests) / 2
