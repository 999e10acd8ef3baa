"""Exact match per question type, on pictures, colour-and-shape pairs and wordings new to the model.

An answer counts when every token of it, its end included, is the model's first choice: the same truth value as
decoding it greedily, in one pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

from ghostvis_cli.checkpoint.tokenizer import IMAGE_TOKEN, Tokenizer
from ghostvis_cli.model.ghostvis import GhostVis
from ghostvis_cli.model.preprocess import preprocess
from tools.train_demo.chat import INTENTS, NO_PICTURE, ONLY_SHAPES, outside, small_talk
from tools.train_demo.questions import MAKERS, NOT_SHAPES, Asked, ask_two, follow_up, no_picture
from tools.train_demo.rows import IGNORED, Renderer, Row, Turn, arrays
from tools.train_demo.scenes import HELD_PAIRS, Held, Scene, render, sample_scene

BATCH = 128
Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Trial:
    """A conversation whose last answer is scored."""

    turns: tuple[Turn, ...]
    scenes: tuple[Scene, ...] = ()


def _scene(rng: Random, held: Held) -> Scene:
    """One to three shapes, or none: what the model promises to understand."""
    while (scene := sample_scene(rng, held)).content != "shapes" or len(scene.shapes) > 3:
        pass
    return scene


def _single(kind: str, rng: Random, held: Held, wording: bool) -> Trial:
    while True:
        scene = _scene(rng, held)
        asked = MAKERS[kind][0](scene, rng, wording)
        if asked is not None and (held == "never" or _concerns_held(scene, asked)):
            return Trial((Turn(asked.question, asked.answer, (0,)),), (scene,))


def _concerns_held(scene: Scene, asked: Asked) -> bool:
    """Whether the question or its answer speaks of the shape whose pair is new."""
    if asked.question and asked.answer.startswith("The background"):
        return True
    text = f"{asked.question} {asked.answer}".lower()
    held = [shape for shape in scene.shapes if (shape.color, shape.kind) in HELD_PAIRS]
    return any(shape is asked.focus or shape.color in text or shape.kind in text for shape in held)


def _follow(rng: Random, held: Held) -> Trial:
    while True:
        scene = _scene(rng, held)
        maker = MAKERS[rng.choice(("where", "color", "count", "yes/no", "compare"))][0]
        first = maker(scene, rng, False)
        second = first and follow_up(scene, first, rng, False)
        if first and second and (held == "never" or _concerns_held(scene, second)):
            turns = Turn(first.question, first.answer, (0,)), Turn(second.question, second.answer)
            return Trial(turns, (scene,))


def _two(rng: Random) -> Trial:
    scenes = _scene(rng, "never"), _scene(rng, "never")
    asked = ask_two(scenes, rng, False)
    if rng.random() < 0.5:
        return Trial((Turn(asked.question, asked.answer, (0, 1)),), scenes)
    turns = []
    for at, scene in enumerate(scenes):
        while (before := MAKERS["caption"][0](scene, rng, False)) is None:
            pass
        turns.append(Turn(before.question, before.answer, (at,)))
    return Trial((*turns, Turn(asked.question, asked.answer)), scenes)


def _strange(rng: Random) -> Trial:
    while (scene := sample_scene(rng)).content != "clutter":
        pass
    asked = MAKERS["caption"][0](_scene(rng, "never"), rng, False)
    assert asked is not None
    return Trial((Turn(asked.question, NOT_SHAPES, (0,)),), (scene,))


def trials(seed: int, count: int) -> Iterator[tuple[str, str, list[Trial]]]:
    """Every set and type with its trials. Their random streams are disjoint from training's."""

    def rng(*name: str) -> Random:
        return Random(f"{seed}/evaluation/{'/'.join(name)}")

    for part, held in (("unseen pictures", "never"), ("unseen pairs", "always")):
        for kind in MAKERS:
            r = rng(part, kind)
            yield part, kind, [_single(kind, r, held, False) for _ in range(count)]  # type: ignore[arg-type]
        r = rng(part, "follow-up")
        yield part, "follow-up", [_follow(r, held) for _ in range(count)]  # type: ignore[arg-type]
    r = rng("two")
    yield "unseen pictures", "two pictures", [_two(r) for _ in range(count)]
    r = rng("outside picture")
    outsiders = [Turn(outside(r, picture=True), ONLY_SHAPES, (0,)) for _ in range(count)]
    yield "unseen pictures", "outside", [Trial((turn,), (_scene(r, "never"),)) for turn in outsiders]
    r = rng("strange")
    yield "unseen pictures", "no shapes", [_strange(r) for _ in range(max(4, count // 4))]
    for kind in MAKERS:
        r = rng("wording", kind)
        yield "unseen wordings", kind, [_single(kind, r, "never", True) for _ in range(count)]
    for part, wording in (("chat, known wordings", False), ("chat, unseen wordings", True)):
        r = rng(part)
        talk = [
            small_talk(r, intent=name, held=wording) for name in INTENTS for _ in range(max(1, count // 8))
        ]
        yield part, "about itself", [Trial((Turn(*said),)) for said in talk]
        yield part, "no picture", [Trial((Turn(no_picture(r, wording), NO_PICTURE),)) for _ in range(count)]
        yield part, "outside", [Trial((Turn(outside(r, held=wording), ONLY_SHAPES),)) for _ in range(count)]
    yield "chat, unseen wordings", "by hand", [Trial((Turn(*said),)) for said in BY_HAND]


def _pixels(trial: Trial, model: GhostVis, rng: Random) -> list[Tensor]:
    assert model.config.vision is not None
    vision = model.config.vision
    return [
        torch.from_numpy(
            preprocess(render(scene, rng), vision.tower.image_size, vision.image_mean, vision.image_std)
        )
        for scene in trial.scenes
    ]


@torch.no_grad()
def right(model: GhostVis, tokenizer: Tokenizer, tested: Sequence[Trial], seed: int) -> list[bool]:
    """Whether the model's last answer is exactly the trial's, for each trial."""
    assert model.config.vision is not None
    renderer = Renderer(tokenizer, model.config.vision.num_tokens)
    device = model.decoder.wte.weight.device
    rng = Random(f"{seed}/evaluation pixels")
    rows = [_last_only(renderer.row(trial.turns)) for trial in tested]
    # Of like length together; the answers come back in the callers' order.
    order = sorted(range(len(rows)), key=lambda at: len(rows[at].ids))
    result = [False] * len(rows)
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        length = max(len(rows[at].ids) for at in places)
        ids, targets = (
            torch.from_numpy(a).to(device) for a in arrays([rows[at] for at in places], length, renderer.bos)
        )
        x = model.decoder.embed(ids)
        pixels = [picture for at in places for picture in _pixels(tested[at], model, rng)]
        if pixels:
            vision = model.encode_images(torch.stack(pixels).to(device))
            x = x.masked_scatter((ids == tokenizer.special(IMAGE_TOKEN))[..., None], vision)
        ok = ((model.decoder(x).argmax(-1) == targets) | (targets == IGNORED)).all(1)
        for at, value in zip(places, ok.tolist(), strict=True):
            result[at] = value
    return result


def _last_only(row: Row) -> Row:
    """Score the last answer only: unlearn the ones before."""
    end = len(row.learned)
    start = end
    while row.learned[start - 1]:
        start -= 1
    return Row(row.ids, [False] * start + [True] * (end - start), row.pictures)


def evaluate(model: GhostVis, tokenizer: Tokenizer, *, seed: int = 0, count: int = 200) -> Table:
    """Per set and type the share of exact answers."""
    table: Table = {}
    for part, kind, tested in trials(seed, count):
        table.setdefault(part, {})[kind] = float(np.mean(right(model, tokenizer, tested, seed)))
    return table


def mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def as_text(table: Table) -> str:
    kinds = list(dict.fromkeys(kind for scores in table.values() for kind in scores))
    lines = ["| | " + " | ".join(table) + " |", "|---|" + "---|" * len(table)]
    for kind in kinds:
        cells = (f"{scores[kind]:.1%}" if kind in scores else "" for scores in table.values())
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines.append("| **mean** | " + " | ".join(f"**{mean(scores):.1%}**" for scores in table.values()) + " |")
    return "\n".join(lines)


def _say(name: str, *questions: str) -> list[tuple[str, str]]:
    answer = {"outside": ONLY_SHAPES, "picture": NO_PICTURE}.get(name) or INTENTS[name].answer
    return [(question, answer) for question in questions]


# Ordinary prompts, written without looking at the templates; the commonest occur in training all the same.
BY_HAND: tuple[tuple[str, str], ...] = (
    *_say(
        "hello", "Hello!", "hi", "Hey there!", "Good morning", "HELLO", "hello model", "Hi, nice to meet you!"
    ),
    *_say("how are you", "How are you?", "how are you doing today?", "How's it going?"),
    *_say(
        "who", "Who are you?", "what is your name?", "What are you?", "Tell me about yourself.", "who are u"
    ),
    *_say("who", "which model are you", "What's your name, little one?", "Introduce yourself please"),
    *_say("human", "Are you a human?", "are you ChatGPT?", "are you a real person?"),
    *_say(
        "can do", "What can you do?", "help", "How can you help me?", "what can you see?", "What do you do?"
    ),
    *_say("can do", "What kind of questions can I ask you?", "how do i use you?"),
    *_say(
        "shapes", "Which shapes do you know?", "what shapes can you recognise?", "List the shapes you know."
    ),
    *_say(
        "colors", "Which colours do you know?", "what colors can you recognize?", "what colours can you see?"
    ),
    *_say(
        "ai",
        "What is AI?",
        "what's artificial intelligence?",
        "Explain AI to me",
        "define ai",
        "what is machine learning",
    ),
    *_say("vlm", "What is a vision-language model?", "what is a VLM?"),
    *_say(
        "maker", "Who made you?", "How were you trained?", "who created you?", "What is your training data?"
    ),
    *_say("size", "How big are you?", "How many parameters do you have?"),
    *_say("thanks", "Thanks!", "thank you very much", "Thank you for your help."),
    *_say("bye", "Bye!", "Goodbye", "see you later", "Good night!"),
    *_say("circle", "What is a circle?"),
    *_say("triangle", "How many sides does a triangle have?", "What is a triangle?"),
    *_say("square", "what's a square?", "How many corners does a square have?"),
    *_say("joke", "Tell me a joke", "do you know a joke?"),
    *_say("language", "Do you speak French?", "sprechen sie deutsch?"),
    *_say("favorite", "What is your favourite colour?"),
    *_say("picture", "What is in this picture?", "Describe the image.", "How many shapes are there?"),
    *_say("picture", "Is there a red circle?", "what color is the square?", "Where is the triangle?"),
    *_say(
        "picture", "what shapes are in the image?", "What colour is the background?", "Which shape is larger?"
    ),
    *_say(
        "picture",
        "is the circle left of the square?",
        "describe the picture in detail",
        "Which picture has more shapes?",
    ),
    *_say(
        "outside",
        "What is 2+2?",
        "Tell me about France",
        "What is the capital of France?",
        "Who won the world cup?",
    ),
    *_say("outside", "Write a poem about the sea", "What's the weather like today?", "How do I cook pasta?"),
    *_say(
        "outside",
        "Who is the president of the United States?",
        "What time is it?",
        "Explain quantum physics.",
    ),
    *_say(
        "outside",
        "Translate hello to Spanish",
        "What is the meaning of life?",
        "Write a Python function to sort a list.",
    ),
    *_say("outside", "How tall is Mount Everest?", "What is the largest planet?", "Why is the sky blue?"),
    *_say(
        "outside", "Who wrote Hamlet?", "how far is the moon", "Give me a recipe for pancakes", "Is God real?"
    ),
    *_say(
        "outside",
        "What color is a banana?",
        "How many legs does a spider have?",
        "Where is Tokyo?",
        "I am hungry",
    ),
    *_say(
        "outside",
        "My dog is sick",
        "Tell me a story about a dragon",
        "What should I wear today?",
        "asdfghjkl",
    ),
    *_say(
        "outside",
        "What happened in 1969?",
        "Can you book me a flight?",
        "How old is the universe?",
        "lorem ipsum",
    ),
    *_say(
        "outside",
        "Which is better, Linux or Windows?",
        "Play some music",
        "What's for dinner?",
        "I love my wife",
    ),
    *_say(
        "outside",
        "What did Einstein discover?",
        "Convert 10 miles to kilometers",
        "12345",
        "SELECT * FROM users;",
    ),
    *_say(
        "outside",
        "Is there a dog?",
        "What is the man doing?",
        "How many cars are there?",
        "What does the sign say?",
    ),
    *_say(
        "outside",
        "Summarize the news",
        "What is love?",
        "How does a car engine work?",
        "who is your favourite actor?",
    ),
)
