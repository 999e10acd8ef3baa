"""The parity certificate: a checkpoint and the directory made of it give the same answers, in figures.

The weights of both sides are those that were written (the source's are rounded to the directory's dtype) and the
arithmetic is float32, so that what is measured is the conversion. What remains are the rotary tables, which
GhostVis rounds to bfloat16 and transformers does not (format specification, section 10), and, below float32, the
embedding table, which is rounded after its rows were normalised instead of before.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch

from ghostvis_cli.convert.cases import Case, cases, corpus
from ghostvis_cli.convert.observed import Answer, Converted, Source
from ghostvis_cli.convert.run import Plan
from ghostvis_cli.convert.tensors import DTYPES
from ghostvis_cli.model.decoder import rms

DIVERGED = 0.05  # of a layer: greatest difference of normalised rows; far above what rotary tables cause


@dataclass(frozen=True)
class Limits:
    """What a conversion may differ by. The logits lie within ±15."""

    mapping: float = 1e-3  # of logits, with the source's rotary tables left unrounded: seen 1e-4
    max_logit: float = 0.1  # with the source as it is: seen 0.02 on random models, 0.05 on the demo model
    mean_logit: float = 0.005
    kl: float = 1e-4
    top1: float = 0.99
    rows: float = 1e-3


LIMITS = {
    "float32": Limits(),
    "float16": Limits(mapping=0.05, max_logit=0.1, mean_logit=0.005, kl=1e-4, top1=0.98),
    "bfloat16": Limits(mapping=0.5, max_logit=0.5, mean_logit=0.02, kl=1e-3, top1=0.97),
}


@dataclass(frozen=True)
class Check:
    """A figure and the limit it keeps to: at most, or where `least` is set, at least."""

    name: str
    value: float
    limit: float
    least: bool = False

    @property
    def ok(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"value": _or_null(self.value), "ok": self.ok}


def verify(plan: Plan, directory: Path, check: Callable[[], None]) -> dict[str, Any]:
    """The certificate's `verification`. `check` is called between the parts and may raise to end it."""
    vision = plan.classified.config.vision is not None
    fixed = cases(vision=vision)
    source = Source(plan.checkpoint, DTYPES[plan.settings.dtype], plan.layout)
    source.answer(fixed, check)
    converted = Converted(directory, vision=vision)
    compared = _Compared(plan)
    for case in fixed:
        check()
        if (expected := source.answers.get(case.name)) is None:
            continue
        compared.case(case, expected, converted.answer(case, expected.greedy))
    compared.texts(converted)
    return compared.record()


class _Compared:
    """Adds up the differences of all cases."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.differences: list[torch.Tensor] = []  # (T, ) greatest and mean a position
        self.kl: list[torch.Tensor] = []
        self.agreed: list[torch.Tensor] = []
        self.per_case: list[dict[str, Any]] = []
        self.rendered_otherwise = 0
        self.pixels = self.rows = self.mapped = 0.0
        self.texts_compared = self.texts_otherwise = self.tokens_otherwise = 0
        self.diverging: str | None = None

    def case(self, case: Case, expected: Answer, got: Answer) -> None:
        ours = [self.plan.tokenizer.image_id if id_ < 0 else id_ for id_ in expected.ids]
        same_prompt = ours == got.ids
        self.rendered_otherwise += not same_prompt
        figures: dict[str, Any] = {
            "case": case.name,
            "positions": len(expected.logits),
            "same_ids": same_prompt,
        }
        if expected.pixels is not None and got.pixels is not None and got.rows is not None:
            assert expected.rows is not None, "pictures that were seen have rows"
            self.pixels = max(self.pixels, _greatest(expected.pixels, got.pixels))
            self.rows = max(self.rows, _greatest(rms(expected.rows), got.rows))
        if same_prompt:
            figures |= self._logits(expected, got)
        self.per_case.append(figures)

    def _logits(self, expected: Answer, got: Answer) -> dict[str, Any]:
        assert expected.logits_unrounded is not None, "the source's answers hold both"
        self.mapped = max(self.mapped, _greatest(expected.logits_unrounded, got.logits))
        difference = (expected.logits - got.logits).abs()
        log_p, log_q = expected.logits.log_softmax(-1), got.logits.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        agreed = expected.logits.argmax(-1) == got.logits.argmax(-1)
        self.differences.append(torch.stack((difference.amax(-1), difference.mean(-1))))
        self.kl.append(kl)
        self.agreed.append(agreed)
        if self.diverging is None and not self.mapped <= self._limits.mapping:
            self.diverging = _first_diverging(expected.layers, got.layers)
        match = _match_length(expected.greedy, got.greedy)
        figures = {
            "max_logit_difference": _or_null(float(difference.max())),
            "greedy_tokens": len(expected.greedy),
            "greedy_match": match,
        }
        if match < len(expected.greedy):  # how sure the source was of the first token that differs
            best = expected.logits[len(expected.ids) - 1 + match].topk(2).values
            figures["margin"] = _or_null(float(best[0] - best[1]))
        return figures

    def texts(self, converted: Converted) -> None:
        ours, theirs = self.plan.tokenizer, converted.tokenizer
        for text in corpus():
            self.texts_compared += 1
            self.texts_otherwise += theirs.encode(text, add_special_tokens=False) != ours.encode(text)
        names = theirs.convert_ids_to_tokens(list(range(ours.vocab_size)))
        spelled = {token: id_ for token, id_ in theirs.get_vocab().items() if id_ < ours.vocab_size}
        self.tokens_otherwise = sum(spelled.get(name) != id_ for id_, name in enumerate(names))

    @property
    def _limits(self) -> Limits:
        return LIMITS[self.plan.settings.dtype]

    def checks(self) -> list[Check]:
        limits = self._limits
        found = [
            Check("prompts compared", len(self.per_case), 1, least=True),
            Check("prompts rendered to other ids", self.rendered_otherwise, 0),
            Check("texts with other ids", self.texts_otherwise, 0),
            Check("tokens with other ids", self.tokens_otherwise, 0),
        ]
        if self.differences:
            greatest, mean = torch.cat(self.differences, dim=1)
            found += [
                Check("max |logit difference| with unrounded rotary tables", self.mapped, limits.mapping),
                Check("max |logit difference|", float(greatest.max()), limits.max_logit),
                Check("mean |logit difference|", float(mean.mean()), limits.mean_logit),
                Check("mean KL divergence", float(torch.cat(self.kl).mean().clamp(min=0)), limits.kl),
                Check(
                    "top-1 agreement", float(torch.cat(self.agreed).float().mean()), limits.top1, least=True
                ),
            ]
        if self.plan.classified.config.vision is not None:
            found += [
                Check("max |pixel difference|", self.pixels, 0),
                Check("max |image feature difference|", self.rows, limits.rows),
            ]
        return found

    def record(self) -> dict[str, Any]:
        import transformers

        checks = self.checks()
        return {
            "skipped": False,
            "passed": all(check.ok for check in checks),
            "checks": [check.record() for check in checks],
            "first_diverging_layer": self.diverging,
            "texts_compared": self.texts_compared,
            "cases": self.per_case,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }


def _greatest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The greatest difference; infinite where shapes differ or something is not a number."""
    if a.shape != b.shape:
        return inf
    difference = float((a.float() - b.float()).abs().max())
    return difference if isfinite(difference) else inf


def _or_null(figure: float) -> float | None:
    """For JSON, which has no infinities."""
    return figure if isfinite(figure) else None


def _match_length(expected: Sequence[int], got: Sequence[int]) -> int:
    pairs = zip(expected, got, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(expected))


def _first_diverging(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> str:
    names = ["embed_tokens", *(f"layers.{i}" for i in range(len(expected) - 1))]
    for name, a, b in zip(names, expected, got, strict=True):
        if not _greatest(a, b) <= DIVERGED:
            return name
    return "lm_head"
