"""Checks that all tensors are loaded: SGLang itself does not notice a missing one."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SHOWN = 5


def complete(weights: Iterable[tuple[str, T]], expected: set[str]) -> Iterator[tuple[str, T]]:
    """Pass the tensors on. ValueError names the first unexpected one, and at the end the missing ones."""
    missing = set(expected)
    for name, tensor in weights:
        if name not in expected:
            raise ValueError(f"the directory has a tensor that the model has no place for: {name}")
        missing.discard(name)
        yield name, tensor
    if missing:
        shown = ", ".join(sorted(missing)[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise ValueError(f"the directory lacks {len(missing)} of the model's tensors: {shown}")
