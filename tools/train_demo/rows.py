"""From questions to batches: conversations, their rows of ids, and batch i as a function of (seed, i) alone.

A picture takes 64 rows in place of 64 `<|image|>` ids, then a line break and the question (layout `inline`).
Only answers and their end token are learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostvis_cli.checkpoint.tokenizer import IMAGE_TOKEN, Tokenizer
from tools.train_demo.chat import INTENTS, ONLY_SHAPES, outside, small_talk, talk
from tools.train_demo.questions import Asked, ask, ask_two, follow_up
from tools.train_demo.scenes import Scene, patch_labels, sample_scene

IGNORED = -1
SYSTEM = (
    "You are a helpful assistant.",
    "You are GhostVis.",
    "Answer briefly.",
    "Answer in one sentence.",
    "You are a helpful assistant. Answer the questions about the picture.",
    "Be concise.",
    "You are a helpful vision assistant. Be kind.",
)


@dataclass(frozen=True)
class Turn:
    """A question with the pictures attached to it (places in the conversation's list) and its answer."""

    question: str
    answer: str
    pictures: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    ids: list[int]
    learned: list[bool]
    pictures: list[int]  # in order of their first row


@dataclass(frozen=True)
class Shape:
    """How a batch is made up: rows with one picture, with two, three, none; all `length` ids long."""

    length: int
    one: int
    two: int
    three: int
    text: int

    @property
    def pictures(self) -> int:
        return self.one + 2 * self.two + 3 * self.three

    def scaled(self, share: float) -> "Shape":
        counts = (self.one, self.two, self.three, self.text)
        return Shape(self.length, *(max(1, round(share * n)) if n else 0 for n in counts))


# Mostly short conversations; the long ones teach the positions that a chat of twelve turns reaches.
SHAPES = (Shape(144, 392, 0, 0, 120), Shape(320, 96, 64, 8, 32), Shape(640, 28, 16, 10, 18))
SHAPE_WEIGHTS = (0.55, 0.35, 0.10)


class Renderer:
    """Turns conversations into ids, as the toolkit renders a chat for the model."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.encode = lru_cache(maxsize=200_000)(tokenizer.encode)
        self.bos, self.user, self.user_end, self.assistant, self.assistant_end = (
            tokenizer.special(name)
            for name in (
                "<|bos|>",
                "<|user_start|>",
                "<|user_end|>",
                "<|assistant_start|>",
                "<|assistant_end|>",
            )
        )
        self.image = [tokenizer.special(IMAGE_TOKEN)] * num_tokens

    def prompt(self, turn: Turn, system: str = "") -> list[int]:
        """user_start … assistant_start of one turn."""
        before = self.encode(system + "\n\n") if system and turn.pictures else []
        text = system + "\n\n" + turn.question if system and not turn.pictures else turn.question
        content: list[int] = []
        for at, _ in enumerate(turn.pictures):
            last = at == len(turn.pictures) - 1
            content += self.image + ([] if last else self.encode("\n"))
        content += self.encode("\n" + text if turn.pictures else text)
        return [self.user, *before, *content, self.user_end, self.assistant]

    def row(self, turns: Sequence[Turn], length: int | None = None, system: str = "") -> Row:
        """Ids of whole turns, as many as fit into `length`."""
        ids, learned = [self.bos], [False]
        pictures: list[int] = []
        for at, turn in enumerate(turns):
            asked = self.prompt(turn, system if at == 0 else "")
            answer = [*self.encode(turn.answer), self.assistant_end]
            if length is not None and len(ids) + len(asked) + len(answer) > length:
                break
            ids += asked + answer
            learned += [False] * len(asked) + [True] * len(answer)
            pictures += turn.pictures
        return Row(ids, learned, pictures)


def about_one(scene: Scene, rng: Random, turns: int, *, picture: int = 0) -> list[Turn]:
    """A conversation about one picture, now and then with other talk before or in between."""
    said = [Turn(*talk(rng)) for _ in range(rng.choice((0, 0, 0, 0, 0, 0, 0, 1, 2)))]
    before: Asked | None = None
    attached: tuple[int, ...] = (picture,)
    for _ in range(turns):
        turn, before = _next(scene, before, rng, attached)
        said.append(turn)
        attached = ()
    return said


def _next(
    scene: Scene, before: Asked | None, rng: Random, attached: tuple[int, ...]
) -> tuple[Turn, Asked | None]:
    chance = rng.random()
    if chance < 0.07:
        return Turn(outside(rng, picture=True), ONLY_SHAPES, attached), None
    if chance < (0.085 if attached else 0.11):
        return Turn(*_talk_beside_picture(rng), attached), None
    asked = follow_up(scene, before, rng, False) if before and chance < 0.42 else None
    asked = asked or ask(scene, rng)
    question = (
        "" if attached and asked.answer.endswith("background.") and rng.random() < 0.01 else asked.question
    )
    return Turn(question, asked.answer, attached), asked


def _talk_beside_picture(rng: Random) -> tuple[str, str]:
    """Small talk, but for what means the picture once there is one: "what can you see?"."""
    while True:
        question, answer = small_talk(rng)
        if answer != INTENTS["can do"].answer and "you see" not in question.lower():
            return question, answer


def about_several(scenes: Sequence[Scene], rng: Random, turns: int) -> list[Turn]:
    """A conversation about two or three pictures, attached together or one after the other."""
    together = rng.random() < 0.5
    said: list[Turn] = []
    before: Asked | None = None
    scene = scenes[-1]
    if not together:
        said = about_one(scenes[0], rng, rng.choice((1, 1, 1, 2, 3)))
        for at in range(1, len(scenes)):
            turn, before = _next(scenes[at], None, rng, (at,))
            said.append(turn)
    for _ in range(turns):
        attached = tuple(range(len(scenes))) if together and not said else ()
        chance = rng.random()
        if attached or together or chance < 0.65:
            if chance < 0.06:
                said.append(Turn(outside(rng, picture=True), ONLY_SHAPES, attached))
                before = None
                continue
            asked = ask_two(scenes, rng, False)
            said.append(Turn(asked.question, asked.answer, attached))
            before = None
        else:
            turn, before = _next(scene, before, rng, ())
            said.append(turn)
    return said


def pool_scene(seed: int, index: int) -> Scene:
    """What the training pool's picture `index` shows."""
    return sample_scene(Random(f"{seed}/picture/{index}"))


@dataclass(frozen=True)
class Batch:
    """R rows of T ids with P pictures; labels are the auxiliary task's, per patch of a picture."""

    ids: NDArray[np.int64]  # (R, T)
    targets: NDArray[np.int64]  # (R, T), IGNORED where nothing is learned
    pictures: NDArray[np.int64]  # (P,), places in the pool, in the order of the rows
    used: int  # pictures whose rows fit; the rest only fill up the count
    colors: NDArray[np.int64]  # (P, patches)
    kinds: NDArray[np.int64]


class Batches:
    """Batch i of a training run, for any i, in any process."""

    def __init__(self, renderer: Renderer, seed: int, pool: int, grid: int, share: float = 1.0) -> None:
        self.renderer, self.seed, self.pool, self.grid, self.share = renderer, seed, pool, grid, share

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: int) -> Batch:
        rng = Random(f"{self.seed}/batch/{index}")
        shape = rng.choices(SHAPES, SHAPE_WEIGHTS)[0].scaled(self.share)
        chosen = [rng.randrange(self.pool) for _ in range(shape.pictures)]
        scenes = [pool_scene(self.seed, picture) for picture in chosen]
        turns = shape.length // 16
        rows: list[tuple[int, Row]] = []  # with the place of the row's first picture
        at = 0
        for wanted, many in ((shape.one, 1), (shape.two, 2), (shape.three, 3)):
            for _ in range(wanted):
                own = scenes[at : at + many]
                said = about_one(own[0], rng, turns) if many == 1 else about_several(own, rng, turns)
                rows.append((at, self._row(said, shape, rng)))
                at += many
        rows += [
            (at, self._row([Turn(*talk(rng)) for _ in range(turns)], shape, rng)) for _ in range(shape.text)
        ]
        rng.shuffle(rows)
        order = [first + place for first, row in rows for place in row.pictures]
        spare = sorted(set(range(len(chosen))) - set(order))
        labels = [patch_labels(scenes[at], self.grid) for at in order + spare]
        ids, targets = arrays([row for _, row in rows], shape.length, self.renderer.bos)
        return Batch(
            ids,
            targets,
            np.array([chosen[at] for at in order + spare], np.int64),
            len(order),
            np.stack([colors for colors, _ in labels]),
            np.stack([kinds for _, kinds in labels]),
        )

    def _row(self, turns: list[Turn], shape: Shape, rng: Random) -> Row:
        system = rng.choice(SYSTEM) if rng.random() < 0.03 else ""
        return self.renderer.row(turns, shape.length, system)


def arrays(rows: Sequence[Row], length: int, fill: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and next-id targets, each (rows, length)."""
    ids = np.full((len(rows), length), fill, np.int64)
    targets: NDArray[Any] = np.full((len(rows), length), IGNORED, np.int64)
    for at, row in enumerate(rows):
        n = len(row.ids)
        ids[at, :n] = row.ids
        targets[at, : n - 1] = np.where(row.learned[1:], row.ids[1:], IGNORED)
    return ids, targets
