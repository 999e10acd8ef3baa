"""The network equals the reference implementation, number by number (float32, recorded on a CPU)."""

import numpy as np
import pytest
import torch
from PIL import Image

from ghostvis_cli.model.decoder import KVCache
from ghostvis_cli.model.preprocess import normalisation, preprocess
from tests.conftest import DATA, Reference

TOLERANCE = 1e-4  # what independent float32 implementations reach; the worst seen is 1.6e-5
CHUNK_TOLERANCE = 1e-5  # the same weights and thread, only other shapes of the same sums


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("prompt", ["one", "raw", "chat", "long"])
def test_text_logits_equal_the_recorded_ones(text_reference: Reference, prompt: str) -> None:
    decoder = text_reference.load().model.decoder
    ids = torch.tensor(text_reference.facts["prompts"][prompt])[None]
    ours = decoder(decoder.embed(ids))[0].numpy()
    assert np.abs(ours - text_reference.arrays[f"fp32/logits/{prompt}"]).max() <= TOLERANCE


def test_chunked_prefill_and_cached_decoding_equal_the_recorded_ones(text_reference: Reference) -> None:
    decoder = text_reference.load().model.decoder
    ids = torch.tensor(text_reference.facts["prompts"]["long"][:40])
    ours = _cached_logits(decoder, decoder.embed(ids[None]), [9, 4] + [1] * 27)
    recorded = text_reference.arrays["fp32/kv_logits/long40"]
    assert np.abs(ours.numpy() - recorded).max() <= TOLERANCE
    assert (ours - decoder(decoder.embed(ids[None]))[0]).abs().max() <= CHUNK_TOLERANCE


def _cached_logits(decoder, x, sizes):
    """Logits (T, V) of embedded rows (1, T, D), run in pieces of these sizes over one cache."""
    cache = KVCache.empty(decoder.config, 1, x.size(1), device=x.device, dtype=torch.float32)
    pieces, start = [], 0
    for size in sizes:
        step = decoder.plan(torch.arange(start, start + size)[None], length=start + size)
        pieces.append(decoder.logits(decoder.trunk(x[:, start : start + size], step, cache))[0])
        start += size
    assert start == x.size(1)
    return torch.cat(pieces)


def test_each_stage_of_vision_equals_the_recorded_one(vlm_reference: Reference) -> None:
    model = vlm_reference.load().model
    vision = model.config.vision
    assert vision is not None and model.vision is not None
    pixels = preprocess(
        Image.open(vlm_reference.base_dir / "image.png"),
        vision.tower.image_size,
        vision.image_mean,
        vision.image_std,
    )
    assert (pixels == vlm_reference.arrays["pixel_values"]).all()
    tower = model.vision.tower(torch.from_numpy(pixels)[None])
    resampled = model.vision.resampler(tower)
    projected = model.vision.projector(resampled)
    for name, ours in (("encoder", tower), ("resampler", resampled), ("projector", projected)):
        recorded = vlm_reference.arrays[f"fp32/vision/{name}"]
        assert np.abs(ours.numpy() - recorded).max() <= TOLERANCE, name


@pytest.mark.parametrize("layout", ["inline", "prepend", "prepend_slots", "prepend_literal"])
def test_logits_of_every_layout_equal_the_recorded_ones(vlm_reference: Reference, layout: str) -> None:
    model = vlm_reference.load().model
    rows = model.encode_images(torch.from_numpy(vlm_reference.arrays["pixel_values"]).reshape(1, 3, 56, 56))
    ids = torch.tensor(vlm_reference.facts["layouts"][layout]["ids"])[None]
    x = model.decoder.embed(ids)
    if layout == "inline":
        x[0, ids[0] == vlm_reference.facts["image_token_id"]] = rows[0]
    else:
        x = torch.cat((rows, x), dim=1)
    recorded = vlm_reference.arrays[f"fp32/logits/{layout}"]
    assert np.abs(model.decoder(x)[0].numpy() - recorded).max() <= TOLERANCE


RECORDED_PIXELS = np.load(DATA / "_preproc" / "reference.npz")


@pytest.mark.parametrize("name", RECORDED_PIXELS.files)
def test_pixels_equal_the_recorded_ones_exactly(name: str) -> None:
    file, encoder, size = name.split("/")
    image = Image.open(DATA / "_preproc" / f"{file}.png")
    assert (preprocess(image, int(size), *normalisation(encoder)) == RECORDED_PIXELS[name]).all()


def test_rotary_tables_hold_bfloat16_values(text_reference: Reference) -> None:
    decoder = text_reference.load().model.decoder
    assert torch.equal(decoder.cos, decoder.cos.bfloat16().float())


def test_positions_beyond_the_trained_length_still_work(text_reference: Reference) -> None:
    decoder = text_reference.load().model.decoder
    length = 2 * decoder.config.sequence_len + 1
    x = decoder.embed(torch.zeros((1, length), dtype=torch.int64))
    assert decoder(x).shape == (1, length, decoder.config.vocab_size)


def test_a_batch_of_rows_of_different_lengths_decodes_like_single_rows(text_reference: Reference) -> None:
    decoder = text_reference.load().model.decoder
    ids = torch.tensor(text_reference.facts["prompts"]["long"])
    cache = KVCache.empty(decoder.config, 2, 64, device=ids.device, dtype=torch.float32)
    lengths = (20, 33)
    for row, length in enumerate(lengths):
        step = decoder.plan(torch.arange(length)[None], first_row=row, length=length)
        decoder.trunk(decoder.embed(ids[None, :length]), step, cache)
    step = decoder.plan(torch.tensor([[20], [33]]), length=34)
    together = decoder.logits(decoder.trunk(decoder.embed(ids[list(lengths)][:, None]), step, cache))
    for row, length in enumerate(lengths):
        alone = decoder(decoder.embed(ids[None, : length + 1]))[0, -1]
        assert (together[row, 0] - alone).abs().max() <= CHUNK_TOLERANCE
