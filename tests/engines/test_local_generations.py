"""The local engine on nanochat's later generations: recorded tokens, batches, and prefixes cut anywhere."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from ghostvis_cli import demo
from ghostvis_cli.checkpoint.generations import Constants
from ghostvis_cli.checkpoint.load import LoadedModel, load_model
from ghostvis_cli.convert.tensors import one_thread
from ghostvis_cli.engines.base import Sampling
from ghostvis_cli.engines.local.decode import Padded, one_step
from ghostvis_cli.engines.local.scheduler import Scheduler
from ghostvis_cli.engines.local.sequence import Sequence
from ghostvis_cli.images import load_image
from ghostvis_cli.model.config import VisionConfig
from ghostvis_cli.model.preprocess import preprocess
from ghostvis_cli.prompt import Message, Prompt, render_for_reply
from tests.conftest import DATA, Reference
from tests.nanochat import VOCABULARY, Eyes, Shape, plain_logits, write

CASES = sorted(path.name for path in DATA.glob("n[2-9]_*"))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode(), one_thread():
        yield


def loaded(case: str) -> LoadedModel:
    reference = Reference(case)
    tables = Constants(rotary_tables=reference.facts["rotary_tables"])
    return load_model(replace(reference.checkpoint(), constants=tables))


def sequence(ids: list[int], tokens: int = 24, **sampling: Any) -> Sequence:
    chosen = Sampling(max_tokens=tokens, ignore_eos=True, **({"temperature": 0.0} | sampling))
    return Sequence.start(Prompt(tuple(ids), (0,) * len(ids)), [], chosen, 0)


def run(scheduler: Scheduler, *sequences: Sequence) -> list[list[int]]:
    for each in sequences:
        scheduler.submit(each)
    while scheduler.busy:
        for _, event in scheduler.step():
            if isinstance(event, Exception):
                raise event
    return [each.output for each in sequences]


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_of_every_prompt_equal_the_recorded_ones(case: str) -> None:
    """Prompts longer than the window and than the trained length among them, read 7 at a time, all at once."""
    reference, model = Reference(case), loaded(case)
    prompts = reference.facts["prompts"]
    sequences = [sequence(ids) for ids in prompts.values()]
    answers = run(Scheduler(model.model, model.tokenizer, prefill_tokens=7), *sequences)
    assert answers == [reference.greedy(f"{name}/naive") for name in prompts]


@pytest.mark.parametrize("case", CASES)
def test_sampled_tokens_equal_the_recorded_ones(case: str) -> None:
    reference, model = Reference(case), loaded(case)
    wanted = reference.greedy("raw/engine_t0.8_k20_seed42")
    asked = sequence(
        reference.facts["prompts"]["raw"], len(wanted), temperature=0.8, top_k=20, top_p=1.0, seed=42
    )
    assert run(Scheduler(model.model, model.tokenizer), asked) == [wanted]


@pytest.mark.parametrize("case", ["n7_smear", "n5_cap20"])
def test_a_prefix_cut_at_every_position_changes_no_token(case: str) -> None:
    """The first new token takes in its predecessor, which is in the cache and not in the step."""
    model = loaded(case)
    ids = Reference(case).facts["prompts"]["short40"]
    (wanted,) = run(Scheduler(model.model, model.tokenizer, prefix_cache_bytes=0), sequence(ids, 8))
    for cut in range(1, len(ids)):
        scheduler = Scheduler(model.model, model.tokenizer)
        run(scheduler, sequence([*ids[:cut], (ids[cut] + 1) % VOCABULARY], 1))
        again = sequence(ids, 8)
        assert run(scheduler, again) == [wanted]
        assert again.cached_tokens == cut


@pytest.mark.parametrize("padded", [False, True], ids=["eager", "padded"])
@pytest.mark.parametrize("name", ["n3", "n5", "n6", "n7"])
def test_a_crowd_with_shared_beginnings_answers_as_each_would_alone(name, padded, tmp_path) -> None:
    model = load_model(write(tmp_path, name, Shape(seq=40, layers=2)))
    rng = random.Random(1)
    common = [rng.randrange(VOCABULARY) for _ in range(60)]
    prompts = [
        common[: rng.randrange(1, 60)] + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 9))]
        for _ in range(24)
    ]
    lengths = [rng.randrange(1, 40) for _ in prompts]
    alone = [
        run(Scheduler(model.model, model.tokenizer, prefix_cache_bytes=0), sequence(ids, tokens))[0]
        for ids, tokens in zip(prompts, lengths, strict=True)
    ]
    decode = Padded(model.model.decoder, one_step) if padded else None
    scheduler = Scheduler(model.model, model.tokenizer, max_batch=8, prefill_tokens=16, decode=decode)
    crowd = [sequence(ids, tokens) for ids, tokens in zip(prompts, lengths, strict=True)]
    assert run(scheduler, *crowd) == alone
    assert any(each.cached_tokens for each in crowd)


EYES = Shape(rows=1024, vocabulary=1024, seq=40)


def vision_of(model: LoadedModel) -> VisionConfig:
    assert model.model.config.vision is not None
    return model.model.config.vision


@pytest.mark.parametrize("layout", ["inline", "prepend"])
@pytest.mark.parametrize("name", ["n4", "n7"])
def test_images_go_before_a_later_decoder_and_their_last_row_is_a_neighbour(name, layout, tmp_path) -> None:
    """Nobody has trained one: that images' rows have no value embedding, and are smeared, is ours to say."""
    model = load_model(write(tmp_path, name, EYES, eyes=Eyes()))
    image = load_image(str(demo.EXAMPLES[0]))
    vision = vision_of(model)
    prompt = render_for_reply(
        [Message.of("user", "What is it?", [image])], model.tokenizer, layout, vision.num_tokens
    )
    pixels = preprocess(image.pil(), vision.tower.image_size, vision.image_mean, vision.image_std)
    rows = model.model.encode_images(torch.from_numpy(pixels)[None])[0]
    wanted = list(prompt.ids)
    for _ in range(6):
        state = torch.load(tmp_path / "base_checkpoints" / "d3" / "model_000010.pt", weights_only=True)
        wanted.append(int(plain_logits(state, name, EYES, wanted, rows)[-1].argmax()))
    for prefill in (3, 512):  # 3: chunks end within and right behind the image
        sampling = Sampling(max_tokens=6, temperature=0, ignore_eos=True)
        scheduler = Scheduler(model.model, model.tokenizer, prefill_tokens=prefill)
        for _ in range(2):
            asked = Sequence.start(prompt, [pixels], sampling, vision.num_tokens)
            assert run(scheduler, asked) == [wanted[len(prompt.ids) :]]
    assert asked.cached_tokens == len(prompt.ids) - 1


@pytest.mark.parametrize("name", ["n7"])
def test_an_image_in_the_cache_is_the_neighbour_of_the_text_behind_it(name, tmp_path) -> None:
    """The cut is right behind the image: its row is looked up again, not computed as a token's."""
    model = load_model(write(tmp_path, name, EYES, eyes=Eyes()))
    vision = vision_of(model)
    image = load_image(str(demo.EXAMPLES[0]))
    pixels = preprocess(image.pil(), vision.tower.image_size, vision.image_mean, vision.image_std)

    def asked(text: str) -> Sequence:
        prompt = render_for_reply(
            [Message.of("user", text, [image])], model.tokenizer, "prepend", vision.num_tokens
        )
        ids = prompt.ids[: vision.num_tokens] + prompt.ids[vision.num_tokens + (text != "first") :]
        sampling = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
        return Sequence.start(replace(prompt, ids=ids), [pixels], sampling, vision.num_tokens)

    scheduler = Scheduler(model.model, model.tokenizer)
    run(scheduler, asked("first"))
    again = asked("second")  # without its first token: nothing but the image is shared
    given = run(scheduler, again)
    assert again.cached_tokens == vision.num_tokens
    assert given == run(Scheduler(model.model, model.tokenizer, prefix_cache_bytes=0), asked("second"))
