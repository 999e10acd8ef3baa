"""SGLang against the local engine on one CUDA device: the same answers in bfloat16, and what shared pictures save.

    python -m benchmarks.gpu_sglang [demo|d32] [-- SGLANG FLAGS]

d32 is a vision model of the real sizes (2.1 billion parameters, CLIP ViT-L/14 at 224 pixels) with random weights,
made here. Two servers share the device, with the radix cache and without, and are measured as in claims.py.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.claims import COMMAND, Amount, measure_caches, measure_engines, server
from benchmarks.report import machine
from ghostvis_cli import demo
from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.engines.base import Completion, GenerateRequest, Sampling, complete
from ghostvis_cli.images import EncodedImage, load_image
from ghostvis_cli.prompt import Message

MEMORY_SHARE = 0.35  # of the device, for each of the two servers
QUESTIONS = ("What is in this picture?", "How many shapes are there?", "Where is the red one?")
NEW_TOKENS = 32
# In flight: few enough that a picture is mostly known when the next question about it comes, and many.
AMOUNTS = (Amount(requests=40, concurrency=4, repeats=8), Amount(requests=100, concurrency=32, repeats=8))


@dataclass(frozen=True)
class Sizes:
    """Of a d32 vision model (format specification, 2.2)."""

    layers: int = 32
    width: int = 2048
    kv: int = 1024
    mlp: int = 5529
    vocabulary: int = 65536
    tower_layers: int = 24
    tower: int = 1024
    patches: int = 257
    proj: int = 2048

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        D, W, P = self.width, self.tower, self.proj
        yield "transformer.wte.weight", (self.vocabulary, D)
        yield "lm_head.weight", (self.vocabulary, D)
        for i in range(self.layers):
            for name, rows in {"c_q": D, "c_k": self.kv, "c_v": self.kv, "c_proj": D}.items():
                yield f"transformer.h.{i}.attn.{name}.weight", (rows, D)
            for name in ("c_q", "c_k", "c_v"):
                yield f"transformer.h.{i}.attn.{name}.bias", (self.kv if name != "c_q" else D,)
            yield f"transformer.h.{i}.mlp.c_gate.weight", (self.mlp, D)
            yield f"transformer.h.{i}.mlp.c_up.weight", (self.mlp, D)
            yield f"transformer.h.{i}.mlp.c_proj.weight", (D, self.mlp)
        root = "vision_encoder.encoder"
        yield f"{root}.embeddings.class_embedding", (W,)
        yield f"{root}.embeddings.patch_embedding.weight", (W, 3, 14, 14)
        yield f"{root}.embeddings.position_embedding.weight", (self.patches, W)
        for norm in ("pre_layrnorm", "post_layernorm"):
            yield from _both(f"{root}.{norm}", (W,))
        for i in range(self.tower_layers):
            layer = f"{root}.encoder.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield from _both(f"{layer}.self_attn.{name}", (W, W))
            for norm in ("layer_norm1", "layer_norm2"):
                yield from _both(f"{layer}.{norm}", (W,))
            yield from _both(f"{layer}.mlp.fc1", (4 * W, W))
            yield from _both(f"{layer}.mlp.fc2", (W, 4 * W))
        yield "vision_resampler.queries", (1, 64, W)
        for i in range(2):
            layer = f"vision_resampler.layers.{i}"
            for norm in ("norm1", "norm2"):
                yield from _both(f"{layer}.{norm}", (W,))
            yield f"{layer}.cross_attn.in_proj_weight", (3 * W, W)
            yield f"{layer}.cross_attn.in_proj_bias", (3 * W,)
            yield from _both(f"{layer}.cross_attn.out_proj", (W, W))
            yield from _both(f"{layer}.mlp.0", (4 * W, W))
            yield from _both(f"{layer}.mlp.2", (W, 4 * W))
        yield from _both("vision_projector.mlp.0", (P, W))
        yield from _both("vision_projector.mlp.3", (D, P))
        yield from _both("vision_projector.mlp.4", (D,))


def _both(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def make_d32(folder: Path) -> Checkpoint:
    """Random weights of a scale at which activations stay in range."""
    import torch

    torch.manual_seed(0)
    state = {}
    for name, shape in Sizes().shapes():
        if "norm" in name or name.startswith("vision_projector.mlp.4"):
            tensor = torch.full(shape, float(name.endswith("weight")), device="cuda")
        elif len(shape) == 1:
            tensor = torch.zeros(shape, device="cuda")
        else:
            fan_in = max(1, torch.Size(shape[1:]).numel())
            tensor = torch.randn(shape, device="cuda") * (1.0 if "wte" in name else fan_in**-0.5)
        state[name] = tensor.bfloat16().cpu()
    torch.save(state, folder / "model_000001.pt")
    config: dict[str, Any] = {"sequence_len": 2048, "vocab_size": 65536, "n_layer": 32, "n_head": 16}
    config |= {
        "n_kv_head": 8,
        "n_embd": 2048,
        "mlp_type": "swiglu",
        "rope_theta": 10000.0,
        "attention_bias": True,
    }
    config |= {"vision_encoder_name": "clip_vit_l14", "vision_encoder_heads": 16, "vision_image_size": 224}
    config |= {"vision_num_tokens": 64, "vision_resampler_mode": "perceiver", "vision_resampler_depth": 2}
    config |= {"vision_resampler_heads": 8, "vision_proj_hidden": 2048}
    meta = {"step": 1, "layout": "inline", "model_config": config}
    (folder / "meta_000001.json").write_text(json.dumps(meta))
    shutil.copy(demo.BASE_DIR / "tokenizer" / "tokenizer.pkl", folder)
    return locate.from_path(folder, None, folder)


def pictures() -> list[EncodedImage]:
    return [load_image(path) for path in sorted(demo.BASE_DIR.parent.glob("*.*g"))]


def requests(images: Sequence[EncodedImage]) -> list[GenerateRequest]:
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=5)
    return [
        GenerateRequest((Message.of("user", question, [image]),), sampling=sampling)
        for image in images
        for question in QUESTIONS
    ]


async def local_answers(checkpoint: Checkpoint, asked: Sequence[GenerateRequest]) -> list[Completion]:
    from ghostvis_cli.engines.local import LocalEngine, LocalSettings

    async with await LocalEngine.load(checkpoint, LocalSettings(device="cuda", dtype="bfloat16")) as engine:
        return [await complete(engine, request) for request in asked]


def served_answer(url: str, request: GenerateRequest, ids: Sequence[int]) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities by SGLang's own route, from the very ids that the local engine was given."""
    import httpx2

    body = {
        "input_ids": list(ids),
        "image_data": [image.data_url() for image in request.messages[0].images],
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
    }
    answer = httpx2.post(f"{url}/generate", json=body, timeout=120).raise_for_status().json()
    tokens = answer["meta_info"]["output_token_logprobs"]
    return [token[1] for token in tokens], [token[0] for token in tokens]


def compare(url: str, checkpoint: Checkpoint) -> None:
    """Tokens until the first difference, and the logprobs up to and including it, where both saw the same text."""
    from ghostvis_cli.checkpoint.tokenizer import Tokenizer
    from ghostvis_cli.prompt import VISION_ROW, render_for_reply

    tokenizer = Tokenizer.load(checkpoint.tokenizer_path)
    asked = requests(pictures())
    known = asyncio.run(local_answers(checkpoint, asked))
    equal, alike, differences, margins = 0, 0, [], []
    for request, reference in zip(asked, known, strict=True):
        # One row: the plug-in makes 64 of a mark.
        ids = [
            tokenizer.image_id if id_ == VISION_ROW else id_
            for id_ in render_for_reply(request.messages, tokenizer, "inline", 1).ids
        ]
        tokens, logprobs = served_answer(url, request, ids)  # type: ignore[arg-type]
        pairs = list(zip(reference.token_ids, tokens, strict=True))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        equal, alike = equal + (same == len(pairs)), alike + same
        differences += [abs(reference.logprobs[i].logprob - logprobs[i]) for i in range(same)]
        if same < len(pairs):
            best, second, *_ = sorted((p for _, p in reference.logprobs[same].top), reverse=True)
            margins.append(best - second)
    print(
        f"{equal} of {len(asked)} answers of {NEW_TOKENS} tokens equal, {alike} tokens before a difference; "
        f"|logprob difference| max {max(differences):.3f}, mean {sum(differences) / len(differences):.4f}; "
        f"margin where they part: {', '.join(f'{m:.3f}' for m in margins) or '-'}",
        flush=True,
    )


def main() -> None:
    size, *flags = [arg for arg in sys.argv[1:] if arg != "--"] or ["demo"]
    import torch

    print(f"{machine()}, {torch.cuda.get_device_name()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        checkpoint = make_d32(place) if size == "d32" else locate.find(demo.BASE_DIR, "sft", None, None)
        logs = Path(os.environ.get("OUT", folder))
        directory = place / "converted"
        convert = ["convert", str(checkpoint.path), "--out", str(directory), "--no-verify", "--quiet"]
        subprocess.run([*COMMAND, *convert], check=True)
        model = ["--checkpoint-path", str(directory), "--gpu-memory-utilization", str(MEMORY_SHARE)]
        with server(model, logs / f"{size}-radix.log", flags=flags) as cached:
            compare(cached, checkpoint)
            with server(
                model, logs / f"{size}-none.log", flags=[*flags, "--disable-radix-cache"]
            ) as uncached:
                for amount in AMOUNTS:
                    print(f"{size}, {amount}", flush=True)
                    measure_caches(cached, uncached, amount, logs)
            measure_engines(cached, ["--checkpoint-path", str(checkpoint.path)], [], AMOUNTS[0], logs)


if __name__ == "__main__":
    main()
