"""A conversation for reading: Markdown, HTML, or JSON in OpenAI's form. One file each, the images inside.

What people and models wrote is data. In HTML it is text and nothing else; in Markdown it stays Markdown, except
that it can hold no HTML, fetch no image, and leave no fence open over what follows.
"""

import json
import re
from html import escape
from typing import TYPE_CHECKING, Any

from ghostvis_cli.chat.session import Reply, Session, Turn
from ghostvis_cli.cli.output import CONTROL
from ghostvis_cli.version import SCHEMA_VERSION

if TYPE_CHECKING:
    from ghostvis_cli.images import EncodedImage

# No script, no address: even a browser that was fooled would load nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif;
       color: #222; background: #fff }
section { margin: 1rem 0; padding: .75rem 1rem; border-radius: .5rem; background: #f4f4f5 }
section.user { background: #e8f0fe }
h1 { font-size: 1.3rem } h2 { margin: 0 0 .25rem; font-size: .8rem; color: #555 }
p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: 20rem; max-height: 20rem; margin: .25rem .5rem .25rem 0 }
footer { font-size: .8rem; color: #555 }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #18181b } section { background: #27272a } section.user { background: #1e293b }
  h2, footer { color: #aaa }
}
"""
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


def export(session: Session, style: str, title: str) -> str:
    """`style` is md, json or html; `title` says which model and when."""
    return {"md": markdown, "html": html, "json": as_json}[style](session, title)


# --- JSON


def as_json(session: Session, title: str) -> str:
    """`messages` can be sent to any OpenAI-compatible server as it stands.

    `beside` holds what a server sent besides text, by the number of its message.
    """
    messages: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    if session.system:
        messages.append({"role": "system", "content": session.system})
    for turn in session.turns:
        messages.append({"role": "user", "content": _content(turn)})
        if turn.reply is not None:
            messages.append({"role": "assistant", "content": turn.reply.text})
            if found := turn.reply.beside.record():
                beside.append({"message": len(messages) - 1, **found})
    names = ("prompt", "image", "cached", "completion")
    whole: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "title": title, "messages": messages}
    whole |= {"beside": beside} if beside else {}
    whole["tokens"] = {name: getattr(session.totals, name) for name in names}
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"


def _content(turn: Turn) -> str | list[dict[str, Any]]:
    if not turn.images:
        return turn.text
    images = [{"type": "image_url", "image_url": {"url": image.data_url()}} for image in turn.images]
    return [*images, {"type": "text", "text": turn.text}]


# --- HTML


def html(session: Session, title: str) -> str:
    sections = [_section("system", "System", session.system)] if session.system else []
    for turn in session.turns:
        sections.append(_section("user", "You", turn.text, "".join(map(_img, turn.images))))
        if turn.reply is not None:
            sections.append(_section("assistant", "Model", turn.reply.text + _cut(turn.reply)))
    body, title = "\n".join(sections), escape(_visible(title))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<footer>{escape(_footer(session))}</footer>
</body>
</html>
"""


def _section(role: str, name: str, text: str, images: str = "") -> str:
    shown = f"\n<div>{images}</div>" if images else ""
    return f'<section class="{role}">\n<h2>{name}</h2>{shown}\n<p>{escape(_visible(text))}</p>\n</section>'


def _img(image: "EncodedImage") -> str:
    return f'<img src="{image.data_url()}" alt="{escape(image.name)}" title="{escape(image.name)}">'


# --- Markdown


def markdown(session: Session, title: str) -> str:
    parts = [f"# {_inert(_visible(title))}"]
    if session.system:
        parts.append(f"## System\n\n{closed(session.system)}")
    for turn in session.turns:
        images = "".join(f"![{_label(image.name)}]({image.data_url()})\n\n" for image in turn.images)
        parts.append(f"## You\n\n{images}{closed(turn.text)}")
        if turn.reply is not None:
            parts.append(f"## Model\n\n{closed(turn.reply.text)}{closed(_cut(turn.reply))}")
    return "\n\n".join([*parts, f"---\n\n{_footer(session)}"]) + "\n"


def closed(text: str) -> str:
    """Markdown of a message, kept from affecting the document around it."""
    fence = ""
    lines: list[str] = []
    for line in _visible(text).split("\n"):
        found = _FENCE.match(line)
        if fence:
            ends = found and found[1][0] == fence[0] and len(found[1]) >= len(fence) and not found[2].strip()
            fence = "" if ends else fence
        elif found and not (found[1][0] == "`" and "`" in found[2]):
            fence = found[1]
        else:
            line = _inert(line)
        lines.append(line)
    return "\n".join([*lines, fence] if fence else lines)


def _inert(line: str) -> str:
    """Escapes HTML and images outside code spans."""
    pieces, end = [], 0
    for span in _CODE_SPAN.finditer(line):
        pieces += [_inert_text(line[end : span.start()]), span[0]]
        end = span.end()
    return "".join([*pieces, _inert_text(line[end:])])


def _inert_text(text: str) -> str:
    return text.replace("<", "&lt;").replace("![", "!\\[")


def _label(name: str) -> str:
    return re.sub(r"([\\\[\]<>`&])", r"\\\1", name)


# --- both


def _footer(session: Session) -> str:
    totals = session.totals
    cached = f", {totals.cached} of the prompt tokens cached" if totals.cached is not None else ""
    counts = f"{totals.text} text + {totals.image} image prompt tokens, {totals.completion} answered{cached}"
    return f"{totals.replies} replies, {counts}"


def _cut(reply: Reply) -> str:
    """How a reply ended early, or what came where it has no text."""
    if reply.notice is not None:
        return f"({_visible(reply.notice)})"
    reasons = {"stop": "", "length": "\n\n(cut off at max_tokens)", "abort": "\n\n(stopped)"}
    return reasons[reply.finish_reason]


def _visible(text: str) -> str:
    """Without what would drive a terminal or turn the direction of the text around."""
    return CONTROL.sub("", text)
