"""Prompt ids and images -> the scheduler's input: N ids for each image, pixels, identities."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens
from sglang.srt.utils import ImageData

from ghostvis_cli.sglang.plugin.expand import expand
from ghostvis_cli.sglang.plugin.media import ImageStore, LoadedImage
from ghostvis_cli.sglang.plugin.models.vision_language import GhostVisForConditionalGeneration

HASHED_IN_LOOP = 2**18  # characters: below a millisecond, and a thread costs some tenths of one too
T = TypeVar("T")


class GhostVisMultimodalProcessor(BaseMultimodalProcessor):
    models = [GhostVisForConditionalGeneration]  # noqa: RUF012 - as the base class declares it
    gpu_image_decode = False  # pixels as training saw them, and no CUDA context in this process
    prefer_tokenized_input = True  # a typed <|image|> is already encoded as text, and must stay so

    def __init__(self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.image_id, self.layout = hf_config.image_token_id, hf_config.image_layout
        self.rows = hf_config.vision_config.num_tokens
        self.images = ImageStore(hf_config.vision_config.image_size)
        self._reading: dict[bytes, asyncio.Task[LoadedImage]] = {}
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
        """ValueError, which SGLang answers as 400, where ids and images do not fit together."""
        if audio_data or getattr(request_obj, "video_data", None):
            raise ValueError("this model takes images, no audio and no video")
        sources = [source.url if isinstance(source, ImageData) else source for source in image_data or ()]
        ids, spans = expand(self._ids(input_text), self.image_id, self.rows, len(sources), self.layout)
        self._forget_hashes(request_obj)
        named = ((source, f"image {number}") for number, source in enumerate(sources, start=1))
        images = await asyncio.gather(*(self._image(source, name) for source, name in named))
        items = [self._item(image, span) for image, span in zip(images, spans, strict=True)]
        return MultimodalProcessorOutput(input_ids=ids, mm_items=items, im_token_id=self.image_id)

    async def _image(self, source: object, name: str) -> LoadedImage:
        """A cached image needs no thread; one that several requests need at once is read by the first."""
        key = await self._key(source, name)
        if key is None:
            return await self._read(source, name, None)
        if (known := self.images.recall(key)) is not None:
            return known
        if key not in self._reading:
            self._reading[key] = asyncio.create_task(self._read(source, name, key))
            self._reading[key].add_done_callback(lambda _: self._reading.pop(key))
            return await asyncio.shield(self._reading[key])
        try:
            return await asyncio.shield(self._reading[key])
        except ValueError:  # names the first request's field
            return await self._read(source, name, key)

    async def _read(self, source: object, name: str, key: bytes | None) -> LoadedImage:
        return await self._thread(partial(self.images.load, source, name, key))

    async def _key(self, source: object, name: str) -> bytes | None:
        make = partial(self.images.key, source, name)
        is_long = isinstance(source, str | bytes) and len(source) > HASHED_IN_LOOP
        return await self._thread(make) if is_long else make()

    async def _thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.io_executor, work)

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt, add_special_tokens=False))
        return list(prompt or ())

    @staticmethod
    def _forget_hashes(request: Any) -> None:
        """Ignore identities sent by clients: two images with the same one would get each other's answers."""
        for field in ("mm_hashes", "mm_content_hashes"):
            if getattr(request, field, None) is not None:
                setattr(request, field, None)

    @staticmethod
    def _item(image: LoadedImage, span: tuple[int, int]) -> MultimodalDataItem:
        """One image, one item, one span, so that each has an identity of its own.

        An array, not a tensor: it is sent within the message, where SGLang would put each tensor into a file of
        shared memory, which costs more than copying so little and is left behind when a scheduler dies.
        """
        item = MultimodalDataItem(modality=Modality.IMAGE, feature=image.pixels[None], offsets=[span])
        if hasattr(item, "set_identity"):
            item.set_identity(image.identity)
        else:  # 0.5.17
            item.set_hash(int.from_bytes(image.identity[:8], "big"))
        return item
