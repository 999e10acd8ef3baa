"""How likely a prompt's own tokens are: one forward without a cache, for evaluation."""

import math

import torch

from ghostvis_cli.engines.base import TokenLogprob
from ghostvis_cli.model.decoder import Decoder

POSITIONS_TOGETHER = 128  # logits (T, V) float32 of a long prompt would be half a gigabyte


def score(decoder: Decoder, ids: tuple[int, ...], alternatives: int) -> tuple[TokenLogprob, ...]:
    """Natural log-probabilities of `ids`, each given those before it; NaN for the first."""
    device = decoder.lm_head.weight.device
    tokens = torch.tensor([ids], device=device)
    positions = torch.arange(len(ids), device=device)[None]
    hidden = decoder.trunk(decoder.embed(tokens), decoder.plan(positions, length=len(ids)))[0]
    found = [TokenLogprob(ids[0], math.nan)]
    for start in range(0, len(ids) - 1, POSITIONS_TOGETHER):
        after = ids[start + 1 : start + 1 + POSITIONS_TOGETHER]
        logprobs = torch.log_softmax(decoder.logits(hidden[start : start + len(after)]), dim=-1)
        chosen = logprobs.gather(1, tokens[0, start + 1 : start + 1 + len(after), None])[:, 0].tolist()
        top = logprobs.topk(min(alternatives, logprobs.size(-1)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        found += [
            TokenLogprob(id_, value, tuple(zip(*best, strict=True)))
            for id_, value, best in zip(after, chosen, pairs, strict=True)
        ]
    return tuple(found)
