"""Where the plug-in puts images' rows, against the prompts of `prompt.py`."""

import pytest

from ghostvis_cli.sglang.plugin.expand import expand

IMAGE = 9


def test_images_side_by_side_have_a_span_each() -> None:
    assert expand([1, IMAGE, IMAGE, 2], IMAGE, 3, 2, "inline") == (
        [1, *[IMAGE] * 6, 2],
        [(1, 3), (4, 6)],
    )


def test_slots_of_prepend_slots_are_expanded_and_are_no_place_of_an_image() -> None:
    ids, spans = expand([IMAGE, 1, IMAGE, 2], IMAGE, 2, 1, "prepend_slots")
    assert ids == [IMAGE, IMAGE, 1, IMAGE, IMAGE, 2]
    assert spans == [(0, 1)]


@pytest.mark.parametrize("marks", [0, 1, 3])
def test_marks_that_do_not_match_the_images_are_refused(marks: int) -> None:
    with pytest.raises(ValueError, match=f"2 images need 2 image tokens .* it has {marks}"):
        expand([IMAGE] * marks, IMAGE, 4, 2, "inline")
