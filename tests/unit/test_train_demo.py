"""The training program of the built-in model: its pictures, rows and runs, without waiting for a trained one."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.demo import BASE_DIR, EXAMPLES, MODEL_TAG, PHOTO
from ghostvis_cli.model.preprocess import crop
from tools.train_demo.grammar import parse
from tools.train_demo.network import tiny_config
from tools.train_demo.rows import IGNORED, SHAPES, Batches, Renderer, Turn, arrays, pool_scene
from tools.train_demo.scenes import COLORS, HELD_PAIRS, Scene, render, sample_scene
from tools.train_demo.train import Plan, Trainer
from tools.train_demo.vocabulary import SPECIALS, VOCABULARY, corpus, learn, save


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return learn(corpus(seed=3, lines=4000))


@pytest.fixture(scope="module")
def batches(tokenizer: Tokenizer) -> Batches:
    return Batches(Renderer(tokenizer, num_tokens=64), seed=3, pool=300, grid=8, share=0.05)


def test_a_shape_is_where_and_what_its_label_says() -> None:
    rng = Random(1)
    looked_at = 0
    while looked_at < 60:
        scene = sample_scene(rng)
        image = crop(render(scene, rng, jpeg=False), 112)
        for shape in scene.shapes:
            if shape.hollow or shape.size < 0.09:
                continue
            pixel = np.asarray(image)[int(shape.y * 112), int(shape.x * 112)].astype(float)
            # Grain and soft edges move a colour by a few levels, never to another colour of the scene.
            assert np.abs(pixel - shape.rgb).max() < 45, (shape, pixel)
            looked_at += 1


def test_every_shape_lies_inside_the_square_that_the_model_sees() -> None:
    rng = Random(2)
    for scene in (sample_scene(rng) for _ in range(500)):
        for shape in scene.shapes:
            assert shape.size <= shape.x <= 1 - shape.size and shape.size <= shape.y <= 1 - shape.size


def test_shapes_are_named_in_reading_order() -> None:
    rng = Random(3)
    for scene in (sample_scene(rng) for _ in range(300)):
        places = [(shape.row, shape.column) for shape in scene.shapes]
        assert places == sorted(places)


def test_pairs_kept_from_training_occur_in_no_training_picture() -> None:
    seen = {(s.color, s.kind) for index in range(4000) for s in pool_scene(1, index).shapes}
    assert not seen & HELD_PAIRS
    assert {color for color, _ in seen} == set(COLORS)


def test_pairs_kept_from_training_occur_in_no_training_text(batches: Batches) -> None:
    tokenizer = batches.renderer.tokenizer
    for index in range(6):
        text = tokenizer.decode(batches[index].ids.reshape(-1).tolist()).lower()
        assert any(color in text for color in COLORS)
        assert not [pair for pair in HELD_PAIRS if " ".join(pair) in text]


def test_a_picture_takes_64_places_and_is_used_once(batches: Batches) -> None:
    image = batches.renderer.tokenizer.special("<|image|>")
    for index in range(4):
        batch = batches[index]
        assert (batch.ids == image).sum() == 64 * batch.used
        assert len(batch.pictures) == len(batch.colors) >= batch.used


def test_only_answers_and_their_end_are_learned(tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer, num_tokens=64)
    turns = [Turn("What is this?", "A red circle.", (0,)), Turn("And its color?", "It is red.")]
    row = renderer.row(turns)
    learned = [id_ for id_, wanted in zip(row.ids, row.learned, strict=True) if wanted]
    assert tokenizer.decode(learned) == "A red circle.<|assistant_end|>It is red.<|assistant_end|>"
    _, targets = arrays([row], len(row.ids), renderer.bos)
    assert [id_ for id_ in targets[0].tolist() if id_ != IGNORED] == learned


def test_a_row_holds_whole_turns_only(batches: Batches) -> None:
    end = batches.renderer.assistant_end
    for index in range(3):
        batch = batches[index]
        assert batch.ids.shape[1] in {shape.length for shape in SHAPES}
        for ids, targets in zip(batch.ids, batch.targets, strict=True):
            last = np.flatnonzero(targets != IGNORED)[-1]
            assert targets[last] == end
            assert last + 1 == len(ids) - 1 or (ids[last + 2 :] == batches.renderer.bos).all()


def test_a_batch_depends_on_its_number_alone(batches: Batches) -> None:
    again = Batches(batches.renderer, seed=3, pool=300, grid=8, share=0.05)
    assert (batches[5].ids == again[5].ids).all()
    assert batches[5].ids.shape != batches[6].ids.shape or (batches[5].ids != batches[6].ids).any()


def test_the_tokenizer_comes_back_from_its_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(tokenizer, tmp_path)
    loaded = Tokenizer.load(tmp_path / "tokenizer.pkl")
    assert loaded.ranks == tokenizer.ranks and loaded.specials == tokenizer.specials
    assert loaded.vocab_size <= VOCABULARY and tuple(loaded.specials) == SPECIALS
    text = "\nWhat colour is the square? Ça va, 日本 <|bos|>"
    assert loaded.decode(loaded.encode(text)) == text
    lengths = torch.load(tmp_path / "token_bytes.pt", weights_only=True)
    assert lengths.dtype == torch.int32 and len(lengths) == loaded.vocab_size
    assert lengths[65] == 1 and lengths[loaded.special("<|bos|>")] == 0


def test_a_resumed_run_reaches_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    plan = Plan(seed=5, steps=10, pictures=40, share=0.01, look_until=0.3)
    whole = Trainer(plan, tmp_path, config=tiny_config())
    whole.train()
    first = Trainer(plan, tmp_path, config=tiny_config())
    first.train(until=4)
    second = Trainer(plan, tmp_path, config=tiny_config())
    second.resume()
    assert second.step == 4
    second.train()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def test_an_unbalanced_template_is_refused() -> None:
    with pytest.raises(ValueError, match="unbalanced"):
        parse("what is (this|that")


def test_pictures_without_shapes_have_no_labels() -> None:
    rng = Random(9)
    clutter = next(scene for scene in (sample_scene(rng) for _ in range(1000)) if scene.content == "clutter")
    assert clutter == Scene((), clutter.ground, "clutter")


def test_the_shipped_files_are_there_and_small() -> None:
    weights = list((BASE_DIR / "chatsft_checkpoints" / MODEL_TAG).glob("model_*.pt"))
    assert len(weights) == 1 and weights[0].stat().st_size < 16e6
    assert weights[0].with_name(weights[0].name.replace("model", "meta")).with_suffix(".json").exists()
    assert Tokenizer.load(BASE_DIR / "tokenizer" / "tokenizer.pkl").vocab_size == VOCABULARY
    assert len(EXAMPLES) == 4 and all(path.exists() for path in (*EXAMPLES, PHOTO))
