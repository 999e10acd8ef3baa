"""Verification for models that do not fit in memory: checkpoint and directory side by side, a layer at a time.

The same prompts, checks and certificate as the whole-model verification, but for the greedy answers, which would
read all weights once a token. In memory are a layer of each side in float32, or a slice of the heads, and the rows
of all prompts. The checkpoint is computed by our blocks, the directory by transformers' own modules for it.

T positions, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from json import loads
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ghostvis_cli.checkpoint.load import assemble
from ghostvis_cli.convert.cases import Case, cases
from ghostvis_cli.convert.observed import Answer, Prompts, auto_class, pixels_of, rendered, unround_rotary
from ghostvis_cli.convert.run import Plan
from ghostvis_cli.convert.shards import INDEX
from ghostvis_cli.convert.tensors import DTYPES
from ghostvis_cli.convert.tensors import Source as Tensors
from ghostvis_cli.convert.verify import Compared, LogitSums, diverged, layer_names
from ghostvis_cli.model.config import LOGIT_SOFTCAP
from ghostvis_cli.model.decoder import Step, rms
from ghostvis_cli.model.ghostvis import GhostVis
from ghostvis_cli.prompt import VISION_ROW

MODE = "layer by layer"
HEAD_ROWS = 4096  # of the vocabulary, whose logits are held at a time
NOT_CHECKED = {"greedy_tokens": 0, "greedy_match": "not checked"}


@dataclass
class _Case:
    """A prompt on its way through the layers, as the source has it and as the directory has it."""

    figures: dict[str, Any]
    step: Step
    expected: Tensor  # (2, T, D): with the source's rotary tables, and with unrounded ones
    got: Tensor  # (1, T, D)
    sums: LogitSums
    diverging: str | None = None

    def compare(self, layer: str) -> None:
        if self.diverging is None and diverged(rms(self.expected[1]), rms(self.got[0])):
            self.diverging = layer


@torch.inference_mode()
def verify(plan: Plan, directory: Path, check: Callable[[], None]) -> dict[str, Any]:
    """The certificate's `verification`. `check` is called between the parts and may raise to end it."""
    source, converted, compared = _Source(plan), _Converted(plan, directory), Compared(plan)
    running = _begin(source, converted, compared, check)
    layers = plan.classified.config.decoder.n_layer
    for index, name in enumerate(layer_names(layers)[1:]):
        check()
        ours, theirs = source.block(index), converted.layer(index)
        for case in running:
            case.expected = ours(case.expected, case.step, None, index)
            case.got = theirs(case.got)
            case.compare(name)
    _compare_logits(running, source, converted, check)
    for case in running:
        compared.logits(case.figures, case.sums, case.diverging)
    compared.texts(converted.prompts.tokenizer)
    return compared.record(MODE)


def _begin(
    source: "_Source", converted: "_Converted", compared: Compared, check: Callable[[], None]
) -> list[_Case]:
    """Prompts and pictures, and what enters the first layers, of the cases that are the same on both sides."""
    expected = source.prompts(check)
    steps = source.steps([answer.positions for _, answer in expected])
    got = converted.answers([case for case, _ in expected], check)
    running = []
    for (case, ours), step, theirs in zip(expected, steps, got, strict=True):
        figures = compared.prompt(case, ours, theirs)
        if figures["same_ids"]:
            figures |= NOT_CHECKED
            rows, sums = source.embedded(ours), LogitSums(ours.positions)
            running.append(_Case(figures, step, rows.expand(2, -1, -1), converted.embedded(theirs), sums))
            running[-1].compare("embed_tokens")
    return running


def _compare_logits(
    running: list[_Case], source: "_Source", converted: "_Converted", check: Callable[[], None]
) -> None:
    norm = converted.norm()
    for case in running:
        case.expected, case.got = rms(case.expected), norm(case.got)
    for start in range(0, source.config.decoder.vocab_size, HEAD_ROWS):
        check()
        ours, theirs = source.head(start), converted.head(start)
        for case in running:
            rounded, unrounded = _capped(case.expected @ ours.T, LOGIT_SOFTCAP)
            case.sums.add(rounded, unrounded, _capped(case.got @ theirs.T, converted.softcap)[0])


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _fill(module: nn.Module, read: Callable[[str, torch.Size], Tensor]) -> nn.Module:
    """Give a module weights, tensor by tensor. `read` gets a name and a shape.

    In the memory that it has by then: layers that come and go would leave holes too small for the next.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device="cpu")
    for name, tensor in module.state_dict().items():
        tensor.copy_(read(name, tensor.shape))
    return module


@contextmanager
def _open(eyes: nn.Module | None, fill: Callable[[nn.Module], object]) -> Iterator[None]:
    """The vision part with its weights for a while."""
    if eyes is None:
        yield
        return
    fill(eyes)
    try:
        yield
    finally:
        eyes.to_empty(device="meta")


class _Source:
    """The checkpoint, its weights rounded as the directory's are and the arithmetic in float32."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config = plan, plan.classified.config
        self._tensors = Tensors(plan.checkpoint.path)
        self._dtype = DTYPES[plan.settings.dtype]
        with torch.device("meta"):
            self._model = GhostVis(self.config).eval().requires_grad_(False)

    def _fill(self, module: nn.Module, prefix: str) -> nn.Module:
        return _fill(module, lambda name, shape: self._read(f"{prefix}.{name}", shape))

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        part = self.plan.classified.parts[name]
        pieces = {key: self._tensors[key] for key in part.keys}
        return assemble(name, pieces, part, shape, torch.device("cpu"), self._dtype).float()

    def _rows(self, name: str, which: Tensor | slice) -> Tensor:
        """Of a table, whose other rows stay in the file."""
        (key,) = self.plan.classified.parts[name].keys
        return self._tensors[key][which].to(self._dtype).float()

    def prompts(self, check: Callable[[], None]) -> list[tuple[Case, Answer]]:
        """The cases that fit the model's positions, with what its eyes see."""
        found, vision = [], self._model.vision
        with _open(vision, lambda eyes: self._fill(eyes, "vision")):
            for case in cases(vision=vision is not None):
                check()
                prompt = rendered(case, self.config, self.plan.tokenizer, self.plan.layout)
                if prompt is not None:
                    pixels = pixels_of(prompt, self.config)
                    rows = None if pixels is None else self._model.encode_images(pixels)
                    found.append(
                        (case, Answer(list(prompt.ids), [], torch.empty(0), pixels=pixels, rows=rows))
                    )
        return found

    def steps(self, lengths: list[int]) -> list[Step]:
        """For rows (2, T, D): the first rotated by the source's tables, the second by unrounded ones."""
        decoder = self._model.decoder
        rounded = [decoder.plan(torch.arange(T)[None], length=T) for T in lengths]
        unround_rotary(decoder, max(lengths, default=0))
        steps = []
        for step in rounded:
            other = decoder.plan(step.positions, length=step.length)
            cos, sin = torch.cat((step.cos, other.cos)), torch.cat((step.sin, other.sin))
            steps.append(replace(step, cos=cos, sin=sin))
        return steps

    def embedded(self, answer: Answer) -> Tensor:
        """(1, T, D), normalised as the first block gets them."""
        ids = torch.tensor(answer.ids)
        x = self._rows("decoder.wte.weight", ids.clamp(min=0))
        if answer.rows is not None:
            x[ids == VISION_ROW] = answer.rows.flatten(0, 1)
        return rms(x)[None]

    def block(self, index: int) -> nn.Module:
        """All are of one shape, and take the first one's place."""
        return self._fill(self._model.decoder.blocks[0], f"decoder.blocks.{index}")

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
        self._rotary = type(self._base.rotary_emb)(self._config.get_text_config())  # derived: in no file
        self._files = _files(directory)

    @property
    def softcap(self) -> float:
        return float(self._config.get_text_config().final_logit_softcapping)

    def _fill(self, module: nn.Module, prefix: str) -> nn.Module:
        return _fill(module, lambda name, _: self._rows(f"{prefix}.{name}", slice(None)))

    def _rows(self, name: str, which: Tensor | slice) -> Tensor:
        """Copied: a tensor that is still the mapped file keeps its pages in memory."""
        with safe_open(self._files[name], "pt") as file:
            tensor = file.get_tensor(name)[which]
        rows: Tensor = tensor.to(torch.float32, copy=True)
        return rows

    def answers(self, fixed: list[Case], check: Callable[[], None]) -> list[Answer]:
        """Ids as the directory renders them, and what its eyes see."""
        found, vision = [], getattr(self._model.model, "vision", None)
        with _open(vision, lambda eyes: self._fill(eyes, "model.vision")):
            for case in fixed:
                check()
                ids, pixels = self.prompts.inputs(case)
                rows = None if pixels is None else self._model.get_image_features(pixels)
                found.append(Answer(ids, [], torch.empty(0), pixels=pixels, rows=rows))
        return found

    def embedded(self, answer: Answer) -> Tensor:
        """(1, T, D), as they enter the first layer."""
        ids = torch.tensor(answer.ids)
        x = self._rows(f"{self._root}.embed_tokens.weight", ids)
        if answer.rows is not None:
            from ghostvis_cli.hf.model import picture_places

            places = picture_places(ids[None], self._config.image_token_id, self._config.image_layout)
            x[places[0]] = answer.rows.flatten(0, 1)
        return (self._base.norm(x) if self._normalises_embeddings else x)[None]

    @property
    def _normalises_embeddings(self) -> bool:
        return type(self._base).__name__ == "NanoChatModel"  # whose norm has no weights

    def layer(self, index: int) -> Callable[[Tensor], Tensor]:
        """All are of one shape, and take the first one's place."""
        layer = self._fill(self._base.layers[0], f"{self._root}.layers.{index}")

        def run(x: Tensor) -> Tensor:
            positions = torch.arange(x.size(1))[None]
            out: Tensor = layer(
                x,
                attention_mask=None,  # one whole sequence: causal without one
                position_ids=positions,
                position_embeddings=self._rotary(x, positions),
            )
            return out

        return run

    def norm(self) -> nn.Module:
        return self._fill(self._base.norm, f"{self._root}.norm")

    def head(self, start: int) -> Tensor:
        return self._rows("lm_head.weight", slice(start, start + HEAD_ROWS))


def _files(directory: Path) -> Mapping[str, Path]:
    """Which file holds each tensor."""
    if (directory / INDEX).exists():
        names = loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: directory / file for name, file in names.items()}
    with safe_open(directory / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), directory / "model.safetensors")
