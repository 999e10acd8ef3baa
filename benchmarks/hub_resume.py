"""A model of 2 GB from a hub on this machine, interrupted ten times and finished: what is sent twice, and left.

    python -m benchmarks.hub_resume [--gigabytes 2] [--interruptions 10]

Every second interruption kills the process (SIGKILL), the others end the connection, each after a tenth of it.
The file is sparse and holds no model: what counts is that it arrives whole. Ends with 1 where it does not, where
more than a twentieth was sent twice, or where anything is left beside it.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import machine
from tests.hubs import Hub, Repository, running

GHOSTVIS = Path(sys.executable).with_name("ghostvis")
NAME, FILE = "owner/large", "model_000001.pt"
MOST_TWICE = 1.05
PATIENCE_S = 300.0


def repository(folder: Path, size: int) -> Repository:
    folder.mkdir()
    with (folder / FILE).open("wb") as file:
        file.truncate(size)
    with (folder / FILE).open("rb") as file:
        (folder / f".{FILE}.sha256").write_text(hashlib.file_digest(file, "sha256").hexdigest())
    (folder / "meta_000001.json").write_text("{}")
    return Repository(folder)


def download(hub: Hub, home: Path) -> "subprocess.Popen[bytes]":
    """The cheapest command that needs the file. It ends with 4, since the file holds no model."""
    command = [str(GHOSTVIS), "convert", "--dry-run", "--hf", NAME]
    env = os.environ | hub.env | {"HF_HOME": str(home)}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def interrupted(hub: Hub, home: Path, size: int, interruptions: int) -> None:
    share = size // (interruptions + 1)
    hub.cut_after = lambda: share
    for _ in range(interruptions // 2):
        before = hub.sent_bytes
        with download(hub, home) as process:
            deadline = time.monotonic() + PATIENCE_S
            while hub.sent_bytes < before + share * 3 // 2 and time.monotonic() < deadline:
                time.sleep(0.01)  # a cut at one share, and half a share after that
            process.kill()
    hub.cut_after = lambda: None
    download(hub, home).wait(PATIENCE_S)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--interruptions", type=int, default=10)
    args = parser.parse_args()
    size = int(args.gigabytes * 10**9)
    print(machine())
    with tempfile.TemporaryDirectory() as place, running() as hub:
        hub.repositories[NAME] = repository(Path(place, "served"), size)
        home = Path(place, "hf")
        began_s = time.monotonic()
        interrupted(hub, home, size, args.interruptions)
        took_s = time.monotonic() - began_s
        blobs = [path for path in home.rglob("blobs/*") if path.stat().st_size > size // 100]
        whole = [hashlib.file_digest(path.open("rb"), "sha256").hexdigest() == path.name for path in blobs]
        continued = sum(asked is not None and asked != "bytes=0-" for _, _, asked in hub.asked)
        print(
            f"{size / 1e9:g} GB, {args.interruptions} interruptions, continued {continued} times: {took_s:.1f} s"
        )
        print(
            f"sent {hub.sent_bytes / size:.3f} times its size; files left: {len(blobs)}, whole: {all(whole)}"
        )
        return int(not (whole == [True] and hub.sent_bytes < MOST_TWICE * size))


if __name__ == "__main__":
    sys.exit(main())
