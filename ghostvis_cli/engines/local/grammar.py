"""What a JSON schema or a regular expression allows next: llguidance, on the CPU. Knows tokens, no sequences."""

import json
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ghostvis_cli.engines.base import GrammarError
from ghostvis_cli.errors import RequestError, printable
from ghostvis_cli.sampling import Sampling

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.tokenizer import Tokenizer

# As json.dumps writes. A model that may put white space anywhere may never put anything else.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


LONGEST_REASON = 200  # characters


class Grammar:
    """One answer's grammar and how far it has got."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self._bits = matcher, np.zeros(words, dtype=np.int32)

    def allowed(self, size: int) -> Tensor:
        """(size,) bool: the ids that may come next; the end of a turn where the answer may end.

        Any, where the grammar grew beyond its limits: `take` says so, to the one sequence that it belongs to.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            return torch.ones(size, dtype=torch.bool)
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[:size]
        return torch.from_numpy(np.pad(bits, (0, size - len(bits))).view(np.bool_))

    def take(self, token: int) -> None:
        """Go on behind a token, which may be the end's."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise GrammarError(f"the answer's grammar is too much: {_first_line(self._matcher)}")


def _first_line(matcher: Any) -> str:
    return printable(" ".join(str(matcher.get_error()).split()))[:LONGEST_REASON]


class Grammars:
    """Makes grammars for one vocabulary. Blocks for up to seconds: call it in a thread."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer, self._lock = tokenizer, Lock()

    def of(self, sampling: Sampling) -> Grammar | None:
        """None where any text will do; GrammarError where what is asked for is no grammar."""
        if not sampling.has_grammar:
            return None
        with self._lock:
            vocabulary = self._vocabulary
        from llguidance import LLMatcher

        if sampling.regex is not None:
            text = LLMatcher.grammar_from_regex(sampling.regex)
        else:
            text = LLMatcher.grammar_from_json_schema(
                json.loads(sampling.json_schema or ""), overrides=LAYOUT
            )
        matcher = LLMatcher(vocabulary, text, log_level=0)
        if matcher.is_error():
            asked = "regular expression" if sampling.json_schema is None else "JSON schema"
            raise GrammarError(f"the {asked} can't be followed: {_first_line(matcher)}")
        return Grammar(matcher, (self._tokenizer.vocab_size + 31) // 32)

    @cached_property
    def _vocabulary(self) -> Any:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            hint = "pip install 'ghostvis-cli[local]'"
            raise RequestError(
                "answers by a schema need llguidance, which is not installed", hint=hint
            ) from error
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer)))


class _Vocabulary:
    """The tokenizer as llguidance wants one. Its special tokens are no text: none is ever allowed but the end."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.eos_token_id = tokenizer.special("<|assistant_end|>")
        self.bos_token_id = tokenizer.special("<|bos|>")
        self.tokens = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.vocab_size)]
        self.special_token_ids = list(tokenizer.specials.values())
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())
