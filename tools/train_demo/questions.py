# ruff: noqa: E501 (one wording a line)
"""Questions about one or two pictures, and their one right answer, worked out from the scene and never from pixels.

Every template marked `*` is kept from training. Answers are one sentence in American spelling.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from tools.train_demo.grammar import expand, has_held, pick, typed
from tools.train_demo.scenes import COLORS, HELD_PAIRS, KINDS, PLACES, Scene, Shape

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
NOT_SHAPES = "I see no simple shapes here, and I only know about simple shapes."
PICTURE = "(picture|image|photo|pic)"


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and the shape that "it" means afterwards."""

    question: str
    answer: str
    focus: Shape | None = None


# A maker gives None where its question would have no single right answer for this scene.
Maker = Callable[[Scene, Random, bool], Asked | None]


@dataclass(frozen=True)
class Target:
    """What a question is about: a colour, a kind, or both."""

    color: str | None
    kind: str | None

    @property
    def name(self) -> str:
        return " ".join(word for word in (self.color, self.kind or "shape") if word)

    @property
    def plural(self) -> str:
        kind = self.kind or "shape"
        return " ".join(word for word in (self.color, kind + ("es" if kind == "cross" else "s")) if word)

    def of(self, scene: Scene) -> tuple[Shape, ...]:
        return tuple(s for s in scene.shapes if self.color in (None, s.color) and self.kind in (None, s.kind))


def article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def grouped(shapes: Sequence[Shape], *, color: bool = True, kind: bool = True) -> str:
    """`a red circle and two blue squares`, in reading order."""
    counts = Counter(Target(s.color if color else None, s.kind if kind else None) for s in shapes)
    return joined([article(t.name) if n == 1 else f"{NUMBERS[n]} {t.plural}" for t, n in counts.items()])


def ground_phrase(scene: Scene) -> str:
    return f"on {article(scene.ground.label)} background"


def _wording(templates: Sequence[str], rng: Random, held: bool, **words: str) -> str:
    return typed(expand(pick(templates, rng, held=held and has_held(templates)), rng, words), rng)


NO_SHAPE = "There is no shape in the picture."


def _absent(name: str) -> str:
    return f"There is no {name} in the picture."


def _present(scene: Scene, rng: Random, *, with_pair: bool = True) -> Target | None:
    if not scene.shapes:
        return None
    shape = rng.choice(scene.shapes)
    forms = [Target(shape.color, None), Target(None, shape.kind)]
    if with_pair:
        forms += [Target(shape.color, shape.kind)] * 2
    return rng.choice(forms)


def absent_target(scene: Scene, rng: Random) -> Target:
    """Something that is not there, half the time nearly there; never a pair kept from training."""
    for _ in range(200):
        color, kind = rng.choice(tuple(COLORS)), rng.choice(KINDS)
        if scene.shapes and rng.random() < 0.6:
            shape = rng.choice(scene.shapes)
            color, kind = (shape.color, kind) if rng.random() < 0.5 else (color, shape.kind)
        if (color, kind) in HELD_PAIRS:
            continue
        target = rng.choice(
            (Target(color, None), Target(None, kind), Target(color, kind), Target(color, kind))
        )
        if not target.of(scene):
            return target
    raise AssertionError("a scene of three shapes cannot hold every colour and kind")


CAPTION = (
    "what (is|do you see|can you see) in (this|the) {p}",
    "what(| i)s in (this|the) {p}",
    "whats in (this|the) {p}",
    "(describe|caption) (this|the) {p}",
    "describe (this|it|what you see)",
    "(give|write) (me |)a (short |)(caption|description) (for|of) (this|the) {p}",
    "what(| i|'|' i)s this",
    "what is (this|it|here|that)",
    "what does (this|the) {p} show",
    "what(| kind of things) (do|can) you see(| here)",
    "(tell me|say) what you (can |)see(| here)",
    "what is shown( here|) (in this {p}|)",
    "what am i looking at",
    "what(| i)s going on (here|in this {p})",
    "tell me about (this|the) {p}",
    "(a |)caption(| please)",
    "(look at (this|the) {p} and |)(say|tell me) what is (there|in it)",
    "(what objects|what things|which objects|which things|what) (are|are there) in (this|the) {p}",
    "summarize (this|the) {p}",
    "can you (see|describe) (this|the|my) {p}",
    "describe (this|the) {p} (in one sentence|in a sentence|briefly|in a few words|for a blind person|for me|simply)",
    "(what|say what) (did i|have i|has someone|did he|did she) (draw|drawn|paint|painted|make|made)(| here| in (this|the) {p})",
    "(guess|see|look) what i (drew|have drawn|painted|made)",
    "i (drew|painted|made|have drawn) (something|this|a {p})(,|) (what is it|what do you see|describe it|can you see it)",
    "what is (drawn|painted|shown|displayed|to be seen|present|contained) (here|in (this|the) {p}|on (this|the) {p})",
    "what can be (seen|found) (here|in (this|the) {p})",
    "(these|those) are what",
    "(explain|interpret|analyze) (what you see|this|what is here)",
    "(which|what) objects (are visible|are shown|are displayed|are drawn|do you see|can you see)(| here| in (this|the) {p})",
    "(here is|this is|here you have|i have|i attached|i send you|see) (a|my|another|the|one more|a new) {p}(, what is this|, describe it|, what do you see|, tell me what it shows|)",
    "(now|and) (this|this one|this {p}|here|the next {p}|what is this)",
    "(and |)(in|what about|how about) this (one|{p})",
    "(give me|write|make) (alt text|an alt text|a title|a summary|one sentence)( for (this|the) {p}|)",
    "what (is|does) (this|the) {p} (about|of|depict|display|represent|contain|look like)",
    "(take a look|have a look|look)(| at this| at my {p})( and describe it|)",
    "do you (see|recognize|understand) (this|the|my) {p}",
    "(please |)(look|describe|caption|see|explain)",
    "(what|which) things are visible( here| in (this|the) {p}|)",
    "*what is (visible|depicted|displayed) in (this|the) {p}",
    "*(i made|here is|look at) (this|a) {p}, what is (in |on |)it",
    "*explain (this|the) {p} (to me|)",
    "*what has been drawn (here|)",
)


def caption(scene: Scene, rng: Random, held: bool) -> Asked:
    question = _wording(CAPTION, rng, held, p=expand(PICTURE, rng))
    if not scene.shapes:
        return Asked(question, f"There are no shapes, only {article(scene.ground.label)} background.")
    focus = scene.shapes[0] if len(scene.shapes) == 1 else None
    return Asked(question, sentence(f"{grouped(scene.shapes)} {ground_phrase(scene)}"), focus)


DETAIL = (
    "describe (this|the) {p} in detail",
    "describe (this|the) {p} (exactly|precisely|carefully)",
    "give (me |)a detailed (description|caption)( of (this|the) {p}|)",
    "(describe|list|name) every(thing| shape| object) (with|and) (its|the) (position|place|location)",
    "(say|tell me) (what is where|where everything is)(| in (this|the) {p})",
    "what is where(| in (this|the) {p})",
    "(what|which shapes|what shapes) do you see and (at which places|at what positions|where are they)",
    "(what|which shapes) are (there|here) and where",
    "(where are the shapes and what are they|what and where)",
    "(please |)(give|tell|show) me (all |)(the |)details(| of (this|the) {p})",
    "(describe|explain) every(thing| shape| detail)",
    "(more details|in (more |)detail|in more detail please|longer description)",
    "describe (it|this|what you see) (in detail|exactly|precisely|carefully|with positions)",
    "list (all |)the (shapes|objects) (and|with) (their|the) (positions|places|locations)",
    "*what do you see and where( is it|)",
    "*i (want|need) a detailed description",
)


def detail(scene: Scene, rng: Random, held: bool) -> Asked | None:
    if not scene.shapes:
        question = _wording(DETAIL, rng, held, p=expand(PICTURE, rng))
        return Asked(question, f"There are no shapes, only {article(scene.ground.label)} background.")
    question = _wording(DETAIL, rng, held, p=expand(PICTURE, rng))
    parts = joined([f"{article(s.name)} {s.place}" for s in scene.shapes])
    return Asked(question, sentence(f"{parts}, {ground_phrase(scene)}"))


COLOR = (
    "what color is the {t}",
    "what( i|'|)s the color of the {t}",
    "which color (is|has) the {t}",
    "what color does the {t} have",
    "the {t} is what color",
    "(and |)the color of the {t}",
    "tell me the color of the {t}",
    "(name|say|give me) the color of the {t}",
    "in what color is the {t} (drawn|painted)",
    "(can you|could you) (see|say) what color the {t} is",
    "how (did i|was i|do they) (color|paint) the {t}",
    "(what|which) color did i (give|use for|paint) the {t}( in|)",
    "(what|which) color would (you|one) call the {t}",
    "is the {t} (red|blue|green) or what( color|)",
    "{t} color",
    "color of the {t}",
    "what is the {t} colored( like|)",
    "*what color would you say the {t} is",
    "*how is the {t} colored",
)
COLOR_IT = (
    "what color is (it|the shape|the object|the figure|this shape|this|that)",
    "what( i|'|)s (its|the) color",
    "which color is (it|the shape)",
    "(and |)its color",
    "(and |)what color",
    "the color",
    "(and |)of what color",
    "tell me its color",
    "*what color does (it|this) have",
)
COLORS_ALL = (
    "(what|which) colors (are|are there) in (this|the) {p}",
    "(what|which) colors (do you see|can you see|are there|are used|are the shapes|do the shapes have)",
    "(list|name|tell me) (all |)the colors( of the shapes|)",
    "what are the colors of the shapes",
    "*what colors does (this|the) {p} (have|show|contain)",
)


def color(scene: Scene, rng: Random, held: bool) -> Asked | None:
    chance = rng.random()
    p = expand(PICTURE, rng)
    names = list(dict.fromkeys(s.color for s in scene.shapes))
    if chance < 0.22 and len(scene.shapes) != 1:
        if not names:
            return Asked(_wording(COLOR_IT, rng, held), NO_SHAPE)
        if chance < 0.07:
            return Asked(_wording(COLOR_IT, rng, held), f"I see {joined(names)}.")
    if chance < 0.18 and scene.shapes:
        return Asked(_wording(COLORS_ALL, rng, held, p=p), f"I see {joined(names)}.")
    if chance < 0.4 and len(scene.shapes) == 1:
        return Asked(_wording(COLOR_IT, rng, held), f"It is {scene.shapes[0].color}.", scene.shapes[0])
    if chance < 0.5 and scene.shapes:
        shape = rng.choice(scene.shapes)
        if sum(s.place == shape.place for s in scene.shapes) == 1:
            what = expand("(shape|object|thing|figure) ", rng) + shape.place
            return Asked(_wording(COLOR, rng, held, t=what), f"It is {shape.color}.", shape)
    if chance < 0.6:
        target = Target(None, absent_target(scene, rng).kind)
    else:
        target = Target(None, rng.choice(scene.shapes).kind) if scene.shapes else absent_target(scene, rng)
    if target.kind is None:
        return None
    target = Target(None, target.kind)
    found = target.of(scene)
    names = list(dict.fromkeys(s.color for s in found))
    if not found:
        return Asked(_wording(COLOR, rng, held, t=target.name), _absent(target.name))
    if len(found) == 1:
        return Asked(_wording(COLOR, rng, held, t=target.name), f"The {target.name} is {names[0]}.", found[0])
    question = _wording(
        ("what color(s|) (are|have) the {t}", "what are the colors of the {t}"), rng, False, t=target.plural
    )
    return Asked(question, f"The {target.plural} are {joined(names)}.")


SHAPE = (
    "what shape is the {t}",
    "what is the {t}",
    "which shape is the {t}",
    "what(| i)s the shape of the {t}",
    "what shape (has|does) the {t}( have|)",
    "what (kind|type|sort) of (shape|thing) is the {t}",
    "(name|say) the shape of the {t}",
    "what did i (draw|paint) in {c}",
    "what is {c}( here|)",
    "(what|which) shape did i (draw|paint) in {c}",
    "what is the {t} called",
    "is the {t} a circle or what",
    "the {t} is (what shape|which shape|a what)",
    "*what (form|figure) is the {t}",
    "*the {t}, what shape is it",
)
SHAPE_IT = (
    "what shape is (it|this|that|the shape|the object|the figure)",
    "what( i|'|)s (its|the) shape",
    "which shape is (it|this|that|in the {p})",
    "(and |)its shape",
    "(and |)what shape",
    "what (kind|type|sort) of shape is (it|this|that)",
    "name (the|this) shape",
    "(and |)the shape",
    "*what shape does (it|this) have",
)
SHAPES_ALL = (
    "(what|which) (shapes|figures|forms) (are|are there) in (this|the) {p}",
    "(what|which) shapes (do you see|can you see|are there|are shown)",
    "(list|name|tell me|find) (all |)the shapes( in (this|the) {p}|)",
    "*what shapes does (this|the) {p} (have|show|contain)",
)
SHAPE_AT = (
    "what( i|'|)s {t}",
    "what (shape|object|thing) is {t}",
    "(which|what) shape (do you see|can you see|is there) {t}",
    "what (do you see|can you see|can be seen) {t}",
    "is there (something|anything) {t}",
    "what have i (drawn|painted|put) {t}",
    "what (was|has been) (drawn|put|placed|painted) {t}",
    "{t} (there is what|is what|you see what)",
    "(which|what) (object|figure|shape) (lies|sits|is placed) {t}",
    "*what (did i draw|is drawn|is located) {t}",
)


def shape(scene: Scene, rng: Random, held: bool) -> Asked | None:
    chance = rng.random()
    p = expand(PICTURE, rng)
    if chance < 0.22 and len(scene.shapes) != 1:
        if not scene.shapes:
            return Asked(_wording(SHAPE_IT, rng, held, p=p), NO_SHAPE)
        if chance < 0.06:
            return Asked(_wording(SHAPE_IT, rng, held, p=p), f"I see {grouped(scene.shapes, color=False)}.")
    if chance < 0.18 and scene.shapes:
        return Asked(_wording(SHAPES_ALL, rng, held, p=p), f"I see {grouped(scene.shapes, color=False)}.")
    if chance < 0.35 and len(scene.shapes) == 1:
        only = scene.shapes[0]
        return Asked(_wording(SHAPE_IT, rng, held, p=p), f"It is {article(only.kind)}.", only)
    if chance < 0.6:
        place = rng.choice(scene.shapes).place if scene.shapes and rng.random() < 0.75 else rng.choice(PLACES)
        there = [s for s in scene.shapes if s.place == place]
        asked = place.replace("in the", rng.choice(("in the", "at the"))) if rng.random() < 0.3 else place
        question = _wording(SHAPE_AT, rng, held, t=asked)
        if not there:
            return Asked(question, f"There is nothing {place}.")
        return Asked(question, sentence(grouped(there)), there[0] if len(there) == 1 else None)
    if chance < 0.68:
        target = Target(absent_target(scene, rng).color, None)
    else:
        target = Target(rng.choice(scene.shapes).color, None) if scene.shapes else Target("red", None)
    if target.color is None:
        return None
    found = target.of(scene)
    noun = rng.choice(("shape", "shape", "object", "thing", "one", "figure"))
    question = _wording(SHAPE, rng, held, t=f"{target.color} {noun}", c=target.color)
    if not found:
        return Asked(question, _absent(target.name))
    if len(found) == 1:
        return Asked(question, f"The {target.name} is {article(found[0].kind)}.", found[0])
    question = _wording(
        ("what (shapes |)are the {t}", "which shapes are {c}"), rng, False, t=target.plural, c=target.color
    )
    return Asked(question, f"The {target.plural} are {grouped(found, color=False)}.")


WHERE = (
    "where (is|'s) the {t}",
    "wheres the {t}",
    "where can i (find|see) the {t}",
    "where (do you see|is) (the|a) {t}",
    "(in |)(what|which) (position|place|part|corner) is the {t}( in|)",
    "what is the (position|location|place) of the {t}",
    "(and |)the (position|location|place) of the {t}",
    "where in (this|the) {p} is the {t}",
    "(find|locate) the {t}",
    "(tell me|say) where the {t} is",
    "(can you|could you) (see|say|find) where the {t} is",
    "(where|at what place) did i (draw|put|place|paint) the {t}",
    "where (exactly |)is the {t} (located|placed|drawn|positioned|situated|now|at)",
    "in (which|what) (corner|part|area) (can i find|do you see|lies) the {t}",
    "{t} where",
    "*where would i find the {t}",
    "*whereabouts is the {t}",
)
WHERE_IT = (
    "where is (it|the shape|the object|this|that)",
    "where( i|'|)s it",
    "(and |)where",
    "(and |)its (position|place|location)",
    "what( i|'|)s its (position|place|location)",
    "where in (this|the) {p} is it",
    "where in (this|the) {p}",
    "*where is it located",
)


WHERE_ALL = (
    "where are (they|the shapes|the objects|all the shapes|the figures|the things)",
    "(and |)their (positions|places)",
    "where do you see (shapes|the shapes|them)",
    "(name|list) the (positions|places) of the shapes",
    "*where can the shapes be found",
)


def where(scene: Scene, rng: Random, held: bool) -> Asked | None:
    p = expand(PICTURE, rng)
    chance = rng.random()
    if chance < 0.12 and len(scene.shapes) == 1:
        only = scene.shapes[0]
        return Asked(_wording(WHERE_IT, rng, held, p=p), f"It is {only.place}.", only)
    if chance < 0.12:
        if not scene.shapes:
            return Asked(_wording(WHERE_IT, rng, held, p=p), NO_SHAPE)
        question = _wording(WHERE_IT if chance < 0.04 else WHERE_ALL, rng, held, p=p)
        places = list(dict.fromkeys(s.place for s in scene.shapes))
        return Asked(question, f"The shapes are {joined(places)}.")
    target = None if chance < 0.22 else _present(scene, rng)
    target = target or absent_target(scene, rng)
    found = target.of(scene)
    if len(found) > 1:
        question = _wording(
            ("where are the {t}", "where (do you see|can i find) the {t}"), rng, False, t=target.plural
        )
        places = list(dict.fromkeys(s.place for s in found))
        return Asked(question, f"The {target.plural} are {joined(places)}.")
    question = _wording(WHERE, rng, held, t=target.name, p=p)
    if not found:
        return Asked(question, _absent(target.name))
    return Asked(question, f"The {target.name} is {found[0].place}.", found[0])


COUNT = (
    "how many {t} are there",
    "how many {t} (do you see|can you see|are visible|are shown)",
    "how many {t} are (there |)in (this|the) {p}",
    "how many {t} (does the {p} (have|show)|do you count)",
    "how many {t}",
    "count the {t}",
    "(what is |)the number of {t}",
    "number of {t}",
    "(can you |please |)count (all |)the {t}( for me|)",
    "how many {t} (have i drawn|are drawn|have been drawn|did you find|did you see|could you count|exist)(| here)",
    "how many {t} are (there|here) (in total|altogether|all together|overall)",
    "(what|tell me) the (total |)number of {t}( is|)",
    "how many {t} (are in it|are on it|does it have|does it show|can be seen|do we have|have you got)",
    "(i drew|i see) how many {t}",
    "how many (different |)(kinds of |){t} are there".replace("(different |)(kinds of |)", "(visible |)"),
    "*how many {t} did i draw",
    "*(give|tell) me the number of {t}",
)


def count(scene: Scene, rng: Random, held: bool) -> Asked:
    p = expand(PICTURE, rng)
    chance = rng.random()
    if chance < 0.1:
        n = len({s.color for s in scene.shapes})
        question = _wording(COUNT, rng, held, t=rng.choice(("colors", "different colors")), p=p)
        noun = "color" if n == 1 else "colors"
        return Asked(question, f"There {'is' if n == 1 else 'are'} {NUMBERS[n]} {noun}.")
    if chance < 0.5:
        n = len(scene.shapes)
        asked = rng.choice(("shapes", "shapes", "shapes", "objects", "figures", "things"))
        focus = scene.shapes[0] if n == 1 else None
        target = Target(None, None)
        return Asked(_wording(COUNT, rng, held, t=asked, p=p), _number(target, n), focus)
    target = (_present(scene, rng) if chance < 0.85 else None) or absent_target(scene, rng)
    found = target.of(scene)
    question = _wording(COUNT, rng, held, t=target.plural, p=p)
    return Asked(question, _number(target, len(found)), found[0] if len(found) == 1 else None)


def _number(target: Target, n: int) -> str:
    return f"There is one {target.name}." if n == 1 else f"There are {NUMBERS[n]} {target.plural}."


EXISTS = (
    "is there (a|an|any) {t}",
    "is there {a}( here| in (this|the) {p}|)",
    "(do|can) you see (a|an|any) {t}",
    "(do|can) you see {a}( here| in (this|the) {p}|)",
    "are there any {ts}( here| in (this|the) {p}|)",
    "does (this|the) {p} (have|show|contain) {a}",
    "{a}",
    "any {ts}",
    "can i (see|find) {a} (here|in (this|the) {p})",
    "there is {a}, (right|yes|correct|isn't there)",
    "{t}",
    "(have i drawn|have i made|did anybody draw|did i make|did someone paint) {a}( here|)",
    "(is|are) (one|some|any) of the shapes {a}".replace("(is|are)", "is"),
    "(could|can) (one|you) (find|spot) {a}( here| in (this|the) {p}|)",
    "i (think i|) see {a}(, do you|, right|, is that right)".replace("(think i|)", "(think i|do)"),
    "would you (find|see) {a} here",
    "(does it|does this) (have|show|contain) {a}",
    "*did i draw {a}",
    "*would you say there is {a}( here|)",
)
ANYTHING = (
    "is there (anything|something) {c}",
    "is (anything|something) {c}( here| in (this|the) {p}|)",
    "(is|are) (any|one|some) (shape|object|figure|of the objects|of them) {c}",
    "did i (use|draw with|paint with) {c}",
    "is {c} (used|there|one of the colors|in the {p}|present)",
    "do you see {c}",
    "(do|can) you see (anything|something) {c}",
    "*are any of the shapes {c}",
)
VERIFY = (
    "is the {t} {v}",
    "the {t} is {v}, (right|yes|correct|isn't it)",
    "is it true that the {t} is {v}",
    "(can you|please) check (if|whether) the {t} is {v}",
    "*would you say the {t} is {v}",
)
VERIFY_IT = (
    "is (it|this|that) {v}",
    "is the (shape|object) {v}",
    "it is {v}, (right|correct|isn't it)",
    "*would you call it {v}",
)


def yes_no(scene: Scene, rng: Random, held: bool) -> Asked | None:
    chance = rng.random()
    if chance < 0.55:
        return _exists(scene, rng, held)
    if not scene.shapes:
        return None
    one = rng.choice(scene.shapes)
    if chance < 0.62 and len(scene.shapes) == 1:
        return _verify_it(one, rng, held)
    if chance < 0.78:
        return _verify(scene, Target(None, one.kind), "color", rng, held)
    if chance < 0.88:
        return _verify(scene, Target(one.color, None), "kind", rng, held)
    return _verify(
        scene, rng.choice((Target(None, one.kind), Target(one.color, one.kind))), "place", rng, held
    )


def _exists(scene: Scene, rng: Random, held: bool) -> Asked:
    target = (_present(scene, rng) if rng.random() < 0.5 else None) or absent_target(scene, rng)
    p = expand(PICTURE, rng)
    if target.kind is None and target.color and rng.random() < 0.6:
        question = _wording(ANYTHING, rng, held, c=target.color, p=p)
    else:
        question = _wording(EXISTS, rng, held, t=target.name, a=article(target.name), ts=target.plural, p=p)
    found = target.of(scene)
    match len(found):
        case 0:
            return Asked(question, f"No, there is no {target.name}.")
        case 1:
            return Asked(question, f"Yes, there is {article(target.name)}.", found[0])
        case n:
            return Asked(question, f"Yes, there are {NUMBERS[n]} {target.plural}.")


def _claim(shape: Shape, attribute: str, rng: Random) -> tuple[str, str]:
    """What the question claims and what is true; right half the time, never naming a pair kept from training."""
    if attribute == "place":
        claimed = shape.place if rng.random() < 0.5 else rng.choice(PLACES)
        return claimed, shape.place
    while True:
        if attribute == "color":
            claimed = shape.color if rng.random() < 0.5 else rng.choice(tuple(COLORS))
            pair = claimed, shape.kind
        else:
            claimed = shape.kind if rng.random() < 0.5 else rng.choice(KINDS)
            pair = shape.color, claimed
        if pair not in HELD_PAIRS or pair == (shape.color, shape.kind):
            break
    if attribute == "color":
        return claimed, shape.color
    return article(claimed), article(shape.kind)


def _verify(scene: Scene, target: Target, attribute: str, rng: Random, held: bool) -> Asked | None:
    found = target.of(scene)
    if len(found) != 1:
        return None
    claimed, true = _claim(found[0], attribute, rng)
    question = _wording(VERIFY, rng, held, t=target.name, v=claimed)
    return Asked(question, f"{'Yes' if claimed == true else 'No'}, the {target.name} is {true}.", found[0])


def _verify_it(shape: Shape, rng: Random, held: bool) -> Asked:
    claimed, true = _claim(shape, rng.choice(("color", "kind", "place")), rng)
    return Asked(
        _wording(VERIFY_IT, rng, held, v=claimed),
        f"{'Yes' if claimed == true else 'No'}, it is {true}.",
        shape,
    )


BIGGER = (
    "which (shape |one |)is (bigger|larger), the {a} or the {b}",
    "is the {a} or the {b} (bigger|larger)",
    "what is (bigger|larger), the {a} or the {b}",
    "(compare|which of the two is (bigger|larger)): the {a} (and|or) the {b}",
    "*between the {a} and the {b}, which is (bigger|larger)",
)
SMALLER = (
    "which (shape |one |)is smaller, the {a} or the {b}",
    "is the {a} or the {b} smaller",
    "what is smaller, the {a} or the {b}",
    "*between the {a} and the {b}, which is smaller",
)
BIGGEST = (
    "which (shape|one|object) is the (biggest|largest)",
    "which (shape|one|object) is (bigger|larger)",
    "what( i|'|)s the (biggest|largest) (shape|object|thing)",
    "(name|find) the (biggest|largest) (shape|object)",
    "*the (biggest|largest) (shape|object) is which",
)
SMALLEST = (
    "which (shape|one|object) is (the smallest|smaller)",
    "what( i|'|)s the smallest (shape|object|thing)",
    "(name|find) the smallest (shape|object)",
    "*the smallest (shape|object) is which",
)
IS_BIGGER = (
    "is the {a} (bigger|larger) than the {b}",
    "*would you say the {a} is (bigger|larger) than the {b}",
)
IS_SMALLER = ("is the {a} smaller than the {b}", "*would you say the {a} is smaller than the {b}")
BESIDE = ("is the {a} (|to the ){r} the {b}", "*would you say the {a} is {r} the {b}")
WHAT_BESIDE = (
    "what is (|to the ){r} the {b}",
    "what do you see (|to the ){r} the {b}",
    "which shape is {r} the {b}",
)
SAME_COLOR = (
    "(are|do) the {a} and the {b} (have |)the same color",
    "is the {a} the same color as the {b}",
    "*have the {a} and the {b} got the same color",
)
RATIO = 1.4  # sizes closer than this are never compared


def compare(scene: Scene, rng: Random, held: bool) -> Asked | None:
    if len(scene.shapes) < 2 or len({s.name for s in scene.shapes}) < len(scene.shapes):
        return None
    maker = rng.choice(
        (_compare_two, _compare_two, _compare_all, _is_bigger, _beside, _what_beside, _same_color)
    )
    return maker(scene, rng, held)


def _unique_name(scene: Scene, shape: Shape, rng: Random) -> str:
    """The full name, or the kind alone where that suffices."""
    if rng.random() < 0.4 and len(Target(None, shape.kind).of(scene)) == 1:
        return shape.kind
    return shape.name


def _compare_two(scene: Scene, rng: Random, held: bool) -> Asked | None:
    one, other = rng.sample(scene.shapes, 2)
    if max(one.size, other.size) < RATIO * min(one.size, other.size):
        return None
    names = {shape: _unique_name(scene, shape, rng) for shape in (one, other)}
    large = rng.random() < 0.6
    right = (max if large else min)(one, other, key=lambda s: s.size)
    question = _wording(BIGGER if large else SMALLER, rng, held, a=names[one], b=names[other])
    return Asked(question, f"The {names[right]} is {'larger' if large else 'smaller'}.", right)


def _compare_all(scene: Scene, rng: Random, held: bool) -> Asked | None:
    large = rng.random() < 0.6
    ordered = sorted(scene.shapes, key=lambda s: s.size, reverse=large)
    first, second = sorted((ordered[0].size, ordered[1].size))
    if second < RATIO * first:
        return None
    question = _wording(BIGGEST if large else SMALLEST, rng, held)
    return Asked(question, f"The {ordered[0].name} is the {'largest' if large else 'smallest'}.", ordered[0])


def _is_bigger(scene: Scene, rng: Random, held: bool) -> Asked | None:
    one, other = rng.sample(scene.shapes, 2)
    if max(one.size, other.size) < RATIO * min(one.size, other.size):
        return None
    a, b = _unique_name(scene, one, rng), _unique_name(scene, other, rng)
    large = rng.random() < 0.6
    question = _wording(IS_BIGGER if large else IS_SMALLER, rng, held, a=a, b=b)
    yes = (one.size > other.size) == large
    word = "larger" if one.size > other.size else "smaller"
    return Asked(question, f"{'Yes' if yes else 'No'}, the {a} is {word} than the {b}.", one)


def _sides(one: Shape, other: Shape, rng: Random) -> tuple[str, str] | None:
    """How `one` lies to `other`, and the opposite; only where it is a matter of whole places."""
    sides = []
    if one.column != other.column:
        sides.append(("left of", "right of") if one.column < other.column else ("right of", "left of"))
    if one.row != other.row:
        sides.append(("above", "below") if one.row < other.row else ("below", "above"))
    return rng.choice(sides) if sides else None


def _beside(scene: Scene, rng: Random, held: bool) -> Asked | None:
    one, other = rng.sample(scene.shapes, 2)
    sides = _sides(one, other, rng)
    if sides is None:
        return None
    a, b = _unique_name(scene, one, rng), _unique_name(scene, other, rng)
    claimed = rng.choice(sides)
    question = _side_words(_wording(BESIDE, rng, held, a=a, b=b, r=claimed))
    return Asked(question, f"{'Yes' if claimed == sides[0] else 'No'}, the {a} is {sides[0]} the {b}.", one)


def _side_words(question: str) -> str:
    return question.replace("to the above", "above").replace("to the below", "below")


def _what_beside(scene: Scene, rng: Random, held: bool) -> Asked | None:
    if len(scene.shapes) != 2:
        return None
    one, other = rng.sample(scene.shapes, 2)
    sides = _sides(one, other, rng)
    if sides is None:
        return None
    b = _unique_name(scene, other, rng)
    asked = rng.choice(sides)
    question = _side_words(_wording(WHAT_BESIDE, rng, held, b=b, r=asked))
    if asked == sides[0]:
        return Asked(question, sentence(article(one.name)), one)
    return Asked(question, f"There is nothing {asked} the {b}.")


def _same_color(scene: Scene, rng: Random, held: bool) -> Asked | None:
    one, other = rng.sample(scene.shapes, 2)
    if one.kind == other.kind:
        return None
    if any(len(Target(None, s.kind).of(scene)) > 1 for s in (one, other)):
        return None
    question = _wording(SAME_COLOR, rng, held, a=one.kind, b=other.kind)
    if one.color == other.color:
        return Asked(question, f"Yes, both are {one.color}.")
    return Asked(question, f"No, the {one.kind} is {one.color} and the {other.kind} is {other.color}.")


SIZE = (
    "how (big|large) is the {t}",
    "what size is the {t}",
    "what( i|'|)s the size of the {t}",
    "is the {t} (big|large|small) or (small|big|large|tiny)",
    "is the {t} (small, medium or large|big, medium or small)",
    "(tell me|say) how (big|large) the {t} is",
    "*what size does the {t} have",
)


def size(scene: Scene, rng: Random, held: bool) -> Asked | None:
    target = _present(scene, rng)
    if target is None:
        return None
    found = target.of(scene)
    if len(found) != 1 or found[0].size_word is None:
        return None
    question = _wording(SIZE, rng, held, t=target.name)
    return Asked(question, f"The {target.name} is {found[0].size_word}.", found[0])


BACKGROUND = (
    "what( i|'|)s the background( color| like|)",
    "what color is the background",
    "which color (has|is) the background",
    "what (kind of |)background (is (there|it)|does the {p} have|do you see)",
    "(describe|name) the background",
    "what( i|'|)s the color of the background",
    "what is (in|behind) the (background|shapes)",
    "how does the background look",
    "(is the background|does it have a) (plain|white|colored|striped) or (what|not|patterned)( background|)".replace(
        "does it have a", "is the ground"
    ),
    "(what|which) (color|pattern) did i use for the background",
    "background( color|)",
    "(tell me|say) what the background (is|looks like)",
    "(and |)the background",
    "what does the background look like",
    "*on what (kind of |)background (are they|is it) drawn",
    "*tell me about the background",
)


def background(scene: Scene, rng: Random, held: bool) -> Asked:
    return Asked(
        _wording(BACKGROUND, rng, held, p=expand(PICTURE, rng)), f"The background is {scene.ground.label}."
    )


MAKERS: dict[str, tuple[Maker, float]] = {
    "caption": (caption, 1.8),
    "detail": (detail, 0.8),
    "color": (color, 1.4),
    "shape": (shape, 1.4),
    "where": (where, 1.5),
    "count": (count, 1.7),
    "yes/no": (yes_no, 2.2),
    "compare": (compare, 2.0),
    "size": (size, 0.7),
    "background": (background, 0.8),
}


def ask(scene: Scene, rng: Random, kind: str | None = None, *, held: bool = False) -> Asked:
    """A question about the scene, of the wanted kind where the scene allows it (caller checks with `can_ask`)."""
    for _ in range(60):
        name = kind or rng.choices(tuple(MAKERS), [weight for _, weight in MAKERS.values()])[0]
        asked = MAKERS[name][0](scene, rng, held)
        if asked is not None:
            return Asked(asked.question, NOT_SHAPES) if scene.content == "clutter" else asked
        if kind and rng.random() < 0.02:
            break
    return (
        caption(scene, rng, held)
        if scene.content == "shapes"
        else Asked(caption(scene, rng, held).question, NOT_SHAPES)
    )


AND_THE = ("(and|what about|how about|and what about) the {t}", "*same for the {t}")


def follow_up(scene: Scene, before: Asked, rng: Random, held: bool) -> Asked | None:
    """A question that only makes sense after `before`: about "it", or "and the square?" after a colour or place."""
    it = before.focus
    if it is None:
        return None
    others = [s for s in scene.shapes if s is not it and len(Target(None, s.kind).of(scene)) == 1]
    if others and rng.random() < 0.35:
        other = rng.choice(others)
        question = _wording(AND_THE, rng, held, t=other.kind)
        if before.answer == f"The {it.kind} is {it.color}.":
            return Asked(question, f"The {other.kind} is {other.color}.", other)
        if before.answer in (f"The {it.kind} is {it.place}.", f"The {it.name} is {it.place}."):
            return Asked(question, f"The {other.kind} is {other.place}.", other)
    p = expand(PICTURE, rng)
    match rng.choice(("color", "shape", "where", "verify", "size")):
        case "color":
            return Asked(_wording(COLOR_IT, rng, held), f"It is {it.color}.", it)
        case "shape":
            return Asked(_wording(SHAPE_IT, rng, held, p=p), f"It is {article(it.kind)}.", it)
        case "where":
            return Asked(_wording(WHERE_IT, rng, held, p=p), f"It is {it.place}.", it)
        case "size" if it.size_word:
            question = _wording(
                ("how (big|large) is it", "(and |)(its|what is its) size", "*what size is it"), rng, held
            )
            return Asked(question, f"It is {it.size_word}.", it)
        case _:
            return _verify_it(it, rng, held)


ORDINAL = (("first", "first", "1st"), ("second", "second", "2nd"), ("third", "third", "3rd"))
INSIDE = (
    "(in|on) the {o} {p}(,|) {q}",
    "{q} in the {o} {p}",
    "(for|about|regarding) the {o} {p}(,|:) {q}",
    "*looking at the {o} {p}, {q}",
)
MORE = (
    "which {p} has more {t}",
    "(where are|which {p} shows|in which {p} are) (there |)more {t}",
    "*what {p} has the most {t}",
)
FEWER = ("which {p} has (fewer|less) {t}", "*which {p} shows the fewest {t}")
WHICH_HAS = (
    "which {p} (has|shows|contains) {a}",
    "in which {p} (is there|do you see) {a}",
    "(which|what) {p} is the {t} in",
    "*{a} is in which {p}",
)
BOTH = (
    "what is in (these|the|both|the two) {p}s",
    "describe (these|the|both|the two|the 2) {p}s",
    "what do you see( in (these|the|both) {p}s|)",
    "describe (each|every) {p}",
    "compare (them|(these|the|both|the two) {p}s)",
    "what( i|')s the difference( between (them|these {p}s|the two {p}s|the {p}s)|)",
    "how (do|are) (they|the {p}s|these {p}s) (differ|different)",
    "what are (these|the two {p}s)",
    "*tell me about (both|these) {p}s",
)
SAME_NUMBER = (
    "do (both|the) {p}s (have|show) the same number of shapes",
    "*is the number of shapes the same in both {p}s",
)


def ask_two(scenes: Sequence[Scene], rng: Random, held: bool) -> Asked:
    """A question about two or three pictures in a row."""
    p = rng.choice(("picture", "picture", "image", "image", "photo", "pic", "one"))
    chance = rng.random()
    if chance < 0.62 or len(scenes) > 2 or any(scene.content == "clutter" for scene in scenes):
        return _in_one(scenes, rng, held, p)
    if chance < 0.74:
        p = "picture" if p == "one" else p
        parts = (grouped(scene.shapes) + " " if scene.shapes else "no shapes " for scene in scenes)
        first, second = (part + ground_phrase(scene) for part, scene in zip(parts, scenes, strict=True))
        return Asked(
            _wording(BOTH, rng, held, p=p), f"The first picture: {first}. The second picture: {second}."
        )
    if chance < 0.9:
        return _more(scenes, rng, held, p)
    return _which_has(scenes, rng, held, p) or _more(scenes, rng, held, p)


def _in_one(scenes: Sequence[Scene], rng: Random, held: bool, p: str) -> Asked:
    at = rng.randrange(len(scenes))
    asked = ask(scenes[at], rng)
    question = asked.question.rstrip("?!. ")
    if question[:2] != question[:2].upper():
        question = question[0].lower() + question[1:]
    for word in ("this", "the"):
        for noun in ("picture", "image", "photo", "pic"):
            question = question.replace(f" in {word} {noun}", "").replace(f"{word} {noun}", "it")
    ordinal = "last" if at == len(scenes) - 1 and rng.random() < 0.15 else rng.choice(ORDINAL[at])
    text = expand(pick(INSIDE, rng, held=held), rng, {"o": ordinal, "p": p, "q": question})
    return Asked(typed(text, rng, question=rng.random() < 0.9), asked.answer, asked.focus)


def _more(scenes: Sequence[Scene], rng: Random, held: bool, p: str) -> Asked:
    a, b = (len(scene.shapes) for scene in scenes)
    things = rng.choice(("shapes", "shapes", "objects", "figures", "things"))
    if rng.random() < 0.15:
        number = (
            f"Yes, both have {NUMBERS[a]}."
            if a == b
            else f"No, the first has {NUMBERS[a]} and the second has {NUMBERS[b]}."
        )
        return Asked(_wording(SAME_NUMBER, rng, held, p="picture" if p == "one" else p), number)
    more = rng.random() < 0.75
    question = _wording(MORE if more else FEWER, rng, held, p=p, t=things)
    if a == b:
        return Asked(question, "Both pictures have the same number of shapes.")
    which = "first" if (a > b) == more else "second"
    return Asked(question, f"The {which} picture has {'more' if more else 'fewer'} shapes.")


def _which_has(scenes: Sequence[Scene], rng: Random, held: bool, p: str) -> Asked | None:
    one = rng.choice(scenes)
    target = (_present(one, rng) if rng.random() < 0.85 else None) or absent_target(one, rng)
    if (target.color, target.kind) in HELD_PAIRS and not any(target.of(scene) for scene in scenes):
        return None
    has = [bool(target.of(scene)) for scene in scenes]
    question = _wording(WHICH_HAS, rng, held, a=article(target.name), t=target.name, p=p)
    match has:
        case [True, True]:
            return Asked(question, f"Both pictures have {article(target.name)}.")
        case [False, False]:
            return Asked(question, f"Neither picture has {article(target.name)}.")
        case _:
            return Asked(
                question, f"The {'first' if has[0] else 'second'} picture has {article(target.name)}."
            )


def no_picture(rng: Random, held: bool) -> str:
    """A question about a picture, for when none is attached."""
    from tools.train_demo.scenes import sample_scene

    for _ in range(50):
        scene = sample_scene(rng)
        if scene.content != "shapes" or not scene.shapes:
            continue
        asked = ask_two((scene, scene), rng, held) if rng.random() < 0.08 else ask(scene, rng, held=held)
        text = asked.question.lower()
        # Without a picture these are greetings, questions about the model itself, or about nothing at all.
        if (
            "can you see" in text
            or "is this" in text
            or len(text) < 12
            or text.startswith(("what is it", "what is here", "what is that"))
        ):
            continue
        return asked.question
    raise AssertionError("nearly every scene allows a question")
