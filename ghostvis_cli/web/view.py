"""How a conversation looks: messages as Gradio's chatbot takes them, and lines around them. Imports no Gradio.

What people and models wrote stays Markdown that holds no HTML and fetches no image; all HTML is written here.
"""

import asyncio
import mimetypes
import re
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostvis_cli import files
from ghostvis_cli.chat.commands import chip, context, share_seen
from ghostvis_cli.chat.export import closed
from ghostvis_cli.chat.session import Reply, Turn
from ghostvis_cli.chat.store import PRIVATE
from ghostvis_cli.chat.transcript import image_hash

if TYPE_CHECKING:
    from ghostvis_cli.images import EncodedImage
    from ghostvis_cli.web.desk import Desk

SHOWN_PIXELS = 640  # the long side of an image in the page
DIMMED = 0.35  # how bright the parts are that the model does not see
NAME_BYTES = 200  # of a file; the system's limit is 255
_STRANGE = re.compile(r"[^\w. ()-]")

# Should HTML get past `closed`, then not as these elements, which load or do something: Gradio shows their text.
ACTIVE = [
    "audio", "base", "details", "dialog", "embed", "foreignobject", "form", "frame", "iframe", "image", "img",
    "link", "map", "math", "meta", "object", "picture", "portal", "script", "select", "source", "style", "template",
    "textarea", "track", "use", "video",
]  # fmt: skip

Message = dict[str, Any]


class View:
    """What pages show of a desk. `folder` takes the images as they are shown."""

    def __init__(self, desk: "Desk", folder: Path) -> None:
        self.desk, self.folder = desk, folder
        self._written: set[Path] = set()  # for the box, of images that were not sent

    # Messages

    def messages(self) -> list[Message]:
        """One for each thing in a bubble of its own: Gradio can change the text of no other."""
        return [message for turn in self.desk.chat.session.turns for message in self._of(turn)]

    def coming(self, text: str) -> list[Message]:
        """The reply so far, if there is a word of it."""
        return [_said("assistant", inert(text))] if text else []

    def turn_at(self, message: int) -> int:
        """The turn that a message belongs to, by their numbers."""
        owners = [n for n, turn in enumerate(self.desk.chat.session.turns) for _ in self._of(turn)]
        return owners[message]

    def text_of(self, turn: int, shown: str) -> str:
        """A message's text after people changed what `inert` may have changed before."""
        text = self.desk.chat.session.turns[turn].text
        if inert(text) in (text, shown):
            return shown if inert(text) == text else text
        return shown.replace("&lt;", "<").replace("!\\[", "![")

    def _of(self, turn: Turn) -> list[Message]:
        found: list[Message] = []
        for image in turn.images:
            shown = {"path": str(self._file(image)), "alt_text": image.name}
            found += [{"role": "user", "content": shown}, _small("user", self._caption(image))]
        found.append(_said("user", inert(turn.text)))
        return found + _answer(turn.reply) if turn.reply else found

    def _caption(self, image: "EncodedImage") -> str:
        """ "cat.jpg 640x480 · the central square, 75 % of it · 64 tokens"."""
        engine = self.desk.chat.engine
        tokens = [f"{engine.info.image_tokens} tokens"] if engine and engine.info.image_tokens else []
        return " · ".join([chip(image), share_seen(image), *tokens])

    # Images

    async def draw(self) -> None:
        """Make the files that are missing, and remove those of images that are gone. Holds until the next await."""
        while missing := [path for path in self._files() if not path.exists()]:
            await asyncio.to_thread(_draw, self._files()[missing[0]], missing[0])
        for path in self.folder.glob("*.webp"):
            if path not in self._files():
                path.unlink()
        for path in self._written - {self._original(image) for image in self.desk.chat.session.pending}:
            path.unlink(missing_ok=True)
            self._written.remove(path)

    def _files(self) -> dict[Path, "EncodedImage"]:
        return {self._file(image): image for image in self.desk.chat.session.images}

    def pending(self) -> list[Message]:
        """The images of a message that was not answered, as the box takes files."""
        found = []
        for image in self.desk.chat.session.pending:
            path = self._original(image)
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                files.write(path, image.data, mode=PRIVATE, durable=False)
                self._written.add(path)
            found.append({"path": str(path), "orig_name": path.name, "mime_type": image.mime})
        return found

    def _original(self, image: "EncodedImage") -> Path:
        return self.folder / image_hash(image) / _file_name(image)

    def _file(self, image: "EncodedImage") -> Path:
        return self.folder / f"{image_hash(image)}.webp"

    # Around the messages

    def status(self) -> str:
        """The model, and how full it is."""
        chat = self.desk.chat
        info = chat.engine.info if chat.engine else None
        model = f"{info.tag or info.model.rsplit('/', 1)[-1]} · {info.kind}" if info else "no model yet"
        used, limit = chat.context_used() or 0, chat.context_tokens
        meter = f'<progress max="{limit}" value="{used}"></progress>' if limit else ""
        return f"<div><b>{escape(model)}</b><span>{meter} {escape(context(chat))}</span></div>"

    @staticmethod
    def lines(lines: list[str]) -> str:
        return "".join(f"<p>{escape(line)}</p>" for line in lines)


def inert(text: str) -> str:
    """Somebody's Markdown, as it may be shown. Of diagrams Gradio would make HTML once more, so they stay text."""
    return closed(text).replace("```mermaid", "``` mermaid")


def _file_name(image: "EncodedImage") -> str:
    """Its name as files and addresses can have it, with an ending: Gradio tells images by that."""
    name = _STRANGE.sub("_", Path(image.name).name).lstrip(".").encode()[-NAME_BYTES:].decode(errors="ignore")
    if (mimetypes.guess_type(name, strict=False)[0] or "").startswith("image/"):
        return name
    return (name or "image") + (mimetypes.guess_extension(image.mime, strict=False) or ".png")


def _answer(reply: Reply) -> list[Message]:
    cut = "cut off at max_tokens · " if reply.finish_reason == "length" else ""
    told = f"{reply.notice} · " if reply.notice else ""
    text = [_said("assistant", inert(reply.text))] if reply.text else []
    return [*text, _small("assistant", told + cut + reply.statistics())]


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": {"type": "text", "text": text}}


def _small(role: str, text: str) -> Message:
    return _said(role, f"<small>{escape(text)}</small>")


def _draw(image: "EncodedImage", path: Path) -> None:
    """The image small, and dark where the model does not see it."""
    shown = image.pil().copy()
    shown.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    side = min(shown.size)
    left, top = (shown.width - side) // 2, (shown.height - side) // 2
    square = (left, top, left + side, top + side)
    dark = shown.point(lambda value: value * DIMMED)
    dark.paste(shown.crop(square), square)
    file = BytesIO()
    dark.save(file, "WEBP", quality=88)
    files.write(path, file.getvalue(), mode=PRIVATE, durable=False)
