"""What SGLang does not check for us, hooked in front of its own functions (seen on 0.5.17 and 0.5.23).

* A prompt's id outside the vocabulary ends its scheduler, or reads what another request cached under that id.
* A prompt with pictures goes from ids to text and back, where a typed `<|bos|>` would become the token.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from ghostvis_cli.convert.tokenizer import escaped

MODEL_TYPES = ("ghostvis", "nanochat", "qwen3")


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        refuse_unknown_ids,
        HookType.BEFORE,
    )
    HookRegistry.register(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_messages",
        keep_typed_specials,
        HookType.AFTER,
    )


def refuse_unknown_ids(manager: Any, _request: Any, input_ids: Sequence[int] | None, *_: Any) -> None:
    """ValueError, which SGLang answers as 400."""
    config = manager.model_config
    if config.hf_config.model_type not in MODEL_TYPES:
        return
    ids = () if input_ids is None else input_ids
    if len(ids) and not (min(ids) >= 0 and max(ids) < config.vocab_size):
        raise ValueError(f"token ids must be within 0 and {config.vocab_size - 1}")


def keep_typed_specials(result: Any, chat: Any, *_: Any, **__: Any) -> Any:
    """The prompt of a chat with pictures: text that gives the very ids again when it is encoded."""
    manager = chat.tokenizer_manager
    if manager.model_config.hf_config.model_type == "ghostvis" and isinstance(result.prompt_ids, list):
        tokenizer = manager.tokenizer
        result.prompt = spelled(result.prompt_ids, set(tokenizer.all_special_ids), tokenizer.decode)
    return result


def spelled(ids: Sequence[int], specials: set[int], decode: Callable[[list[int]], str]) -> str:
    """Ids as text: special tokens by name, everything else escaped so that it stays what it is."""
    pieces = []
    for special, run in groupby(ids, key=specials.__contains__):
        text = decode(list(run))
        pieces.append(text if special else escaped(text))
    return "".join(pieces)
