"""Speed of nanochat's newest generation (n7) against its oldest (n1) of the same size, on the same machine.

    python -m benchmarks.generations [--repeats 5] [--sizes d6 d12]
    .venv-sglang/bin/python -m benchmarks.generations --sglang [--sizes d12] [-- SGLANG FLAGS]

Random weights in nanochat's shapes (width 64 a layer, heads of 128, windows SSSL of 2048). The two take turns in
each repeat, and what is reported is the ratio of the pair: n7 has more to do (value embeddings, smear), and less
where windows bite. Target: n7 keeps 0.85 of n1's rate. With --sglang both are converted and served side by side, on
a CUDA device where there is one, and asked for the same answers; memory is what SGLang says the weights take.
"""

import json
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims import server
from benchmarks.decode import SIZES, Ours, Worker, random_model
from benchmarks.report import Spread, machine, parser_of
from ghostvis_cli import demo
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.generations import windows
from ghostvis_cli.convert import run
from ghostvis_cli.convert.plan import ConvertSettings, make_plan
from ghostvis_cli.model.config import DecoderConfig
from ghostvis_cli.model.generations import N7, PLAIN, Generation

TARGET = 0.85
SEQUENCE_LEN, PATTERN, HEAD_DIM = 2048, "SSSL", 128
VOCABULARIES = {6: 8192, 12: 32768, 20: 32768, 24: 32768}
MEMORY_SHARE = "0.4"  # of a device, for each of two servers


def config(depth: int, generation: Generation) -> DecoderConfig:
    width = -(-64 * depth // HEAD_DIM) * HEAD_DIM
    heads = width // HEAD_DIM
    short = generation.short_window(SEQUENCE_LEN)
    return DecoderConfig(
        SEQUENCE_LEN,
        VOCABULARIES[depth],
        depth,
        heads,
        heads,
        width,
        4 * width,
        "relu2",
        rope_theta=generation.rotary_base,
        generation=generation,
        qk_scale=generation.qk_scale,
        gate_scale=generation.gate_scale,
        windows=windows(PATTERN, depth, short, SEQUENCE_LEN) if generation.windows else (),
    )


class Local(Ours):
    """`size` is a depth and a generation: d12-n7."""

    def __init__(self, size: str) -> None:
        SIZES[size] = _named(size)
        super().__init__(size)

    def run(self, batch: int, new_tokens: int) -> float:
        if new_tokens > 1:
            return super().run(batch, new_tokens)
        started = time.perf_counter()
        for _ in range(8):
            super().run(batch, 1)
        return time.perf_counter() - started


def _named(size: str) -> DecoderConfig:
    depth, name = size.split("-")
    return config(int(depth[1:]), {"n1": PLAIN, "n7": N7}[name])


def measure_local(size: str, repeats: int) -> bool:
    new, old = Worker(Local, f"{size}-n7"), Worker(Local, f"{size}-n1")
    good = True
    for batch, tokens, what in (
        (1, 48, "decoding, batch 1"),
        (8, 48, "decoding, batch 8"),
        (16, 1, "reading prompts"),
    ):
        for worker in (new, old):
            worker.run(batch, tokens)
        pairs = [(new.run(batch, tokens), old.run(batch, tokens)) for _ in range(repeats)]
        ratio = Spread.of([b / a for a, b in pairs])
        rates = [Spread.of([batch * tokens / pair[i] for pair in pairs]).median for i in (0, 1)]
        good &= ratio.median >= TARGET
        speeds = f"n7 {rates[0]:.0f}, n1 {rates[1]:.0f} tok/s; " if tokens > 1 else ""
        print(f"{size}, local, {what}: {speeds}n7 to n1 {ratio.show()}", flush=True)
    for worker in (new, old):
        worker.close()
    return good


def write(place: Path, depth: int, generation: Generation) -> Path:
    """A checkpoint in nanochat's format."""
    wanted = config(depth, generation)
    torch.manual_seed(0)
    directory = place / generation.name
    directory.mkdir()
    torch.save(dict(_tensors(wanted)), directory / "model_000001.pt")
    meta: dict[str, Any] = {
        "sequence_len": SEQUENCE_LEN,
        "vocab_size": wanted.vocab_size,
        "n_head": wanted.n_head,
        "n_kv_head": wanted.n_kv_head,
    }
    if generation.windows:
        meta["window_pattern"] = PATTERN
    (directory / "meta_000001.json").write_text(json.dumps({"model_config": meta}))
    (directory / "tokenizer.pkl").write_bytes((demo.BASE_DIR / "tokenizer" / "tokenizer.pkl").read_bytes())
    return directory


def converted(checkpoint: Path, dtype: str) -> Path:
    """Its directory for SGLang, not compared: what is measured is speed."""
    place = checkpoint.with_name(f"{checkpoint.name}-converted")
    settings = ConvertSettings(dtype=dtype, verify=False)  # type: ignore[arg-type]
    plan = make_plan(locate.from_path(checkpoint), settings)
    run.run(plan, place, run.Progress(plan.weights_bytes))
    return place


def _tensors(config: DecoderConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of our own random decoder, under the file's names."""
    state = random_model(config).decoder.state_dict()
    kv = config.kv_width
    for name in [name for name in state if name.startswith(("resid_", "x0_", "smear_", "backout_"))]:
        yield name, state[name]
    yield "transformer.wte.weight", state["wte.weight"].bfloat16()
    yield "lm_head.weight", state["lm_head.weight"]
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        qkv = state[f"{ours}.attn.qkv.weight"].split([config.n_embd, kv, kv])
        for key, tensor in zip("qkv", qkv, strict=True):
            yield f"{theirs}.attn.c_{key}.weight", tensor.clone()
        yield f"{theirs}.attn.c_proj.weight", state[f"{ours}.attn.proj.weight"]
        yield f"{theirs}.mlp.c_fc.weight", state[f"{ours}.mlp.up.weight"]
        yield f"{theirs}.mlp.c_proj.weight", state[f"{ours}.mlp.down.weight"]
    for i, layer in enumerate(config.value_layers):
        yield f"transformer.h.{layer}.attn.ve_gate.weight", state[f"blocks.{layer}.attn.gate.weight"]
        yield f"value_embeds.{layer}.weight", state[f"values.{i}.weight"].bfloat16()


def ask(url: str, batch: int, prompt_tokens: int, new_tokens: int, seed: int) -> float:
    """Seconds for `batch` answers at once, to prompts that nobody has asked before."""

    def one(row: int) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + row)
        ids = torch.randint(300, 900, (prompt_tokens,), generator=generator).tolist()
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        body = json.dumps({"input_ids": ids, "sampling_params": sampling}).encode()
        request = urllib.request.Request(f"{url}/generate", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            assert len(json.load(answer)["output_ids"]) == new_tokens

    started = time.perf_counter()
    with ThreadPoolExecutor(batch) as pool:
        list(pool.map(one, range(batch)))
    return time.perf_counter() - started


def measure_sglang(size: str, repeats: int, flags: Sequence[str]) -> bool:
    cuda = torch.cuda.is_available()
    options = ["--gpu-memory-utilization", MEMORY_SHARE] if cuda else ["--device", "cpu"]
    good = True
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        place, urls = Path(folder), {}
        for generation in (N7, PLAIN):
            checkpoint = write(place, int(size[1:]), generation)
            model = ["--checkpoint-path", str(converted(checkpoint, "bfloat16" if cuda else "float32"))]
            log = place / f"{generation.name}.log"
            urls[generation.name] = running.enter_context(server(model, log, *options, flags=flags))
            for line in re.findall(r"Load weight end.*|KV Cache is allocated.*", log.read_text()):
                print(f"{size}, SGLang, {generation.name}: {line}", flush=True)
        for batch, prompt, tokens in ((1, 32, 64), (8, 32, 64), (8, 1024, 64), (32, 32, 128)):
            for url in urls.values():
                ask(url, batch, prompt, tokens, seed=999)
            pairs = [
                tuple(ask(url, batch, prompt, tokens, seed=batch + repeat) for url in urls.values())
                for repeat in range(repeats)
            ]
            ratio = Spread.of([b / a for a, b in pairs])
            rate = Spread.of([batch * tokens / a for a, _ in pairs])
            good &= ratio.median >= TARGET
            print(
                f"{size}, SGLang, {batch} at once, {prompt} ids in, {tokens} out: "
                f"n7 {rate.median:.0f} tok/s; n7 to n1 {ratio.show()}",
                flush=True,
            )
    return good


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["d6"], choices=[f"d{depth}" for depth in VOCABULARIES])
    parser.add_argument("--sglang", action="store_true")
    split = [*sys.argv, "--"].index("--")
    given, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    print(f"{machine()}; target {TARGET}", flush=True)
    measured = [
        measure_sglang(size, given.repeats, flags) if given.sglang else measure_local(size, given.repeats)
        for size in given.sizes
    ]
    print("every ratio meets the target" if all(measured) else "not every ratio meets the target")
    return 0


if __name__ == "__main__":
    sys.exit(main())
