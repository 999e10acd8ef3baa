"""`ghostvis doctor`: what is installed, what would run, and whether it does; each finding with its fix."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from ghostvis_cli.cli import options, output
from ghostvis_cli.cli.options import option
from ghostvis_cli.errors import ExitCode, UsageError
from ghostvis_cli.version import SCHEMA_VERSION

if TYPE_CHECKING:
    from ghostvis_cli.doctor import Finding
    from ghostvis_cli.profile import Resolved

app = typer.Typer(rich_markup_mode=None)
# Status -> its word, and the colour of that word on a terminal.
MARKS = {"ok": ("ok", "32"), "note": ("note", "2"), "warning": ("warn", "33"), "error": ("FAIL", "31")}
EXAMPLES = """Examples:

  ghostvis doctor

  ghostvis doctor --base-url http://gpu-1:30000

  ghostvis doctor --profile lab --no-run --json
"""


@app.command(epilog=EXAMPLES)
@options.takes(
    option(bool, "--run/--no-run", "Ask the model for text and about an image.", default=True),
    option(float, "--time-limit SECONDS", "For everything together.", default=60.0, min=1, max=86_400),
    options.MODEL,
    options.ANY_ENGINE,
    options.PROFILE,
    options.JSON,
)
def doctor(ctx: typer.Context, *, run: bool, time_limit: float, json: bool) -> None:
    """Examine this machine, the settings and the model or server. Exit code 9 when something is wrong."""
    from ghostvis_cli.doctor import diagnose

    findings = diagnose(_settings(ctx), run=run, limit_s=time_limit, on_crash=_tell_traceback)
    found = list(findings) if json else list(_shown(findings))
    errors = sum(finding.status == "error" for finding in found)
    if json:
        records = [asdict(finding) for finding in found]
        output.record({"schema_version": SCHEMA_VERSION, "ok": not errors, "findings": records})
    else:
        warnings = sum(finding.status == "warning" for finding in found)
        output.notice(f"{len(found)} findings, {errors} errors, {warnings} warnings")
    raise typer.Exit(ExitCode.CHECK_FAILED if errors else ExitCode.OK)


def _settings(ctx: typer.Context) -> "Resolved | UsageError":
    """The profile of this call. Its faults are findings, and must not end the examination."""
    from ghostvis_cli.profile.readers import heeded

    try:
        found = options.read_profile(ctx)
        return heeded(found, (found.profile.engine.chosen_kind,))
    except UsageError as error:
        return error


def _shown(findings: "Iterator[Finding]") -> "Iterator[Finding]":
    for finding in findings:
        mark, color = MARKS[finding.status]
        fix = f"; fix: {finding.fix}" if finding.fix and finding.status != "ok" else ""
        said = " ".join(f"{finding.message}{fix}".split())
        output.marked(f"{mark:<4}", color, f"  {finding.area:<11}  {finding.name:<11}  {said}")
        yield finding


def _tell_traceback(error: BaseException) -> None:
    if output.verbose():
        output.traceback(error)
