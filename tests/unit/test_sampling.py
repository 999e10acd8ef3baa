"""Sampling filters against their definitions, by drawing many times."""

import collections

import pytest
import torch

from ghostvis_cli.engines.base import Sampling
from ghostvis_cli.engines.local.sampling import draws, penalise, sample, shaped
from ghostvis_cli.errors import UsageError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0])


def drawn(**settings: object) -> collections.Counter[int]:
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(**{"top_p": 1.0, "top_k": 0, "temperature": 1.0, **settings})  # type: ignore[arg-type]
    return collections.Counter(
        int(sample(LOGITS[None], [sampling], draws([sampling], [generator], 5))) for _ in range(4000)
    )


def test_greedy_takes_the_first_of_equal_ids() -> None:
    assert sample(torch.tensor([[1.0, 3.0, 3.0]]), [Sampling(temperature=0)], None).tolist() == [1]


def test_draws_follow_the_softmax() -> None:
    counts = drawn(temperature=0.5)
    expected = torch.softmax(LOGITS / 0.5, 0)
    for id_, share in enumerate(expected.tolist()):
        assert abs(counts[id_] / 4000 - share) < 0.03  # four standard deviations of the widest


def test_top_k_keeps_that_many() -> None:
    assert set(drawn(top_k=2)) == {0, 1}
    assert set(drawn(top_k=1)) == {0}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    shares = torch.softmax(LOGITS, 0).cumsum(0).tolist()
    assert set(drawn(top_p=shares[1] - 1e-4)) == {0, 1}
    assert set(drawn(top_p=shares[1] + 1e-4)) == {0, 1, 2}
    assert set(drawn(top_p=1e-9)) == {0}


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert set(drawn(min_p=0.3)) == {0, 1}


def test_the_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    penalised = penalise(LOGITS, torch.tensor([0, 3]), 2.0)
    assert penalised.tolist() == [1.0, 1.0, 0.0, -2.0, -8.0]


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_tokens": 0},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": ("",)},
        {"logprobs": 21},
        {"logprobs": True},
        {"top_k": 2.5},
        {"max_tokens": None},
        {"temperature": None},
        {"temperature": "1"},
        {"seed": 1.5},
        {"stop": ["a list"]},
        {"stop": (1,)},
    ],
)
def test_settings_outside_their_range_are_usage_errors(setting: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Sampling(**setting)  # type: ignore[arg-type]


def test_presence_counts_once_and_frequency_each_time() -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=-0.25)
    changed = shaped(LOGITS, sampling, seen=[0, 1, 4], output=[1, 1, 4, 1], grammar=None)
    assert (LOGITS - changed).tolist() == pytest.approx([0, 0.5 - 0.75, 0, 0, 0.5 - 0.25])
    assert shaped(LOGITS, sampling, seen=[0], output=[], grammar=None) is LOGITS  # a prompt does not count


@pytest.mark.parametrize("schema", ["", "[]", "{", "true", "[" * 100_000])
def test_a_schema_that_is_no_json_object_is_refused(schema: str) -> None:
    with pytest.raises(UsageError, match="json_schema is no JSON object"):
        Sampling(json_schema=schema)


def test_one_grammar_at_a_time() -> None:
    with pytest.raises(UsageError, match="both given"):
        Sampling(json_schema="{}", regex="a")
    assert Sampling(json_schema="{}").changed(regex="a") == Sampling(regex="a")
