"""Which tensors the converted directory holds, and how each is made from the checkpoint's. Data, without torch.

A swiglu decoder is a Qwen3 after a change of parameters that leaves its function as it is (format specification,
section 10); a relu2 decoder is transformers' NanoChat as it stands; nanochat's generations of 2026, which no stock
class expresses, are our own class's as they stand; the vision part keeps the names it has in
`ghostvis_cli.model.vision`.

    change        what is written
    copy          the sources one below the other, cut to the target's rows (padded vocabularies lose their padding)
    rms           each row divided by its root mean square: the norm that follows the embedding, done once
    swap_halves   the halves of each head's rows exchanged: rotation by -theta becomes the usual one by +theta
    pad_rows      zero rows below
    pad_columns   zero columns on the right
    ones, zeros   a constant: weightless norms, and biases that the target class insists on
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from ghostvis_cli.checkpoint.header import TensorInfo
from ghostvis_cli.checkpoint.keys import Classified
from ghostvis_cli.model.config import SMEAR_CHANNELS, DecoderConfig, GhostVisConfig
from ghostvis_cli.model.generations import PLAIN

Change = Literal["copy", "rms", "swap_halves", "pad_rows", "pad_columns", "ones", "zeros"]
Architecture = Literal[
    "Qwen3ForCausalLM",
    "NanoChatForCausalLM",
    "GhostVisNanoChatForCausalLM",
    "GhostVisForConditionalGeneration",
]
MLP_MULTIPLE = 128  # GPU kernels and tensor parallelism want even widths; zeros change nothing


@dataclass(frozen=True)
class TargetTensor:
    """One tensor of the converted directory."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    change: Change = "copy"
    head_dim: int = 1  # of swap_halves: rows that must stay together
    exact: bool = False  # float32 whatever the other weights are

    @property
    def numel(self) -> int:
        return prod(self.shape)


def architecture(config: GhostVisConfig) -> Architecture:
    if config.vision is not None:
        return "GhostVisForConditionalGeneration"
    if config.decoder.generation is not PLAIN:
        return "GhostVisNanoChatForCausalLM"
    return "Qwen3ForCausalLM" if config.decoder.mlp_type == "swiglu" else "NanoChatForCausalLM"


def padded_mlp_width(config: DecoderConfig) -> int:
    return -(-config.intermediate_size // MLP_MULTIPLE) * MLP_MULTIPLE


def targets(classified: Classified, header: Mapping[str, TensorInfo]) -> list[TargetTensor]:
    """Every tensor of the directory, in the order in which it is written. `header` has clean names."""
    config = classified.config
    root = "model." if config.vision is None else "model.language_model."
    found = list(_decoder(classified, root))
    if config.vision is not None:
        found += _vision(classified, header)
    return found


def _decoder(classified: Classified, root: str) -> Iterator[TargetTensor]:
    config, parts = classified.config.decoder, classified.parts
    table = (config.vocab_size, config.n_embd)
    qwen = config.mlp_type == "swiglu"
    yield TargetTensor(
        f"{root}embed_tokens.weight", table, parts["decoder.wte.weight"].keys, "rms" if qwen else "copy"
    )
    for i in range(config.n_layer):
        yield from _attention(classified, i, f"{root}layers.{i}.self_attn")
        yield from _mlp(classified, i, f"{root}layers.{i}.mlp")
        if qwen:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield TargetTensor(f"{root}layers.{i}.{norm}.weight", (config.n_embd,), change="ones")
    if qwen:
        yield TargetTensor(f"{root}norm.weight", (config.n_embd,), change="ones")
    yield from _generation(classified, root)
    yield TargetTensor("lm_head.weight", table, parts["decoder.lm_head.weight"].keys)


def _attention(classified: Classified, layer: int, root: str) -> Iterator[TargetTensor]:
    config, parts = classified.config.decoder, classified.parts
    h, width = config.head_dim, config.n_embd
    rotated: Change = "swap_halves" if config.mlp_type == "swiglu" else "copy"
    shapes = {"q": config.n_head * h, "k": config.n_kv_head * h, "v": config.n_kv_head * h}
    for kind in ("weight", "bias") if config.attention_bias else ("weight",):
        keys = parts[f"decoder.blocks.{layer}.attn.qkv.{kind}"].keys
        for (name, rows), key in zip(shapes.items(), keys, strict=True):
            shape = (rows, width) if kind == "weight" else (rows,)
            yield TargetTensor(
                f"{root}.{name}_proj.{kind}", shape, (key,), "copy" if name == "v" else rotated, h
            )
    yield TargetTensor(
        f"{root}.o_proj.weight", (width, width), parts[f"decoder.blocks.{layer}.attn.proj.weight"].keys
    )
    if config.attention_bias:  # the class has a bias on all four or on none
        yield TargetTensor(f"{root}.o_proj.bias", (width,), change="zeros")
    if config.mlp_type == "swiglu":
        for name in ("q_norm", "k_norm"):
            yield TargetTensor(f"{root}.{name}.weight", (h,), change="ones")


def _mlp(classified: Classified, layer: int, root: str) -> Iterator[TargetTensor]:
    config, parts = classified.config.decoder, classified.parts
    width, inner = config.n_embd, padded_mlp_width(config)
    gated = config.mlp_type == "swiglu"
    ups = ("gate_proj", "up_proj") if gated else ("fc1",)
    for name, key in zip(ups, parts[f"decoder.blocks.{layer}.mlp.up.weight"].keys, strict=True):
        yield TargetTensor(f"{root}.{name}.weight", (inner, width), (key,), "pad_rows")
    down = parts[f"decoder.blocks.{layer}.mlp.down.weight"].keys
    yield TargetTensor(
        f"{root}.{'down_proj' if gated else 'fc2'}.weight", (width, inner), down, "pad_columns"
    )


def _generation(classified: Classified, root: str) -> Iterator[TargetTensor]:
    """What nanochat's later generations added, under the names that we have for it."""
    config, parts = classified.config.decoder, classified.parts
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    if config.generation.lambdas:
        shapes |= {name: (name, (config.n_layer,)) for name in ("resid_lambdas", "x0_lambdas")}
    for i, layer in enumerate(config.value_layers):
        gate = (config.n_kv_head, config.generation.gate_channels)
        shapes[f"blocks.{layer}.attn.gate.weight"] = (f"layers.{layer}.self_attn.gate.weight", gate)
        table = (config.vocab_size, config.kv_width)
        shapes[f"values.{i}.weight"] = (f"layers.{layer}.value_embed.weight", table)
    if config.generation.smear:
        shapes["smear_gate.weight"] = ("smear_gate.weight", (1, SMEAR_CHANNELS))
        shapes |= {name: (name, (1,)) for name in ("smear_lambda", "backout_lambda")}
    for ours, (theirs, shape) in shapes.items():
        part = parts[f"decoder.{ours}"]
        yield TargetTensor(f"{root}{theirs}", shape, part.keys, exact=part.exact)


def _vision(classified: Classified, header: Mapping[str, TensorInfo]) -> Iterator[TargetTensor]:
    vision = classified.config.vision
    assert vision is not None, "targets asks for vision where there is some"
    tower = vision.tower
    # The two that files hold with leading ones.
    flat = {"vision.tower.class_token": (tower.width,), "vision.tower.position": (tower.tokens, tower.width)}
    for name, part in classified.parts.items():
        if name.startswith("vision."):
            yield TargetTensor(f"model.{name}", flat.get(name) or _joined(part.keys, header), part.keys)


def _joined(keys: tuple[str, ...], header: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    shapes = [header[key].shape for key in keys]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
