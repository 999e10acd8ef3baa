"""Wordings: one line of text stands for many, and people's typing habits are put on top.

`(a|b|)` picks one alternative, nested at will; `{name}` is filled from the caller's words or word lists.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from random import Random
from typing import Union

Node = Union[str, "Choice", tuple["Node", ...]]

BRITISH = (("color", "colour"), ("gray", "grey"), ("center", "centre"), ("Color", "Colour"))
OPENINGS = (
    "(hey|hi|hello|ok|okay|so|well|now|and|please|quick question|one question|excuse me)(,|:|) ",
    "(can|could|would) you (please |)tell me(,|:|) ",
    "(please |)tell me(,|:|) ",
    "i (want|would like) to know(,|:|) ",
    "do you know(,|:|) ",
    "(just |)(curious|wondering|asking)(,|:|) ",
    "(let me ask you|i have a question|my question is)(,|:|) ",
)
CLOSINGS = (
    " please",
    ", please",
    " thanks",
    ", thank you",
    " now",
    " (buddy|friend|mate|dear|model)",
    " (for me|exactly)",
)


class Choice(tuple["Node", ...]):
    """Alternatives, where a plain tuple is a sequence."""


@cache
def parse(template: str) -> Node:
    """The tree of a template; parsed once, expanded millions of times."""
    node, end = _alternatives(template, 0)
    if end != len(template):
        raise ValueError(f"unbalanced brackets: {template}")
    return node


def _alternatives(text: str, at: int) -> tuple[Node, int]:
    options: list[Node] = []
    sequence: list[Node] = []
    while at < len(text) and text[at] != ")":
        if text[at] == "(":
            node, at = _alternatives(text, at + 1)
            if at >= len(text):
                raise ValueError(f"unbalanced brackets: {text}")
            sequence.append(node)
            at += 1
        elif text[at] == "|":
            options.append(tuple(sequence))
            sequence = []
            at += 1
        else:
            end = re.compile(r"[^()|]+").match(text, at)
            assert end is not None
            sequence.append(end.group())
            at = end.end()
    options.append(tuple(sequence))
    return (Choice(options) if len(options) > 1 else options[0]), at


def _expand(node: Node, rng: Random) -> str:
    if isinstance(node, str):
        return node
    if isinstance(node, Choice):
        return _expand(node[int(rng.random() * len(node))], rng)
    return "".join([_expand(part, rng) for part in node])


def expand(template: str, rng: Random, words: Mapping[str, str | Sequence[str]] | None = None) -> str:
    """One wording of the template; a list in `words` gives a fresh word at every use."""
    text = _expand(parse(template), rng)
    if words and "{" in text:

        def word(match: re.Match[str]) -> str:
            value = words[match.group(1)]
            return value if isinstance(value, str) else rng.choice(value)

        text = re.sub(r"\{(\w+)\}", word, text)
    return text


def pick(templates: Sequence[str], rng: Random, *, held: bool = False) -> str:
    """A template; those marked `*` are kept from training and are all that `held` gives."""
    wanted = _by_mark(tuple(templates), held)
    return wanted[int(rng.random() * len(wanted))]


@cache
def _by_mark(templates: tuple[str, ...], held: bool) -> tuple[str, ...]:
    marked = tuple(line[1:] for line in templates if line.startswith("*"))
    return marked if held else tuple(line for line in templates if not line.startswith("*"))


def has_held(templates: Sequence[str]) -> bool:
    return any(line.startswith("*") for line in templates)


def typed(text: str, rng: Random, *, question: bool = True) -> str:
    """The text as people type it: openings, letter case, punctuation, British spelling, now and then a slip."""
    if question:
        chance = rng.random()
        if chance < 0.14:
            text = expand(rng.choice(OPENINGS), rng) + text
        elif chance < 0.20:
            text += expand(rng.choice(CLOSINGS), rng)
    if rng.random() < 0.5:
        for american, british in BRITISH:
            text = text.replace(american, british)
    text = _punctuated(text, rng, question)
    chance = rng.random()
    if chance < 0.5:
        text = text[:1].upper() + text[1:]
    elif chance < 0.55:
        text = text.upper()
    elif chance < 0.58:
        text = text.title()
    if rng.random() < 0.05:
        text = _slip(text, rng)
    return text


def _punctuated(text: str, rng: Random, question: bool) -> str:
    chance = rng.random()
    mark = "?" if question else "."
    if text[-1:] in ".?!" or chance < 0.3:
        return text
    if chance < 0.88:
        return text + mark
    return text + rng.choice((".", "!", "??", " ?", "...", "?!"))


def _slip(text: str, rng: Random) -> str:
    """One letter dropped, doubled or swapped with its neighbour: never in a short word, to keep the meaning."""
    words = list(re.finditer(r"[a-zA-Z]{6,}", text))
    if not words:
        return text
    match = rng.choice(words)
    at = rng.randrange(match.start() + 1, match.end() - 1)
    changed = rng.choice((text[at + 1 : at + 2], text[at] * 2 + text[at + 1], text[at + 1] + text[at]))
    return text[:at] + changed + text[at + 2 :]
