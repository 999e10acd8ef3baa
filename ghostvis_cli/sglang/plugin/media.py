"""An image of a request -> the square that the model sees, and its identity. Cached, so a repeat costs one hash.

Independent of SGLang, whose own cache for this came after 0.5.17 and trusts hashes that clients may send.
"""

import hashlib
import hmac
import os
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ghostvis_cli.errors import InputError
from ghostvis_cli.fetch import is_from
from ghostvis_cli.image_limits import ImageLimits
from ghostvis_cli.images import load_image
from ghostvis_cli.model.preprocess import crop
from ghostvis_cli.sglang.plugin import BACKGROUND_VARIABLE, HOSTS_VARIABLE, IMAGE_KEY_VARIABLE

if TYPE_CHECKING:
    from numpy.typing import NDArray

CACHE_VARIABLE = "GHOSTVIS_PICTURE_CACHE_MB"
CACHE_MB = 128  # 890 images of 224 pixels


@dataclass(frozen=True)
class LoadedImage:
    """`pixels` (S, S, 3) uint8. `identity`: 32 bytes, equal for equal pixels within this process alone."""

    pixels: "NDArray[Any]"
    identity: bytes


class ImageStore:
    """Loads and caches images of S x S pixels. Thread-safe."""

    def __init__(
        self,
        size: int,
        *,
        hosts: frozenset[str] | None = None,
        limits: ImageLimits | None = None,
        cache_mb: float | None = None,
    ) -> None:
        self.size = size
        self.cache_bytes = 2**20 * (cache_size_mb() if cache_mb is None else cache_mb)
        self.hosts = allowed_hosts() if hosts is None else hosts
        # A redirect would lead from an allowed host to any other.
        self.limits = replace(limits or default_limits(), max_redirects=0)
        # Keyed, so that a client that knows an image can't compute its identity.
        self._key = identity_key()
        self._known: OrderedDict[bytes, LoadedImage] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, source: object, name: str, key: bytes | None = None) -> LoadedImage:
        """Load a data: URL, bytes, or http(s) of an allowed host; `key` is its cache key, if already computed.

        ValueError says what is wrong with `name`, and nothing of the source's content or where it redirects.
        """
        key = key or self.key(source, name)
        if key is not None and (known := self.recall(key)) is not None:
            return known
        try:
            image = self._image(load_image(source, limits=self.limits).pil())  # type: ignore[arg-type]
        except InputError:
            raise ValueError(self._refusal(source, name)) from None
        if key is not None:
            self._remember(key, image)
        return image

    def key(self, source: object, name: str) -> bytes | None:
        """The cache key of a source; None for an address, whose image may change."""
        if isinstance(source, bytes):
            return hashlib.sha256(source).digest()
        if isinstance(source, str):
            if source[:5].lower() == "data:":
                return hashlib.sha256(source.encode("utf-8", "surrogatepass")).digest()
            if is_from(source, self.hosts):
                return None
        hosts = f", or an http(s) URL of {', '.join(sorted(self.hosts))}" if self.hosts else ""
        raise ValueError(f"{name} must be a data: URL{hosts}")

    def recall(self, key: bytes) -> LoadedImage | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def _refusal(self, source: object, name: str) -> str:
        if isinstance(source, str) and source[:5].lower() != "data:":
            return f"{name} could not be fetched as an image"
        return (
            f"{name} is not a whole image in a known format, "
            f"or larger than {self.limits.max_pixels:,} pixels or {self.limits.size}"
        )

    def _image(self, image: Any) -> LoadedImage:
        import numpy as np

        pixels = np.array(crop(image, self.size), dtype=np.uint8)  # a copy: torch warns of Pillow's memory
        return LoadedImage(pixels, hmac.digest(self._key, pixels.tobytes(), "sha256"))

    def _remember(self, key: bytes, image: LoadedImage) -> None:
        with self._lock:
            self._known[key] = image
            while len(self._known) * image.pixels.nbytes > self.cache_bytes:  # all have one size
                self._known.popitem(last=False)


def default_limits() -> ImageLimits:
    background = os.environ.get(BACKGROUND_VARIABLE)
    return ImageLimits(background=background) if background else ImageLimits()


def allowed_hosts() -> frozenset[str]:
    """The hosts in GHOSTVIS_ALLOWED_IMAGE_HOSTS, separated by commas; none by default."""
    names = os.environ.get(HOSTS_VARIABLE, "").split(",")
    return frozenset(name.strip().lower() for name in names if name.strip())


def identity_key() -> bytes:
    """This process's own key, or the one that several share, so that an image has the same identity in all."""
    shared = os.environ.get(IMAGE_KEY_VARIABLE)
    return bytes.fromhex(shared) if shared else secrets.token_bytes(32)


def cache_size_mb() -> float:
    """The size in GHOSTVIS_PICTURE_CACHE_MB; 0 caches nothing."""
    chosen = os.environ.get(CACHE_VARIABLE, str(CACHE_MB))
    try:
        return float(chosen)
    except ValueError:
        raise ValueError(f"{CACHE_VARIABLE} is {chosen!r}: a number of megabytes") from None
