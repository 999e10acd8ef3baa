"""Every program of this folder, one after the other, each as it runs without arguments.

    python -m benchmarks

Minutes. Ends with 1 if one of them failed.
"""

import subprocess
import sys
from pathlib import Path

MARK = 'if __name__ == "__main__":'
FIRST = ("startup", "demo_run")  # of seconds each; the others take minutes
NOT_ALONE = ("gpu", "gpu_sglang", "sglang_soak", "web_chat")  # they need CUDA, a server that runs, a browser


def programs() -> list[str]:
    found = [file.stem for file in sorted(Path(__file__).parent.glob("*.py")) if MARK in file.read_text()]
    found = [name for name in found if name != "__main__" and name not in NOT_ALONE]
    return sorted(found, key=lambda name: name not in FIRST)


def main() -> int:
    failed = []
    for name in programs():
        print(f"# {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
        print(flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
