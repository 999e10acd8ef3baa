"""`ghostvis profile`: named settings, what they come to, and where each value is from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghostvis_cli.cli import options, output
from ghostvis_cli.cli.options import option
from ghostvis_cli.errors import UsageError
from ghostvis_cli.version import SCHEMA_VERSION

if TYPE_CHECKING:
    from ghostvis_cli.profile.files import Library, Stored

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Named settings: list, show, check and begin them.",
    epilog="Settings: flag > GHOSTVIS_* environment > profile > default. See docs/profiles.md.",
)
Name = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="The profile; else what a run here would use.")
]


@app.command("list")
@options.takes(options.JSON)
def list_profiles(*, json: bool) -> None:
    """The profiles this directory sees, and where each is kept."""
    library = _library()
    records = _records(library)
    output.notices(dict.fromkeys(library.notices))
    if json:
        output.record({"schema_version": SCHEMA_VERSION, "profiles": records})
        return
    output.table(("NAME", "WHERE", "DESCRIPTION"), [_row(record) for record in records])


@app.command("show")
@options.takes(
    option(bool, "--origin", "Say behind each value where it is from."), options.PROFILE, options.JSON
)
def show_profile(
    name: Name = None, *, origin: bool, profile: str | None, sets: list[str] | None, json: bool
) -> None:
    """Every setting as a run would get it, secrets left out."""
    from ghostvis_cli.profile import resolve
    from ghostvis_cli.profile.show import as_record, as_yaml

    if name and profile:
        raise UsageError("the profile is named twice", hint=f"ghostvis profile show {name}")
    resolved = resolve(name or profile, sets=sets or ())
    output.notices(resolved.notices)
    for file in resolved.files:
        output.detail(f"settings from {file}")
    if json:
        output.record({"schema_version": SCHEMA_VERSION, **as_record(resolved)})
        return
    output.answer(as_yaml(resolved, origin=origin))


@app.command("path")
@options.takes()
def path_of_profile(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The profile; else the directory.")
    ] = None,
) -> None:
    """The file of a profile, or the directory for your own."""
    from ghostvis_cli.profile.resolve import choose

    library = _library()
    if name is not None:
        output.answer(f"{choose(library, name).path}\n")
        return
    if library.user_dir is None:
        raise UsageError("there is no home directory", hint="export GHOSTVIS_CONFIG_DIR=DIR")
    if library.project is not None:
        output.detail(f"the project's profiles are in {library.project}")
    output.answer(f"{library.user_dir}\n")


@app.command("validate")
@options.takes(options.JSON)
def validate_profiles(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Else every profile found.")] = None,
    *,
    json: bool,
) -> None:
    """Find every fault of the profiles; exit code 2 if there is one."""
    from ghostvis_cli.profile.document import refuse
    from ghostvis_cli.profile.manage import validate

    report = validate(file)
    output.notices(report.notices)
    for stored in report.profiles:
        output.detail(f"checked {stored.name} ({_where(stored)})")
    refuse(list(report.faults))
    if json:
        checked = [{"name": stored.name, "path": str(stored.path)} for stored in report.profiles]
        output.record({"schema_version": SCHEMA_VERSION, "profiles": checked})
        return
    output.notice(f"no faults in {len(report.profiles)} profiles")


@app.command("init")
@options.takes(
    option(bool, "--project", "A ghostvis.yaml here, for everyone."),
    option(str, "--extends NAME", "Profile to inherit from."),
    option(bool, "--force", "Replace the file that is there."),
)
def begin_profile(
    name: Annotated[str, typer.Argument(help="Letters, digits and . _ -")],
    *,
    project: bool,
    extends: str | None,
    force: bool,
) -> None:
    """Write a profile with every setting explained, and print its path."""
    from ghostvis_cli.profile.manage import begin

    output.answer(f"{begin(name, project=project, extends=extends, force=force)}\n")


def _library() -> "Library":
    import os

    from ghostvis_cli.profile.files import Library

    return Library(os.environ)


def _records(library: "Library") -> list[dict[str, Any]]:
    """One for each profile found; `hidden` where a nearer place has the name too."""
    seen: set[str] = set()
    records = []
    for stored in library.all():
        records.append(
            {
                "name": stored.name,
                "place": stored.place,
                "path": str(stored.path),
                "where": _where(stored),
                "description": stored.description,
                "hidden": stored.name in seen,
                "faults": [str(fault) for fault in stored.faults],
            }
        )
        seen.add(stored.name)
    return records


def _row(record: dict[str, Any]) -> tuple[str, str, str]:
    description = " ".join(record["description"].split())
    if record["faults"]:
        description = "not usable: ghostvis profile validate"
    if record["hidden"]:
        description = f"(hidden by the one above) {description}"
    return (record["name"], record["where"], description)


def _where(stored: "Stored") -> str:
    return stored.place if stored.place == "built-in" else stored.shown
