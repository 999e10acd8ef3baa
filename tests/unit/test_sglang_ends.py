"""What the plug-in takes out of outputs as SGLang 0.5.23 makes them. The real one: tests/sglang/test_ends.py."""

from types import SimpleNamespace
from typing import Any

from ghostvis_cli.sglang.plugin.ends import BY_TOKEN, leave_out_ends

END = {"type": "stop", "matched": 7}


def manager(model_type: str = "ghostvis", **sampling: Any) -> SimpleNamespace:
    states = {"a": SimpleNamespace(obj=SimpleNamespace(sampling_params=sampling))}
    config = SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type))
    return SimpleNamespace(model_config=config, rid_to_state=states)


def batch(*reasons: dict[str, Any] | None, count: int = 3) -> SimpleNamespace:
    rows: dict[str, Any] = {name: [[5, 6, 7] for _ in reasons] for name in BY_TOKEN}
    rows["output_top_logprobs_val"] = None  # nobody asked
    return SimpleNamespace(
        rids=["a"] * len(reasons),
        finished_reasons=[*reasons],
        completion_tokens=[count] * len(reasons),
        **rows,
    )


def test_only_a_token_that_ended_an_answer_is_left_out() -> None:
    by_text, by_length = {"type": "stop", "matched": "x"}, {"type": "length", "length": 3}
    outputs = batch(None, END, by_text, by_length)
    leave_out_ends(manager(), outputs)
    assert outputs.completion_tokens == [3, 2, 3, 3]
    assert outputs.output_ids == [[5, 6, 7], [5, 6], [5, 6, 7], [5, 6, 7]]
    assert outputs.output_token_logprobs_val[1] == [5, 6]


def test_models_of_others_and_clients_that_want_to_see_it_are_left_alone() -> None:
    for asked in (manager("llama"), manager(no_stop_trim=True)):
        outputs = batch(END)
        leave_out_ends(asked, outputs)
        assert (outputs.completion_tokens, outputs.output_ids) == ([3], [[5, 6, 7]])


def test_embeddings_have_nothing_to_count() -> None:
    leave_out_ends(manager(), SimpleNamespace(rids=["a"], finished_reasons=[END]))
