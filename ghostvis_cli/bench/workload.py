"""What is asked: requests drawn from a seed, or read from a file. The same seed, the same requests.

Every run gets rows of its own: one that repeats another's would find them in the server's cache. Rows have the
form that `ghostvis generate --input` reads, so that a workload written to a file can be replayed, there or here.
A prompt's length is counted in short common words; what a tokenizer makes of them, the server reports.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

from ghostvis_cli import files
from ghostvis_cli.batch.rows import ImageSource, Row, RunSettings, Turn, read_row
from ghostvis_cli.batch.source import RowFile
from ghostvis_cli.bench.lengths import Length, Sizes
from ghostvis_cli.bench.schema import WorkloadSummary
from ghostvis_cli.engines.base import GenerateRequest, Sampling
from ghostvis_cli.errors import OutputError, UsageError, printable

if TYPE_CHECKING:
    from ghostvis_cli.image_limits import ImageLimits
    from ghostvis_cli.images import EncodedImage

JsonRow: TypeAlias = dict[str, Any]
TEXT_TOKENS, QUESTION_TOKENS = 128, 32  # default length of a prompt: alone, and with an image
OUTPUT_TOKENS = 64
PROMPTS = 100
REPLY_TOKENS = 24  # of the assistant's turns in a conversation, which are part of the workload
WARM_UP = "warm-up"
FORMATS = ("jpeg", "png", "webp")
# One token each in most vocabularies.
WORDS = """
    time year people way day man thing woman life child world school state family student group country
    problem hand part place case week company system program question work government number night point
    home water room mother area money story fact month lot right study book eye job word business issue
    side kind head house service friend father power hour game line end member law car city community name
    president team minute idea body information back parent face others level office door health person
    art war history party result change morning reason research girl guy moment air teacher force
    education the of and to in is that it was for on are with as his they at be this from have or by one
    had not but what all were when we there can an your which their said if do will each about how up out
    them then she many some so these would other into has more her two like him see could no make than
    first been its who now find long down did get come made may over new sound take only little live me
    give most very after our just good sentence think say great where help through much before too mean
    old any same tell boy follow came want show also around form three small set put
""".split()  # noqa: SIM905 - a page of quotes and commas otherwise
QUESTIONS = (
    "What is in this picture?",
    "Which colours do you see, and where?",
    "How many shapes are there?",
    "What is written in it?",
    "Which shape is the largest?",
    "Describe the background.",
    "What is in the middle?",
    "Is there a circle?",
    "What stands in the upper left corner?",
    "How would you title this picture?",
)


@dataclass(frozen=True)
class Spec:
    """What to draw. `images` images with `questions` each make images * questions requests, shuffled."""

    seed: int = 42
    num_prompts: int | None = None
    prompt_len: Length | None = None
    output_len: Length = field(default_factory=lambda: Length("fixed", OUTPUT_TOKENS))
    with_vision: bool = False
    images: int | None = None
    questions: int | None = None
    shared_prefix: int = 0  # tokens of a system prompt that all requests of a run have
    turns: int = 1  # of a conversation; each is a request that holds the ones before
    image_size: Sizes = field(default_factory=lambda: Sizes(choices=((512, 384),)))
    image_format: str = "jpeg"

    def __post_init__(self) -> None:
        if (self.images is None) != (self.questions is None):
            raise UsageError("--images and --questions go together", hint="--images 4 --questions 10")
        if self.images is not None and self.num_prompts is not None:
            raise UsageError("--images times --questions is the number of prompts", hint="no --num-prompts")
        if self.images is not None and self.turns > 1:
            raise UsageError("--images with --questions has no --turns", hint="--with-vision --turns 3")

    @property
    def vision(self) -> bool:
        return self.with_vision or self.images is not None

    @property
    def kind(self) -> str:
        if self.images is not None:
            return "shared-images"
        if self.turns > 1:
            return "turns"
        if self.shared_prefix:
            return "shared-prefix"
        return "vision" if self.vision else "text"

    @property
    def rows(self) -> int:
        """Requests of one run."""
        if self.images is not None and self.questions is not None:
            return self.images * self.questions
        return PROMPTS if self.num_prompts is None else self.num_prompts

    @property
    def length(self) -> Length:
        usual = QUESTION_TOKENS if self.vision else TEXT_TOKENS
        return self.prompt_len or Length("fixed", usual)

    def settings(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(replace(self, prompt_len=self.length))))
        return plain | {"num_prompts": self.rows}


@dataclass(frozen=True)
class Item:
    """One request to make. `images` are known by what is in them, not by name."""

    row: Row
    gallery: "Gallery" = field(repr=False)

    @property
    def id(self) -> str:
        return str(self.row.id)

    @property
    def sources(self) -> Iterator[str]:
        return (part.url for turn in self.row.turns for part in turn.parts if isinstance(part, ImageSource))

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(self.gallery.digest(url) for url in self.sources)

    def request(self) -> GenerateRequest:
        return self.row.request(self.gallery.fresh)

    def identity(self) -> bytes:
        """SHA-256 of all that decides the request, images by their bytes."""
        turns = tuple(
            Turn(turn.role, tuple(self._by_content(part) for part in turn.parts)) for turn in self.row.turns
        )
        return replace(self.row, index=0, turns=turns).digest

    def _by_content(self, part: Any) -> Any:
        return ImageSource(self.gallery.digest(part.url)) if isinstance(part, ImageSource) else part


class Gallery:
    """Encoded images by name, read or drawn before anything is timed."""

    def __init__(self) -> None:
        self._images: dict[str, EncodedImage] = {}
        self._digests: dict[str, str] = {}
        self._encoded: dict[str, bytes] = {}

    def add(self, url: str, image: "EncodedImage") -> None:
        self._images[url] = replace(image, original=image.data)
        self._digests[url] = hashlib.sha256(image.data).hexdigest()

    def encode(self, urls: Iterable[str]) -> None:
        """Make the base64 of these images, which servers are sent, and drop that of all others."""
        self._encoded = {url: self._encoded.get(url) or self._images[url].base64() for url in urls}

    def fresh(self, url: str) -> "EncodedImage":
        """An image that was not decoded yet: an engine in this process has to, as a server does."""
        return replace(self._images[url], encoded=self._encoded.get(url))

    def digest(self, url: str) -> str:
        return self._digests[url]

    def __contains__(self, url: str) -> bool:
        return url in self._images

    def items(self) -> "Iterator[tuple[str, EncodedImage]]":
        return iter(self._images.items())


@dataclass(frozen=True)
class Workload:
    """Requests of every run, and those that warm up. Run `n` takes `rounds[n]`."""

    summary: WorkloadSummary
    rounds: tuple[tuple[Item, ...], ...]
    warm_up: tuple[Item, ...]
    gallery: Gallery
    notes: tuple[str, ...] = ()


# --- drawing


def drawn(spec: Spec, sampling: Sampling, *, rounds: int, warm_up: int) -> Workload:
    """A workload of `rounds` runs. Images are drawn here, before anything is timed."""
    gallery = Gallery()
    parts = [[*_rows(spec, str(n), gallery)] for n in range(rounds)]
    warming = [*_rows(_sized(spec, warm_up), WARM_UP, gallery)] if warm_up else []
    settings = RunSettings(sampling)
    runs = tuple(_items(rows, settings, gallery) for rows in parts)
    summary = _summary(spec.kind, spec.seed, runs, sampling, spec.settings())
    return Workload(summary, runs, _items(warming, settings, gallery)[:warm_up], gallery)


def _sized(spec: Spec, rows: int) -> Spec:
    if spec.images is not None:
        return replace(spec, images=math.ceil(rows / 2), questions=2)
    return replace(spec, num_prompts=rows)


def _rows(spec: Spec, round_: str, gallery: Gallery) -> Iterator[JsonRow]:
    """The rows of one run, each as JSON has it."""
    random = Random(f"{spec.seed}:{round_}")
    system = {"system": _text(random, spec.shared_prefix)} if spec.shared_prefix else {}
    for number, row in enumerate(_asked(spec, round_, random, gallery)):
        yield {"id": f"{round_}-{number}", **system, **row, "max_tokens": spec.output_len.draw(random)}


def _asked(spec: Spec, round_: str, random: Random, gallery: Gallery) -> Iterator[JsonRow]:
    if spec.images is not None and spec.questions is not None:
        yield from _shared_images(spec, round_, random, gallery)
    elif spec.turns > 1:
        yield from _conversations(spec, round_, random, gallery)
    else:
        for number in range(spec.rows):
            text = _question(random, spec.length.draw(random), spec.vision)
            yield {"prompt": text} | _images(spec, round_, number, gallery)


def _shared_images(spec: Spec, round_: str, random: Random, gallery: Gallery) -> Iterator[JsonRow]:
    assert spec.images is not None and spec.questions is not None
    pairs = [(image, question) for image in range(spec.images) for question in range(spec.questions)]
    for image, _ in _shuffled(pairs, random):
        text = _question(random, spec.length.draw(random), vision=True)
        yield {"prompt": text} | _images(spec, round_, image, gallery)


def _conversations(spec: Spec, round_: str, random: Random, gallery: Gallery) -> Iterator[JsonRow]:
    """All first turns, then all second ones. A row holds the turns before it, so none waits for another."""
    count = math.ceil(spec.rows / spec.turns)
    histories: list[list[JsonRow]] = [[] for _ in range(count)]
    for number in range(spec.rows):
        history = histories[number % count]
        text = _question(random, spec.length.draw(random), spec.vision)
        content: list[JsonRow] = [{"type": "text", "text": text}]
        if not history:
            urls = _images(spec, round_, number, gallery).get("images", ())
            content = [*({"type": "image_url", "image_url": {"url": url}} for url in urls), *content]
        history.append({"role": "user", "content": content})
        yield {"messages": list(history)}
        history.append({"role": "assistant", "content": _text(random, REPLY_TOKENS)})


def _images(spec: Spec, round_: str, number: int, gallery: Gallery) -> JsonRow:
    if not spec.vision:
        return {}
    url = f"{round_}-{number}.{spec.image_format}"
    if url not in gallery:
        gallery.add(url, _image(spec, url))
    return {"images": [url]}


def _image(spec: Spec, url: str) -> "EncodedImage":
    from ghostvis_cli.bench import images
    from ghostvis_cli.images import EncodedImage

    random = Random(f"{spec.seed}:{url}")
    width, height = spec.image_size.draw(random)
    content = images.draw(random, width, height, spec.image_format)  # type: ignore[arg-type]
    return EncodedImage(url, content, f"image/{spec.image_format}", width, height)


def _question(random: Random, words: int, vision: bool) -> str:
    """A text of so many words that ends in a question, about the image where there is one."""
    question = _pick(random, QUESTIONS if vision else ("What do you think?",))
    more = words - len(question.split())
    return question if more < 1 else f"{_text(random, more)} {question}"


def _text(random: Random, words: int) -> str:
    return " ".join(_pick(random, WORDS) for _ in range(words))


def _pick(random: Random, choices: Sequence[str]) -> str:
    return choices[math.floor(random.random() * len(choices))]


def _shuffled(values: Sequence[tuple[int, int]], random: Random) -> list[tuple[int, int]]:
    return [value for _, value in sorted((random.random(), value) for value in values)]


def _items(rows: Sequence[JsonRow], settings: RunSettings, gallery: Gallery) -> tuple[Item, ...]:
    lines = [json.dumps(row).encode() for row in rows]
    return tuple(Item(read_row(line, n, n + 1, settings), gallery) for n, line in enumerate(lines))


# --- a file


def from_file(
    path: str,
    sampling: Sampling,
    limits: "ImageLimits",
    *,
    num_prompts: int | None,
    rounds: int,
    warm_up: int,
    seed: int,
    system: str | None = None,
) -> Workload:
    """The user's rows: run n takes the n-th `num_prompts` of them, and the first ones again at the file's end."""
    gallery, settings = Gallery(), RunSettings(sampling, system)
    with closing(RowFile.open(path, settings)) as file:
        rows = [Item(row, gallery) for row in file.rows(b"\1" * len(file))]
        load = _loader(file.directory, limits)
    for item in rows:
        for turn in item.row.turns:
            for part in turn.parts:
                if isinstance(part, ImageSource) and part.url not in gallery:
                    gallery.add(part.url, load(part.url))
    count = len(rows) if num_prompts is None else num_prompts
    runs = tuple(tuple(rows[(n * count + i) % len(rows)] for i in range(count)) for n in range(rounds))
    warming = drawn(
        Spec(seed, with_vision=any(item.images for item in rows)), sampling, rounds=0, warm_up=warm_up
    )
    summary = replace(_summary("file", seed, runs, sampling, {}), path=path)
    notes = (
        f"{path} has {len(rows)} rows for {rounds} runs of {count}: some rows ran more than once, and a cache"
        " may know them",
    )
    return Workload(summary, runs, warming.warm_up, gallery, notes if rounds * count > len(rows) else ())


def _loader(directory: Path, limits: "ImageLimits") -> "Callable[[str], EncodedImage]":
    from ghostvis_cli.images import beside, load_image

    return lambda url: load_image(beside(directory, url), limits=limits)


def save(spec: Spec, workload: Workload, path: Path) -> Workload:
    """Write every run's rows to `path`, one a line, and the images into a folder beside it."""
    folder = path.with_name(f"{path.stem}.images")
    rows = [row for n in range(len(workload.rounds)) for row in _rows(spec, str(n), workload.gallery)]
    lines = [json.dumps(_in_folder(row, folder.name), ensure_ascii=False) + "\n" for row in rows]
    try:
        files.write(path, "".join(lines).encode())
        for url, image in workload.gallery.items():
            if not url.startswith(WARM_UP):
                folder.mkdir(exist_ok=True)
                files.write(folder / url, image.data, durable=False)
    except OSError as error:
        raise OutputError(f"the workload can't be written: {error.filename}: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise UsageError(
            f"--save-workload {printable(path.name)}: rows name the folder beside it, and that is no text",
            hint="--save-workload rows.jsonl",
        ) from error
    return replace(workload, summary=replace(workload.summary, path=str(path)))


def _in_folder(value: Any, folder: str) -> Any:
    """The row with its images' names as paths."""
    if isinstance(value, Mapping):
        moved = {key: _in_folder(each, folder) for key, each in value.items()}
        if "images" in moved:
            moved["images"] = [f"{folder}/{url}" for url in moved["images"]]
        if "url" in moved:
            moved["url"] = f"{folder}/{moved['url']}"
        return moved
    return [_in_folder(each, folder) for each in value] if isinstance(value, list) else value


def _summary(
    kind: str, seed: int, runs: Sequence[Sequence[Item]], sampling: Sampling, settings: Mapping[str, Any]
) -> WorkloadSummary:
    # A run of rows that another run asks too adds nothing: a file asked whole is the same work however often.
    different_runs = dict.fromkeys(b"".join(item.identity() for item in run) for run in runs)
    first = runs[0] if runs else ()
    different = {image for item in first for image in item.images}
    return WorkloadSummary(
        kind=kind,
        seed=seed,
        rows=len(first),
        sha256=hashlib.sha256(b"".join(different_runs)).hexdigest(),
        images=len(different),
        settings=settings,
        sampling=asdict(sampling),
    )
