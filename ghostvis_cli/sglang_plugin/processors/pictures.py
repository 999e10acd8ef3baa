"""Prompt ids and pictures -> what SGLang's scheduler takes: N ids for each picture, pixels, identities."""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens
from sglang.srt.utils import ImageData

from ghostvis_cli.sglang_plugin.expand import expand
from ghostvis_cli.sglang_plugin.media import Picture, Pictures
from ghostvis_cli.sglang_plugin.models.vision_language import GhostVisForConditionalGeneration


class GhostVisPictureProcessor(BaseMultimodalProcessor):
    models = [GhostVisForConditionalGeneration]  # noqa: RUF012 - as the base class declares it
    gpu_image_decode = False  # pixels as training saw them, and no CUDA context in this process
    prefer_tokenized_input = True  # a typed <|image|> has become text by now, and must stay text

    def __init__(self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.image_id, self.layout = hf_config.image_token_id, hf_config.image_layout
        self.rows = hf_config.vision_config.num_tokens
        self.pictures = Pictures(hf_config.vision_config.image_size)
        name = self._tokenizer.convert_ids_to_tokens(self.image_id)
        self.mm_tokens = MultimodalSpecialTokens(image_token=name, image_token_id=self.image_id).build(
            _processor
        )

    async def process_mm_data_async(
        self,
        image_data: Sequence[Any] | None = None,
        audio_data: Sequence[Any] | None = None,
        input_text: Any = None,
        request_obj: Any = None,
        **_: Any,
    ) -> MultimodalProcessorOutput:
        """ValueError, which SGLang answers as 400, where ids and pictures do not belong together."""
        if audio_data or getattr(request_obj, "video_data", None):
            raise ValueError("this model takes pictures, no audio and no video")
        sources = [source.url if isinstance(source, ImageData) else source for source in image_data or ()]
        ids, spans = expand(self._ids(input_text), self.image_id, self.rows, len(sources), self.layout)
        self._forget_hashes(request_obj)
        loop = asyncio.get_running_loop()
        pictures = await asyncio.gather(
            *(
                loop.run_in_executor(self.io_executor, self.pictures.load, source, f"image {number}")
                for number, source in enumerate(sources, start=1)
            )
        )
        items = [self._item(picture, span) for picture, span in zip(pictures, spans, strict=True)]
        return MultimodalProcessorOutput(input_ids=ids, mm_items=items, im_token_id=self.image_id)

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt, add_special_tokens=False))
        return list(prompt or ())

    @staticmethod
    def _forget_hashes(request: Any) -> None:
        """A client's word for which pictures are the same would mix up what they are answered with."""
        for field in ("mm_hashes", "mm_content_hashes"):
            if getattr(request, field, None) is not None:
                setattr(request, field, None)

    @staticmethod
    def _item(picture: Picture, span: tuple[int, int]) -> MultimodalDataItem:
        """One picture, one item, one span, so that each has an identity of its own."""
        pixels = torch.from_numpy(picture.pixels)[None]
        item = MultimodalDataItem(modality=Modality.IMAGE, feature=pixels, offsets=[span])
        if hasattr(item, "set_identity"):
            item.set_identity(picture.identity)
        else:  # 0.5.17
            item.set_hash(int.from_bytes(picture.identity[:8], "big"))
        return item
