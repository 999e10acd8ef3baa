"""What the vision part's graphs are told, and images on their way to it. The graphs themselves: tests/gpu."""

import numpy as np
import pytest
import torch

from ghostvis_cli.sglang.plugin import GRAPHS_VARIABLE
from ghostvis_cli.sglang.plugin.vision_graphs import LARGEST, captured, largest_batch, uploaded

CPU = torch.device("cpu")


@pytest.mark.parametrize(("said", "largest"), [(None, LARGEST), ("0", 0), ("4", 4)])
def test_the_largest_batch_is_a_setting(
    monkeypatch: pytest.MonkeyPatch, said: str | None, largest: int
) -> None:
    monkeypatch.delenv(GRAPHS_VARIABLE, raising=False)
    if said is not None:
        monkeypatch.setenv(GRAPHS_VARIABLE, said)
    assert largest_batch() == largest


def test_a_setting_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRAPHS_VARIABLE, "off")
    with pytest.raises(
        ValueError, match="GHOSTVIS_VISION_GRAPHS is 'off': a number of images, 0 for no graphs"
    ):
        largest_batch()


def test_a_cpu_has_no_graphs() -> None:
    assert captured(lambda crops: crops, 8, CPU) is None


def test_images_arrive_in_order_and_whole_from_arrays_that_may_not_be_written_to() -> None:
    images = [np.full((1, 4, 4, 3), value, dtype=np.uint8) for value in (3, 1, 2)]
    for image in images:
        image.flags.writeable = False  # as they come out of a message
    crops = uploaded(images, CPU)
    assert crops.dtype == torch.uint8
    assert crops[:, 0, 0, 0].tolist() == [3, 1, 2]
