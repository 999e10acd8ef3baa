"""Workloads: the same seed gives the same requests, runs repeat nothing, files replay exactly."""

from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from ghostvis_cli.bench.arrivals import schedule
from ghostvis_cli.bench.checks import condition
from ghostvis_cli.bench.lengths import Length, Sizes
from ghostvis_cli.bench.loads import loads
from ghostvis_cli.bench.metrics import parse_slo
from ghostvis_cli.bench.schema import Load
from ghostvis_cli.bench.workload import Spec, Workload, drawn, from_file, save
from ghostvis_cli.engines.base import Sampling
from ghostvis_cli.errors import UsageError
from ghostvis_cli.image_limits import ImageLimits

GREEDY = Sampling(temperature=0.0)
SMALL = Sizes(choices=((48, 32),))
SPECS = {
    "text": Spec(num_prompts=6),
    "vision": Spec(num_prompts=4, with_vision=True, image_size=SMALL),
    "shared-images": Spec(images=2, questions=3, image_size=SMALL),
    "shared-prefix": Spec(num_prompts=5, shared_prefix=40),
    "turns": Spec(num_prompts=7, turns=3, with_vision=True, image_size=SMALL),
}


def make(spec: Spec, rounds: int = 2, warm_up: int = 2) -> Workload:
    return drawn(spec, GREEDY, rounds=rounds, warm_up=warm_up)


def texts(work: Workload) -> list[str]:
    return [message.text for items in work.rounds for item in items for message in item.request().messages]


@pytest.mark.parametrize("kind", SPECS)
def test_a_seed_is_a_workload(kind: str) -> None:
    first, again, other = make(SPECS[kind]), make(SPECS[kind]), make(replace(SPECS[kind], seed=7))
    assert first.summary.kind == kind
    assert first.summary.sha256 == again.summary.sha256 != other.summary.sha256
    assert [len(items) for items in first.rounds] == [SPECS[kind].rows] * 2


@pytest.mark.parametrize("kind", SPECS)
def test_a_workload_written_to_a_file_replays_exactly(kind: str, tmp_path: Path) -> None:
    work = make(SPECS[kind])
    save(SPECS[kind], work, tmp_path / "rows.jsonl")
    path = str(tmp_path / "rows.jsonl")
    again = from_file(path, GREEDY, ImageLimits(), num_prompts=SPECS[kind].rows, rounds=2, warm_up=1, seed=1)
    assert again.summary.sha256 == work.summary.sha256
    assert texts(again) == texts(work)
    assert not again.notes


def test_a_place_that_no_row_could_name_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rows\?\.jsonl: rows name the folder"):
        save(SPECS["vision"], make(SPECS["vision"]), tmp_path / "rows\udcff.jsonl")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", SPECS)
def test_no_run_repeats_a_prompt_or_an_image_of_another_or_of_the_warm_up(kind: str) -> None:
    work = make(SPECS[kind])
    parts = [*work.rounds, work.warm_up]
    prompts = [{item.request().messages[-1].text for item in items} for items in parts]
    images = [{image for item in items for image in item.images} for items in parts]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not prompts[a] & prompts[b]
        assert not images[a] & images[b]


def test_every_question_is_asked_of_every_image_in_no_order() -> None:
    (items,) = make(Spec(images=3, questions=4, image_size=SMALL), rounds=1).rounds
    images = [item.images[0] for item in items]
    assert sorted(images.count(image) for image in set(images)) == [4, 4, 4]
    assert images != sorted(images)


def test_a_shared_prefix_is_the_system_prompt_of_every_request() -> None:
    first, second = make(SPECS["shared-prefix"]).rounds
    system = {item.request().messages[0].text for item in first}
    assert len(system) == 1
    assert len(system.pop().split()) == 40
    assert second[0].request().messages[0].text != first[0].request().messages[0].text


def test_a_turn_holds_the_turns_before_it() -> None:
    (items,) = make(SPECS["turns"], rounds=1).rounds
    conversations = [[item.row.turns for item in items[n::3]] for n in range(3)]
    for turns in conversations:
        for before, after in pairwise(turns):
            assert after[: len(before)] == before
            assert [turn.role for turn in after[len(before) :]] == ["assistant", "user"]
    assert all(len(item.images) == 1 for item in items)


def test_every_request_brings_an_image_that_nobody_has_decoded() -> None:
    (items,) = make(SPECS["vision"], rounds=1).rounds
    first, second = (items[0].request().messages[-1].images[0] for _ in range(2))
    assert first.data == second.data
    first.pil()
    assert "_pixels" not in vars(second)


@pytest.mark.parametrize(("kind", "mode"), [("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_images_have_the_size_and_format_asked_for_and_much_in_them(kind: str, mode: str) -> None:
    spec = Spec(num_prompts=1, with_vision=True, image_format=kind, image_size=Sizes(choices=((320, 200),)))
    image = make(spec, rounds=1).rounds[0][0].request().messages[-1].images[0]
    opened = Image.open(BytesIO(image.data))
    assert (opened.format, opened.size, (image.width, image.height)) == (mode, (320, 200), (320, 200))
    colors = opened.convert("RGB").getcolors(1 << 20)
    assert colors is not None and len(colors) > 5000


def test_lengths_are_drawn_as_asked() -> None:
    random = Random("1")

    def many(text: str) -> list[int]:
        return [Length.parse(text, "--prompt-len").draw(random) for _ in range(4000)]

    assert set(many("7")) == {7}
    assert set(many("3-5")) == {3, 4, 5}
    # The mean of 4,000 draws is off by less than five of its standard errors.
    assert sum(many("normal:100,10")) / 4000 == pytest.approx(100, abs=5 * 10 / 4000**0.5)
    assert sorted(many("lognormal:100,0.5"))[2000] == pytest.approx(100, rel=0.07)
    assert min(many("normal:2,9")) == 1


@pytest.mark.parametrize("text", ["", "0", "-3", "9-3", "normal:5", "exp:5", "1.5", "normal:0.5,1"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no length"):
        Length.parse(text, "--prompt-len")


def test_digits_of_any_script_are_numbers_wherever_one_is_typed() -> None:
    def arabic(text: str) -> str:
        return "".join(chr(0x660 + int(char)) if char.isdigit() else char for char in text)

    assert Length.parse(arabic("128"), "--prompt-len") == Length("fixed", 128)
    assert Sizes.parse(arabic("512x384")).choices == ((512, 384),)
    assert loads(None, None, "poisson", 0.0, arabic("concurrency=1,2")) == (Load(1), Load(2))
    assert parse_slo(arabic("ttft=200ms")) == {"ttft": 0.2}
    assert condition("ttft_p95>+" + arabic("5%")).limit == 0.05


def test_sizes_are_fixed_chosen_or_drawn() -> None:
    random = Random("1")
    assert Sizes.parse("640x480").choices == ((640, 480),)
    assert Sizes.parse("224, 720p").choices == ((224, 224), (1280, 720))
    drawn_sizes = [Sizes.parse("30-40").draw(random) for _ in range(200)]
    assert {side for size in drawn_sizes for side in size} == set(range(30, 41))
    for text in ("0x5", "big", "9000", "5x", "", f"1-{'9' * 5000}"):
        with pytest.raises(UsageError, match="is no size"):
            Sizes.parse(text)


def test_rows_that_run_out_begin_again_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "three"}\n')
    path = str(tmp_path / "rows.jsonl")
    work = from_file(
        path, GREEDY, ImageLimits(), num_prompts=2, rounds=2, warm_up=1, seed=1, system="Be brief."
    )
    asked = [[item.request().messages[-1].text for item in items] for items in work.rounds]
    assert asked == [["one", "two"], ["three", "one"]]
    assert work.rounds[0][0].request().messages[0].text == "Be brief."
    assert "more than once" in work.notes[0]
    assert work.warm_up[0].request().messages[-1].text not in ("one", "two", "three")


def test_a_file_that_every_run_asks_whole_is_the_same_work_however_many_runs(tmp_path: Path) -> None:
    def sha256(rows: str, num_prompts: int | None, rounds: int) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{row}"}}\n' for row in rows))
        options: Any = {"num_prompts": num_prompts, "rounds": rounds, "warm_up": 0, "seed": 1}
        return from_file(str(tmp_path / "rows.jsonl"), GREEDY, ImageLimits(), **options).summary.sha256

    assert sha256("abcd", None, 2) == sha256("abcd", 4, 5) != sha256("abce", None, 2)
    assert sha256("abcd", 2, 1) != sha256("abcd", 2, 2)  # the second run asks other rows


def test_constant_arrivals_are_equally_far_apart() -> None:
    times = schedule(Load(None, 4.0, "constant"), Random("1"))
    assert [next(times) for _ in range(4)] == [0.0, 0.25, 0.5, 0.75]


def test_poisson_arrivals_come_at_the_rate_and_without_memory() -> None:
    times = schedule(Load(None, 50.0, "poisson"), Random("1"))
    starts = [next(times) for _ in range(5001)]
    gaps = [after - before for before, after in pairwise(starts)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.02, rel=5 / 5000**0.5)  # five standard errors
    assert variance**0.5 == pytest.approx(mean, rel=0.1)  # of an exponential, deviation and mean are one


def test_a_ramp_reaches_the_full_rate_at_its_end() -> None:
    times = schedule(Load(None, 10.0, "constant", ramp_up_s=4.0), Random("1"))
    starts = [next(times) for _ in range(60)]
    assert sum(start < 4.0 for start in starts) == 20  # half of what the full rate would have sent
    late = [after - before for before, after in pairwise(starts[20:])]
    assert late == pytest.approx([0.1] * len(late))


def test_loads_are_read_from_options() -> None:
    assert loads(None, None, "poisson", 0.0, None) == ()
    assert loads(4, None, "poisson", 0.0, None) == (Load(4),)
    assert loads(9, 2.0, "constant", 1.0, None) == (Load(9, 2.0, "constant", 1.0),)
    assert loads(None, None, "poisson", 0.0, "concurrency=1,2,4") == (Load(1), Load(2), Load(4))
    assert loads(None, None, "poisson", 0.0, "request_rate=0.5,2") == (
        Load(None, 0.5, "poisson"),
        Load(None, 2.0, "poisson"),
    )


@pytest.mark.parametrize(
    "options",
    [
        (None, 0.0, "poisson", 0.0, None),
        (None, 1.0, "gamma", 0.0, None),
        (None, None, "poisson", 0.0, "speed=1,2"),
        (None, None, "poisson", 0.0, "concurrency=1.5"),
        (None, None, "poisson", 0.0, "concurrency=inf"),
        (None, None, "poisson", 0.0, "concurrency=0,1"),
        (None, None, "poisson", 0.0, "concurrency"),
        (2, None, "poisson", 0.0, "concurrency=1,2"),
        (None, 1.0, "poisson", 0.0, "request-rate=1,2"),
    ],
)
def test_loads_that_make_no_sense_are_refused(
    options: tuple[int | None, float | None, str, float, str | None],
) -> None:
    with pytest.raises(UsageError):
        loads(*options)
