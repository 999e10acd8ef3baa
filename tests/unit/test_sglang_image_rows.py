"""Where images' rows go in a batch, and that nothing waits for the device to say it."""

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from ghostvis_cli.sglang.plugin.image_rows import ImageRows, places  # noqa: E402

ROWS, WIDTH = 4, 3


def item(hash_: int, start: int) -> Any:
    return SimpleNamespace(hash=hash_, offsets=[(start, start + ROWS - 1)])


def batch(*requests: tuple[list[Any], int, int]) -> Any:
    """(images, positions known before, new ones) of each request."""
    inputs = [SimpleNamespace(mm_items=items) if items else None for items, _, _ in requests]
    known, new = [one[1] for one in requests], [one[2] for one in requests]
    return SimpleNamespace(mm_inputs=inputs, extend_prefix_lens_cpu=known, extend_seq_lens_cpu=new)


def computed(items: list[Any]) -> Any:
    return torch.tensor([[10.0 * each.hash + row] * WIDTH for each in items for row in range(ROWS)])


def test_every_image_of_a_batch_lies_at_its_own_tokens_whatever_came_before() -> None:
    asked = batch(
        ([], 0, 2),  # text
        ([item(1, 1), item(2, 6)], 0, 11),  # whole
        ([item(3, 1)], 3, 4),  # its first two rows are known
        ([item(4, 2)], 0, 4),  # and of this one the last two come in the next chunk
        ([item(5, 0)], 4, 1),  # all are known
    )
    found = [(place.item.hash, place.at, place.first, place.end) for place in places(asked)]
    assert found == [(1, 3, 0, 4), (2, 8, 0, 4), (3, 13, 2, 4), (4, 19, 0, 2)]
    embedding = torch.full((22, WIDTH), -1.0)
    ImageRows(computed, ROWS).put(embedding, asked)
    rows = embedding[:, 0].int().tolist()
    assert rows == [-1, -1, -1, 10, 11, 12, 13, -1, 20, 21, 22, 23, -1, 32, 33, -1, -1, -1, -1, 40, 41, -1]


def test_an_image_is_computed_once_however_many_ask_until_others_need_its_room() -> None:
    asked: list[list[int]] = []

    def compute(items: list[Any]) -> Any:
        asked.append([each.hash for each in items])
        return computed(items)

    room_for_two = 2 * ROWS * WIDTH * 4 / 2**20
    images = ImageRows(compute, ROWS, room_for_two)
    for hashes in ((1, 1, 2), (2, 1), (3,), (1,), (2,)):
        embedding = torch.zeros(len(hashes) * ROWS, WIDTH)
        images.put(embedding, batch(*(([item(hash_, 0)], 0, ROWS) for hash_ in hashes)))
        assert embedding[::ROWS, 0].tolist() == [10.0 * hash_ for hash_ in hashes]
    assert asked == [[1, 2], [3], [2]]
    images.forget()  # the weights are others
    images.put(torch.zeros(ROWS, WIDTH), batch(([item(1, 0)], 0, ROWS)))
    assert asked[-1] == [1]


def test_a_batch_larger_than_the_memory_is_answered_all_the_same() -> None:
    embedding = torch.zeros(2 * ROWS, WIDTH)
    ImageRows(computed, ROWS, 0).put(embedding, batch(([item(1, 0), item(2, ROWS)], 0, 2 * ROWS)))
    assert embedding[:, 0].int().tolist() == [10, 11, 12, 13, 20, 21, 22, 23]


def test_nothing_is_read_back_from_the_device() -> None:
    """A fake tensor has no values, and says so to whoever asks for one."""
    with FakeTensorMode():
        embedding = torch.zeros(3 * ROWS, WIDTH)
        compute = lambda items: torch.zeros(len(items) * ROWS, WIDTH)  # noqa: E731
        ImageRows(compute, ROWS).put(embedding, batch(([item(1, 2)], 0, 8), ([item(2, 0)], 0, ROWS)))
