"""nanochat's later generations on SGLang: the local engine's greedy tokens, whatever is cached, chunked or shared.

float32 with `exact` numerics: no tolerance. Shapes are random ones (odd depths, GQA), windows bite, and contexts go
beyond the trained length.
"""

import random
from collections.abc import Sequence as Ordered
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ghostvis_cli.checkpoint.load import load_model
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.engines.base import Sampling
from ghostvis_cli.engines.local.scheduler import Scheduler
from ghostvis_cli.engines.local.sequence import Sequence
from ghostvis_cli.model.config import Layout
from ghostvis_cli.prompt import Prompt
from tests.conftest import DATA, Reference
from tests.nanochat import VOCABULARY, Eyes, Shape, write
from tests.sglang.asking import about_images, directory
from tests.sglang.servers import NotStartedError, Server, serving
from tests.sglang.test_parity import assert_equal

TOKENS = 64
SHAPE = Shape(seq=60, pattern="SSL")
CHUNKS = ("--chunked-prefill-size", "16")


def locally(checkpoint: Checkpoint, prompts: Ordered[list[int]], tokens: int = TOKENS) -> list[list[int]]:
    loaded = load_model(checkpoint)
    scheduler = Scheduler(loaded.model, loaded.tokenizer)
    sampling = Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
    asked = [Sequence.start(Prompt(tuple(ids), (0,) * len(ids)), [], sampling, 0) for ids in prompts]
    with torch.inference_mode():
        for sequence in asked:
            scheduler.submit(sequence)
        while scheduler.busy:
            scheduler.step()
    return [sequence.output for sequence in asked]


def remotely(
    server: Server, prompts: Ordered[list[int]], tokens: int = TOKENS, at_once: int = 1
) -> list[list[int]]:
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda ids: server.generate(ids, tokens=tokens), prompts))
    assert {answer.status for answer in answers} == {200}
    return [answer.json["output_ids"] for answer in answers]


def crowd(seed: int, count: int) -> list[list[int]]:
    """Prompts that share beginnings cut at random, some of them beginnings of others."""
    rng = random.Random(seed)
    stems = [[rng.randrange(VOCABULARY) for _ in range(100)] for _ in range(5)]
    return [
        rng.choice(stems)[: rng.randrange(1, 100)]
        + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(3))]
        for _ in range(count)
    ]


@pytest.mark.slow
@pytest.mark.xdist_group("nanochat")
@pytest.mark.parametrize("name", ["n2", "n3", "n4", "n5", "n6", "n7"])
def test_each_generation_gives_the_local_engines_tokens_in_chunks_from_the_cache_and_in_a_crowd(
    name: str, tmp_path: Path
) -> None:
    checkpoint = write(tmp_path / "in", name, SHAPE)
    prompts = [[each % VOCABULARY for each in range(7, 7 + length)] for length in (1, 15, 16, 17, 40, 130)]
    many = crowd(1, 200 if name == "n7" else 24)
    with serving(directory(checkpoint, tmp_path), *CHUNKS) as server:
        wanted = locally(checkpoint, prompts)
        assert remotely(server, prompts) == wanted  # cold, but for what they share
        assert remotely(server, prompts) == wanted  # all of it cached
        server.forget()
        assert remotely(server, many, 16, at_once=8) == locally(checkpoint, many, 16)


@pytest.mark.slow
@pytest.mark.xdist_group("nanochat")
@pytest.mark.parametrize("case", ["n7_smear", "n5_cap20"])
def test_two_ranks_give_the_recorded_tokens(case: str, tmp_path: Path) -> None:
    reference = Reference(case)
    prompts = reference.facts["prompts"]
    with serving(
        directory(reference.checkpoint(), tmp_path), "--tp", "2", SGLANG_CPU_OMP_THREADS_BIND="0|1"
    ) as server:
        for _ in range(2):
            given = remotely(server, list(prompts.values()), 24)
            assert given == [reference.greedy(f"{name}/naive") for name in prompts]


@pytest.mark.slow
@pytest.mark.xdist_group("nanochat")
def test_two_ranks_that_share_a_key_head_give_the_tokens_of_one(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "in", "n7", Shape(kv_heads=1, seq=60, pattern="SL"))
    prompts = crowd(2, 12)
    with serving(directory(checkpoint, tmp_path), "--tp", "2", SGLANG_CPU_OMP_THREADS_BIND="0|1") as server:
        assert remotely(server, prompts, 24, at_once=4) == locally(checkpoint, prompts, 24)


@pytest.mark.slow
@pytest.mark.xdist_group("nanochat")
def test_slots_that_are_taken_again_and_again_remember_their_own_predecessors(tmp_path: Path) -> None:
    """A cache so small that prompts evict each other and requests are retracted."""
    checkpoint = write(tmp_path / "in", "n7", SHAPE)
    prompts = crowd(3, 40)
    small = ("--max-total-tokens", "700", *CHUNKS)
    with serving(directory(checkpoint, tmp_path), *small) as server:
        assert remotely(server, prompts, 40, at_once=8) == locally(checkpoint, prompts, 40)


@pytest.mark.slow
@pytest.mark.xdist_group("nanochat")
def test_fast_numerics_differ_by_rotary_tables_alone(tmp_path: Path) -> None:
    """A model that a CPU trained, whose tables are not rounded: `fast` rotates as exactly."""
    checkpoint = write(tmp_path / "in", "n7", Shape(seq=60, stored=torch.float32))
    prompts = crowd(4, 12)
    with serving(directory(checkpoint, tmp_path), GHOSTVIS_NUMERICS="fast") as server:
        assert remotely(server, prompts, 24) == locally(checkpoint, prompts, 24)


@pytest.mark.slow
@pytest.mark.xdist_group("nanochat")
def test_what_would_make_answers_wrong_ends_the_start_by_name(tmp_path: Path) -> None:
    place = directory(Reference(DATA / "n7_smear").checkpoint(), tmp_path)
    with (
        pytest.raises(NotStartedError, match="can't be served with a cache beyond the device's memory"),
        serving(place, "--enable-hierarchical-cache"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.xdist_group("nanochat")
@pytest.mark.parametrize("layout", ["inline", "prepend_slots"])
def test_images_before_a_later_decoder_are_answered_as_locally(layout: Layout, tmp_path: Path) -> None:
    """An image's last row is the next token's neighbour, in a chunk, between chunks and behind a prefix hit."""
    checkpoint = write(tmp_path / "in", "n7", Shape(rows=1024, vocabulary=1024, seq=200), eyes=Eyes())
    place = directory(checkpoint, tmp_path, layout=layout)
    with serving(place, *CHUNKS) as server:
        assert_equal(server, checkpoint, about_images(seed=5, images=3), layout)
