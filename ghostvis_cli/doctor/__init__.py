"""`ghostvis doctor`: what is installed, what would run, and whether it does. Findings only; printing is elsewhere.

finding   what a check says; running checks     machine       Python, packages, torch, memory, directories
settings  profiles and their faults             checkpoints   the base directory and the chosen model
converted directories made for servers, and whether their certificates hold
engine    the server, or the model loaded       trips, card   asking it, about a card that tells up from down
"""

from collections.abc import Callable, Iterator

from ghostvis_cli.doctor.finding import Check, Finding, examine, in_loop
from ghostvis_cli.errors import UsageError
from ghostvis_cli.profile import Resolved

__all__ = ["Finding", "diagnose"]

ALL = 1.0


def diagnose(
    chosen: Resolved | UsageError, *, run: bool, limit_s: float, on_crash: Callable[[BaseException], None]
) -> Iterator[Finding]:
    """Every finding as it comes. `chosen` is the profile of this run, or why there is none.

    run       also load the model or ask the server to answer
    limit_s   for everything together
    on_crash  gets what a check raised that no check should raise, before its finding comes
    """
    checks = _checks(chosen, run=run, limit_s=limit_s)
    return _without_repeats(examine(checks, limit_s, on_crash))


def _without_repeats(findings: Iterator[Finding]) -> Iterator[Finding]:
    """A checkpoint's notices come from its header and, when it is loaded, from the engine again."""
    noted: set[str] = set()
    for finding in findings:
        if finding.status != "note" or finding.message not in noted:
            yield finding
        noted.add(finding.message)


def _checks(chosen: Resolved | UsageError, *, run: bool, limit_s: float) -> list[Check]:
    from ghostvis_cli.doctor import card, checkpoints, converted, engine, machine, settings
    from ghostvis_cli.image_limits import DEFAULT_LIMITS

    resolved = chosen if isinstance(chosen, Resolved) else None
    profile = resolved.profile if resolved else None
    kind = profile.engine.chosen_kind if profile else None
    checks = [
        Check("python", machine.python),
        Check("packages", lambda: machine.packages(needed=kind)),
        Check("torch", lambda: machine.torch_and_devices(profile.engine if profile else None), ALL),
        Check("memory", machine.memory),
        Check("directories", machine.directories),
        Check("profile", lambda: settings.profiles(chosen)),
        Check("checkpoints", lambda: checkpoints.checkpoints(resolved)),
        Check("converted", lambda: converted.converted(resolved)),
        Check("pictures", lambda: card.images(profile.images if profile else DEFAULT_LIMITS)),
    ]
    if profile is not None and kind == "remote":
        request_s = limit_s / 2
        checks.append(Check("server", lambda: in_loop(engine.remote(profile, request_s, run=run)), ALL))
    elif profile is not None and run:
        checks.append(Check("model", lambda: in_loop(engine.local(profile, limit_s / 2)), ALL))
    return checks
