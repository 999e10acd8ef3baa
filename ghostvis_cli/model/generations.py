"""nanochat's generations: which constants and extra tensors each set of its mathematics has. Data, without torch.

A checkpoint is one of these, told by its keys and shapes (`checkpoint.generations`). A later one is one entry here,
and what is new in its mathematics in `model.decoder`.
"""

from dataclasses import dataclass, replace
from typing import Literal

TableType = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Generation:
    """What the files do not say. `since` is the day it reached nanochat's master branch."""

    name: str
    since: str
    words: str  # what people call it
    rotary_base: float = 10000.0
    qk_scale: float = 1.0  # of q and k, after their norms
    softcap: float = 15.0
    lambdas: bool = False  # x = resid_lambdas[i] * x + x0_lambdas[i] * x0 before each layer
    windows: bool = False
    short_share: int = 2  # the short window is sequence_len / short_share,
    short_multiple: int = 1  # rounded down; where this is more than 1, rounded up to its multiple
    gate_channels: int = 0  # value embeddings on every second layer, gated by so many channels; 0: none
    gate_scale: float = 2.0
    smear: bool = (
        False  # the embedding takes in its predecessor's, and the middle layer's output is backed out
    )
    default_sequence_len: int = 1024  # where a meta file that was made by hand does not say
    tables_as_stored: bool = False  # rotary tables in the embedding's dtype; before, bfloat16 always

    def short_window(self, sequence_len: int) -> int:
        """Keys back, without oneself."""
        if self.short_multiple == 1:
            return sequence_len // self.short_share
        share = -(-sequence_len // self.short_share)
        return -(-share // self.short_multiple) * self.short_multiple

    def rotary_tables(self, stored: str) -> TableType:
        """What training saw, by the dtype that the embedding is stored in."""
        return "float32" if self.tables_as_stored and stored in ("float32", "float64") else "bfloat16"

    @property
    def title(self) -> str:
        return f"nanochat, {self.since}: {self.words}"


PLAIN = Generation("n1", "October 2025", "as GhostVis forked it")
N2 = Generation("n2", "January 2026", "residual scalars", lambdas=True)
N3 = replace(N2, name="n3", words="residual scalars, windows", windows=True)
N4 = replace(N3, name="n4", words="value embeddings, windows", gate_channels=32, default_sequence_len=2048)
N5 = replace(N4, name="n5", since="March 2026", words="value embeddings, soft cap 20", softcap=20.0)
N6 = replace(
    N4,
    name="n6",
    since="March 2026",
    words="value embeddings, rotary base 100000",
    rotary_base=100000.0,
    qk_scale=1.15,
    short_share=3,
    short_multiple=128,
    gate_channels=12,
    gate_scale=3.0,
    tables_as_stored=True,
)
N7 = replace(N6, name="n7", words="value embeddings, smear", qk_scale=1.2, short_share=4, smear=True)
GENERATIONS = {generation.name: generation for generation in (PLAIN, N2, N3, N4, N5, N6, N7)}
