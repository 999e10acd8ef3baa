"""A server under images that are ever new, with clients that are killed: does anything grow, is anything left?

    python -m benchmarks.sglang_soak --url http://127.0.0.1:30000 [--seconds 300] [--in-flight 64] [--killed 10]

Each client sends an image that nobody sent before and reads the streamed answer; one in --killed closes its
connection after the first piece. Every 10 s: memory (RSS) of each process of the server, files in /dev/shm,
answers.
At the end, with nothing in flight: what SGLang still counts as running, and how much each process grew since the
first third was over, by when caches and pools are full.
"""

import asyncio
import base64
import io
import json
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.report import parser_of
from ghostvis_cli.processor_use import listeners, local_port, with_children

MIB = 2**20
LOOK_S, QUIET_S = 10.0, 8.0
DRAWING = 4  # processes that make images


@dataclass
class Counts:
    whole: int = 0
    killed: int = 0
    failed: dict[str, int] = field(default_factory=dict)


def image(number: int) -> str:
    """A small JPEG that no other number has."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((512, 384)).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


async def client(
    url: str, numbers: "asyncio.Queue[int]", until_s: float, killed: int, counts: Counts, drawing: Executor
) -> None:
    host, port = urlsplit(url).hostname, local_port(url)
    while time.monotonic() < until_s:
        number = await numbers.get()
        numbers.put_nowait(number + 1)
        drawn = await asyncio.get_running_loop().run_in_executor(drawing, image, number)
        content = [{"type": "image_url", "image_url": {"url": drawn}}]
        content.append({"type": "text", "text": "What is in this picture?"})
        asked = {"model": "x", "stream": True, "max_tokens": 16, "ignore_eos": True, "temperature": 0}
        body = json.dumps({**asked, "messages": [{"role": "user", "content": content}]}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        )
        try:
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            status = await reader.readline()
            if number % killed == 0:
                await reader.readuntil(b"data:")
                writer.transport.abort()
                counts.killed += 1
                continue
            answer = await reader.read()
            writer.close()
            what = None if b"[DONE]" in answer else status.decode().strip() or "no answer"
        except (OSError, asyncio.IncompleteReadError) as error:
            what = type(error).__name__
        if what is None:
            counts.whole += 1
        else:
            counts.failed[what] = counts.failed.get(what, 0) + 1


def memory(pids: list[int]) -> dict[int, float]:
    """Resident MiB by process."""
    found = {}
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        rss = [line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")]
        found[pid] = int(rss[0]) / 1024 if rss else 0.0
    return found


def shared() -> int:
    return len(list(Path("/dev/shm").iterdir()))


async def watch(pids: list[int], seconds: float, counts: Counts) -> list[dict[int, float]]:
    looks, started_s = [], time.monotonic()
    while time.monotonic() - started_s < seconds:
        await asyncio.sleep(min(LOOK_S, seconds / 12))
        looks.append(memory(pids))
        now = ", ".join(f"{mib:.0f}" for mib in looks[-1].values())
        print(
            f"{time.monotonic() - started_s:6.0f} s: {now} MiB; {shared()} in /dev/shm; {counts}", flush=True
        )
    return looks


async def soak(url: str, seconds: float, in_flight: int = 64, killed: int = 10) -> None:
    port = local_port(url)
    assert port is not None, "a server of this machine"
    pids, before, counts = with_children(listeners(port)), shared(), Counts()
    numbers: asyncio.Queue[int] = asyncio.Queue()
    numbers.put_nowait(int(time.time()) * 1000)
    until_s = time.monotonic() + seconds
    watching = asyncio.create_task(watch(pids, seconds, counts))
    with ProcessPoolExecutor(DRAWING, mp_context=get_context("spawn")) as drawing:
        asked = (client(url, numbers, until_s, killed, counts, drawing) for _ in range(in_flight))
        await asyncio.gather(*asked)
    looks = await watching
    await asyncio.sleep(QUIET_S)
    print(f"{counts}; /dev/shm {before} before, {shared()} after; running: {await running(url)}")
    early, late = looks[len(looks) // 3], memory(pids)
    print(
        "growth since a third of it, MiB:",
        {pid: round(late[pid] - early[pid], 1) for pid in late if pid in early},
    )


async def running(url: str) -> Any:
    import httpx2

    async with httpx2.AsyncClient(trust_env=False, timeout=30) as asking:
        text = (await asking.get(f"{url}/metrics")).text
    lines = [
        line
        for line in text.splitlines()
        if line.startswith(("sglang:num_running_reqs", "sglang:num_queue_reqs"))
    ]
    return [line.rpartition(" ")[2] for line in lines]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--killed", type=int, default=10, help="one client in so many")
    given = parser.parse_args()
    asyncio.run(soak(given.url, given.seconds, given.in_flight, given.killed))


if __name__ == "__main__":
    main()
