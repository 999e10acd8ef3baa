"""Makes docs/terminal.svg: runs real commands and draws what they print.

python -m tools.terminal_image
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

FOLDER = Path("ghostvis_cli/demo")
COMMANDS = (
    'ghostvis generate -i three-shapes.jpg "What is in this picture?" --stats',
    'ghostvis generate -q -i two-circles-striped.png "Which is larger?" "Where is the purple one?"',
    "ghostvis generate -q -i red-circle.png 'Is there a star?' --json | jq -c '.text, .usage'",
    "ghostvis generate --source sft --model-tag d32 Hello",
)
TARGET = Path("docs/terminal.svg")


def main() -> None:
    console = Console(record=True, width=108, file=sys.stderr, force_terminal=True)
    for command in COMMANDS:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        done = subprocess.run(
            [
                "bash",
                "-c",
                command.replace("ghostvis", _executable(), 1).replace(
                    "generate", "generate --color always", 1
                ),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=FOLDER,
            env=os.environ | {"HOME": "/home/ada", "GHOSTVIS_TEMPERATURE": "0"},
        )
        console.print(Text.from_ansi(_merged(done)))
        console.print()
    svg = console.export_svg(title="ghostvis", theme=MONOKAI)
    # Fonts from elsewhere would be a request whenever somebody looks at the page.
    TARGET.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


def _executable() -> str:
    return shlex.quote(str(Path(sys.executable).with_name("ghostvis").absolute()))


def _merged(done: "subprocess.CompletedProcess[str]") -> str:
    return (done.stdout + done.stderr).rstrip("\n")


if __name__ == "__main__":
    main()
