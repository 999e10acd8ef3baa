"""What a model answers to the fixed cases: the checkpoint through our network, the directory through transformers.

The two are run one after the other, so that memory holds one model at a time. T positions, V vocabulary, N rows a
image, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ghostvis_cli.checkpoint.load import load_model
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.convert.cases import Case
from ghostvis_cli.model.config import GhostVisConfig, Layout
from ghostvis_cli.model.decoder import Decoder, KVCache, rms, rotary_angles
from ghostvis_cli.model.generations import PLAIN
from ghostvis_cli.model.ghostvis import GhostVis
from ghostvis_cli.model.preprocess import preprocess
from ghostvis_cli.prompt import Prompt

GREEDY_TOKENS = 32


@dataclass
class Observation:
    """One case. `ids` is the prompt, images' places as VISION_ROW; `greedy` what the source says next."""

    ids: list[int]
    greedy: list[int]
    logits: Tensor  # (T, V) float32
    layers: list[Tensor] = field(default_factory=list)  # (T, D), normalised: first input, then each output
    logits_unrounded: Tensor | None = None  # the source's, had its rotary tables not been rounded to bfloat16
    pixels: Tensor | None = None  # (images, 3, S, S)
    rows: Tensor | None = None  # (images, N, D)

    @property
    def positions(self) -> int:
        """T: the prompt and all of `greedy` but its last."""
        return len(self.ids) + len(self.greedy[:-1])


@dataclass
class CheckpointOutputs:
    """The checkpoint's answers, its weights rounded as the directory's are and the arithmetic in float32."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    layout: Layout | None
    answers: dict[str, Observation] = field(default_factory=dict)  # of the cases that fit the positions

    @torch.inference_mode()
    def answer(self, cases: Sequence[Case], check: Callable[[], None]) -> None:
        loaded = load_model(self.checkpoint, dtype=self.dtype)
        model = loaded.model.float()
        for case in cases:
            check()
            if prompt := rendered(case, model.config, loaded.tokenizer, self.layout):
                pixels = pixels_of(prompt, model.config)
                self.answers[case.name] = _run(model, list(prompt.ids), pixels)
        longest = max((len(answer.logits) for answer in self.answers.values()), default=0)
        if model.config.decoder.generation is PLAIN:  # the classes of later ones round as training did
            unround_rotary(model.decoder, longest)
        for answer in self.answers.values():
            check()
            with _watched(list(model.decoder.blocks)) as layers:
                answer.logits_unrounded = model.decoder(_embedded(model, answer))[0]
            answer.layers = layers()


def rendered(
    case: Case, config: GhostVisConfig, tokenizer: Tokenizer, layout: Layout | None
) -> Prompt | None:
    """The prompt as the source has it; None where the model has too few positions for it and an answer."""
    prompt = case.prompt(tokenizer, layout, config.vision.num_tokens if config.vision else 0)
    return prompt if len(prompt.ids) + GREEDY_TOKENS <= config.decoder.max_positions else None


def pixels_of(prompt: Prompt, config: GhostVisConfig) -> Tensor | None:
    """A prompt's images (images, 3, S, S) float32, preprocessed; None for text."""
    vision = config.vision
    if vision is None or not prompt.images:
        return None
    size, mean, std = vision.tower.image_size, vision.image_mean, vision.image_std
    return torch.stack(
        [torch.from_numpy(preprocess(image.pil(), size, mean, std)) for image in prompt.images]
    )


def _run(model: GhostVis, ids: list[int], pixels: Tensor | None) -> Observation:
    """Greedy decoding over a cache, and the logits of every position it went through."""
    decoder = model.decoder
    T = len(ids)
    cache = KVCache.empty(
        decoder.config, 1, T + GREEDY_TOKENS, device=torch.device("cpu"), dtype=torch.float32
    )
    rows = None if pixels is None else model.encode_images(pixels)
    answer = Observation(ids, [], torch.empty(0), pixels=pixels, rows=rows)
    step = decoder.plan(torch.arange(T)[None], length=T)
    logits = [decoder.logits(decoder.trunk(_embedded(model, answer), step, cache))[0]]
    for position in range(T, T + GREEDY_TOKENS - 1):
        answer.greedy.append(int(logits[-1][-1].argmax()))
        step = decoder.plan(torch.tensor([[position]]), length=position + 1)
        ids = [*ids, answer.greedy[-1]]
        x = decoder.embed(torch.tensor([ids[-1 - decoder.config.reach :]]).clamp(min=0))
        logits.append(decoder.logits(decoder.trunk(x, step, cache))[0])
    answer.greedy.append(int(logits[-1][-1].argmax()))
    answer.logits = torch.cat(logits)
    return answer


def _embedded(model: GhostVis, answer: Observation) -> Tensor:
    """Prompt and greedy tokens but the last, as rows (1, T, D)."""
    ids = torch.tensor([[*answer.ids, *answer.greedy[:-1]]])
    return model.decoder.embed(ids, None if answer.rows is None else answer.rows.flatten(0, 1))


def unround_rotary(decoder: Decoder, positions: int) -> None:
    """Give the decoder the rotary tables that transformers computes, the one known difference."""
    h = decoder.config.head_dim
    angle = rotary_angles(h, decoder.config.rope_theta, positions)
    cos, sin = angle.cos(), angle.sin()
    decoder.cos, decoder.sin = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)


class _Layers(Protocol):
    def __call__(self) -> list[Tensor]: ...


@contextmanager
def _watched(blocks: Sequence[nn.Module]) -> Iterator[_Layers]:
    """Collect the input of the first block and the output of each, over any number of calls for one sequence."""
    seen: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]

    def keep(index: int, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        seen[index].append(rms(value.detach().float()).reshape(-1, value.size(-1)))

    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda _module, args, kwargs: keep(0, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    ]
    for index, block in enumerate(blocks, start=1):
        hooks.append(block.register_forward_hook(lambda _module, _args, out, i=index: keep(i, out)))
    try:
        yield lambda: [torch.cat(pieces) for pieces in seen]
    finally:
        for hook in hooks:
            hook.remove()


class Prompts:
    """The fixed prompts as the directory renders them, with its own tokenizer, template and processor."""

    def __init__(self, directory: Path, *, vision: bool) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        import ghostvis_cli.hf  # noqa: F401 - registers the classes

        self.processor = transformers.AutoProcessor.from_pretrained(directory) if vision else None
        self.tokenizer: Any = (
            self.processor.tokenizer
            if self.processor
            else transformers.AutoTokenizer.from_pretrained(directory)
        )

    def inputs(self, case: Case) -> tuple[list[int], Tensor | None]:
        """Ids, and the pixels (images, 3, S, S) where there are images."""
        conversation = case.for_template()
        if self.processor is None:
            ids: list[int] = self.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, return_dict=False
            )
            return ids, None
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True)
        images = [image.pil() for image in case.images] or None
        inputs = self.processor(images=images, text=text, return_tensors="pt")
        return inputs["input_ids"][0].tolist(), inputs.get("pixel_values")


def auto_class(*, vision: bool) -> Any:
    """The Auto class of transformers that users load such a directory with."""
    import transformers

    return transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM


class Converted:
    """The directory through its own loader: transformers' Auto classes, in float32."""

    def __init__(self, directory: Path, *, vision: bool) -> None:
        self.vision = vision
        self.prompts = Prompts(directory, vision=vision)
        self.model = auto_class(vision=vision).from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(self, case: Case, greedy: list[int]) -> Observation:
        """The same positions as the source's: the prompt as the directory renders it, then the source's tokens."""
        ids, pixels = self.prompts.inputs(case)
        extended = torch.tensor([[*ids, *greedy[:-1]]])
        extra = {} if pixels is None else {"pixel_values": pixels}
        base = self.model.model.language_model if self.vision else self.model.model
        with _watched(list(base.layers)) as layers:
            logits = self.model(input_ids=extended, **extra).logits[0].float()
        if type(self.model).__name__ == "Qwen3ForCausalLM":  # which reads no cap from its configuration
            cap = self.model.config.final_logit_softcapping
            logits = cap * torch.tanh(logits / cap)
        rows = None if pixels is None else self.model.get_image_features(pixels)
        return Observation(
            ids, logits[len(ids) - 1 :].argmax(-1).tolist(), logits, layers(), pixels=pixels, rows=rows
        )
