"""A conversation -> token ids, for each way a GhostVis model may have been taught to see its images.

The one home of placeholder arithmetic. An image takes `num_image_tokens` rows (N); in the ids such a row is
`VISION_ROW`, a number no tokenizer uses, so it can never be mistaken for something a user typed.

    layout            rows of image k                       what stands in the text
    inline            in the turn, where the image stands   nothing
    prepend           before everything                       nothing
    prepend_slots     before everything                       N ordinary `<|image|>` tokens
    prepend_literal   before everything                       the nine characters `<|image|>`
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from ghostvis_cli.encoding import well_formed
from ghostvis_cli.errors import InputError, RequestError

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.tokenizer import Tokenizer
    from ghostvis_cli.images import EncodedImage
    from ghostvis_cli.model.config import Layout

VISION_ROW = -1
IMAGE_TEXT = "<|image|>"
Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Text:
    """A piece of a message's text."""

    text: str

    def __post_init__(self) -> None:
        well_formed(self.text, "the text")


@dataclass(frozen=True)
class ImagePart:
    """An image's place in a message."""

    image: "EncodedImage"


@dataclass(frozen=True)
class Tool:
    """What an assistant ran (`python`) or was answered (`output`), between its own pair of special tokens."""

    kind: Literal["python", "output"]
    text: str


Part: TypeAlias = Text | ImagePart | Tool


@dataclass(frozen=True)
class Message:
    """One turn. Images belong to the turn they stand in."""

    role: Role
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, role: Role, text: str, images: Sequence["EncodedImage"] = ()) -> "Message":
        """A turn as GhostVis was trained: each image on a line of its own, then the text."""
        return cls(role, with_line_breaks([*(ImagePart(image) for image in images), Text(text)]))

    @property
    def images(self) -> tuple["EncodedImage", ...]:
        return tuple(part.image for part in self.parts if isinstance(part, ImagePart))

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))


def with_line_breaks(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Parts in their order with the line break that training put after every image."""
    broken: list[Part] = []
    for part in parts:
        after_image = bool(broken) and isinstance(broken[-1], ImagePart)
        if after_image and not (isinstance(part, Text) and part.text.startswith("\n")):
            broken.append(Text("\n"))
        broken.append(part)
    return tuple(broken)


@dataclass(frozen=True)
class Prompt:
    """`ids` with N consecutive VISION_ROWs for each of `images`, in order. `mask` is 1 where training has loss."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]
    images: tuple["EncodedImage", ...] = ()

    @property
    def image_tokens(self) -> int:
        return self.ids.count(VISION_ROW)


def render(
    messages: Sequence[Message],
    tokenizer: "Tokenizer",
    layout: "Layout" = "inline",
    num_image_tokens: int = 0,
) -> Prompt:
    """The whole conversation, every turn closed (format specification, section 6.5)."""
    out = _Writer(tokenizer, layout, num_image_tokens)
    out.special("<|bos|>")
    for message in merged(messages):
        if message.role == "user":
            out.special("<|user_start|>")
            out.parts(message.parts, loss=0)
            out.special("<|user_end|>")
        else:
            out.special("<|assistant_start|>")
            out.parts(message.parts, loss=1)
            out.special("<|assistant_end|>", loss=1)
    return out.prompt()


def render_for_reply(
    messages: Sequence[Message],
    tokenizer: "Tokenizer",
    layout: "Layout" = "inline",
    num_image_tokens: int = 0,
) -> Prompt:
    """The conversation up to where the assistant goes on: behind its own last words, or at a new reply."""
    prompt = render(messages, tokenizer, layout, num_image_tokens)
    if messages[-1].role == "assistant":
        return Prompt(prompt.ids[:-1], prompt.mask[:-1], prompt.images)
    start = tokenizer.special("<|assistant_start|>")
    return Prompt((*prompt.ids, start), (*prompt.mask, 0), prompt.images)


def render_text(text: str, tokenizer: "Tokenizer") -> Prompt:
    """Raw text to be continued, as for a base model: BOS and the text."""
    ids = (tokenizer.special("<|bos|>"), *tokenizer.encode(text))
    return Prompt(ids, (0,) * len(ids))


def merged(messages: Sequence[Message]) -> list[Message]:
    """Turns that alternate, as training had them: the chat template of converted directories does the same.

    A system text goes in front of the next user text. Messages of one role in a row are one turn, an empty line
    between them. An assistant that speaks first stays first. InputError where there is nothing to answer.
    """
    turns: list[Message] = []
    system = ""
    for message in messages:
        if message.role == "system":
            if message.images:
                raise InputError("a system message can't hold an image: attach it to a user message")
            system += f"{message.text}\n\n"
            continue
        parts = message.parts
        if message.role == "user" and system:
            parts, system = (Text(system), *parts), ""
        if turns and turns[-1].role == message.role:
            turns[-1] = Message(message.role, (*turns[-1].parts, Text("\n\n"), *parts))
        else:
            turns.append(Message(message.role, parts))
    if system:
        raise InputError("a system message must be followed by a user message")
    if not any(turn.role == "user" for turn in turns):
        raise InputError("no message is the user's, so there is nothing to answer")
    return turns


class _Writer:
    """Collects ids and mask. Text on both sides of nothing is joined before it is encoded."""

    def __init__(self, tokenizer: "Tokenizer", layout: "Layout", num_image_tokens: int) -> None:
        self.tokenizer, self.layout, self.rows = tokenizer, layout, num_image_tokens
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.images: list[EncodedImage] = []

    def add(self, ids: Sequence[int], loss: int) -> None:
        self.ids.extend(ids)
        self.mask.extend([loss] * len(ids))

    def special(self, name: str, loss: int = 0) -> None:
        self.add([self.tokenizer.special(name)], loss)

    def parts(self, parts: Sequence[Part], loss: int) -> None:
        text = ""
        for part in parts:
            if isinstance(part, Text):
                text += part.text
                continue
            if isinstance(part, ImagePart) and self.layout in ("prepend", "prepend_literal"):
                self.image(part)
                text += IMAGE_TEXT if self.layout == "prepend_literal" else ""
                continue
            self.add(self.tokenizer.encode(text), loss)
            text = ""
            if isinstance(part, ImagePart):
                self.image(part)
            else:
                self.tool(part)
        self.add(self.tokenizer.encode(text), loss)

    def image(self, part: ImagePart) -> None:
        if not self.rows:
            raise RequestError(
                "this model reads text only, so it can't be given an image", hint="choose a vision checkpoint"
            )
        self.images.append(part.image)
        if self.layout == "inline":
            self.add([VISION_ROW] * self.rows, 0)
        elif self.layout == "prepend_slots":
            if self.tokenizer.image_id is None:
                raise RequestError(
                    "layout prepend_slots needs a tokenizer with <|image|>, and this model's has none",
                    hint="--layout inline",
                )
            self.add([self.tokenizer.image_id] * self.rows, 0)

    def tool(self, part: Tool) -> None:
        loss = int(part.kind == "python")
        self.special(f"<|{part.kind}_start|>", loss)
        self.add(self.tokenizer.encode(part.text), loss)
        self.special(f"<|{part.kind}_end|>", loss)

    def prompt(self) -> Prompt:
        front = 0 if self.layout == "inline" else self.rows * len(self.images)
        return Prompt(
            (VISION_ROW,) * front + tuple(self.ids), (0,) * front + tuple(self.mask), tuple(self.images)
        )
