"""`ghostvis ARGS` in this process, with its streams caught: for real processes see tests/commands/processes.py."""

from typing import Any

from typer.testing import CliRunner, Result

from ghostvis_cli.cli.app import build


def invoke(*args: object, **options: Any) -> Result:
    return CliRunner().invoke(build(), [str(arg) for arg in args], prog_name="ghostvis", **options)
