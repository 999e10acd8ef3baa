"""Choosing the next token. Order (format specification, section 7): penalties and grammar, then
greedy or top-k, temperature, softmax, top-p, min-p, one draw from the request's own generator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ghostvis_cli.engines.base import Sampling, TokenLogprob
from ghostvis_cli.engines.local.grammar import Grammar

COLDEST = 1e-6  # below it the likeliest token has all the probability, and float32 none left to divide by


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (V,) of ids already `seen` (n,): positive ones divided by the penalty, negative ones multiplied."""
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def shaped(
    logits: Tensor, sampling: Sampling, seen: Sequence[int], output: Sequence[int], grammar: Grammar | None
) -> Tensor:
    """Logits (V,) as penalties and grammar change them. `seen`: each id of prompt and answer once."""
    device = logits.device
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, torch.tensor(seen, device=device), sampling.repetition_penalty)
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = torch.bincount(torch.tensor(output, device=device), minlength=logits.numel())
        logits = logits - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts
    if grammar is not None:
        logits = logits.masked_fill(~grammar.allowed(logits.numel()).to(device), -torch.inf)
    return logits


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """One id from logits (V,) float32. Ties go to the lowest id. Greedy ignores every filter."""
    if sampling.temperature < COLDEST:
        return int(logits.argmax())
    count = min(sampling.top_k or logits.numel(), logits.numel())
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0:
        values, ids = logits.topk(count)  # descending, which is what top-p wants
    else:
        values, ids = logits, None
    probabilities = torch.softmax(values / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        # Keep the smallest set whose mass reaches top_p: drop what begins beyond it. The first always stays.
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        probabilities = probabilities.masked_fill(beyond, 0)
    if sampling.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0)
    # Drawn on the CPU: one seed then gives one answer on every device.
    choice = int(torch.multinomial(probabilities.cpu(), 1, generator=generator))
    return choice if ids is None else int(ids[choice])


def logprob(logits: Tensor, chosen: int, alternatives: int) -> TokenLogprob:
    """Log-probabilities under the model itself: logits (V,) before penalty, temperature and filters."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top = logprobs.topk(min(alternatives, logprobs.numel()))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprob(chosen, float(logprobs[chosen]), tuple(pairs))
