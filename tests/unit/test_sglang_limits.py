"""What a server is refused for nanochat's later generations, and which windows its layers get."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from ghostvis_cli.sglang.plugin.limits import ALL, layer_windows, refuse

FINE = {"pp_size": 1, "disaggregation_mode": "null", "enable_hierarchical_cache": False, "tp_size": 4}


@pytest.mark.parametrize("smear", [False, True])
@pytest.mark.parametrize(
    ("settings", "named", "smear_only"),
    [
        ({"pp_size": 2}, "pipeline parallelism", False),
        ({"speculative_algorithm": "EAGLE"}, "speculative decoding", False),
        ({"enable_dp_attention": True}, "data-parallel attention", False),
        ({"disaggregation_mode": "prefill"}, "disaggregated prefill", True),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache", True),
        ({"enable_lmcache": True}, "--enable-lmcache", True),
        ({"enable_flexkv": True}, "--enable-flexkv", True),
        ({"radix_cache_backend": "flexkv"}, "--radix-cache-backend", True),
        ({"attn_cp_size": 2}, "context parallelism", False),
        ({"dcp_size": 2}, "context parallelism", False),
    ],
)
def test_what_would_make_answers_wrong_is_refused_by_name(
    settings: dict, named: str, smear_only: bool, smear: bool
) -> None:
    refuse(FINE, smear=smear)
    if smear_only and not smear:
        refuse(FINE | settings, smear=smear)
        return
    with pytest.raises(ValueError, match=named):
        refuse(FINE | settings, smear=smear)


@pytest.mark.parametrize("of_a_release", [dict, lambda phase: SimpleNamespace(**phase)])
def test_graphs_of_prefill_are_refused_where_they_would_mix_up_a_batch(
    of_a_release: Callable[[dict], object],
) -> None:
    for backend in ("breakable", "full"):
        captured = {"cuda_graph_config": of_a_release({"prefill": of_a_release({"backend": backend})})}
        refuse(FINE | captured, smear=False)
        for needs in ({"smear": True}, {"smear": False, "images": True}):
            with pytest.raises(ValueError, match="graphs of prefill"):
                refuse(FINE | captured, **needs)
    none = {"cuda_graph_config": of_a_release({"prefill": of_a_release({"backend": "disabled"})})}
    refuse(FINE | none, smear=True, images=True)


def test_long_windows_bite_beyond_the_trained_length_alone() -> None:
    assert layer_windows([512, 512, 2048], 2048, {"attention_backend": "triton"}) == [512, 512, ALL]
    assert layer_windows([512, 512, 2048], 2049, {"attention_backend": "triton"}) == [512, 512, ALL]
    assert layer_windows([128, 64], 64, {"attention_backend": "triton"}) == [ALL, ALL]
    assert layer_windows([64, 64], 640, {"attention_backend": "flashinfer"}) == [64, 64]
    assert layer_windows([], 640, {}) == []


def test_two_lengths_need_an_attention_backend_that_reads_each_layers_own() -> None:
    windows = [512, 2048]
    for name in ("fa3", "torch_native", "intel_amx"):
        assert layer_windows(windows, 4096, {"attention_backend": name}) == windows
    for settings in (
        {"attention_backend": "flashinfer"},
        {"attention_backend": "fa3", "decode_attention_backend": "triton"},
    ):
        with pytest.raises(ValueError, match="--context-length 2048, or --attention-backend fa3"):
            layer_windows(windows, 4096, settings)
