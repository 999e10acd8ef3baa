"""`ghostvis convert` as it is typed."""

import json
import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.cli import invoke
from tests.commands.processes import GHOSTVIS
from tests.conftest import DATA, Reference

SWIGLU = str(Reference("text_swiglu").checkpoint().path)
convert = partial(invoke, "convert")
MOE = DATA / "text_moe_top1" / "base_checkpoints" / "d4"


def test_a_conversion_prints_where_the_directory_is(tmp_path: Path) -> None:
    done = convert(SWIGLU, "--out", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert "verified: max |logit difference|" in done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_of_runs_for_one_place_at_once_exactly_one_is_done(tmp_path: Path, force: tuple[str, ...]) -> None:
    place = tmp_path / "out"
    if force:
        assert convert(SWIGLU, "--out", place, "--no-verify").exit_code == 0
    command = [GHOSTVIS, "convert", SWIGLU, "--out", str(place), "--no-verify", *force]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    said = [run.communicate(timeout=60)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2, 2] or force, said
    assert {run.returncode for run in runs} <= {0, 2} and 0 in {run.returncode for run in runs}, said
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_json_prints_the_certificate(tmp_path: Path) -> None:
    done = convert("--checkpoint-path", SWIGLU, "--out", tmp_path / "out", "--json", "--no-verify")
    assert "not verified" in done.stderr
    record = json.loads(done.stdout)
    assert record["parity"] == json.loads((tmp_path / "out" / "parity.json").read_text())


def test_a_dry_run_lists_every_tensor_and_writes_nothing(tmp_path: Path) -> None:
    done = convert(SWIGLU, "--dry-run", "--json", "--out", tmp_path / "out")
    record = json.loads(done.stdout)
    by_name = {tensor["name"]: tensor for tensor in record["tensors"]}
    assert by_name["model.layers.0.self_attn.q_proj.weight"]["change"] == "swap_halves"
    assert by_name["model.embed_tokens.weight"]["sources"] == ["transformer.wte.weight"]
    assert record["bytes"] == sum(tensor["bytes"] for tensor in record["tensors"])
    assert not list(tmp_path.iterdir())
    shown = convert(SWIGLU, "--dry-run")
    assert "model.layers.0.mlp.down_proj.weight" in shown.stdout
    assert "Qwen3ForCausalLM" in shown.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([SWIGLU], 2, "where to?"),
        ([SWIGLU, "--out", "x", "--dtype", "int8"], 2, "no dtype named 'int8'"),
        ([SWIGLU, "--out", "x", "--max-shard-size", "lots"], 2, "not a size"),
        ([SWIGLU, "--out", "x", "--checkpoint-path", SWIGLU], 2, "named twice"),
        (["--out", "x"], 2, "no checkpoint was named"),
        (["nowhere.pt", "--out", "x"], 4, "does not exist"),
        (
            [MOE, "--dry-run"],
            4,
            "mixture",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_with_its_code(args: list[object], code: int, said: str) -> None:
    done = convert(*args)
    assert done.exit_code == code
    assert said in done.stderr
