"""The image processor where many ask at once: what is read, how often, and what each is told."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ghostvis_cli.sglang.plugin.media import ImageStore, LoadedImage
from ghostvis_cli.sglang.plugin.processors.images import HASHED_IN_LOOP, GhostVisMultimodalProcessor
from tests.pictures import data_url, png

ASKING = 8


class Counted(ImageStore):
    """How often an image was read, which takes until `asked` are waiting."""

    def __init__(self) -> None:
        super().__init__(16, hosts=frozenset())
        self.reads, self.all_asked = 0, threading.Event()

    def _image(self, image: object) -> LoadedImage:
        self.reads += 1
        self.all_asked.wait(60)
        return super()._image(image)


def processor(images: ImageStore) -> GhostVisMultimodalProcessor:
    """Without a model, of which reading images knows nothing."""
    made = object.__new__(GhostVisMultimodalProcessor)
    made.images, made._reading, made.io_executor = images, {}, ThreadPoolExecutor(4)
    return made


async def asked(made: GhostVisMultimodalProcessor, images: Counted, source: str) -> list[object]:
    waiting = [asyncio.create_task(made._image(source, f"image {n}")) for n in range(ASKING)]
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(images.all_asked.set)
    return await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize("size", [(24, 20), (600, 500)], ids=["hashed at once", "hashed in a thread"])
def test_an_image_that_many_ask_about_at_once_is_read_once(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    from PIL import Image

    source, images = data_url(png_of(Image.fromarray(noise))), Counted()
    assert (len(source) > HASHED_IN_LOOP) is (size[0] > 100)
    found = asyncio.run(asked(processor(images), images, source))
    assert images.reads == 1
    assert {id(image) for image in found} == {id(found[0])}


def test_each_of_many_is_told_its_own_number_of_an_image_that_is_none() -> None:
    images = Counted()
    found = asyncio.run(asked(processor(images), images, data_url(b"no image")))
    assert [str(error).partition(" is ")[0] for error in found] == [f"image {n}" for n in range(ASKING)]


def test_a_reader_that_leaves_does_not_take_the_image_from_the_others() -> None:
    async def leave(made: GhostVisMultimodalProcessor, images: Counted) -> object:
        first = asyncio.create_task(made._image(data_url(png()), "image 1"))
        second = asyncio.create_task(made._image(data_url(png()), "image 1"))
        await asyncio.sleep(0)
        first.cancel()
        images.all_asked.set()
        return await second

    images = Counted()
    assert isinstance(asyncio.run(leave(processor(images), images)), LoadedImage)
    assert images.reads == 1


def png_of(image: object) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, "PNG")  # type: ignore[attr-defined]
    return file.getvalue()
