"""What a checkpoint becomes, decided from headers alone: which tensors go where, in which type and layout."""

from dataclasses import dataclass
from typing import Literal

from ghostvis_cli.checkpoint import load
from ghostvis_cli.checkpoint.choose import choose_layout
from ghostvis_cli.checkpoint.header import read_header
from ghostvis_cli.checkpoint.keys import Classified, clean_names
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.convert import shards
from ghostvis_cli.convert.mapping import Architecture, TargetTensor, architecture, targets
from ghostvis_cli.convert.shards import Shard
from ghostvis_cli.errors import ModelError
from ghostvis_cli.model.config import Layout

WeightsDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class ConvertSettings:
    """dtype is bfloat16 by default, the one that training and GPU servers compute in."""

    dtype: WeightsDtype = "bfloat16"
    layout: Layout | None = None  # None: as the file says
    max_shard_bytes: int = 5 * 1000**3
    force: bool = False
    verify: bool = True
    by_layer: bool = False  # verify so, in little memory and without greedy answers


@dataclass(frozen=True)
class Plan:
    """What a checkpoint becomes. Made from headers: no weight has been read."""

    checkpoint: Checkpoint
    settings: ConvertSettings
    classified: Classified
    tokenizer: Tokenizer
    layout: Layout | None  # None for a text model
    shards: tuple[Shard, ...]
    notices: tuple[str, ...]

    @property
    def architecture(self) -> Architecture:
        return architecture(self.classified.config)

    @property
    def targets(self) -> tuple[TargetTensor, ...]:
        """Every tensor to write, in the order of the files."""
        return tuple(target for shard in self.shards for target in shard.targets)

    @property
    def weights_bytes(self) -> int:
        return shards.total_bytes(self.shards, self.settings.dtype)


def make_plan(checkpoint: Checkpoint, settings: ConvertSettings) -> Plan:
    """Read what the checkpoint is; ModelError where it can't be converted."""
    if checkpoint.hf:
        raise ModelError(
            f"{checkpoint.path} is in Hugging Face's format already",
            hint="name the training checkpoint, model_<step>.pt; or use the directory as it is",
        )
    classified, tokenizer = load.verify(checkpoint)
    if classified.config.vision is not None and tokenizer.image_id is None:
        raise ModelError(
            f"the tokenizer {checkpoint.tokenizer_path} has no <|image|>, "
            "so there is no id for an image's place in a prompt",
            hint="put a tokenizer.pkl that has one beside the model file",
        )
    layout, notices = choose_layout(classified.config, settings.layout)
    wanted = targets(classified, clean_names(read_header(checkpoint.path)))
    split = shards.split(wanted, settings.dtype, settings.max_shard_bytes)
    told = (*classified.notices, *notices)
    return Plan(checkpoint, settings, classified, tokenizer, layout, tuple(split), told)
