"""The fixed prompts, images and texts that a conversion is verified with. No tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ghostvis_cli import demo
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.images import EncodedImage, load_image
from ghostvis_cli.model.config import Layout
from ghostvis_cli.prompt import ImagePart, Message, Part, Prompt, Text, render_for_reply, with_line_breaks

PARAGRAPH = (
    "The harbour wakes before the town does. Nets are mended on the quay, crates of ice are dragged across wet "
    "stone, and a radio that nobody listens to reads out the weather: wind from the south-west, force 4 to 5, "
    "rain later, visibility 2.5 miles. By 06:30 the first boats are back; by 7 o'clock everything that can be "
    "sold has been. What did the fishermen do first, and what does that tell you about their day?"
)


@dataclass(frozen=True)
class Case:
    """A conversation that ends with a user's turn."""

    name: str
    messages: tuple[Message, ...]

    def prompt(self, tokenizer: Tokenizer, layout: Layout | None, num_image_tokens: int) -> Prompt:
        return render_for_reply(self.messages, tokenizer, layout or "inline", num_image_tokens)

    def for_template(self) -> list[dict[str, Any]]:
        """The same as OpenAI-style messages. Images stand as {"type": "image"}, in the order of `images`."""
        return [{"role": m.role, "content": _content(m)} for m in self.messages]

    @property
    def images(self) -> tuple[EncodedImage, ...]:
        return tuple(image for message in self.messages for image in message.images)


def _content(message: Message) -> str | list[dict[str, str]]:
    """A string for a turn of one text, so that both forms of content are verified."""
    if [type(part) for part in message.parts] == [Text]:
        return message.text
    return [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.parts
    ]


def cases(*, vision: bool) -> list[Case]:
    """Cases of text, and for vision models of images; the first case is the cheapest."""
    found = [
        Case("greeting", (Message.of("user", "Hello! Who are you?"),)),
        Case(
            "numbers",
            (Message.of("user", "17 * 24 = 408, 1234567 / 89 = 13871.5. 2**10 == 1024?\n\n\tdef f(x):"),),
        ),
        Case("scripts", (Message.of("user", "Übersetze: naïve café 漢字 かな한국어 🙂 — ¿qué?"),)),
        Case(
            "turns",
            (
                Message.of("system", "You answer in one sentence."),
                Message.of("user", "Name a colour."),
                Message.of("assistant", "Blue."),
                Message.of("user", "And a warm one?"),
            ),
        ),
        Case("paragraph", (Message.of("user", PARAGRAPH),)),
    ]
    return [*found, *_with_images()] if vision else found


def _with_images() -> list[Case]:
    circle, shapes, striped, cross = (load_image(str(path)) for path in demo.EXAMPLES)
    photo = load_image(str(demo.PHOTO))
    between: list[Part] = [
        Text("Between "),
        ImagePart(cross),
        Text(" and "),
        ImagePart(photo),
        Text("choose one."),
    ]
    return [
        Case("picture", (Message.of("user", "What is in this picture?", [shapes]),)),
        Case("photograph", (Message.of("user", "Describe it.", [photo]),)),
        Case("two images", (Message.of("user", "What differs?", [circle, striped]),)),
        Case("images among words", (Message("user", with_line_breaks(between)),)),
        Case(
            "image, then another",
            (
                Message.of("user", "What colour is it?", [circle]),
                Message.of("assistant", "Red."),
                Message.of("user", "And here?", [cross]),
            ),
        ),
    ]


def corpus() -> Iterator[str]:
    """Texts whose ids must agree: every code point below 0x3000, and edge cases of the split pattern."""
    yield from PARAGRAPH.split(". ")
    yield from ("", " ", "  ", "\n", "\r\n", "\t\n \n", "a\n\n\nb", " \u00a0 x", "x" * 500, " " * 100)
    yield from (
        "it's I'LL we've they'd",
        "1 12 123 1234 12345 3.14 1e-5",
        "don\u2019t \u2014 \u201cquotes\u201d \u2026",
        "<|bos",
        "|>",
    )
    yield "e\u0301 \u1100\u1161\u11a8 \U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea"
    yield "ß ẞ İ \u0131 ŉ ǆ"
    for start in (*range(0, 0x3000, 16), *range(0x3000, 0x20000, 1024)):
        block = "".join(chr(c) for c in range(start, start + 16) if not 0xD800 <= c < 0xE000)
        yield block
        yield " ".join(block)
