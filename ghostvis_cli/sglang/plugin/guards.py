"""Checks that SGLang lacks, wrapped around its own functions (needed with 0.5.17 and 0.5.23).

* Its scheduler, and with it the server, crashes on a prompt's id outside the vocabulary (or reads what another
  request cached under it), on embeddings sent as JSON, and on some numbers out of range.
* Its grammar backend ignores parts of a JSON schema, at most with a line in its log (`schemas`).
* A typed `<|bos|>` would become the token in text outside a chat template: a raw prompt, the beginning of a reply,
  and a prompt with images, which would go from ids to text and back.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ghostvis_cli.convert.tokenizer import escaped
from ghostvis_cli.sglang.plugin import schemas

MODEL_TYPES = ("ghostvis", "ghostvis_nanochat", "nanochat", "qwen3")
KEYS = ("api_key", "admin_api_key")
MOST_TOPS, MOST_ANSWERS = 256, 128  # OpenAI's routes are documented for 20 and 128


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    chat = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat"
    completion = "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion"
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    for target, hook, kind in (
        (f"{manager}._validate_one_request", refuse_what_kills, HookType.BEFORE),
        (f"{chat}._process_messages", keep_typed_specials, HookType.AFTER),
        (f"{chat}._append_assistant_prefix_to_prompt_ids", keep_specials_of_a_reply, HookType.AROUND),
        (f"{completion}._convert_to_internal_request", begin_as_training_did, HookType.AFTER),
        ("sglang.srt.entrypoints.http_server.msgspec_to_builtins", hide_keys, HookType.AFTER),
    ):
        HookRegistry.register(target, hook, kind)


def hide_keys(answer: Any, *_: Any, **__: Any) -> Any:
    """The body of /server_info with its keys starred out, also within other fields' texts."""
    keys = [answer[name] for name in KEYS if answer.get(name)] if isinstance(answer, dict) else []
    return starred(answer, keys) if keys else answer


def starred(value: Any, keys: Sequence[str]) -> Any:
    if isinstance(value, str):
        for key in keys:
            value = value.replace(key, "***")
    elif isinstance(value, dict):
        return {name: starred(each, keys) for name, each in value.items()}
    elif isinstance(value, list):
        return [starred(each, keys) for each in value]
    return value


def refuse_what_kills(manager: Any, request: Any, input_ids: Sequence[int] | None, *_: Any) -> None:
    """ValueError for what would crash the scheduler; SGLang answers it as 400."""
    config = manager.model_config
    if config.hf_config.model_type not in MODEL_TYPES:
        return
    refuse_unknown_ids(() if input_ids is None else input_ids, config.vocab_size)
    sampling = request.sampling_params or {}
    if manager.server_args.grammar_backend in schemas.BACKENDS:
        schemas.refuse_what_is_left_out(sampling.get("json_schema"))
    tops = getattr(request, "top_logprobs_num", None) or 0
    answers = sampling.get("n") or 1
    embeddings = request.positional_embed_overrides
    for fault, rule in (
        ((getattr(request, "logprob_start_len", None) or 0) < -1, "logprob_start_len must be at least -1"),
        (not 0 <= tops <= MOST_TOPS, f"top_logprobs must be within 0 and {MOST_TOPS}"),
        (answers > MOST_ANSWERS, f"n must be at most {MOST_ANSWERS}"),
        (embeddings is not None and not hasattr(embeddings, "positions"), "embeddings can't be sent as JSON"),
    ):
        if fault:
            raise ValueError(rule)


def refuse_unknown_ids(ids: Sequence[int], vocab_size: int) -> None:
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise ValueError(f"token ids must be within 0 and {vocab_size - 1}")


def keep_typed_specials(result: Any, chat: Any, request: Any, *_: Any, **__: Any) -> Any:
    """Pass a vision model's chat on as the ids it was rendered to, where SGLang would pass their text."""
    config = chat.tokenizer_manager.model_config
    if config.hf_config.model_type == "ghostvis" and isinstance(result.prompt_ids, list):
        refuse_unknown_ids(result.prompt_ids, config.vocab_size)  # a client may send them here too
        request.input_ids = result.prompt_ids
    return result


def keep_specials_of_a_reply(
    append: Callable[..., list[int]], chat: Any, prompt_ids: list[int], text: str
) -> list[int]:
    """Encode the beginning of a reply (`continue_final_message`) as plain text, after the rendered prompt."""
    return append(
        chat, prompt_ids, escaped(text) if _reads_escapes(chat.tokenizer_manager.tokenizer) else text
    )


def begin_as_training_did(result: tuple[Any, Any], completion: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
    """Put a BOS before a raw prompt, as the local engine does; tokenizers converted earlier add none."""
    request, tokenizer = result[0], completion.tokenizer_manager.tokenizer
    if request.text is not None and _reads_escapes(tokenizer):
        texts = [request.text] if isinstance(request.text, str) else request.text
        bos = "" if tokenizer.bos_token_id in tokenizer.encode("") else tokenizer.bos_token
        begun = [bos + escaped(text) for text in texts]
        request.text = begun[0] if isinstance(request.text, str) else begun
    return result


def _reads_escapes(tokenizer: Any) -> bool:
    """Whether the tokenizer is of a converted directory: it removes the escape marks again."""
    if tokenizer is None:
        return False
    return bool(tokenizer.decode(tokenizer.encode(escaped("<"), add_special_tokens=False)) == "<")
