"""What a checkpoint is, told by its key names and shapes: its configuration, and where each tensor goes.

Pure: works on headers, so that `ghostvis models` can describe a file without torch. Tensors are believed over
the meta file; what neither can say (the number of heads) must be in the meta. Anything left over is an error.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, TypeAlias, TypeVar

from ghostvis_cli.checkpoint import generations
from ghostvis_cli.checkpoint.generations import NONE_SET, Constants
from ghostvis_cli.checkpoint.header import TensorInfo
from ghostvis_cli.errors import ModelError
from ghostvis_cli.model.config import (
    LAYOUTS,
    SMEAR_CHANNELS,
    DecoderConfig,
    GhostVisConfig,
    Layout,
    MlpType,
    ResamplerMode,
    TowerConfig,
    TowerFamily,
    VisionConfig,
)
from ghostvis_cli.model.generations import N4, N5, PLAIN, Generation
from ghostvis_cli.model.preprocess import normalisation

T = TypeVar("T")
Shape: TypeAlias = tuple[int, ...]
ROOTS = (
    *("transformer.", "lm_head.", "vision_encoder.", "vision_resampler.", "vision_projector."),
    *("resid_lambdas", "x0_lambdas", "smear_gate.", "smear_lambda", "backout_lambda"),
    *("value_embed", "v0_lambdas", "bigram_"),  # with those of side branches, which are refused by name
)
WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")

# Every key of `model_config` that any writer is known to use (format specification, section 2.1).
KNOWN_CONFIG = frozenset((
    "sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "intermediate_size", "mlp_type",
    "rope_theta", "attention_bias", "window_pattern", "image_token_id", "layout",
    "num_experts", "top_k", "num_shared_experts", "moe_num_experts", "moe_top_k", "moe_layer_start",
    "moe_layer_end", "moe_layer_stride", "moe_capacity_factor", "moe_aux_loss_coef",
    "use_flash_attn", "use_fused_kernels", "use_fused_loss", "use_gradient_checkpointing",
    "vision_encoder_name", "vision_encoder_trainable", "vision_encoder_heads", "vision_image_size",
    "vision_num_tokens", "vision_resampler_mode", "vision_resampler_depth", "vision_resampler_heads",
    "vision_proj_hidden", "vision_proj_dropout",
))  # fmt: skip
# The modules of a tower's block: our name -> that in files of timm, of Hugging Face's CLIP and SigLIP.
MLP = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
TIMM_BLOCK = {"norm1": "norm1", "qkv": "attn.qkv", "proj": "attn.proj", "norm2": "norm2", **MLP}
HF_BLOCK = {"norm1": "layer_norm1", "proj": "self_attn.out_proj", "norm2": "layer_norm2", **MLP}
MOST_POSITIONS = 10_000_000  # beyond any real model; a hostile meta file must not size our tables
# Stored by some writers and not needed: CLIP's pooled head, SigLIP's attention head, position numbers.
UNUSED = re.compile(r"^vision_encoder\.encoder\.(vision_model\.)?(embeddings\.position_ids|head\..*)$")
UNUSED_IN_CLIP = re.compile(r"^vision_encoder\.encoder\.(vision_model\.)?post_layernorm\.(weight|bias)$")


@dataclass(frozen=True)
class Part:
    """The file's tensors that make up one of ours: concatenated along rows, cut to `rows`, reshaped.

    `exact` ones are float32 whatever the weights are: scalars of the residual stream.
    """

    keys: tuple[str, ...]
    rows: int | None = None
    exact: bool = False


@dataclass
class Classified:
    """What a checkpoint is, and which of the file's keys make each of our parameters."""

    config: GhostVisConfig
    parts: dict[str, Part]  # our parameter name -> the file's keys
    parameters: int  # numbers in the file
    notices: list[str] = field(default_factory=list)
    # The constants of its mathematics, and for each where it comes from.
    constants: dict[str, tuple[Any, str]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """A short description, e.g. "vlm swiglu, clip tower, perceiver"."""
        decoder, vision = self.config.decoder, self.config.vision
        if decoder.generation is not PLAIN:
            return ("text" if vision is None else "vlm") + f", {decoder.generation.title}"
        if vision is None:
            return f"text {decoder.mlp_type}"
        return f"vlm {decoder.mlp_type}, {vision.tower.family} tower, {vision.resampler_mode}"


def clean_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Take off what compilers and wrappers put in front of names; two names that become one are refused."""
    cleaned = {_clean(name): tensor for name, tensor in tensors.items()}
    if len(cleaned) < len(tensors):
        twice = [name for name, count in Counter(map(_clean, tensors)).items() if count > 1]
        raise ModelError(f"it holds the same tensor under two names: {', '.join(twice[:3])}")
    return cleaned


def _clean(name: str) -> str:
    before = None
    while name != before:
        before = name
        for prefix in WRAPPERS:
            name = name.removeprefix(prefix)
        if name.removeprefix("model.").startswith((*ROOTS, *WRAPPERS, "model.")):
            name = name.removeprefix("model.")
    return name.replace("._orig_mod.", ".").replace("._fsdp_wrapped_module.", ".")


def classify(
    tensors: Mapping[str, TensorInfo],
    meta: Mapping[str, Any],
    constants: Constants = NONE_SET,
    base_meta: Mapping[str, Any] | None = None,
) -> Classified:
    """Header (clean names) and meta file -> configuration and tensor map, or a ModelError with the reason.

    `constants` beat what the generation says; `base_meta` is that of the base run of the same tag, which dates it.
    """
    _refuse_other_kinds(tensors)
    return Classifier(tensors, meta, constants, base_meta or meta).run()


def _refuse_other_kinds(tensors: Mapping[str, TensorInfo]) -> None:
    if any(".mlp.router.weight" in name or re.search(r"\.mlp\.experts\.\d", name) for name in tensors):
        raise ModelError(
            "it is a mixture-of-experts model: its answers depend on what else is in the batch, "
            "so cached decoding can't be right",
            hint="serve a dense checkpoint",
        )
    if "transformer.wte.weight" not in tensors:
        raise ModelError(
            f"its keys are not a GhostVis or nanochat model's: {', '.join(list(tensors)[:3])} ...",
            hint="a converted model needs --engine sglang; a training checkpoint has transformer.wte.weight",
        )


def _model_config(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    config = meta.get("model_config")
    return config if isinstance(config, Mapping) else {}


class Classifier:
    """One pass over a header. `parts` grows as sections are read; at the end it must account for every key."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        meta: Mapping[str, Any],
        constants: Constants = NONE_SET,
        base_meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.tensors, self.meta, self.stored = tensors, meta, _model_config(meta)
        self.chosen, self.base_meta = constants.chosen, base_meta or meta
        self.constants: dict[str, tuple[Any, str]] = {}
        self.parts: dict[str, Part] = {}
        self.shapes: dict[str, Shape] = {}  # what each of the file's keys must be
        self.notices: list[str] = []

    def run(self) -> Classified:
        decoder = self.decoder()
        vision = self.vision(decoder.n_embd)
        self.account_for_every_key()
        numbers = sum(info.numel for info in self.tensors.values())
        config = GhostVisConfig(decoder, vision, self.layout())
        return Classified(config, self.parts, numbers, self.notices, self.constants)

    # --- reading

    def spelled(self, key: str) -> str:
        """A key as the file spells it, for people."""
        return key

    def shape(self, key: str, dims: int = 2) -> tuple[int, ...]:
        if key not in self.tensors:
            raise ModelError(f"it lacks {self.spelled(key)}")
        shape = self.tensors[key].shape
        if len(shape) != dims:
            raise ModelError(f"{self.spelled(key)} has shape {list(shape)}, where {dims} dimensions belong")
        return shape

    def count(self, pattern: str) -> int:
        """How many layers there are, by the indices that `pattern` captures: 0 to n-1 and no other."""
        found = {int(match[1]) for name in self.tensors if (match := re.match(pattern, name))}
        if found and max(found) != len(found) - 1:
            missing = next(index for index in range(len(found)) if index not in found)
            raise ModelError(f"its layers go up to {max(found)}, and layer {missing} is missing")
        return len(found)

    def place(
        self, ours: str, shapes: Mapping[str, Shape], rows: int | None = None, *, exact: bool = False
    ) -> None:
        """Our parameter is made of these keys of the file, which must have these shapes."""
        self.parts[ours] = Part(tuple(shapes), rows, exact)
        self.shapes |= shapes

    def layer(self, ours: str, theirs: str, shape: Shape) -> None:
        """A weight of this shape and its bias: a Linear (out, in) or a norm (width,)."""
        self.place(f"{ours}.weight", {f"{theirs}.weight": shape})
        self.place(f"{ours}.bias", {f"{theirs}.bias": shape[:1]})

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number of the meta file, at least 1."""
        value = self.stored.get(name)
        value = default if value is None else value
        if value is None:
            raise ModelError(
                f"the meta file does not say {name}, and no tensor does", hint=f'add "{name}" to it'
            )
        if type(value) is not int or value < 1:
            raise ModelError(f"the meta file's {name} is {value!r}, not a positive whole number")
        return value

    def compare(self, name: str, actual: object) -> None:
        """Take the tensors' value, with a notice where the meta file differs."""
        stored = self.stored.get(name)
        if stored is not None and stored != actual:
            self.notices.append(f"the meta file says {name} = {stored}, the tensors say {actual}")

    # --- the decoder

    def decoder(self) -> DecoderConfig:
        rows, width = self.shape("transformer.wte.weight")
        if self.shape("lm_head.weight") != (rows, width):
            raise ModelError(
                f"lm_head.weight has shape {list(self.shape('lm_head.weight'))}, not [{rows}, {width}]"
            )
        generation = self.generation()
        layers = self.count(r"transformer\.h\.(\d+)\.")
        config = self.map_all(generation, rows, width, layers)
        if generation is not PLAIN and (config.mlp_type != "relu2" or self.biased):
            raise ModelError(
                f"it is a fork of nanochat: {generation.words} with "
                + ("attention biases" if self.biased else "a swiglu MLP")
            )
        wte = self.tensors["transformer.wte.weight"].dtype
        if generation is N5 and wte == "float32" and "rotary_tables" not in self.chosen:
            self.notices.append(
                "it was trained without a GPU in March 2026: rotary tables were bfloat16 until the 4th, float32 "
                "after, and no file says which: taking bfloat16 (--set model.rotary_tables=float32)"
            )
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "intermediate_size", "mlp_type"):
            self.compare(name, getattr(config, name))
        self.compare("attention_bias", self.biased)
        return config

    def map_all(self, generation: Generation, rows: int, width: int, layers: int) -> DecoderConfig:
        """The decoder's configuration, and its tensors mapped. What tensors do not say, each kind of file says."""
        heads, kv_heads = self.heads(generation, layers, width)
        mlp_type, gate_up = self.mlp_names()
        sequence_len = self.sequence_len(generation)
        tables = generation.rotary_tables(self.tensors["transformer.wte.weight"].dtype)
        config = DecoderConfig(
            sequence_len=sequence_len,
            vocab_size=self.vocabulary(rows),
            n_layer=layers,
            n_head=heads,
            n_kv_head=kv_heads,
            n_embd=width,
            intermediate_size=self.shape(f"transformer.h.0.mlp.{gate_up[0]}.weight")[0],
            mlp_type=mlp_type,
            attention_bias=self.biased,
            rope_theta=self.theta(generation),
            softcap=self.constant("softcap", generation.softcap, self.origin),
            generation=generation,
            qk_scale=self.constant("qk_scale", generation.qk_scale, self.origin),
            gate_scale=self.constant("gate_scale", generation.gate_scale, self.origin),
            windows=self.windows(generation, layers, sequence_len),
            rotary_tables=self.constant(
                "rotary_tables",
                tables,
                "the embedding's dtype" if generation.tables_as_stored else self.origin,
            ),
        )
        self.map_decoder(config, rows, gate_up)
        self.map_generation(config, rows)
        return config

    # --- the generation and its constants

    def generation(self) -> Generation:
        pattern = self.chosen.get("window_pattern", self.stored.get("window_pattern"))
        found = generations.recognise(self.tensors, pattern, generations.evaluated_on(self.base_meta))
        if found is PLAIN and pattern is not None and set(str(pattern).upper()) != {"L"}:
            raise ModelError(f"it has sliding windows ({pattern!r}) without January 2026's residual scalars")
        if unknown := sorted(self.chosen.keys() - generations.settable(found)):
            raise ModelError(
                f"{', '.join(unknown)} can't be set: its mathematics has none",
                hint=f"--set model.{unknown[0]}=null",
            )
        self.settable, self.origin = generations.settable(found), found.name
        if found is PLAIN:
            self.origin = "default"
        if found in (N4, N5) and "softcap" not in self.chosen and not generations.dated(self.base_meta):
            self.notices.append(
                "its soft cap is 15 or 20, and no file says which: taking 15 (--set model.softcap=20); "
                "the likeliest token is the same"
            )
        return found

    def constant(self, name: str, found: T, origin: str) -> T:
        """A constant of the mathematics: the user's, else the one found. Recorded with its origin."""
        if name in self.settable:
            self.constants[name] = (found, origin)
        if name in self.chosen:
            self.constants[name] = (self.chosen[name], "setting")
            if self.chosen[name] != found:
                self.notices.append(f"{name} is {self.chosen[name]} as it was set, not {found} ({origin})")
        chosen: T = self.chosen.get(name, found)
        return chosen

    def windows(self, generation: Generation, layers: int, sequence_len: int) -> tuple[int, ...]:
        stored = self.stored.get("window_pattern")
        if not generation.windows or (stored is None and "window_pattern" not in self.chosen):
            if generation.lambdas:
                self.notices.append(
                    "the meta file has no window_pattern: no layer has a short window "
                    "(--set model.window_pattern=SSSL, where it was trained with one)"
                )
            if not generation.windows:
                return ()
        pattern = self.constant("window_pattern", "L" if stored is None else str(stored), "the meta file")
        default = generation.short_window(sequence_len)
        short = self.constant("short_window", default, self.origin)
        return generations.windows(pattern, layers, short, sequence_len)

    def heads(self, generation: Generation, layers: int, width: int) -> tuple[int, int]:
        """Query and key heads: from the gates, which have a row for each key head, else from the meta file."""
        kv_rows = self.shape("transformer.h.0.attn.c_k.weight")[0]
        if generation.gate_channels:
            key_heads = self.shape(f"transformer.h.{layers - 1}.attn.ve_gate.weight")[0]
            head_dim = kv_rows // key_heads
            if kv_rows % key_heads or head_dim % 2 or width % head_dim or (width // head_dim) % key_heads:
                raise ModelError(f"{key_heads} gates do not fit the key projection's {kv_rows} rows")
            return width // head_dim, key_heads
        heads = self.number("n_head")
        if not layers or width % heads or (width // heads) % 2:
            raise ModelError(
                f"{heads} heads do not divide a width of {width} with {layers} layers into even sizes"
            )
        head_dim = width // heads
        kv_heads = kv_rows // head_dim
        misfit = kv_rows % head_dim or not kv_heads or heads % kv_heads
        if misfit or self.number("n_kv_head", kv_heads) != kv_heads:
            raise ModelError(
                f"n_head = {heads} in the meta file does not fit the key projection's {kv_rows} rows",
                hint="n_head and n_kv_head in the meta file must be those it was trained with",
            )
        return heads, kv_heads

    def map_generation(self, config: DecoderConfig, rows: int) -> None:
        """The tensors that its generation added."""
        generation, layers = config.generation, (config.n_layer,)
        if generation.lambdas:
            for name in ("resid_lambdas", "x0_lambdas"):
                self.place(f"decoder.{name}", {name: layers}, exact=True)
        for i, layer in enumerate(config.value_layers):
            gate = f"transformer.h.{layer}.attn.ve_gate.weight"
            shape = (config.n_kv_head, generation.gate_channels)
            self.place(f"decoder.blocks.{layer}.attn.gate.weight", {gate: shape})
            table = {f"value_embeds.{layer}.weight": (rows, config.kv_width)}
            self.place(f"decoder.values.{i}.weight", table, config.vocab_size)
        if generation.smear:
            self.place("decoder.smear_gate.weight", {"smear_gate.weight": (1, SMEAR_CHANNELS)})
            for name in ("smear_lambda", "backout_lambda"):
                self.place(f"decoder.{name}", {name: (1,)}, exact=True)

    @property
    def biased(self) -> bool:
        return "transformer.h.0.attn.c_q.bias" in self.tensors

    def vocabulary(self, rows: int) -> int:
        """Rows in use: nanochat pads the tables to a multiple of 64."""
        size = self.number("vocab_size", rows)
        if size > rows:
            raise ModelError(f"the meta file says {size} token ids, the embedding has {rows} rows")
        return size

    def sequence_len(self, generation: Generation) -> int:
        default = generation.default_sequence_len
        length = self.number("sequence_len", default)
        if length > MOST_POSITIONS:
            raise ModelError(f"the meta file's sequence_len is {length}, more than any model's")
        silent = self.stored.get("sequence_len") is None
        if silent and generation.windows and "sequence_len" not in self.chosen:
            self.notices.append(
                f"the meta file has no sequence_len, and windows depend on it: taking {default}, nanochat's "
                "default (--set model.sequence_len=N, as it was trained)"
            )
        return self.constant("sequence_len", length, "default" if silent else "the meta file")

    def theta(self, generation: Generation) -> float:
        stored = self.stored.get("rope_theta")
        found, origin = (generation.rotary_base, self.origin) if stored is None else (stored, "the meta file")
        value = self.constant("rotary_base", found, origin)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 1 < value < 1e12:
            raise ModelError(f"the meta file's rope_theta is {value!r}, not a rotary base")
        return float(value)

    def mlp_names(self) -> tuple[MlpType, tuple[str, ...]]:
        """The file's spelling of what we store as `mlp.up`."""
        spellings: tuple[tuple[MlpType, tuple[str, ...]], ...] = (
            ("swiglu", ("c_gate", "c_up")),
            ("swiglu", ("swiglu.gate", "swiglu.up")),
            ("relu2", ("c_fc",)),
        )
        for mlp_type, names in spellings:
            if f"transformer.h.0.mlp.{names[0]}.weight" in self.tensors:
                return mlp_type, names
        raise ModelError("its MLP is neither swiglu (c_gate, c_up) nor relu2 (c_fc)")

    def map_decoder(self, config: DecoderConfig, rows: int, gate_up: tuple[str, ...]) -> None:
        D, width = config.n_embd, config.intermediate_size
        sizes = {"c_q": D, "c_k": config.kv_width, "c_v": config.kv_width}
        for ours, theirs in (("wte", "transformer.wte"), ("lm_head", "lm_head")):
            self.place(f"decoder.{ours}.weight", {f"{theirs}.weight": (rows, D)}, config.vocab_size)
        for i in range(config.n_layer):
            ours, theirs = f"decoder.blocks.{i}", f"transformer.h.{i}"
            attn = f"{theirs}.attn"
            self.place(f"{ours}.attn.qkv.weight", {f"{attn}.{k}.weight": (n, D) for k, n in sizes.items()})
            if config.attention_bias:
                self.place(f"{ours}.attn.qkv.bias", {f"{attn}.{k}.bias": (n,) for k, n in sizes.items()})
            self.place(f"{ours}.attn.proj.weight", {f"{attn}.c_proj.weight": (D, D)})
            self.place(
                f"{ours}.mlp.up.weight", {f"{theirs}.mlp.{name}.weight": (width, D) for name in gate_up}
            )
            self.place(f"{ours}.mlp.down.weight", {f"{theirs}.mlp.c_proj.weight": (D, width)})

    # --- vision

    def vision(self, n_embd: int) -> VisionConfig | None:
        if not any(name.startswith("vision_") for name in self.tensors):
            if self.stored.get("vision_encoder_name"):
                self.notices.append("the meta file names a vision encoder, the file holds none: text only")
            return None
        tower = self.tower()
        mode, num_tokens, depth = self.resampler(tower.width)
        heads = self.number("vision_resampler_heads", 8)
        if mode == "perceiver" and tower.width % heads:
            raise ModelError(f"{heads} resampler heads do not divide its width of {tower.width}")
        hidden = self.shape("vision_projector.mlp.0.weight")[0]
        self.map_projector("vision_projector", tower.width, hidden, n_embd)
        encoder = self.stored.get("vision_encoder_name")
        mean, std = normalisation(str(encoder or ""))
        if tower.family == "clip" and "clip" not in str(encoder):
            self.notices.append(
                f"a CLIP tower under the name {encoder!r}: pixels are normalised to ±1, as upstream does"
            )
        self.compare("vision_image_size", tower.image_size)
        self.compare("vision_num_tokens", num_tokens)
        return VisionConfig(tower, num_tokens, mode, depth, heads, hidden, mean, std)

    def resampler(self, width: int) -> tuple[ResamplerMode, int, int]:
        """Mode, rows an image, depth. Average pooling leaves no trace in the file: the meta must say it."""
        if not any(name.startswith("vision_resampler.") for name in self.tensors):
            if self.stored.get("vision_resampler_mode") != "avgpool":
                raise ModelError(
                    "it has a vision tower but no resampler, and its meta file does not say avgpool"
                )
            return "avgpool", self.number("vision_num_tokens", 64), 0
        self.compare("vision_resampler_mode", "perceiver")
        num_tokens = self.shape("vision_resampler.queries", 3)[1]
        self.place("vision.resampler.queries", {"vision_resampler.queries": (1, num_tokens, width)})
        depth = self.count(r"vision_resampler\.layers\.(\d+)\.")
        self.map_perceiver("vision_resampler", depth, width)
        return "perceiver", num_tokens, depth

    def map_perceiver(self, root: str, depth: int, width: int) -> None:
        """Its layers below `root` in the file."""
        W = width
        layers = {"norm1": (W,), "norm2": (W,), "cross_attn.out_proj": (W, W)}
        layers |= {"mlp.0": (4 * W, W), "mlp.2": (W, 4 * W)}
        for i in range(depth):
            ours, theirs = f"vision.resampler.layers.{i}", f"{root}.layers.{i}"
            for name, shape in layers.items():
                self.layer(f"{ours}.{name}", f"{theirs}.{name}", shape)
            attn = "cross_attn.in_proj"  # one matrix for q, k and v, and no dot before its kind
            self.place(f"{ours}.{attn}_weight", {f"{theirs}.{attn}_weight": (3 * W, W)})
            self.place(f"{ours}.{attn}_bias", {f"{theirs}.{attn}_bias": (3 * W,)})

    def map_projector(self, root: str, width: int, hidden: int, n_embd: int) -> None:
        for name, shape in {"mlp.0": (hidden, width), "mlp.3": (n_embd, hidden), "mlp.4": (n_embd,)}.items():
            self.layer(f"vision.projector.{name}", f"{root}.{name}", shape)

    def tower(self) -> TowerConfig:
        root = "vision_encoder.encoder."
        if f"{root}patch_embed.proj.weight" in self.tensors:
            return self.timm_tower(root)
        if any(name.startswith(f"{root}vision_model.") for name in self.tensors):
            root += "vision_model."
        if f"{root}embeddings.patch_embedding.weight" not in self.tensors:
            raise ModelError("its vision tower is none of HF CLIP, HF SigLIP and timm")
        is_clip = f"{root}embeddings.class_embedding" in self.tensors
        return self.hf_tower(root, "clip" if is_clip else "siglip")

    def tower_config(
        self, family: TowerFamily, patch_key: str, rows: int, layers: int, mlp_width: int
    ) -> TowerConfig:
        width, channels, patch, other = self.shape(patch_key, 4)
        side = isqrt(rows - (family != "siglip"))
        if channels != 3 or patch != other or side * side != rows - (family != "siglip"):
            raise ModelError(
                f"its vision tower is not for square images: {rows} positions, {patch}x{other} patches"
            )
        heads = self.number("vision_encoder_heads", tower_heads(width))
        if width % heads:
            raise ModelError(f"{heads} vision heads do not divide a width of {width}")
        return TowerConfig(family, width, layers, heads, mlp_width, patch, side * patch)

    def timm_tower(self, root: str) -> TowerConfig:
        rows = self.shape(f"{root}pos_embed", 3)[1]
        tower = self.tower_config(
            "timm",
            f"{root}patch_embed.proj.weight",
            rows,
            self.count(re.escape(root) + r"blocks\.(\d+)\."),
            self.shape(f"{root}blocks.0.mlp.fc1.weight")[0],
        )
        W, patch, ours = tower.width, tower.patch_size, "vision.tower"
        self.place(f"{ours}.patch.weight", {f"{root}patch_embed.proj.weight": (W, 3, patch, patch)})
        self.place(f"{ours}.class_token", {f"{root}cls_token": (1, 1, W)})
        self.place(f"{ours}.position", {f"{root}pos_embed": (1, rows, W)})
        self.layer(f"{ours}.norm_pre", f"{root}norm_pre", (W,))
        self.layer(f"{ours}.norm_post", f"{root}norm", (W,))
        for i in range(tower.layers):
            self.map_block(tower, i, f"{root}blocks.{i}", TIMM_BLOCK)
        return tower

    def hf_tower(self, root: str, family: TowerFamily) -> TowerConfig:
        rows = self.shape(f"{root}embeddings.position_embedding.weight")[0]
        tower = self.tower_config(
            family,
            f"{root}embeddings.patch_embedding.weight",
            rows,
            self.count(re.escape(root) + r"encoder\.layers\.(\d+)\."),
            self.shape(f"{root}encoder.layers.0.mlp.fc1.weight")[0],
        )
        W, patch = tower.width, tower.patch_size
        ours, embeddings = "vision.tower", f"{root}embeddings"
        self.place(f"{ours}.patch.weight", {f"{embeddings}.patch_embedding.weight": (W, 3, patch, patch)})
        self.place(f"{ours}.position", {f"{embeddings}.position_embedding.weight": (rows, W)})
        if family == "clip":
            self.place(f"{ours}.class_token", {f"{embeddings}.class_embedding": (W,)})
            self.layer(f"{ours}.norm_pre", f"{root}pre_layrnorm", (W,))  # the library's spelling
        else:
            self.place(f"{ours}.patch.bias", {f"{embeddings}.patch_embedding.bias": (W,)})
            self.layer(f"{ours}.norm_post", f"{root}post_layernorm", (W,))
        for i in range(tower.layers):
            mine, theirs = f"{ours}.blocks.{i}", f"{root}encoder.layers.{i}"
            attn = [f"{theirs}.self_attn.{name}_proj" for name in "qkv"]
            self.place(f"{mine}.qkv.weight", {f"{key}.weight": (W, W) for key in attn})
            self.place(f"{mine}.qkv.bias", {f"{key}.bias": (W,) for key in attn})
            self.map_block(tower, i, theirs, HF_BLOCK)
        return tower

    def map_block(self, tower: TowerConfig, i: int, root: str, names: Mapping[str, str]) -> None:
        """Block `i` of the tower, whose modules stand below `root` in the file under these names."""
        W, M = tower.width, tower.mlp_width
        shapes = {"qkv": (3 * W, W), "proj": (W, W), "fc1": (M, W), "fc2": (W, M)}
        for ours, theirs in names.items():
            self.layer(f"vision.tower.blocks.{i}.{ours}", f"{root}.{theirs}", shapes.get(ours, (W,)))

    # --- the end

    def account_for_every_key(self) -> None:
        """Check that no key is missing or left over, and that shapes and types are right."""
        clip = "vision.tower.class_token" in self.parts and "vision.tower.norm_post.weight" not in self.parts
        surplus = [
            key
            for key in self.tensors
            if key not in self.shapes and not UNUSED.match(key) and not (clip and UNUSED_IN_CLIP.match(key))
        ]
        missing = sorted(self.shapes.keys() - self.tensors.keys())
        faults = [f"lacks {self.some(missing)}"] if missing else []
        faults += [f"has {self.some(surplus)}, which no known model uses"] if surplus else []
        faults += [self.misshapen()] if self.misshapen() else []
        if faults:
            raise ModelError("it " + " and ".join(faults))
        if unknown := sorted(self.stored.keys() - KNOWN_CONFIG):
            self.notices.append(f"the meta file's {_some(unknown)} is not known here and was ignored")

    def some(self, keys: list[str]) -> str:
        """The first few keys, as the file spells them."""
        return _some(list(map(self.spelled, keys)))

    def misshapen(self) -> str:
        """What is wrong with the tensors that are there, in words; empty where nothing is."""
        found = [(key, shape, self.tensors[key]) for key, shape in self.shapes.items() if key in self.tensors]
        wrong = [
            f"{self.spelled(key)} {list(info.shape)} for {list(shape)}"
            for key, shape, info in found
            if info.shape != shape
        ]
        wrong += [
            f"{self.spelled(key)} of {info.dtype}" for key, _, info in found if "float" not in info.dtype
        ]
        return f"has the wrong tensors {_some(wrong)}" if wrong else ""

    def layout(self) -> Layout | None:
        """Where image rows go, if the file records it: only files this project writes do."""
        stored = self.meta.get("layout", self.stored.get("layout"))
        if stored is None:
            return None
        for layout in LAYOUTS:
            if stored == layout:
                return layout
        raise ModelError(f"the meta file's layout is {stored!r}", hint=f"one of {', '.join(LAYOUTS)}")


def tower_heads(width: int) -> int:
    """Heads of a tower whose file does not record them (upstream's never do).

    Published ViTs have heads of 64 (so400m: 72); the tiny towers made for tests have heads of 16.
    """
    if width == 1152:
        return 16
    return width // 64 if width >= 192 and width % 64 == 0 else max(1, width // 16)


def _some(keys: list[str]) -> str:
    """A readable list: at most eight names, then a count."""
    shown = ", ".join(keys[:8])
    return shown if len(keys) <= 8 else f"{shown} and {len(keys) - 8} more"
