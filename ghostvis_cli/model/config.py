"""Every dimension of a GhostVis model. No tensors here: these describe a checkpoint before torch is imported."""

from dataclasses import dataclass
from typing import Literal

from ghostvis_cli.model.generations import PLAIN, Generation, TableType

MlpType = Literal["swiglu", "relu2"]
TowerFamily = Literal["clip", "timm", "siglip"]
ResamplerMode = Literal["perceiver", "avgpool"]
Layout = Literal["inline", "prepend", "prepend_slots", "prepend_literal"]
LAYOUTS: tuple[Layout, ...] = ("inline", "prepend", "prepend_slots", "prepend_literal")

SMEAR_CHANNELS = 24
RMS_EPS = 2.0**-23
LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class DecoderConfig:
    """The language model. Names follow nanochat's, see format specification section 2.1.

    The last fields are a nanochat generation's: its mathematics, and its constants unless a setting beats them.
    """

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    intermediate_size: int
    mlp_type: MlpType
    attention_bias: bool = False
    rope_theta: float = PLAIN.rotary_base
    softcap: float = PLAIN.softcap
    generation: Generation = PLAIN
    qk_scale: float = PLAIN.qk_scale
    gate_scale: float = PLAIN.gate_scale
    windows: tuple[int, ...] = ()  # of each layer: keys back, without oneself; empty: all of them, everywhere
    rotary_tables: TableType = "bfloat16"  # what training rounded them to

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def value_layers(self) -> tuple[int, ...]:
        """The layers with a value embedding: every second one, the last always among them."""
        return tuple(range((self.n_layer - 1) % 2, self.n_layer, 2)) if self.generation.gate_channels else ()

    @property
    def kv_width(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def reach(self) -> int:
        """Rows before the first new one that a step takes in besides its keys and values."""
        return int(self.generation.smear)

    @property
    def max_positions(self) -> int:
        """The rotary table's length: no position may reach it. Trained on `sequence_len` only."""
        return 10 * self.sequence_len


@dataclass(frozen=True)
class TowerConfig:
    """A vision transformer. `family` decides what the file's key names decided: bias, norms, activation."""

    family: TowerFamily
    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Rows the tower hands on: CLIP and timm keep their class token."""
        return self.patches + (self.family != "siglip")


@dataclass(frozen=True)
class VisionConfig:
    """Tower, resampler and projector: an image becomes `num_tokens` rows of the decoder's width."""

    tower: TowerConfig
    num_tokens: int
    resampler_mode: ResamplerMode
    resampler_depth: int
    resampler_heads: int
    proj_hidden: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


@dataclass(frozen=True)
class GhostVisConfig:
    """A whole model: decoder, vision part if it has one, and where image rows go."""

    decoder: DecoderConfig
    vision: VisionConfig | None = None
    layout: Layout | None = None  # what the file says; None where it says nothing
