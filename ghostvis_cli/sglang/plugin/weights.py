"""Loading that leaves nothing out: SGLang itself does not notice a tensor that no file had."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SHOWN = 5


def complete(weights: Iterable[tuple[str, T]], expected: set[str]) -> Iterator[tuple[str, T]]:
    """The same tensors; ValueError names the first unexpected one, and at the end those that were missing."""
    missing = set(expected)
    for name, tensor in weights:
        if name not in expected:
            raise ValueError(f"the directory has a tensor that the model has no place for: {name}")
        missing.discard(name)
        yield name, tensor
    if missing:
        shown = ", ".join(sorted(missing)[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise ValueError(f"the directory lacks {len(missing)} of the model's tensors: {shown}")
