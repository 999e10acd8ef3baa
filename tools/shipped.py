"""The man page and the shells' completions below share/, made of the commands' own help: `make docs` writes them.

The wheel installs them below the environment's prefix, where man, bash, zsh and fish look. A test compares them.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typer._completion_shared import get_completion_script

from tools.option_tables import DOCS, command, flags, names

SHARE = Path(__file__).parents[1] / "share"
COMPLETIONS = {
    "bash": "bash-completion/completions/ghostvis",
    "zsh": "zsh/site-functions/_ghostvis",
    "fish": "fish/vendor_completions.d/ghostvis.fish",
}
EXIT_CODE = re.compile(r"^\| (\d+) \| ([^|]+) \|", re.MULTILINE)


def files() -> Mapping[str, str]:
    """Path below share/ -> content."""
    return {
        "man/man1/ghostvis.1": man_page(),
        **{path: completion(shell) for shell, path in COMPLETIONS.items()},
    }


def completion(shell: str) -> str:
    script = get_completion_script(prog_name="ghostvis", complete_var="_GHOSTVIS_COMPLETE", shell=shell)
    # A file of zsh's is the body of a function: the first time it is called it must complete, too.
    return f"{script}\n" + ('\n_ghostvis_completion "$@"\n' if shell == "zsh" else "")


def man_page() -> str:
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from ('.TH GHOSTVIS 1 "" "ghostvis" "User Commands"', ".SH NAME")
    yield "ghostvis \\- run, serve, convert and measure GhostVis and nanochat models"
    yield from (".SH SYNOPSIS", ".B ghostvis", ".I COMMAND", "[\\fIOPTION\\fR]... [\\fIARGUMENT\\fR]...")
    yield ".SH COMMANDS"
    for name in names():
        yield from (f".SS ghostvis {_text(name)}", _text(command(name).help or ""))
        for option in command(name).params:
            if option.opts[0].startswith("--"):
                yield from (".TP", f"\\fB{_text(', '.join(flags(option)))}\\fR", _text(option.help or ""))
    yield ".SH EXIT STATUS"
    for code, meaning in EXIT_CODE.findall((DOCS / "exit-codes.md").read_text(encoding="utf-8")):
        yield from (".TP", f"\\fB{code}\\fR", _text(meaning.replace("`", "")))
    yield from (".SH SEE ALSO", "ghostvis COMMAND --help; the project's docs folder")


def _text(text: Any) -> str:
    """One line as roff reads it: no escapes, no request at its beginning, hyphens that can be copied."""
    line = " ".join(str(text).split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{line}" if line[:1] in (".", "'") else line


if __name__ == "__main__":
    for name, content in files().items():
        path = SHARE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
