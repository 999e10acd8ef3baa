"""Verification for models that do not fit in memory: checkpoint and directory side by side, a layer at a time.

The same prompts, checks and certificate as the whole-model verification, but for the greedy answers, which would
read all weights once a token. In memory are a layer of each side in float32, or a slice of the heads, and the rows
of all prompts. The checkpoint is computed by our blocks, the directory by transformers' own modules for it.

T positions, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ghostvis_cli.checkpoint.load import assemble
from ghostvis_cli.convert.cases import Case, cases
from ghostvis_cli.convert.directory import files_of_tensors
from ghostvis_cli.convert.observed import (
    Observation,
    Prompts,
    auto_class,
    pixels_of,
    rendered,
    unround_rotary,
)
from ghostvis_cli.convert.plan import Plan
from ghostvis_cli.convert.tensors import DTYPES, CheckpointTensors
from ghostvis_cli.convert.verify import Compared, LogitSums, diverged, layer_names
from ghostvis_cli.model.decoder import Step, rms
from ghostvis_cli.model.generations import PLAIN
from ghostvis_cli.model.ghostvis import GhostVis
from ghostvis_cli.prompt import VISION_ROW

MODE = "layer by layer"
BESIDE_LAYERS = ("resid_", "x0_", "smear_", "backout_")  # nanochat's later generations', all of them small
HEAD_ROWS = 4096  # of the vocabulary, whose logits are held at a time
NOT_CHECKED = {"greedy_tokens": 0, "greedy_match": "not checked"}


@dataclass
class _Case:
    """A prompt on its way through the layers, as the source has it and as the directory has it."""

    figures: dict[str, Any]
    ids: Tensor  # (T,), below zero where an image's row stands
    step: Step
    expected: Tensor  # (2, T, D): with the source's rotary tables, and with unrounded ones
    got: Tensor  # (1, T, D)
    sums: LogitSums
    diverging: str | None = None

    def __post_init__(self) -> None:
        self.first = self.middle = self.expected, self.got  # of each side, for models that come back to them

    def compare(self, layer: str) -> None:
        if self.diverging is None and diverged(rms(self.expected[1]), rms(self.got[0])):
            self.diverging = layer


@torch.inference_mode()
def verify(plan: Plan, directory: Path, check: Callable[[], None]) -> dict[str, Any]:
    """The certificate's `verification`. `check` is called between the parts and may raise to end it."""
    source, converted, compared = _LayeredCheckpoint(plan), _Converted(plan, directory), Compared(plan)
    running = _begin(source, converted, compared, check)
    decoder = plan.classified.config.decoder
    for index, name in enumerate(layer_names(decoder.n_layer)[1:]):
        check()
        ours, theirs = source.block(index), converted.layer(index)
        for case in running:
            case.expected, case.got = ours(case), theirs(case)
            if index == decoder.n_layer // 2:
                case.middle = case.expected, case.got
            case.compare(name)
    _compare_logits(running, source, converted, check)
    for case in running:
        compared.logits(case.figures, case.sums, case.diverging)
    compared.texts(converted.prompts.tokenizer)
    return compared.record(MODE)


def _begin(
    source: "_LayeredCheckpoint", converted: "_Converted", compared: Compared, check: Callable[[], None]
) -> list[_Case]:
    """Prompts and images, and what enters the first layers, of the cases that are the same on both sides."""
    expected = source.prompts(check)
    steps = source.steps([answer.positions for _, answer in expected])
    answers = converted.answers([case for case, _ in expected], check)
    running = []
    for (case, ours), step, theirs in zip(expected, steps, answers, strict=True):
        figures = compared.prompt(case, ours, theirs)
        if figures["same_ids"]:
            figures |= NOT_CHECKED
            rows, sums = source.embedded(ours, step).expand(2, -1, -1), LogitSums(ours.positions)
            got = converted.embedded(theirs)
            running.append(_Case(figures, torch.tensor(ours.ids), step, rows, got, sums))
            running[-1].compare("embed_tokens")
    return running


def _compare_logits(
    running: list[_Case], source: "_LayeredCheckpoint", converted: "_Converted", check: Callable[[], None]
) -> None:
    finish = converted.finish()
    for case in running:
        case.expected, case.got = source.finish(case), finish(case)
    for start in range(0, source.config.decoder.vocab_size, HEAD_ROWS):
        check()
        ours, theirs = source.head(start), converted.head(start)
        for case in running:
            rounded, unrounded = _capped(case.expected @ ours.T, source.config.decoder.softcap)
            case.sums.add(rounded, unrounded, _capped(case.got @ theirs.T, converted.softcap)[0])


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _fill(module: nn.Module, read: Callable[[str, torch.Size], Tensor]) -> nn.Module:
    """Give a module weights, tensor by tensor. `read` gets a name and a shape.

    Memory is reused from layer to layer, since freed layers would leave holes too small for the next.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device="cpu")
    for name, tensor in module.state_dict().items():
        tensor.copy_(read(name, tensor.shape))
    return module


@contextmanager
def _open(vision: nn.Module | None, fill: Callable[[nn.Module], object]) -> Iterator[None]:
    """The vision part with its weights for a while."""
    if vision is None:
        yield
        return
    fill(vision)
    try:
        yield
    finally:
        vision.to_empty(device="meta")


class _LayeredCheckpoint:
    """The checkpoint, its weights rounded as the directory's are and the arithmetic in float32."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config = plan, plan.classified.config
        self._tensors = CheckpointTensors(plan.checkpoint.path)
        self._dtype = DTYPES[plan.settings.dtype]
        with torch.device("meta"):
            self._model = GhostVis(self.config).eval().requires_grad_(False)
        self._decoder = self._model.decoder
        for name, parameter in list(self._decoder.named_parameters()):
            if name.startswith(BESIDE_LAYERS):
                _replace(self._decoder, name, self._read(f"decoder.{name}", parameter.shape))

    def _fill(self, module: nn.Module, prefix: str) -> nn.Module:
        return _fill(module, lambda name, shape: self._read(f"{prefix}.{name}", shape))

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        part = self.plan.classified.parts[name]
        pieces = {key: self._tensors[key] for key in part.keys}
        return assemble(name, pieces, part, shape, torch.device("cpu"), self._dtype).float()

    def _rows(self, name: str, which: Tensor | slice) -> Tensor:
        """Rows of a table; the other rows are not read."""
        (key,) = self.plan.classified.parts[name].keys
        return self._tensors[key][which].to(self._dtype).float()

    def prompts(self, check: Callable[[], None]) -> list[tuple[Case, Observation]]:
        """The cases that fit the model's positions, with their image rows."""
        found, vision = [], self._model.vision
        with _open(vision, lambda part: self._fill(part, "vision")):
            for case in cases(vision=vision is not None):
                check()
                prompt = rendered(case, self.config, self.plan.tokenizer, self.plan.layout)
                if prompt is not None:
                    pixels = pixels_of(prompt, self.config)
                    rows = None if pixels is None else self._model.encode_images(pixels)
                    found.append(
                        (case, Observation(list(prompt.ids), [], torch.empty(0), pixels=pixels, rows=rows))
                    )
        return found

    def steps(self, lengths: list[int]) -> list[Step]:
        """For rows (2, T, D): the first rotated by the source's tables, the second by unrounded ones."""
        decoder = self._decoder
        rounded = [decoder.plan(torch.arange(T)[None], length=T) for T in lengths]
        if self.config.decoder.generation is PLAIN:
            unround_rotary(decoder, max(lengths, default=0))
        steps = []
        for step in rounded:
            other = decoder.plan(step.positions, length=step.length)
            cos, sin = torch.cat((step.cos, other.cos)), torch.cat((step.sin, other.sin))
            steps.append(replace(step, cos=cos, sin=sin))
        return steps

    def embedded(self, answer: Observation, step: Step) -> Tensor:
        """(1, T, D), normalised as they enter the layers."""
        ids = torch.tensor(answer.ids)
        x = self._rows("decoder.wte.weight", ids.clamp(min=0))
        if answer.rows is not None:
            x[ids == VISION_ROW] = answer.rows.flatten(0, 1)
        return self._decoder.begin(x[None], step)

    def block(self, index: int) -> Callable[[_Case], Tensor]:
        """Those of one shape take the first one's place."""
        config = self.config.decoder
        place = next(
            i for i in range(index + 1) if (i in config.value_layers) == (index in config.value_layers)
        )
        block: Any = self._fill(self._decoder.blocks[place], f"decoder.blocks.{index}")
        if config.windows:
            block.attn.window = config.windows[index]

        def run(case: _Case) -> Tensor:
            value = self._value(index, case.ids)
            value = None if value is None else value.expand(2, -1, -1)
            x = self._decoder.blend(case.expected, case.first[0], index)
            return block(x, case.step, None, index, value)

        return run

    def _value(self, index: int, ids: Tensor) -> Tensor | None:
        """The layer's value embeddings (1, T, K*h), where it has one."""
        if index not in self.config.decoder.value_layers:
            return None
        name = f"decoder.values.{self.config.decoder.value_layers.index(index)}.weight"
        return self._rows(name, ids.clamp(min=0)).masked_fill((ids < 0)[:, None], 0)[None]

    def finish(self, case: _Case) -> Tensor:
        return rms(self._decoder.back_out(case.expected, case.middle[0]))

    def head(self, start: int) -> Tensor:
        stop = min(start + HEAD_ROWS, self.config.decoder.vocab_size)  # files may be padded
        return self._rows("decoder.lm_head.weight", slice(start, stop))


class _Converted:
    """The directory, by the modules of the class that loads it and in the order of that class's `forward`."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        import transformers

        vision = plan.classified.config.vision is not None
        self.prompts = Prompts(directory, vision=vision)
        self._config = transformers.AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = auto_class(vision=vision).from_config(self._config, dtype=torch.float32).eval()
        self._model = model.requires_grad_(False)
        self._base = model.model.language_model if vision else model.model
        self._root = "model.language_model" if vision else "model"
        self._files = files_of_tensors(directory)
        self._decoder = (_NanoChat if self._is_nanochat else _Stock)(self)

    @property
    def _is_nanochat(self) -> bool:
        return bool(self._config.get_text_config().model_type == "ghostvis_nanochat")

    @property
    def softcap(self) -> float:
        return float(self._config.get_text_config().final_logit_softcapping)

    def _fill(self, module: nn.Module, prefix: str) -> nn.Module:
        return _fill(module, lambda name, _: self._rows(f"{prefix}.{name}", slice(None)))

    def _rows(self, name: str, which: Tensor | slice) -> Tensor:
        """A copy, since a view of the mapped file would keep its pages in memory."""
        with safe_open(self._files[name], "pt") as file:
            tensor = file.get_tensor(name)[which]
        return tensor.to(torch.float32, copy=True)

    def answers(self, fixed: list[Case], check: Callable[[], None]) -> list[Observation]:
        """Ids as the directory renders them, and image rows."""
        found, vision = [], getattr(self._model.model, "vision", None)
        with _open(vision, lambda part: self._fill(part, "model.vision")):
            for case in fixed:
                check()
                ids, pixels = self.prompts.inputs(case)
                rows = None if pixels is None else self._model.get_image_features(pixels)
                found.append(Observation(ids, [], torch.empty(0), pixels=pixels, rows=rows))
        return found

    def embedded(self, answer: Observation) -> Tensor:
        """(1, T, D), as they enter the first layer."""
        ids = torch.tensor(answer.ids)
        x = self._rows(f"{self._root}.embed_tokens.weight", ids)
        if answer.rows is not None:
            from ghostvis_cli.hf.model import image_places

            places = image_places(ids[None], self._config.image_token_id, self._config.image_layout)
            x[places[0]] = answer.rows.flatten(0, 1)
        return self._decoder.begin(x[None])

    def layer(self, index: int) -> Callable[[_Case], Tensor]:
        return self._decoder.layer(index)

    def finish(self) -> Callable[[_Case], Tensor]:
        return self._decoder.finish()

    def head(self, start: int) -> Tensor:
        return self._rows("lm_head.weight", slice(start, start + HEAD_ROWS))


class _Stock:
    """transformers' own Qwen3 and NanoChat."""

    def __init__(self, converted: _Converted) -> None:
        self._fill, self._base, self._root = converted._fill, converted._base, converted._root
        self._rotary = type(self._base.rotary_emb)(self._base.config)  # derived: in no file

    def begin(self, x: Tensor) -> Tensor:
        # NanoChat normalises its embeddings, and its norm has no weights.
        return self._base.norm(x) if type(self._base).__name__ == "NanoChatModel" else x

    def layer(self, index: int) -> Callable[[_Case], Tensor]:
        """All are of one shape, and take the first one's place."""
        layer = self._fill(self._base.layers[0], f"{self._root}.layers.{index}")

        def run(case: _Case) -> Tensor:
            positions = torch.arange(case.got.size(1))[None]
            turn = self._rotary(case.got, positions)
            # One whole sequence: causal without a mask.
            return layer(case.got, attention_mask=None, position_ids=positions, position_embeddings=turn)

        return run

    def finish(self) -> Callable[[_Case], Tensor]:
        norm = self._fill(self._base.norm, f"{self._root}.norm")
        return lambda case: norm(case.got)


class _NanoChat:
    """Our class for nanochat's later generations."""

    def __init__(self, converted: _Converted) -> None:
        self._fill, self._base, self._root = converted._fill, converted._base, converted._root
        for name, _ in list(self._base.named_parameters()):
            if name.startswith(BESIDE_LAYERS):
                _replace(self._base, name, converted._rows(f"{self._root}.{name}", slice(None)))

    def begin(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.size(1))[None]
        return self._base.smear(rms(x), positions, None) if self._base.config.smear else rms(x)

    def layer(self, index: int) -> Callable[[_Case], Tensor]:
        """Those of one shape take the first one's place."""
        base, has_value = self._base, self._base.config.has_value_embedding
        place = next(i for i in range(index + 1) if has_value(i) == has_value(index))
        layer = self._fill(base.layers[place], f"{self._root}.layers.{index}")

        def run(case: _Case) -> Tensor:
            T = case.got.size(1)
            mask = base.masks(None, 0, T, case.got.device)[base.window(index)]
            x, turn = base.blend(case.got, case.first[1], index), base.turn(torch.arange(T)[None])
            return layer(x, case.ids[None], mask, turn)

        return run

    def finish(self) -> Callable[[_Case], Tensor]:
        return lambda case: rms(self._base.back_out(case.got, case.middle[1]))


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a parameter, which has no memory yet, this value."""
    *path, last = name.split(".")
    setattr(module.get_submodule(".".join(path)), last, nn.Parameter(tensor, requires_grad=False))
