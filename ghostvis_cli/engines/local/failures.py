"""What torch raises -> what a user is told."""

import torch

from ghostvis_cli.errors import GhostvisError, MemoryLimitError


def explained(error: BaseException) -> GhostvisError:
    """Running out of memory is the user's to solve; anything else that torch raises is a bug, kept whole."""
    if isinstance(error, GhostvisError):
        return error
    text = str(error)
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if memory or "can't allocate memory" in text or "out of memory" in text:
        return MemoryLimitError(
            f"out of memory: {text.splitlines()[0] if text else 'the allocation failed'}",
            hint="lower --max-tokens or the number of requests at once, or use --dtype bfloat16",
        )
    failure = GhostvisError(f"the step thread failed: {type(error).__name__}: {text}")
    failure.__cause__ = error
    return failure
