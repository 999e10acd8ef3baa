"""Image rows among a prompt's ids. A rendered prompt has one image id for each place and each slot."""

from collections.abc import Sequence

from ghostvis_cli.model.config import Layout


def expand(
    ids: Sequence[int], image_id: int, rows: int, images: int, layout: Layout
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids with each image id repeated `rows` times, and the images' first and last positions.

    In prepend_slots the first half are the images' places, the second half ordinary tokens.
    ValueError where the numbers do not agree.
    """
    marks = sum(id_ == image_id for id_ in ids)
    wanted = images * (2 if layout == "prepend_slots" else 1)
    if marks != wanted:
        raise ValueError(
            f"{images} images need {wanted} image tokens in a prompt of layout {layout}; it has {marks}"
        )
    expanded: list[int] = []
    spans: list[tuple[int, int]] = []
    for id_ in ids:
        if id_ != image_id:
            expanded.append(id_)
            continue
        if len(spans) < images:
            spans.append((len(expanded), len(expanded) + rows - 1))
        expanded += [image_id] * rows
    return expanded, spans
