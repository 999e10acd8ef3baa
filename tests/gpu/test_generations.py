"""nanochat's later generations on a CUDA device: the recorded tokens in float32, one by one and all at once."""

from dataclasses import replace

import pytest
import torch

from ghostvis_cli.checkpoint.generations import Constants
from ghostvis_cli.checkpoint.load import load_model
from ghostvis_cli.engines.local.scheduler import Scheduler
from tests.conftest import Reference
from tests.engines.test_local_generations import CASES, run, sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", CASES)
def test_float32_on_cuda_gives_the_recorded_tokens(case: str) -> None:
    reference = Reference(case)
    tables = Constants(rotary_tables=reference.facts["rotary_tables"])
    model = load_model(replace(reference.checkpoint(), constants=tables), device="cuda")
    prompts = reference.facts["prompts"]
    recorded = [reference.greedy(f"{name}/naive") for name in prompts]
    with torch.inference_mode():
        scheduler = Scheduler(model.model, model.tokenizer, prefill_tokens=16)
        assert [run(scheduler, sequence(ids))[0] for ids in prompts.values()] == recorded
        assert run(scheduler, *(sequence(ids) for ids in prompts.values())) == recorded
