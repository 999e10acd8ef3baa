"""An answer without the token that ends it: SGLang leaves that out of the text, but not out of counts and ids.

So completion_tokens, token ids and log-probabilities are those of the local engine (seen on 0.5.23).
"""

from typing import Any

from ghostvis_cli.sglang.plugin.guards import MODEL_TYPES

LOGPROBS = ("token_logprobs", "top_logprobs", "token_ids_logprobs")
BY_TOKEN = ("output_ids", *(f"output_{name}_{part}" for name in LOGPROBS for part in ("val", "idx")))


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    HookRegistry.register(f"{manager}._handle_batch_output", leave_out_ends, HookType.BEFORE)


def leave_out_ends(manager: Any, batch: Any, *_: Any) -> None:
    """Before SGLang's main process hands on what its scheduler has produced, request by request."""
    if not hasattr(batch, "completion_tokens"):  # embeddings
        return
    if manager.model_config.hf_config.model_type not in MODEL_TYPES:
        return
    counts = batch.completion_tokens
    for row, (name, reason) in enumerate(zip(batch.rids, batch.finished_reasons, strict=True)):
        left_out = _ended_by_a_token(reason) and not _shows_its_end(manager.rid_to_state.get(name))
        counts[row] -= left_out
        if left_out or not counts[row]:  # one likeliest token is told where none was asked for
            for field in BY_TOKEN:
                values = getattr(batch, field)
                if values and values[row]:
                    values[row] = values[row][:-1]


def _ended_by_a_token(reason: dict[str, Any] | None) -> bool:
    """Where a stop string ended it, `matched` is that string."""
    return reason is not None and isinstance(reason.get("matched"), int)


def _shows_its_end(state: Any) -> bool:
    return state is not None and bool((state.obj.sampling_params or {}).get("no_stop_trim"))
