"""Choosing the next tokens. Order (format specification, section 7): penalties and grammar, then greedy or
top-k, temperature, softmax, top-p, min-p, one draw from the request's own generator.

All on the logits' device. Random numbers are drawn on the CPU and sent: a seed gives the same answer everywhere.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ghostvis_cli.engines.base import Sampling, TokenLogprob
from ghostvis_cli.engines.local.device import sent
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


def sample(logits: Tensor, samplings: Sequence[Sampling], numbers: Tensor | None) -> Tensor:
    """Ids (B,) from logits (B, V) float32 and the rows' `draws`. Greedy rows ignore every filter.

    Ties go to the lowest id.
    """
    likeliest = logits.argmax(dim=-1)
    drawing = [each for each in samplings if each.temperature >= COLDEST]
    if numbers is None or not drawing:
        return likeliest
    V, width = logits.size(-1), numbers.size(1) - 4
    numbers = sent(numbers, logits.device)
    noise, (count, temperature, top_p, min_p) = numbers[:, :width], numbers[:, width:, None].unbind(1)
    values, ids = logits, None
    if width < V or any(map(_is_filtered, drawing)):
        values, ids = logits.topk(width)  # descending, which is what top-p wants
        if width == V:  # who draws from all of them draws in their own order
            noise = torch.where(count == torch.inf, noise.gather(1, ids), noise)
        values = values.masked_fill(torch.arange(width, device=logits.device) >= count, -torch.inf)
    p = torch.softmax(values / temperature, dim=-1)
    if any(each.top_p < 1 for each in drawing):
        # Keep the smallest set whose mass reaches top_p: drop what begins beyond it. The first always stays.
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    if any(each.min_p > 0 for each in drawing):
        p = p.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), 0)
    drawn = (p / noise).argmax(dim=-1, keepdim=True)
    drawn = drawn if ids is None else ids.gather(1, drawn)
    return torch.where(count == 0, likeliest[:, None], drawn)[:, 0]


def _is_filtered(sampling: Sampling) -> bool:
    return bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0)


def draws(
    samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None], vocabulary: int
) -> Tensor | None:
    """Of each row what it draws, and count of candidates, temperature, top_p and min_p: (B, width + 4).

    On the CPU; None where all rows are greedy.

    The count is 0 for a greedy row, and infinite where nothing is filtered. As torch.multinomial draws one of n:
    the largest of p / e, with e from an exponential distribution.
    """
    counts = [
        0 if each.temperature < COLDEST else min(each.top_k or vocabulary, vocabulary) for each in samplings
    ]
    if not any(counts):
        return None
    numbers = torch.ones(len(counts), max(counts) + 4)
    for row, count, each, generator in zip(numbers, counts, samplings, generators, strict=True):
        if count:
            row[:count].exponential_(generator=generator)
        top_p = each.top_p if each.top_p < 1 else math.inf
        shown = math.inf if count and not _is_filtered(each) else count
        row[-4:] = torch.tensor([shown, each.temperature if count else 1, top_p, each.min_p])
    return numbers


def logprob(logits: Tensor, chosen: int, alternatives: int) -> TokenLogprob:
    """Log-probabilities under the model itself: logits (V,) before penalty, temperature and filters."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top = logprobs.topk(min(alternatives, logprobs.numel()))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprob(chosen, float(logprobs[chosen]), tuple(pairs))
