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
from ghostvis_cli.convert.observed import CheckpointOutputs, Converted, Observation
from ghostvis_cli.convert.plan import Plan
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
    source = CheckpointOutputs(plan.checkpoint, DTYPES[plan.settings.dtype], plan.layout)
    source.answer(fixed, check)
    converted = Converted(directory, vision=vision)
    compared = Compared(plan)
    for case in fixed:
        check()
        if expected := source.answers.get(case.name):
            compared.whole(case, expected, converted.answer(case, expected.greedy))
    compared.texts(converted.prompts.tokenizer)
    return compared.record("whole")


class LogitSums:
    """What the logits of one case's T positions differ by, added up over slices of the vocabulary.

    All lie within ±15: their exponentials can be summed as they are, and the KL divergence follows from three sums.
    """

    def __init__(self, positions: int) -> None:
        self.mapped = 0.0  # greatest difference from the source with unrounded rotary tables
        self.greatest = torch.zeros(positions)
        self.total = torch.zeros(positions, dtype=torch.float64)
        self.weighted, self.mass, self.mass_got = (torch.zeros_like(self.total) for _ in range(3))
        self.columns = 0
        self._best = [torch.full((positions,), -inf), torch.full((positions,), -inf)]
        self._chosen = [torch.zeros(positions, dtype=torch.int64) for _ in range(2)]

    def add(self, expected: torch.Tensor, unrounded: torch.Tensor, got: torch.Tensor) -> None:
        """The next columns of the vocabulary, each (T, columns) float32."""
        self.mapped = max(self.mapped, _greatest(unrounded, got))
        difference, exponentials = expected - got, expected.exp()
        self.greatest = torch.maximum(self.greatest, difference.abs().amax(-1))
        self.total += difference.abs().sum(-1, dtype=torch.float64)
        self.weighted += (exponentials * difference).sum(-1, dtype=torch.float64)
        self.mass += exponentials.sum(-1, dtype=torch.float64)
        self.mass_got += got.exp().sum(-1, dtype=torch.float64)
        for side, logits in enumerate((expected, got)):
            best, chosen = logits.max(-1)
            better = best > self._best[side]
            self._best[side] = torch.where(better, best, self._best[side])
            self._chosen[side] = torch.where(better, chosen + self.columns, self._chosen[side])
        self.columns += expected.size(-1)

    def mean(self) -> torch.Tensor:
        """(T,) of the absolute differences over the vocabulary."""
        return self.total / self.columns

    def kl(self) -> torch.Tensor:
        """(T,) of p, the source's, from q: Σ p (log p - log q)."""
        return self.weighted / self.mass - (self.mass / self.mass_got).log()

    def agreed(self) -> torch.Tensor:
        """(T,) bool: whether both have the same likeliest token."""
        return self._chosen[0] == self._chosen[1]


class Compared:
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

    def prompt(self, case: Case, expected: Observation, got: Observation) -> dict[str, Any]:
        """Ids and images; the case's entry in the certificate, to be filled in where the ids are the same."""
        ours = [self.plan.tokenizer.image_id if id_ < 0 else id_ for id_ in expected.ids]
        figures = {"case": case.name, "positions": expected.positions, "same_ids": ours == got.ids}
        self.rendered_otherwise += ours != got.ids
        if expected.pixels is not None and got.pixels is not None and got.rows is not None:
            assert expected.rows is not None, "images that were seen have rows"
            self.pixels = max(self.pixels, _greatest(expected.pixels, got.pixels))
            self.rows = max(self.rows, _greatest(rms(expected.rows), got.rows))
        self.per_case.append(figures)
        return figures

    def logits(self, figures: dict[str, Any], sums: LogitSums, diverging: str | None) -> None:
        """`diverging` is the first layer of this case that differs, if any does."""
        self.mapped = max(self.mapped, sums.mapped)
        if self.diverging is None and not self.mapped <= self._limits.mapping:
            self.diverging = diverging or "lm_head"
        self.differences.append(torch.stack((sums.greatest, sums.mean())))
        self.kl.append(sums.kl())
        self.agreed.append(sums.agreed())
        figures["max_logit_difference"] = _or_null(float(sums.greatest.max()))

    def whole(self, case: Case, expected: Observation, got: Observation) -> None:
        """A case that both sides have answered from beginning to end."""
        figures = self.prompt(case, expected, got)
        if not figures["same_ids"]:
            return
        assert expected.logits_unrounded is not None, "the source's answers hold both"
        sums = LogitSums(expected.positions)
        sums.add(expected.logits, expected.logits_unrounded, got.logits)
        pairs = zip(layer_names(len(expected.layers) - 1), expected.layers, got.layers, strict=True)
        self.logits(figures, sums, next((name for name, a, b in pairs if diverged(a, b)), None))
        match = _match_length(expected.greedy, got.greedy)
        figures |= {"greedy_tokens": len(expected.greedy), "greedy_match": match}
        if match < len(expected.greedy):  # how sure the source was of the first token that differs
            best = expected.logits[len(expected.ids) - 1 + match].topk(2).values
            figures["margin"] = _or_null(float(best[0] - best[1]))

    def texts(self, theirs: Any) -> None:
        """The directory's tokenizer against the source's."""
        ours = self.plan.tokenizer
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

    def record(self, mode: str) -> dict[str, Any]:
        """The certificate's `verification`. JSON."""
        import transformers

        checks = self.checks()
        return {
            "skipped": False,
            "mode": mode,
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


def layer_names(layers: int) -> list[str]:
    """Of what enters the first layer, and what each hands on."""
    return ["embed_tokens", *(f"layers.{i}" for i in range(layers))]


def diverged(expected: torch.Tensor, got: torch.Tensor) -> bool:
    """Rows of a layer, normalised: whether they differ by more than rounding does."""
    return not _greatest(expected, got) <= DIVERGED
