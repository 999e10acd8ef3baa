"""What slash commands need of the front end: a terminal, or a script's two streams."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Options:
    """How a chat is shown. The words of the command line; what concerns the model is in the profile."""

    raw: bool = False  # the model's text as it is, without Markdown
    stats: bool = False  # a line of statistics after each reply
    json: bool = False  # script mode: one record per turn
    history: bool = True  # remember typed lines
    preview: bool = True  # show images as they are attached
    quiet: bool = False
    resumed: bool = False  # an earlier session goes on
    images: tuple[str, ...] = field(default=())  # attached before the first message


@dataclass(frozen=True)
class Clip:
    """What was on the clipboard: an encoded image or a text, whichever it holds."""

    text: str | None = None
    image: bytes | None = field(default=None, repr=False)


class Surface(Protocol):
    """All calls return when they are done; none is made while a reply is being shown."""

    def say(self, text: str) -> None:
        """What a command was asked to print; may have several lines."""

    def answer(self, text: str) -> None:
        """Text that was asked for on stdout, written as it is."""

    def note(self, text: str) -> None:
        """One line that a person may want to know."""

    def show_image(self, image: "Image.Image", caption: str) -> None:
        """A small RGB image, with a line about it."""

    def edit_text(self, text: str) -> str | None:
        """Let the user change a text in an editor; None where they left without one."""

    def clipboard(self) -> Clip:
        """What the clipboard holds; GhostvisError where there is no way to ask."""
