"""Which fields OpenAI's bodies may have here. One home for the local server, SGLang's guards and the batch reader.

A field is read, or it is known to change nothing, or it asks for something that is not done here and is refused
unless its value asks for nothing. Everything else is refused too: an answer that leaves out what was asked for is
a wrong answer. null is the same as absent.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["chat", "text"]
Values: TypeAlias = Mapping[str, tuple[object, ...]]

LONGEST_NAME = 64  # characters of a field's name that a refusal repeats


@dataclass(frozen=True)
class Stray:
    """A field that can't be accepted. `path` is its name as it may be shown, with the place it stands in."""

    path: str
    message: str
    code: Literal["unknown_parameter", "unsupported_parameter"]


@dataclass(frozen=True)
class Known:
    """The fields that one place of a body may have. `neutral` are values that ask for nothing."""

    read: frozenset[str]
    ignored: frozenset[str] = frozenset()
    neutral: Values = field(default_factory=dict)

    def stray(self, values: Mapping[str, Any], place: str = "") -> Stray | None:
        """The first field of `values` that is not among these."""
        for name, value in values.items():
            if value is None or name in self.read or name in self.ignored:
                continue
            path = _shown(name, place)
            if name not in self.neutral:
                return Stray(
                    path, f"{path} is not a field that is known here{self._meant(name)}", "unknown_parameter"
                )
            if not any(_same(value, neutral) for neutral in self.neutral[name]):
                return Stray(path, f"{path} is not supported here", "unsupported_parameter")
        return None

    def also(self, *names: str) -> "Known":
        return replace(self, read=self.read | set(names))

    def _meant(self, name: str) -> str:
        near = get_close_matches(name[:LONGEST_NAME], self.read, n=1, cutoff=0.8)
        return f" (did you mean {near[0]}?)" if near else ""


def _same(value: object, other: object) -> bool:
    """As JSON has it: true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _shown(name: str, place: str) -> str:
    """Only a plausible name is repeated: whatever else was sent stays out of answers and logs."""
    shown = name if re.fullmatch(rf"[\w.-]{{1,{LONGEST_NAME}}}", name, re.ASCII) else "a field"
    return f"{place}.{shown}" if place else shown


_SAMPLING = frozenset((
    "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "ignore_eos", "stop", "seed", "n", "stream", "stream_options", "logprobs",
    "return_token_ids",
))  # fmt: skip

# Fields of real clients that mean nothing here: who asks, how it is billed, filed, scheduled or sped up, and how
# hard a model that does not reason should reason.
_IGNORED = frozenset((
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prediction", "reasoning_effort",
    "reasoning", "verbosity", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
    "safety_identifier", "rid", "request_id", "priority", "separate_reasoning", "stream_reasoning",
    "cache_prompt", "keep_alive", "ttl",
    "custom_labels",
))  # fmt: skip

# Fields that would change the answer and that no engine of ours follows.
_NEUTRAL: Values = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "logit_bias": ({},), "frequency_penalty": (0,),
    "presence_penalty": (0,), "modalities": (["text"],), "audio": (), "web_search_options": (), "moderation": (),
    "best_of": (1,),
    "echo": (False,), "suffix": ("",), "min_tokens": (0,), "stop_token_ids": ([],), "stop_regex": ([], ""),
    "regex": (), "ebnf": (), "json_schema": (), "structural_tag": (), "skip_special_tokens": (True,),
    "no_stop_trim": (False,), "include_stop_str_in_output": (False,), "spaces_between_special_tokens": (True,),
    "continue_final_message": (False,), "add_generation_prompt": (True,), "chat_template": (),
    "chat_template_kwargs": ({}, {"enable_thinking": False}, {"thinking": False}), "enable_thinking": (False,),
    "thinking": ({"type": "disabled"},), "lora_path": (), "custom_logit_processor": (), "logits_processors": ([],),
    "custom_params": ({},), "input_ids": (), "prompt_logprobs": (), "cache_salt": (), "extra_key": (),
    "length_penalty": (1,), "use_beam_search": (False,), "bad_words": ([],), "allowed_token_ids": ([],),
    "return_hidden_states": (False,), "return_prompt_token_ids": (False,), "return_meta_info": (False,),
    "return_cached_tokens_details": (False,), "return_tokens_as_token_ids": (False,),
}  # fmt: skip

BODY: dict[Kind, Known] = {
    "chat": Known(
        _SAMPLING | {"messages", "top_logprobs"}, _IGNORED, {**_NEUTRAL, "add_special_tokens": (False,)}
    ),
    "text": Known(_SAMPLING | {"prompt"}, _IGNORED, {**_NEUTRAL, "add_special_tokens": (True,)}),
}
TOKENIZE = Known(frozenset(("model", "prompt")), neutral={"add_special_tokens": (False,)})
STREAM_OPTIONS = Known(
    frozenset(("include_usage",)), frozenset(("include_obfuscation",)), {"continuous_usage_stats": (False,)}
)
# Beside its text a message carries what clients copy from the answer before it, all of it empty.
MESSAGE = Known(
    frozenset(("role", "content")),
    frozenset(("name", "id", "cache_control", "reasoning_content", "reasoning")),
    {
        "tool_calls": ([],), "function_call": (), "refusal": ("",), "audio": (), "annotations": ([],),
        "prefix": (False,), "partial": (False,), "provider_specific_fields": ({},), "images": ([],),
    },
)  # fmt: skip
_PART_IGNORED = frozenset(("cache_control", "prompt_cache_breakpoint"))
TEXT_PART = Known(frozenset(("type", "text")), _PART_IGNORED, {"annotations": ([],)})
IMAGE_PART = Known(frozenset(("type", "image_url")), _PART_IGNORED, {"modalities": ("image",)})
IMAGE_URL = Known(frozenset(("url",)), frozenset(("detail",)))  # every image is seen at one size
