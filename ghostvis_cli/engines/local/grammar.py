"""What a JSON schema or a regular expression allows next: llguidance, on the CPU. Knows tokens, no sequences."""

import json
from decimal import Decimal
from functools import cached_property
from math import lcm
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ghostvis_cli.engines.base import GrammarError
from ghostvis_cli.errors import RequestError, one_line, printable
from ghostvis_cli.sampling import Sampling

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.tokenizer import Tokenizer

# As json.dumps writes. A model that may put white space anywhere may never put anything else.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
LONGEST_REASON = 200  # characters
# Of all multipleOf together: each remainder is a state, and from millions on the automaton is never done.
LARGEST_DIVISOR = 100_000
NO_DETAILS, NOTHING_FITS = "<non-verbose/>", "NoExtensionBias"  # llguidance's words


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
            raise GrammarError(f"the answer's grammar is too much: {_reason(self._matcher)}")


def _reason(matcher: Any) -> str:
    said = " ".join(str(matcher.get_error()).replace(NO_DETAILS, "").split())
    return printable("no text fits it" if said == NOTHING_FITS else said)[:LONGEST_REASON]


def _check_divisors(schema: str) -> None:
    """GrammarError where an automaton of remainders would take minutes, or all memory."""
    divisors: list[int] = []

    def note(table: dict[str, Any]) -> None:
        divisor = table.get("multipleOf")
        if isinstance(divisor, int | float):
            digits, exponent = Decimal(str(divisor)).as_tuple()[1:]
            divisors.append(int("".join(map(str, digits))) * 10 ** max(0, int(exponent)))

    json.loads(schema, object_hook=note)
    if lcm(*divisors) > LARGEST_DIVISOR:
        raise GrammarError(
            f"the JSON schema can't be followed: its multipleOf make more than {LARGEST_DIVISOR} remainders"
        )


def _text_of(sampling: Sampling) -> str:
    """The grammar as llguidance reads it."""
    from llguidance import LLMatcher

    if sampling.json_schema is None:
        return str(LLMatcher.grammar_from_regex(sampling.regex or ""))
    try:  # Python's reading of JSON admits more: numbers without end, halves of characters
        text = str(LLMatcher.grammar_from_json_schema(sampling.json_schema, overrides=LAYOUT))
    except ValueError as error:
        raise GrammarError(f"the JSON schema is not valid JSON: {one_line(error)}") from error
    _check_divisors(sampling.json_schema)
    return text


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
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(vocabulary, _text_of(sampling), log_level=0, limits=limits)
        # The first mask builds most of the automaton, which may take seconds: here, where nobody waits for it.
        if matcher.is_error() or (matcher.compute_bitmask() and matcher.is_error()):
            asked = "regular expression" if sampling.json_schema is None else "JSON schema"
            raise GrammarError(f"the {asked} can't be followed: {_reason(matcher)}")
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
