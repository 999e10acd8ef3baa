"""Directories in Hugging Face's format for the local engine: what convert writes, and NanoChat models of others.

`convert.mapping` is the other way. Names become those of a training checkpoint, so that one classifier knows every
shape, and what conversion changed is taken back when a tensor is read. Files are not trusted: no code in a
directory is run.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from ghostvis_cli.checkpoint import safetensors
from ghostvis_cli.checkpoint.formats import CERTIFICATE, CONFIG
from ghostvis_cli.checkpoint.generations import settable
from ghostvis_cli.checkpoint.header import TensorInfo
from ghostvis_cli.checkpoint.keys import MOST_POSITIONS, TIMM_BLOCK, Classified, Classifier, T
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.checkpoint.safetensors import read_json
from ghostvis_cli.errors import ModelError, limit_reached, one_line, printable
from ghostvis_cli.model.config import (
    LAYOUTS,
    DecoderConfig,
    Layout,
    ResamplerMode,
    TowerConfig,
    TowerFamily,
    VisionConfig,
)
from ghostvis_cli.model.generations import GENERATIONS, PLAIN, Generation, TableType

if TYPE_CHECKING:
    from torch import Tensor

OWN, PLAIN_RELU2, PLAIN_SWIGLU = "ghostvis_nanochat", "nanochat", "qwen3"
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
CONVERTED_POSITIONS = 10  # of max_position_embeddings, to one that was trained on
LARGEST_NORM_EPS = 1e-5  # ours is 2**-23 and transformers' NanoChat has 1e-6: no answer depends on it
LARGEST = 1_000_000  # of a width or a count in a configuration
# Names below a layer: the directory's -> a training checkpoint's.
ATTENTION = {
    **{f"self_attn.{n}_proj.{kind}": f"attn.c_{n}.{kind}" for n in "qkv" for kind in ("weight", "bias")},
    "self_attn.o_proj.weight": "attn.c_proj.weight",
}
SWIGLU = ATTENTION | {
    f"mlp.{name}_proj.weight": f"mlp.c_{'proj' if name == 'down' else name}.weight"
    for name in ("gate", "up", "down")
}
RELU2 = ATTENTION | {
    "mlp.fc1.weight": "mlp.c_fc.weight",
    "mlp.fc2.weight": "mlp.c_proj.weight",
    "self_attn.gate.weight": "attn.ve_gate.weight",
}
# What a class insists on and the model does not have: norms with weights of one, a bias of zeros.
ONES = re.compile(
    r"(layers\.\d+\.)?(input_layernorm|post_attention_layernorm|norm|self_attn\.[qk]_norm)\.weight"
)
ZEROS = re.compile(r"layers\.\d+\.self_attn\.o_proj\.bias")


@dataclass(frozen=True)
class Stored:
    """One tensor of the directory. head_dim: of each head's rows so many, their halves exchanged; 0: as trained."""

    path: Path
    name: str
    info: TensorInfo
    head_dim: int = 0


@dataclass(frozen=True)
class Directory:
    """config.json, the tensors by a training checkpoint's names, and those that must be constant."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    ones: tuple[Stored, ...]
    zeros: tuple[Stored, ...]


def classify(checkpoint: Checkpoint) -> Classified:
    """What it is, from its JSON files and headers alone; ModelError where the local engine can't run it."""
    if chosen := checkpoint.constants.chosen:
        raise ModelError(
            f"its constants are in its config.json: {', '.join(chosen)} can't be set any more",
            hint=f"ghostvis convert CHECKPOINT --set model.{min(chosen)}=... --out DIR",
        )
    return _DirectoryClassifier(_read(checkpoint.path)).run()


def tensors(checkpoint: Checkpoint) -> "Mapping[str, Tensor]":
    """Its tensors by a training checkpoint's names, as before conversion; each is read when it is asked for."""
    directory = _read(checkpoint.path)
    _check_constants(directory)
    return _Tensors(directory)


def _read(path: Path) -> Directory:
    config = read_json(path / CONFIG)
    text = _text(config)
    _refuse_strangers(config, text)
    below = SWIGLU if text["model_type"] == PLAIN_SWIGLU else RELU2
    found: dict[str, Stored] = {}
    ones, zeros = [], []
    for name, (file, info) in safetensors.headers(path).items():
        inner = name.removeprefix("model.").removeprefix("language_model.")
        if ONES.fullmatch(inner):
            ones.append(Stored(file, name, info))
        elif ZEROS.fullmatch(inner):
            zeros.append(Stored(file, name, info))
        else:
            swapped = below is SWIGLU and re.search(r"\.self_attn\.[qk]_proj\.", inner)
            found[_trained(inner, below)] = Stored(file, name, info, _head_dim(text) if swapped else 0)
    if text.get("tie_word_embeddings") and EMBEDDING in found:
        found.setdefault(HEAD, found[EMBEDDING])
    return Directory(path, config, found, tuple(ones), tuple(zeros))


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config", config)
    return text if isinstance(text, Mapping) else {}


def _refuse_strangers(config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """By name: a model of another family, quantised weights, mathematics that the decoder does not have."""
    kind = text.get("model_type")
    if kind not in (OWN, PLAIN_RELU2, PLAIN_SWIGLU) or (
        text is not config and config.get("model_type") != "ghostvis"
    ):
        classes = config.get("architectures")
        named = printable(
            str(classes[0] if isinstance(classes, list) and classes else config.get("model_type"))
        )
        raise ModelError(
            f"it is a {named}, not a model of nanochat's family",
            hint="serve it with SGLang or vLLM, and give --base-url",
        )
    if config.get("quantization_config"):
        raise ModelError(
            "its weights are quantised, which the local engine does not run", hint="ghostvis serve"
        )
    if not _is_positive(text.get("final_logit_softcapping")):
        raise ModelError(f"its {kind} has no final_logit_softcapping, so nanochat's training did not make it")
    if text.get("use_sliding_window"):
        raise ModelError("it has a sliding window, which its class did not have in training")
    eps = text.get("rms_norm_eps", 1e-6)
    if not _is_positive(eps) or eps > LARGEST_NORM_EPS:
        raise ModelError(f"its rms_norm_eps is {printable(str(eps))}, not nanochat's")
    if text.get("hidden_act") != ("silu" if kind == PLAIN_SWIGLU else "relu2"):
        raise ModelError(f"its hidden_act is {printable(str(text.get('hidden_act')))}, not nanochat's")


def _trained(name: str, below: Mapping[str, str]) -> str:
    """A training checkpoint's name for a tensor; its own where there is none."""
    if name == "embed_tokens.weight":
        return EMBEDDING
    if match := re.fullmatch(r"layers\.(\d+)\.value_embed\.weight", name):
        return f"value_embeds.{match[1]}.weight"
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        return f"transformer.h.{match[1]}.{below.get(match[2], match[2])}"
    return name


def _head_dim(text: Mapping[str, Any]) -> int:
    """Rows a head: the width over the heads, which is all that the decoder knows."""
    width, heads = _whole(text, "hidden_size"), _whole(text, "num_attention_heads")
    size = width // heads
    if width % heads or size % 2 or text.get("head_dim") not in (None, size):
        raise ModelError(f"its {heads} heads do not divide its width of {width} into even sizes")
    return size


# --- the numbers of a configuration


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value > 0


def _whole(table: Mapping[str, Any], name: str, default: int | None = None, most: int = LARGEST) -> int:
    value = table.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= most:
        raise ModelError(
            f"config.json says {name} is {printable(str(value))}, not a whole number from 1 to {most}"
        )
    return value


def _real(table: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = table.get(name, default)
    if not _is_positive(value):
        raise ModelError(f"config.json says {name} is {printable(str(value))}, not a number above 0")
    return float(value)


def _word(table: Mapping[str, Any], name: str, words: tuple[str, ...], default: str | None = None) -> Any:
    value = table.get(name, default)
    if value not in words:
        raise ModelError(f"config.json says {name} is {printable(str(value))}, not one of {', '.join(words)}")
    return value


class _DirectoryClassifier(Classifier):
    """Its numbers come from config.json; every tensor must have the shape that follows from them."""

    def __init__(self, directory: Directory) -> None:
        super().__init__({name: stored.info for name, stored in directory.tensors.items()}, {})
        self.directory, self.config, self.text = directory, directory.config, _text(directory.config)

    def spelled(self, key: str) -> str:
        if key in self.directory.tensors:
            return self.directory.tensors[key].name
        below = SWIGLU if self.text["model_type"] == PLAIN_SWIGLU else RELU2
        theirs = {trained: name for name, trained in below.items()}
        match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", key)
        return f"model.layers.{match[1]}.{theirs.get(match[2], match[2])}" if match else key

    def decoder(self) -> DecoderConfig:
        generation = self.generation()
        rows, width = self.shape(EMBEDDING)
        layers = self.count(r"transformer\.h\.(\d+)\.")
        if (width, layers, rows) != tuple(
            _whole(self.text, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")
        ):
            raise ModelError(
                f"config.json does not fit: the tensors have {layers} layers, a width of {width} and {rows} tokens"
            )
        return self.map_all(generation, rows, width, layers)

    def generation(self) -> Generation:
        found = PLAIN
        if self.text["model_type"] == OWN:
            found = GENERATIONS[_word(self.text, "generation", tuple(GENERATIONS))]
            for name in ("gate_channels", "smear"):
                if self.text.get(name, getattr(found, name)) != getattr(found, name):
                    raise ModelError(
                        f"config.json says {name} is {self.text[name]}, which {found.name} does not have"
                    )
        self.settable, self.origin = settable(found), CONFIG
        return found

    def heads(self, generation: Generation, layers: int, width: int) -> tuple[int, int]:
        heads = _whole(self.text, "num_attention_heads")
        kv_heads = _whole(self.text, "num_key_value_heads", heads)
        if heads % kv_heads or not _head_dim(self.text):
            raise ModelError(f"its {heads} query heads are no multiple of its {kv_heads} key heads")
        return heads, kv_heads

    def vocabulary(self, rows: int) -> int:
        return rows

    def constant(self, name: str, found: T, origin: str) -> T:
        """As config.json says it; `found` is the generation's."""
        value: Any = found
        if name == "rotary_tables":
            value = _word(self.text, name, get_args(TableType), "bfloat16")
        else:
            value = _real(self.text, "final_logit_softcapping" if name == "softcap" else name, value)
        return self.noted(name, cast(T, value))

    def noted(self, name: str, value: T) -> T:
        """Record a constant for those who list them."""
        if name in self.settable:
            self.constants[name] = (value, CONFIG)
        return value

    def sequence_len(self, generation: Generation) -> int:
        """Conversion records it; before it did, and for others, it follows from the longest position."""
        longest = _whole(self.text, "max_position_embeddings", most=CONVERTED_POSITIONS * MOST_POSITIONS)
        ours = (self.directory.path / CERTIFICATE).is_file()
        default = max(1, longest // CONVERTED_POSITIONS) if ours else longest
        return self.noted("sequence_len", _whole(self.text, "trained_positions", default, MOST_POSITIONS))

    def theta(self, generation: Generation) -> float:
        rope = self.text.get("rope_parameters") or self.text.get("rope_scaling") or {}
        if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
            raise ModelError("its rotary positions are stretched (rope_type), which nanochat's are not")
        stored = rope.get("rope_theta", self.text.get("rope_theta"))
        theta = _real({"rope_theta": stored}, "rope_theta") if stored is not None else generation.rotary_base
        if not 1 < theta < 1e12:
            raise ModelError(f"config.json says rope_theta is {theta}, not a rotary base")
        return self.noted("rotary_base", theta)

    def windows(self, generation: Generation, layers: int, sequence_len: int) -> tuple[int, ...]:
        sizes = self.text.get("window_sizes") or []
        is_sound = isinstance(sizes, list) and all(
            type(size) is int and 0 <= size <= MOST_POSITIONS for size in sizes
        )
        if not is_sound or len(sizes) not in (0, layers) or (sizes and not generation.windows):
            raise ModelError(f"config.json's window_sizes are not one for each of {layers} layers")
        return tuple(sizes)

    # --- vision

    def vision(self, n_embd: int) -> VisionConfig | None:
        stored = self.config.get("vision_config")
        if not isinstance(stored, Mapping):
            return None
        tower = self._tower(stored)
        mode: ResamplerMode = _word(stored, "resampler_mode", get_args(ResamplerMode))
        num_tokens, hidden = _whole(stored, "num_tokens"), _whole(stored, "proj_hidden")
        heads = _whole(stored, "resampler_heads", 8)
        depth = self._perceiver(tower.width, num_tokens, heads) if mode == "perceiver" else 0
        self.map_projector("vision.projector", tower.width, hidden, n_embd)
        mean, std = (self._of_channels(stored, name) for name in ("image_mean", "image_std"))
        return VisionConfig(tower, num_tokens, mode, depth, heads, hidden, mean, std)

    def _layer(self, name: str, shape: tuple[int, ...]) -> None:
        self.layer(name, name, shape)

    def _own(self, name: str, shape: tuple[int, ...]) -> None:
        """A tensor that has our own parameter's name."""
        self.place(name, {name: shape})

    def _tower(self, stored: Mapping[str, Any]) -> TowerConfig:
        family: TowerFamily = _word(stored, "tower_family", get_args(TowerFamily))
        W, heads = _whole(stored, "hidden_size"), _whole(stored, "num_attention_heads")
        M, patch = _whole(stored, "intermediate_size"), _whole(stored, "patch_size")
        layers = self.count(r"vision\.tower\.blocks\.(\d+)\.")
        size = _whole(stored, "image_size", most=10_000)
        if W % heads or patch > size or layers != _whole(stored, "num_hidden_layers"):
            raise ModelError(
                f"config.json's vision tower of {heads} heads does not fit {layers} layers of {W}"
            )
        tower = TowerConfig(family, W, layers, heads, M, patch, size)
        self._own("vision.tower.patch.weight", (W, 3, patch, patch))
        self._own("vision.tower.position", (tower.tokens, W))
        if family == "siglip":
            self._own("vision.tower.patch.bias", (W,))
        else:
            self._own("vision.tower.class_token", (W,))
            self._layer("vision.tower.norm_pre", (W,))
        if family != "clip":
            self._layer("vision.tower.norm_post", (W,))
        for i in range(layers):
            self.map_block(tower, i, f"vision.tower.blocks.{i}", {name: name for name in TIMM_BLOCK})
        return tower

    def _perceiver(self, width: int, num_tokens: int, heads: int) -> int:
        """Its depth, as the tensors have it."""
        if width % heads:
            raise ModelError(f"{heads} resampler heads do not divide its width of {width}")
        self._own("vision.resampler.queries", (1, num_tokens, width))
        depth = self.count(r"vision\.resampler\.layers\.(\d+)\.")
        self.map_perceiver("vision.resampler", depth, width)
        return depth

    def _of_channels(self, stored: Mapping[str, Any], name: str) -> tuple[float, float, float]:
        """Mean or deviation of the three colours, from config.json or the preprocessor's file."""
        values = stored.get(name) or read_json(self.directory.path / "preprocessor_config.json").get(name)
        if not isinstance(values, list) or len(values) != 3:
            raise ModelError(f"{name} is not a list of three numbers")
        if not all(_is_positive(value) for value in values):
            raise ModelError(f"{name} holds {printable(str(values))}, where numbers above 0 belong")
        red, green, blue = map(float, values)
        return red, green, blue

    def layout(self) -> Layout | None:
        if "vision_config" not in self.config:
            return None
        found: Layout = _word(self.config, "image_layout", LAYOUTS)
        return found


# --- reading tensors


class _Tensors(Mapping[str, "Tensor"]):
    """Each tensor when it is asked for, out of the mapped file, with what conversion changed taken back."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._open: dict[Path, Any] = {}

    def __getitem__(self, key: str) -> "Tensor":
        return self.read(self._directory.tensors[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._directory.tensors)

    def __len__(self) -> int:
        return len(self._directory.tensors)

    def read(self, stored: Stored) -> "Tensor":
        from safetensors import safe_open

        try:
            if stored.path not in self._open:
                self._open[stored.path] = safe_open(stored.path, "pt")
            tensor: Tensor = self._open[stored.path].get_tensor(stored.name)
        except Exception as error:  # a damaged file can fail in any way at all
            damaged = ModelError(f"{stored.path} can't be read: {one_line(error)}")
            raise limit_reached(error) or damaged from error
        if not stored.head_dim:
            return tensor
        halves = tensor.reshape(-1, 2, stored.head_dim // 2, *tensor.shape[1:])
        return halves.flip(1).reshape(tensor.shape)


def _check_constants(directory: Directory) -> None:
    """A model with trained norms is of another family, whatever its configuration says."""
    files = _Tensors(directory)
    for stored, value in [*((each, 1) for each in directory.ones), *((each, 0) for each in directory.zeros)]:
        if not bool((files.read(stored) == value).all()):
            raise ModelError(
                f"{printable(stored.name)} is not all {value}: it is not a model of nanochat's family",
                hint="serve it with SGLang or vLLM, and give --base-url",
            )
