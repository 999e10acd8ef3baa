"""Images for tests, and files of them."""

import base64
import io
from typing import Any

from PIL import Image

from ghostvis_cli.images import EncodedImage, load_image

Color = str | tuple[int, ...]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(color: Color = "red", size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    return encoded(Image.new(mode, size, color))


def an_image(color: Color = "red", size: tuple[int, int] = (40, 30)) -> EncodedImage:
    return load_image(Image.new("RGB", size, color))


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
