"""What an image may cost, and what its transparent parts are laid on. No imaging library."""

from dataclasses import dataclass

from ghostvis_cli.errors import UsageError
from ghostvis_cli.transparency import WHITE, ground_colour


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost. The defaults admit what cameras make and nothing that stops a laptop.

    `background` is what shows where an image is transparent.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000  # 192 MB as RGB; full-frame cameras end at 61 million
    max_aspect: float = 100.0  # the long side is resized before the crop: 336 x 33,600 is 11 million pixels
    timeout_s: float = 20.0  # name lookup, every redirect and the whole body together
    max_redirects: int = 3
    allow_private: bool = False  # loopback, link-local (cloud metadata), private networks and the like
    background: str = "white"

    def __post_init__(self) -> None:
        if ground_colour(self.background) is None:
            raise UsageError(f"background is {self.background!r}, not white, black, grey or #rrggbb")

    @property
    def ground(self) -> tuple[int, int, int]:
        """`background` as RGB."""
        return ground_colour(self.background) or WHITE

    @property
    def size(self) -> str:
        """`max_bytes` for messages."""
        return f"{self.max_bytes / 2**20:g} MiB" if self.max_bytes >= 2**20 else f"{self.max_bytes} bytes"


DEFAULT_LIMITS = ImageLimits()
