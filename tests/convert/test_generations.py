"""nanochat's later generations in transformers: logits and `generate` are the checkpoint's, with and without us."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ghostvis_cli.checkpoint.generations import Constants
from ghostvis_cli.checkpoint.load import load_model
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.convert import run
from ghostvis_cli.convert.plan import ConvertSettings, make_plan
from tests.conftest import DATA, Reference
from tests.convert.conversions import converted
from tests.nanochat import OF, Eyes, Shape, write

transformers = pytest.importorskip("transformers")
CASES = sorted(path.name for path in DATA.glob("n[2-9]_*"))
TOLERANCE = 1e-4  # the same mathematics in float32, other orders of its sums: seen 2e-5


def checkpoint_of(case: str) -> Checkpoint:
    """With the tables that the recording had."""
    reference = Reference(case)
    return replace(
        reference.checkpoint(), constants=Constants(rotary_tables=reference.facts["rotary_tables"])
    )


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("nanochat")
    return {case: converted(checkpoint_of(case), place / case) for case in CASES}


def opened(directory: Path):
    import ghostvis_cli.hf  # noqa: F401 - registers the class

    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_the_recorded_ones(case: str, directories: dict[str, Path]) -> None:
    reference, model = Reference(case), opened(directories[case])
    assert type(model).__name__ == "GhostVisNanoChatForCausalLM"
    for prompt, ids in reference.facts["prompts"].items():
        ids = torch.tensor([ids])
        with torch.inference_mode():
            logits = model(ids).logits[0].numpy()
        kept = f"fp32/rows/{prompt}"
        rows = reference.arrays[kept] if kept in reference.arrays.files else slice(None)
        assert abs(logits[rows] - reference.arrays[f"fp32/logits/{prompt}"]).max() <= TOLERANCE
        asked = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with_cache = model.generate(ids, **asked)
        assert with_cache[0, ids.size(1) :].tolist() == reference.greedy(f"{prompt}/naive")
        if prompt in ("one", "chat"):
            assert torch.equal(model.generate(ids, use_cache=False, **asked), with_cache)


def test_a_padded_batch_gives_each_prompts_own_answer(directories: dict[str, Path]) -> None:
    """The first token of a padded row takes in no padding."""
    reference, model = Reference("n7_smear"), opened(directories["n7_smear"])
    prompts = [reference.facts["prompts"][name] for name in ("chat", "short40", "raw", "one")]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(each)) + each for each in prompts])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])
    asked = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answers = model.generate(ids, attention_mask=mask, **asked)[:, width:].tolist()
    assert answers == [reference.greedy(f"{name}/naive") for name in ("chat", "short40", "raw", "one")]


def test_beams_with_a_cache_are_those_without(directories: dict[str, Path]) -> None:
    """Reordered rows keep the neighbours that are theirs."""
    reference, model = Reference("n7_smear"), opened(directories["n7_smear"])
    ids = torch.tensor([reference.facts["prompts"]["chat"]])
    asked = {
        "max_new_tokens": 12,
        "do_sample": False,
        "num_beams": 3,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    assert torch.equal(model.generate(ids, **asked), model.generate(ids, use_cache=False, **asked))


def test_guessed_tokens_that_are_taken_back_leave_no_trace(directories: dict[str, Path]) -> None:
    reference, model = Reference("n7_smear"), opened(directories["n7_smear"])
    ids = torch.tensor([reference.facts["prompts"]["short40"]])
    asked = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    guessed = model.generate(ids, prompt_lookup_num_tokens=3, **asked)
    assert guessed[0, 40:].tolist() == reference.greedy("short40/naive")


@pytest.mark.parametrize("name", OF)
@pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "by layer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_shapes_pass_their_own_certificate(
    name: str, by_layer: bool, dtype: Any, tmp_path: Path
) -> None:
    place = write(tmp_path / "in", name, Shape(rows=300, seq=60, pattern="SSL"))
    plan = make_plan(place, ConvertSettings(dtype=dtype, by_layer=by_layer))
    certificate = run.run(plan, tmp_path / "out", run.Progress(plan.weights_bytes))
    figures = {check["name"]: check["value"] for check in certificate["verification"]["checks"]}
    assert figures["max |logit difference|"] <= TOLERANCE
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    of = OF[name]
    assert (config["final_logit_softcapping"], config["rope_theta"]) == (of.cap, of.base)
    assert (config["qk_scale"], config["gate_channels"], config["smear"]) == (of.m, of.channels, of.smear)
    assert config["window_sizes"] == ([of.short(60), of.short(60), 60] if of.windows else [])


def test_scalars_stay_float32_in_a_bfloat16_directory(tmp_path: Path) -> None:
    place = converted(checkpoint_of("n7_smear"), tmp_path / "out", dtype="bfloat16")
    with safe_open(place / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(f"model.{name}") for name in ("resid_lambdas", "backout_lambda")}
    trained = load_model(checkpoint_of("n7_smear")).model.decoder
    model = opened(place)
    assert model.dtype == torch.bfloat16
    for name, tensor in stored.items():
        assert torch.equal(tensor, getattr(trained, name))
        assert torch.equal(getattr(model.model, name), tensor)


ALONE = """
import sys
import torch
sys.modules["ghostvis_cli"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True).bos_token == "<|bos|>"
ids = torch.tensor([eval(sys.argv[2])])
out = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
print(out[0, ids.size(1):].tolist())
"""


def test_the_directory_alone_needs_nothing_of_this_project(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    reference = Reference("n7_smear")
    ids = reference.facts["prompts"]["short40"]
    answer = subprocess.run(
        [sys.executable, "-c", ALONE, str(directories["n7_smear"]), str(ids)],
        env=os.environ | {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == reference.greedy("short40/naive")


@pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "by layer"])
@pytest.mark.parametrize("layout", ["inline", "prepend_slots"])
def test_a_vision_model_on_a_later_decoder_passes_its_own_certificate(
    layout: Any, by_layer: bool, tmp_path: Path
) -> None:
    place = write(tmp_path / "in", "n7", Shape(rows=1024, vocabulary=1024, seq=100), eyes=Eyes())
    plan = make_plan(place, ConvertSettings(dtype="float32", layout=layout, by_layer=by_layer))
    certificate = run.run(plan, tmp_path / "out", run.Progress(plan.weights_bytes))
    figures = {check["name"]: check["value"] for check in certificate["verification"]["checks"]}
    assert certificate["architecture"] == "GhostVisForConditionalGeneration"
    assert figures["max |logit difference|"] <= TOLERANCE
    assert any(
        "picture" in case["case"] and case["same_ids"] for case in certificate["verification"]["cases"]
    )


ALONE_WITH_IMAGES = """
import sys
sys.modules["ghostvis_cli"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
directory, image = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
a, b = (model.generate(**inputs, use_cache=cached, **asked) for cached in (True, False))
assert (a == b).all()
print(a[0, inputs["input_ids"].shape[1] :].tolist())
"""


def test_a_vision_model_on_a_later_decoder_answers_alone_as_the_local_engine_does(tmp_path: Path) -> None:
    from ghostvis_cli import demo
    from ghostvis_cli.convert.observed import pixels_of
    from ghostvis_cli.engines.base import Sampling
    from ghostvis_cli.engines.local.scheduler import Scheduler
    from ghostvis_cli.engines.local.sequence import Sequence
    from ghostvis_cli.images import load_image
    from ghostvis_cli.prompt import Message, render_for_reply

    checkpoint = write(tmp_path / "in", "n7", Shape(rows=1024, vocabulary=1024, seq=100), eyes=Eyes())
    directory = converted(checkpoint, tmp_path / "out", layout="inline")
    loaded = load_model(checkpoint)
    assert loaded.model.config.vision is not None
    rows = loaded.model.config.vision.num_tokens
    message = Message.of("user", "What is it?", [load_image(str(demo.EXAMPLES[0]))])
    prompt = render_for_reply([message], loaded.tokenizer, "inline", rows)
    images = pixels_of(prompt, loaded.model.config)
    assert images is not None
    pixels = list(images.numpy())
    sequence = Sequence.start(prompt, pixels, Sampling(max_tokens=12, temperature=0, ignore_eos=True), rows)
    scheduler = Scheduler(loaded.model, loaded.tokenizer)
    with torch.inference_mode():
        scheduler.submit(sequence)
        while scheduler.busy:
            scheduler.step()
    answer = subprocess.run(
        [sys.executable, "-c", ALONE_WITH_IMAGES, str(directory), str(demo.EXAMPLES[0])],
        env=os.environ | {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == sequence.output


def test_another_constant_is_another_entry_of_the_cache_and_can_not_be_set_afterwards(tmp_path: Path) -> None:
    from ghostvis_cli.checkpoint.choose import choose_checkpoint
    from ghostvis_cli.convert import cache
    from ghostvis_cli.errors import ModelError
    from ghostvis_cli.profile import ModelSettings

    path = str(Reference("n5_cap20").checkpoint().path)
    places = []
    for settings in (ModelSettings(checkpoint_path=path), ModelSettings(checkpoint_path=path, softcap=15.0)):
        checkpoint, _ = choose_checkpoint(settings)
        places.append(cache.converted(checkpoint, "float32", None, report=print, base=tmp_path))
    caps = [json.loads((place / "config.json").read_text())["final_logit_softcapping"] for place in places]
    assert caps == [20.0, 15.0]
    served = ModelSettings(checkpoint_path=str(places[0]), softcap=15.0)
    with pytest.raises(ModelError, match="softcap can't be set any more"):
        cache.as_it_is(places[0], served, report=print)
