"""Choosing the next token. Order (format specification, section 7): repetition penalty, then greedy or
top-k, temperature, softmax, top-p, min-p, one draw from the request's own generator.

Random numbers are drawn on the CPU and sent: one seed then gives one answer on every device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ghostvis_cli.engines.base import Sampling, TokenLogprob
from ghostvis_cli.engines.local.device import sent

COLDEST = 1e-6  # below it the likeliest token has all the probability, and float32 none left to divide by
MOST_TOGETHER = 1024  # of top-k, where a batch draws together: all rows take as many candidates as the most
OFF = 2.0  # of top-p: no sum of probabilities is so large


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (V,) of ids already `seen` (n,): positive ones divided by the penalty, negative ones multiplied."""
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < COLDEST


def draws_together(sampling: Sampling) -> bool:
    """Whether `sample_together` can choose for it."""
    return is_greedy(sampling) or 0 < sampling.top_k <= MOST_TOGETHER


def sample_together(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """Ids (B,) from logits (B, V) float32, all on the device. Row by row as `sample` chooses."""
    likeliest = logits.argmax(dim=-1)
    if all(is_greedy(each) for each in samplings):
        return likeliest
    V = logits.size(-1)
    counts = [1 if is_greedy(each) else min(each.top_k, V) for each in samplings]
    width = max(counts)
    # As torch.multinomial draws one of n: the largest of p / e, with e from an exponential distribution.
    given = torch.ones(len(counts), width + 4)
    for row, count, sampling, generator in zip(given, counts, samplings, generators, strict=True):
        if is_greedy(sampling):
            row[width:] = torch.tensor([0.0, 1.0, OFF, 0.0])
            continue
        row[:count].exponential_(generator=generator)
        top_p = sampling.top_p if sampling.top_p < 1 else OFF
        row[width:] = torch.tensor([float(count), sampling.temperature, top_p, sampling.min_p])
    given = sent(given, logits.device)
    noise, (count_, temperature, top_p_, min_p) = given[:, :width], given[:, width:, None].unbind(1)
    values, ids = logits.topk(width)  # descending, which is what top-p wants
    outside = torch.arange(width, device=logits.device) >= count_
    p = torch.softmax(values.masked_fill(outside, -torch.inf) / temperature, dim=-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p_, 0)
    p = p.masked_fill(p < min_p * p[:, :1], 0)
    drawn = ids.gather(1, (p / noise).argmax(dim=-1, keepdim=True))[:, 0]
    return torch.where(count_[:, 0] == 0, likeliest, drawn)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """One id from logits (V,) float32. Ties go to the lowest id. Greedy ignores every filter."""
    if is_greedy(sampling):
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
    choice = int(torch.multinomial(probabilities.cpu(), 1, generator=generator))
    return choice if ids is None else int(ids[choice])


def logprob(logits: Tensor, chosen: int, alternatives: int) -> TokenLogprob:
    """Log-probabilities under the model itself: logits (V,) before penalty, temperature and filters."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top = logprobs.topk(min(alternatives, logprobs.numel()))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprob(chosen, float(logprobs[chosen]), tuple(pairs))
