"""SGLang's features that nanochat's later generations don't support: refused at the start, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

# These use each layer's own window. The others plan with one for the whole model.
OWN_WINDOWS = frozenset(("fa3", "torch_native", "intel_amx"))
OTHER_CACHES = {  # with keys from elsewhere than this device's own prefills
    "enable_hierarchical_cache": "--enable-hierarchical-cache",
    "enable_lmcache": "--enable-lmcache",
    "enable_flexkv": "--enable-flexkv",
    "radix_cache_backend": "--radix-cache-backend",
}
BACKENDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
ALL = -1  # keys


def server_settings() -> Mapping[str, Any]:
    """SGLang's arguments, resolved."""
    try:
        from sglang.srt.runtime_context import get_server_args
    except ImportError:  # before 0.5.23
        from sglang.srt.server_args import get_global_server_args as get_server_args
    args = get_server_args()
    return args.resolved_dict() if hasattr(args, "resolved_dict") else vars(args)


def refuse(settings: Mapping[str, Any], *, smear: bool, images: bool = False) -> None:
    """ValueError, which ends the start, since wrong answers would go unnoticed.

    A graph of prefill replays the layers alone. It knows only the batch's first request, whose tokens would become
    all requests' neighbours, and has an id without an embedding in an image's place.
    """
    disaggregated = settings.get("disaggregation_mode") not in (None, "null")
    elsewhere = [option for name, option in OTHER_CACHES.items() if settings.get(name)]
    split = max(settings.get(name) or 1 for name in ("attn_cp_size", "dcp_size")) > 1
    faults = [
        ((settings.get("pp_size") or 1) > 1, "pipeline parallelism (--pp-size)"),
        (settings.get("speculative_algorithm"), "speculative decoding (--speculative-algorithm)"),
        (settings.get("enable_dp_attention"), "data-parallel attention (--enable-dp-attention)"),
        (split, "context parallelism (--attn-cp-size, --dcp-size)"),
        (
            (smear or images) and _has_prefill_graphs(settings),
            "graphs of prefill (for any --cuda-graph-backend-prefill but disabled)",
        ),
        (smear and disaggregated, "disaggregated prefill and decoding (--disaggregation-mode)"),
        (smear and elsewhere, f"a cache beyond the device's memory ({', '.join(elsewhere)})"),
    ]
    if found := [name for fault, name in faults if fault]:
        raise ValueError(f"ghostvis: nanochat models of 2026 can't be served with {' or '.join(found)}")


def _has_prefill_graphs(settings: Mapping[str, Any]) -> bool:
    """Whether SGLang's resolved choice, an object or since 0.5.23 a dictionary, has graphs for prefill."""
    found = settings.get("cuda_graph_config")
    for name in ("prefill", "backend"):
        found = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
    return found not in (None, "disabled")


def layer_windows(windows: Sequence[int], context: int, settings: Mapping[str, Any]) -> list[int]:
    """How many keys back each layer sees; ALL where its window is the whole context."""
    biting = [ALL if window >= context - 1 else window for window in windows]
    lengths = set(biting) - {ALL}
    backends = {str(settings[name]) for name in BACKENDS if settings.get(name)}
    if len(lengths) > 1 and not backends <= OWN_WINDOWS:
        raise ValueError(
            f"ghostvis: a context of {context} needs windows of {' and '.join(map(str, sorted(lengths)))} keys in "
            f"one model, and the attention backend {', '.join(sorted(backends))} has one: "
            f"--context-length {max(lengths)}, or --attention-backend fa3"
        )
    return biting
