"""Images and text -> what the model takes: our own preprocessing, and N image ids in each image's place."""

import re
from collections.abc import Iterator, Sequence
from os.path import isfile
from typing import Any, ClassVar

import torch
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image
from transformers.processing_utils import MultiModalData, ProcessorMixin

from ghostvis_cli.model.config import Layout
from ghostvis_cli.model.preprocess import HALF, preprocess
from ghostvis_cli.transparency import WHITE, on_ground

# What stands in a rendered conversation for each image: its rows' place, and in prepend_slots its slots too.
MARKS_AN_IMAGE: dict[Layout, int] = {"inline": 1, "prepend": 1, "prepend_slots": 2, "prepend_literal": 1}


class GhostVisImageProcessor(BaseImageProcessor):
    """Shortest side to `image_size`, centre crop, normalise: pixel for pixel what training did."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 - as the base class declares it

    def __init__(
        self,
        image_size: int = 224,
        image_mean: Sequence[float] = HALF,
        image_std: Sequence[float] = HALF,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """Upright images (Pillow, path, array or tensor; nested or not) -> pixel_values (B, 3, S, S)."""
        mean, std = tuple(self.image_mean), tuple(self.image_std)
        pixels = [
            torch.from_numpy(preprocess(image, self.image_size, mean, std))  # type: ignore[arg-type]
            for image in _flat(images)
        ]
        return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors)


def _flat(images: Any) -> Iterator[Image.Image]:
    if isinstance(images, list | tuple):
        for image in images:
            yield from _flat(image)
    elif isinstance(images, str) and not isfile(images):  # noqa: PTH113 - Path raises on long names
        yield load_image(images)
    else:
        yield _opaque(images)


def _opaque(image: Any) -> Image.Image:
    """RGB, on white where it is transparent: PIL's `convert` would show the colours under transparent pixels."""
    if isinstance(image, str):
        with Image.open(image) as opened:
            image = ImageOps.exif_transpose(opened)
    elif not isinstance(image, Image.Image):
        image = to_pil_image(image)
    return on_ground(image, image.convert("RGB"), WHITE)


class GhostVisProcessor(ProcessorMixin):
    """A tokenizer and an image processor. Text comes from the chat template, one image token an image."""

    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 64,
        image_layout: Layout = "inline",
        image_token: str = "<|image|>",
        **_: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.num_image_tokens, self.image_layout = num_image_tokens, image_layout
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """input_ids and attention_mask (B, T), and pixel_values of all images where there are any."""
        if text is None:
            raise ValueError(
                "there is no text: even an image alone needs its place in a rendered conversation"
            )
        texts = [text] if isinstance(text, str) else list(text)
        found = {}
        count = 0
        if images is not None and (flat := list(_flat(images))):
            found = dict(self.image_processor(flat, return_tensors="pt"))
            count = len(flat)
        marks = sum(sample.count(self.image_token) for sample in texts)
        if marks != count * MARKS_AN_IMAGE[self.image_layout]:
            raise ValueError(
                f"{count} images need {count * MARKS_AN_IMAGE[self.image_layout]} times "
                f"{self.image_token} in layout {self.image_layout}, the text has {marks}"
            )
        rows = self.replace_image_token(found, 0)
        expanded = [sample.replace(self.image_token, rows) for sample in texts]
        offsets = kwargs.pop("return_text_replacement_offsets", False) and [*map(self._replacements, texts)]
        for name in ("add_special_tokens", "padding_side", "text_kwargs", "images_kwargs", "common_kwargs"):
            kwargs.pop(name, None)
        allowed = {name: kwargs[name] for name in ("padding", "truncation", "max_length") if name in kwargs}
        encoded = self.tokenizer(expanded, add_special_tokens=False, **allowed)
        batch = BatchFeature({**encoded, **found}, tensor_type=return_tensors)
        if offsets:
            batch["text_replacement_offsets"] = offsets
        return batch

    # --- what vLLM's backend of transformers' models asks

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """What takes the place of an image's token: one for each of its rows."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **_: Any) -> MultiModalData:
        """Rows of images of any size, and items of `pixel_values` each."""
        self._require_inline()
        count = len(image_sizes or ())
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def _replacements(self, text: str) -> list[dict[str, Any]]:
        """Each image token of a text: its place before and after, and what replaces it."""
        self._require_inline()
        replacement = self.replace_image_token({}, 0)
        found: list[dict[str, Any]] = []
        for match in re.finditer(re.escape(self.image_token), text):
            first = match.start() + len(found) * (len(replacement) - len(self.image_token))
            spans = {"span": match.span(), "new_span": (first, first + len(replacement))}
            found.append({"type": "image", "text": match[0], "replacement": replacement, **spans})
        return found

    def _require_inline(self) -> None:
        if self.image_layout != "inline":
            raise ValueError(
                f"layout {self.image_layout} puts an image's rows where its token does not stand, which vLLM can't "
                "serve: ghostvis convert --layout inline, where the model was trained so, or ghostvis serve"
            )

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]
