"""How tokens are chosen: the one home of sampling's defaults and ranges."""

import json
from dataclasses import dataclass, replace
from typing import Any

from ghostvis_cli.encoding import well_formed
from ghostvis_cli.errors import UsageError

MOST_TOKENS = 1_000_000  # more than any request needs
# What a `Sampling` may hold; whole numbers where the range is one of whole numbers.
RANGES: dict[str, tuple[int, int] | tuple[float, float]] = {
    "max_tokens": (1, MOST_TOKENS),
    "temperature": (0.0, 100.0),
    "top_p": (1e-9, 1.0),
    "top_k": (0, 1_000_000),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (0, 2**63 - 1),
    "logprobs": (0, 20),
}


class SamplingError(UsageError):
    """`field` of a Sampling can't be so."""

    def __init__(self, field: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.field = field


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens, in this order: penalties, grammar, top-k, temperature, top-p, min-p, draw.

    temperature 0 takes the likeliest token. top_k 0, top_p 1 and min_p 0 switch that filter off. Without a
    seed every request draws its own. logprobs asks for that many alternatives a token besides the one chosen.
    The repetition penalty counts prompt and answer, the other two the answer. json_schema is JSON text; it and
    regex (one of them) say what the whole answer must be.
    """

    max_tokens: int = 100
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    json_schema: str | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            if (value := getattr(self, name)) is not None or name not in ("seed", "logprobs"):
                (_whole if isinstance(low, int) else _number)(name, value, low, high)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) for text in self.stop):
            raise SamplingError("stop", "stop is not a tuple of strings")
        if not all(self.stop):
            raise SamplingError("stop", "a stop string is empty", hint="leave it out")
        for text in self.stop:
            well_formed(text, "a stop string")
        if self.json_schema is not None:
            _json_object(self.json_schema)
        if self.regex is not None:
            well_formed(self.regex, "regex")
            if self.json_schema is not None:
                raise SamplingError("regex", "regex and json_schema are both given", hint="leave one out")

    def changed(self, **given: Any) -> "Sampling":
        """With these fields changed. A grammar replaces another one, of either kind."""
        if given.get("json_schema") or given.get("regex"):
            given = {"json_schema": None, "regex": None, **given}
        return replace(self, **given)

    @property
    def is_shaped(self) -> bool:
        """Whether something changes the model's logits before the draw."""
        penalties = (self.repetition_penalty != 1, self.presence_penalty != 0, self.frequency_penalty != 0)
        return any(penalties) or self.has_grammar

    @property
    def has_grammar(self) -> bool:
        return self.json_schema is not None or self.regex is not None


def _json_object(text: object) -> None:
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SamplingError("json_schema", "json_schema is no JSON object", hint='{"type": "object"}')


def _whole(name: str, value: object, low: float, high: float) -> None:
    if type(value) is not int:
        raise SamplingError(name, f"{name} is {value!r}, not a whole number")
    if not low <= value <= high:
        raise SamplingError(name, f"{name} is {value}, outside {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SamplingError(name, f"{name} is {value!r}, not a number")
    if not low <= value <= high:  # also catches NaN
        raise SamplingError(name, f"{name} is {value:g}, outside {low:g} to {high:g}")
