"""nanochat's later generations: the network equals what upstream recorded, and a plain decoder on other shapes."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.generations import Constants
from ghostvis_cli.checkpoint.load import load_model
from ghostvis_cli.convert.tensors import one_thread
from ghostvis_cli.model.decoder import Decoder, KVCache
from tests.conftest import DATA, Reference
from tests.nanochat import OF, Shape, plain_logits, state_of, write

TOLERANCE = 1e-4  # what independent float32 implementations reach; the worst seen is 2.1e-5
# More recorded cases, in the form of tests/data, may lie elsewhere.
EXTRA = Path(os.environ.get("GHOSTVIS_NANOCHAT_CASES", os.devnull))
CASES = sorted(path for place in (DATA, EXTRA) for path in place.glob("n[2-9]_*"))
MODES = ("fp32", "fp32_bf16rot")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode(), one_thread():
        yield


def recorded(mode: str) -> list[object]:
    cases = [Reference(path) for path in CASES]
    cases = [case for case in cases if any(name.startswith(f"{mode}/") for name in case.arrays.files)]
    return [pytest.param(case, id=case.case) for case in cases]


def decoder_of(case: Reference, mode: str) -> Decoder:
    """With the tables as the mode has them: upstream's on a CPU, or what training on a GPU saw."""
    tables: Any = "bfloat16" if mode == "fp32_bf16rot" else case.facts["rotary_tables"]
    return load_model(replace(case.checkpoint(), constants=Constants(rotary_tables=tables))).model.decoder


def in_pieces(decoder: Decoder, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits (T, V) of ids (1, T), run in pieces of these sizes over one cache, the last size again and again."""
    T = ids.size(1)
    cache = KVCache.empty(decoder.config, 1, T, device=ids.device, dtype=torch.float32)
    pieces, start = [], 0
    while start < T:
        end = min(T, start + (sizes.pop(0) if len(sizes) > 1 else sizes[0]))
        x = decoder.embed(ids[:, max(0, start - decoder.config.reach) : end])
        step = decoder.plan(torch.arange(start, end)[None], length=end)
        pieces.append(decoder.logits(decoder.trunk(x, step, cache))[0])
        start = end
    return torch.cat(pieces)


def assert_recorded(case: Reference, mode: str) -> None:
    decoder = decoder_of(case, mode)
    for prompt, ids in case.facts["prompts"].items():
        if f"{mode}/logits/{prompt}" in case.arrays.files:
            kept = f"{mode}/rows/{prompt}"
            rows = case.arrays[kept] if kept in case.arrays.files else slice(None)
            ids = torch.tensor(ids)[None]
            wanted = case.arrays[f"{mode}/logits/{prompt}"]
            for ours in (decoder(decoder.embed(ids))[0], in_pieces(decoder, ids, [9, 4, 1])):
                assert np.abs(ours.numpy()[rows] - wanted).max() <= TOLERANCE, prompt


@pytest.mark.parametrize("case", recorded("fp32"))
def test_logits_equal_the_recorded_ones_whole_and_in_pieces(case: Reference) -> None:
    assert_recorded(case, "fp32")


@pytest.mark.parametrize("case", recorded("fp32_bf16rot"))
def test_so_they_do_with_rotary_tables_as_a_gpu_rounds_them(case: Reference) -> None:
    assert_recorded(case, "fp32_bf16rot")


@pytest.mark.parametrize("case", recorded("fp32"))
def test_the_tables_are_those_that_training_saw(case: Reference) -> None:
    """wte in bfloat16: a GPU trained it."""
    decoder = load_model(case.checkpoint()).model.decoder
    assert decoder.config.rotary_tables == "bfloat16"
    assert torch.equal(decoder.cos, decoder.cos.bfloat16().float())


def test_a_model_of_january_without_windows_is_n3_within_the_window(tmp_path: Path) -> None:
    """n2 is n3 without windows: where none bites, what was recorded for n3 holds."""
    case = Reference(DATA / "n3_window")
    state = torch.load(case.checkpoint().path, weights_only=True)
    shape = Shape(layers=4, kv_heads=4, seq=64)
    place = write(tmp_path, "n2", shape)
    torch.save(state, place.path)
    decoder = load_model(place).model.decoder
    assert decoder.config.generation.name == "n2" and not decoder.config.windows
    ids = torch.tensor(case.facts["prompts"]["chat"])[None]
    assert np.abs(decoder(decoder.embed(ids))[0].numpy() - case.arrays["fp32/logits/chat"]).max() <= TOLERANCE
    long = case.facts["prompts"]["long"]
    ours, plain = decoder(decoder.embed(torch.tensor(long)[None]))[0], plain_logits(state, "n2", shape, long)
    assert (ours - plain).abs().max() <= TOLERANCE


SHAPES = {
    "odd depth, GQA": Shape(),
    "one layer": Shape(layers=1, kv_heads=4, pattern="L"),
    "two layers, one key head": Shape(layers=2, kv_heads=1, rows=300, pattern="S"),
    "trained on a CPU": Shape(layers=4, kv_heads=4, stored=torch.float32, pattern="SSSL", seq=400),
    "unpadded, lower case": Shape(layers=5, heads=2, kv_heads=2, rows=300, pattern="ssl", seq=24),
    "long short windows": Shape(layers=3, pattern="SSL", seq=200),
}


@pytest.mark.parametrize("name", OF)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_other_shapes_equal_a_plain_decoder_whole_and_in_pieces(
    name: str, shape: Shape, tmp_path: Path
) -> None:
    decoder = load_model(write(tmp_path, name, shape)).model.decoder
    T = 150 if shape.seq > 100 else 2 * shape.seq
    ids = torch.randint(300, (1, T), generator=torch.Generator().manual_seed(1))
    plain = plain_logits(state_of(name, shape), name, shape, ids[0].tolist())
    assert (decoder(decoder.embed(ids))[0] - plain).abs().max() <= TOLERANCE
    assert (in_pieces(decoder, ids, [9, 4, 30, 1, 1, 1, 50, 1, 1, 40]) - plain).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "case", [Reference(DATA / "n7_smear"), Reference(DATA / "n5_cap20")], ids=["n7", "n5"]
)
def test_a_batch_of_rows_at_different_positions_decodes_like_single_rows(case: Reference) -> None:
    decoder = load_model(case.checkpoint()).model.decoder
    ids = torch.tensor(case.facts["prompts"]["long"])
    lengths, reach = (3, 70, len(ids) - 1), decoder.config.reach
    cache = KVCache.empty(decoder.config, 3, len(ids), device=ids.device, dtype=torch.float32)
    for row, length in enumerate(lengths):
        step = decoder.plan(torch.arange(length)[None], first_row=row, length=length)
        decoder.trunk(decoder.embed(ids[None, :length]), step, cache)
    positions = torch.tensor(lengths)[:, None]
    x = decoder.embed(torch.stack([ids[length - reach : length + 1] for length in lengths]))
    known: dict[str, Any]
    plans: list[dict[str, Any]] = [{}, {"first": 3, "length": len(ids)}, {"padded": True, "length": len(ids)}]
    for known in plans:
        together = decoder.logits(decoder.trunk(x, decoder.plan(positions, **known), cache))
        for row, length in enumerate(lengths):
            alone = decoder(decoder.embed(ids[None, : length + 1]))[0, -1]
            assert (together[row, 0] - alone).abs().max() <= TOLERANCE


def test_constants_beat_recognition_and_bite(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "n7", Shape(seq=200))
    ids = torch.arange(150)[None]

    def logits(**constants: Any) -> torch.Tensor:
        decoder = load_model(replace(checkpoint, constants=Constants(**constants))).model.decoder
        return decoder(decoder.embed(ids))

    before = logits()
    for constants in (
        {"rotary_base": 10000.0},
        {"qk_scale": 1.15},
        {"gate_scale": 2.0},
        {"softcap": 20.0},
        {"short_window": 40},
        {"window_pattern": "L", "sequence_len": 100},
        {"rotary_tables": "float32"},
    ):
        assert (logits(**constants) - before).abs().max() > 1e-3, constants


def test_every_handed_case_is_found() -> None:
    assert {"n3_window", "n5_cap20", "n6_theta", "n7_smear"} <= {path.name for path in CASES}
    assert locate.find(DATA / "n7_smear", "base").step == 21400
