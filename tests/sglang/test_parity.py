"""SGLang's greedy tokens are the local engine's: both decoders, every layout, two ranks; and where `fast` differs.

In float32 with `exact` numerics every token over 64, whatever the end token says. No tolerance: the two differ by
rounding, near 1e-5 in a logit, and a tie that close would be named by its margin.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.engines.base import GenerateRequest
from ghostvis_cli.model.config import Layout
from tests.conftest import Reference
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
