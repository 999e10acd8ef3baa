"""Installs what dist/ holds into fresh environments of each Python: `make dist`, before a release.

    python -m tools.try_wheel --pythons python3.11 python3.13 --extras core local serve

The wheel with each extra, the sdist with the last of them. For each: pip's own check is silent, the command starts
and lists models, man page and completions are there. Ends with 1 if one fails.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = ("man/man1/ghostvis.1", "bash-completion/completions/ghostvis", "zsh/site-functions/_ghostvis")


def tried(python: str, extra: str, built: Path) -> str:
    """What is wrong; empty where nothing is."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "venv")
        named = f"{built}[{extra}]" if extra != "core" else str(built)
        pip = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        for command in (
            [python, "-m", "venv", str(place)],
            [*pip, "install", "--quiet", "-c", str(ROOT / "constraints.txt"), named],
            [*pip, "check"],
            [str(place / "bin" / "ghostvis"), "--version"],
            [str(place / "bin" / "ghostvis"), "models", "--quiet"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{' '.join(command[-2:])}: {(done.stderr or done.stdout)[-300:]}"
        missing = [name for name in SHIPPED if not (place / "share" / name).is_file()]
        return f"no share/{missing[0]}" if missing else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pythons", nargs="+", default=[sys.executable])
    parser.add_argument("--extras", nargs="+", default=["core"])
    args = parser.parse_args()
    ((wheel,), (sdist,)) = ((ROOT / "dist").glob(name) for name in ("*.whl", "*.tar.gz"))
    failed = False
    for python in args.pythons:
        for built, extra in [*((wheel, extra) for extra in args.extras), (sdist, args.extras[-1])]:
            fault = tried(python, extra, built)
            failed = failed or bool(fault)
            print(f"{python} {built.name} [{extra}] {fault or 'ok'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
