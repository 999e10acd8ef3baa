"""What torch raises -> what a user is told."""

from ghostvis_cli.errors import GhostvisError, limit_reached


def explained(error: BaseException) -> GhostvisError:
    """Running out of memory is the user's to solve; anything else that torch raises is a bug, kept whole."""
    if isinstance(error, GhostvisError):
        return error
    if limit := limit_reached(error):
        return limit
    failure = GhostvisError(f"the step thread failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
