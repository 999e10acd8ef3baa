"""`ghostvis convert` on a synthetic checkpoint of 2 GB: time, peak memory, twenty kills, and verification by layer.

    python -m benchmarks.convert [--kills 20] [--layers 20] [--folder DIR] [--whole]

The checkpoint is a d20 of random weights (format specification, section 2.2). Time is compared with `cp` and
`sha256sum` of the same file, both from a warm cache; the conversion reads and hashes the input, writes, hashes and
syncs the output. Target: at most twice as long, and at most 1.5 GB and the largest tensor of memory. A kill is a
SIGKILL at a random moment of a run that replaces an earlier conversion; what must be there after it is that one or
the new one, whole. A verification layer by layer must pass in the memory that it tells beforehand; with `--whole`
the whole-model one, which takes 4 GB, is shown beside it. Exit 1 where one of these does not hold.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import file_digest
from multiprocessing import get_context
from pathlib import Path

from benchmarks.report import Spread, machine, parser_of
from ghostvis_cli import demo

GHOSTVIS = Path(sys.executable).with_name("ghostvis")
WIDTH, HEADS, KV_HEADS, MLP, VOCABULARY = 1280, 10, 5, 3456, 65536
CHECKPOINT = "model_000001.pt"
LIMIT_RATIO, LIMIT_BYTES = 2.0, 1.5e9
RUNS = 3


def make_checkpoint(folder: Path, layers: int) -> None:
    import torch

    torch.manual_seed(0)
    kv = WIDTH // HEADS * KV_HEADS
    state = {
        "transformer.wte.weight": torch.randn(VOCABULARY, WIDTH).bfloat16(),
        "lm_head.weight": torch.randn(VOCABULARY, WIDTH) * 0.02,
    }
    shapes = {"attn.c_q": (WIDTH, WIDTH), "attn.c_k": (kv, WIDTH), "attn.c_v": (kv, WIDTH)}
    shapes |= {"attn.c_proj": (WIDTH, WIDTH), "mlp.c_gate": (MLP, WIDTH), "mlp.c_up": (MLP, WIDTH)}
    shapes |= {"mlp.c_proj": (WIDTH, MLP)}
    for layer in range(layers):
        for name, shape in shapes.items():
            state[f"transformer.h.{layer}.{name}.weight"] = torch.randn(shape) * 0.02
    torch.save(state, folder / CHECKPOINT)
    config = {"sequence_len": 2048, "vocab_size": VOCABULARY, "n_head": HEADS, "n_kv_head": KV_HEADS}
    (folder / "meta_000001.json").write_text(json.dumps({"step": 1, "model_config": config}))
    shutil.copy(demo.BASE_DIR / "tokenizer" / "tokenizer.pkl", folder)


def convert(checkpoint: Path, out: Path, *options: str) -> list[str]:
    arguments = [str(checkpoint), "--out", str(out), "--no-verify", "--quiet", *options]
    return [str(GHOSTVIS), "convert", *arguments]


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of one process that must succeed."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(checkpoint: Path, folder: Path) -> bool:
    """Plain copies and conversions in turn, so that whatever else the machine does meets both."""
    copy_s: list[float] = []
    same_s: list[float] = []
    half_s: list[float] = []
    peaks: list[int] = []
    for _ in range(RUNS):
        copied = folder / "copy.pt"
        copy_s.append(
            timed(["cp", str(checkpoint), str(copied)])[0] + timed(["sha256sum", str(checkpoint)])[0]
        )
        copied.unlink()
        for dtype, seconds in (("float32", same_s), ("bfloat16", half_s)):
            out = folder / dtype
            took_s, peak = timed(convert(checkpoint, out, "--dtype", dtype))
            seconds.append(took_s)
            peaks.append(peak)
            shutil.rmtree(out)
    largest = 4 * VOCABULARY * WIDTH
    ratio = Spread.of(same_s).median / Spread.of(copy_s).median
    print(f"cp and sha256sum: {Spread.of(copy_s).show(2, ' s')}")
    print(
        f"convert to float32: {Spread.of(same_s).show(2, ' s')}, {ratio:.2f} times as long; limit {LIMIT_RATIO}"
    )
    print(f"convert to bfloat16: {Spread.of(half_s).show(2, ' s')}")
    limit = LIMIT_BYTES + largest
    print(f"peak memory: {max(peaks) / 1e9:.2f} GB; limit {limit / 1e9:.2f} GB", flush=True)
    return ratio <= LIMIT_RATIO and max(peaks) <= limit


def verify(checkpoint: Path, folder: Path, *, whole: bool) -> bool:
    """Peak of one process that converts and verifies."""
    from ghostvis_cli.checkpoint import load, locate
    from ghostvis_cli.convert.memory import verification_bytes, verification_bytes_by_layer

    model = load.inspect(locate.from_path(checkpoint))
    ways = [("by layer", ["--verify-by-layer"], verification_bytes_by_layer(model.config, model.parameters))]
    if whole:
        ways.append(("whole", ["--verify"], verification_bytes(model.config, model.parameters)))
    kept = True
    for way, options, limit in ways:
        for dtype in ("float32", "bfloat16"):
            out = folder / "verified"
            command = [str(GHOSTVIS), "convert", str(checkpoint), "--out", str(out), "--quiet", *options]
            took_s, peak = timed([*command, "--dtype", dtype])
            figures = json.loads((out / "parity.json").read_text())["verification"]
            values = ", ".join(f"{check['name']} {check['value']:.2g}" for check in figures["checks"][4:7])
            shutil.rmtree(out)
            print(
                f"verified {way} as {dtype}: {took_s:.0f} s with the conversion, peak {peak / 1e9:.2f} GB; ",
                end="",
            )
            print(f"limit {limit / 1e9:.2f} GB; {values}", flush=True)
            kept &= peak <= limit and figures["passed"]
    return kept


def state_of(out: Path) -> str:
    """The dtype of a whole conversion; SystemExit where a file is missing or differs from its hash."""
    certificate = json.loads((out / "parity.json").read_text())
    for name, digest in certificate["outputs"].items():
        with (out / name).open("rb") as file:
            if file_digest(file, "sha256").hexdigest() != digest:
                raise SystemExit(f"{out / name} is not what the certificate says")
    return str(certificate["dtype"])


def kill(checkpoint: Path, folder: Path, kills: int) -> None:
    """Replace a conversion by one of the other 16-bit type, again and again, and never let it end in peace."""
    out, moments = folder / "out", random.Random(0)
    length_s, _ = timed(convert(checkpoint, out, "--dtype", "bfloat16"))
    replaced, struck = 0, 0
    for _ in range(kills):
        before = state_of(out)
        other = "float16" if before == "bfloat16" else "bfloat16"
        process = subprocess.Popen(convert(checkpoint, out, "--force", "--dtype", other))
        try:
            process.wait(moments.uniform(0, 1.3 * length_s))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            struck += 1
        replaced += state_of(out) == other
        left = [entry.name for entry in folder.iterdir() if entry.name.startswith(".out.")]
        if len(left) > 1:
            raise SystemExit(f"killed runs pile up: {left}")
    timed(convert(checkpoint, out, "--force"))
    left = [entry.name for entry in folder.iterdir() if entry.name.startswith(".out.")]
    print(
        f"{kills} runs, {struck} of them killed: {replaced} left the new state, the others the old one, whole"
    )
    print(f"left over after the next run: {left or 'nothing'}", flush=True)
    if left:
        raise SystemExit(1)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where 8 GB fit (default: the temporary directory)")
    parser.add_argument("--whole", action="store_true", help="verify the whole model too")
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        # Not in this process: a child's peak memory, as the system counts it, begins with its parent's.
        maker = get_context("spawn").Process(target=make_checkpoint, args=(folder, arguments.layers))
        maker.start()
        maker.join()
        checkpoint = folder / CHECKPOINT
        print(f"checkpoint: {checkpoint.stat().st_size / 1e9:.2f} GB", flush=True)
        kept = measure(checkpoint, folder)
        kept &= verify(checkpoint, folder, whole=arguments.whole)
        kill(checkpoint, folder, arguments.kills)
    if not kept:
        raise SystemExit("a limit was exceeded")


if __name__ == "__main__":
    main()
