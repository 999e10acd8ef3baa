"""Which of nanochat's generations a file is, told by its keys and shapes, and the constants that go with it.

The constants are in no file: each belongs to a generation, and a setting beats it. Side branches, which master
never had or had for hours, share names but not the mathematics: they are refused by name.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ghostvis_cli.checkpoint.header import TensorInfo
from ghostvis_cli.errors import ModelError
from ghostvis_cli.model.generations import N2, N3, N4, N5, N6, N7, PLAIN, Generation, TableType

EXPERTS = re.compile(r"\.(mlp|moe)\.router\.gate\.weight$")
GATE = re.compile(r"^transformer\.h\.\d+\.attn\.ve_gate\.weight$")
SMEAR = frozenset(("smear_gate.weight", "smear_lambda", "backout_lambda"))
LAMBDAS = frozenset(("resid_lambdas", "x0_lambdas"))
LATER = re.compile(r"^(value_embeds?[._]|value_embed_|bigram_)")
# Base training of 4 March 2026 on evaluates on so many tokens, that before on less: it tells soft cap 20 from 15.
EVAL_TOKENS_OF_CAP_20 = 80 * 524288
LETTERS = frozenset("SL")


@dataclass(frozen=True)
class Constants:
    """Constants that the user sets. None: the generation's own."""

    sequence_len: int | None = None
    rotary_base: float | None = None
    qk_scale: float | None = None
    gate_scale: float | None = None
    softcap: float | None = None
    short_window: int | None = None
    window_pattern: str | None = None
    rotary_tables: TableType | None = None

    @property
    def chosen(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


NONE_SET = Constants()


def recognise(tensors: Mapping[str, TensorInfo], pattern: str | None, evaluated_on: object) -> Generation:
    """The generation, or a ModelError that names the branch or what is missing."""
    _refuse_side_branches(tensors)
    if found := SMEAR & tensors.keys():
        if missing := sorted(SMEAR - found):
            raise ModelError(f"it has {min(found)} but lacks {', '.join(missing)}")
        generation = N7
    elif widths := {tensors[name].shape[-1] for name in tensors if GATE.match(name)}:
        if widths <= {N6.gate_channels}:
            generation = N6
        elif widths <= {N4.gate_channels}:
            generation = N5 if evaluated_on == EVAL_TOKENS_OF_CAP_20 else N4
        else:
            raise ModelError(
                f"it is a fork of nanochat: its value embeddings' gates read "
                f"{' and '.join(map(str, sorted(widths)))} channels, nanochat's all {N6.gate_channels} "
                f"or all {N4.gate_channels}"
            )
    elif LAMBDAS & tensors.keys():
        generation = N3 if pattern is not None else N2
    else:
        generation = PLAIN
    return _checked(generation, tensors)


def _refuse_side_branches(tensors: Mapping[str, TensorInfo]) -> None:
    if any(EXPERTS.search(name) for name in tensors):
        raise ModelError(
            "it is a mixture-of-experts model of one of nanochat's branches of 2026, which is not supported",
            hint="serve a dense checkpoint",
        )
    if any(name.startswith("bigram_") for name in tensors):
        raise ModelError(
            "it is a nanochat model of 27 to 28 January 2026 with hashed bigram embeddings (engram), which were "
            "taken back after 22 hours and are not supported"
        )
    if "v0_lambdas" in tensors:
        raise ModelError(
            "it is a nanochat model of the branch of 16 January 2026 that tried value embeddings without gates, "
            "which is not supported"
        )


def _checked(generation: Generation, tensors: Mapping[str, TensorInfo]) -> Generation:
    """Refuse a file with only some of a generation's tensors. account_for_every_key checks the rest."""
    stray = [name for name in tensors if LATER.match(name)] if not generation.gate_channels else []
    if stray:
        raise ModelError(f"it is a fork of nanochat: it has {stray[0]} without gates to open it")
    return generation


def settable(generation: Generation) -> frozenset[str]:
    """The constants that a generation's mathematics has."""
    names = {"sequence_len", "rotary_base", "softcap"}
    if generation.lambdas:
        names |= {"qk_scale", "rotary_tables", "window_pattern"}
    if generation.windows:
        names.add("short_window")
    if generation.gate_channels:
        names.add("gate_scale")
    return frozenset(names)


def dated(meta: Mapping[str, Any]) -> bool:
    """Whether the meta file is known to be of the soft cap 15 or 20."""
    return type(evaluated_on(meta)) is int


def evaluated_on(meta: Mapping[str, Any]) -> object:
    """The `eval_tokens` of a base run, which date it. Later stages have other values."""
    settings = meta.get("user_config")
    of_base = any(key in meta for key in ("device_batch_size", "max_seq_len"))
    return settings.get("eval_tokens") if of_base and isinstance(settings, Mapping) else None


def windows(pattern: str, layers: int, short: int, long: int) -> tuple[int, ...]:
    """The window of each layer: the pattern repeated, and the last layer always long."""
    if not pattern or set(pattern.upper()) - LETTERS:
        raise ModelError(
            f"window_pattern is {pattern[:40]!r}, not made of the letters S and L",
            hint="--set model.window_pattern=SSSL",
        )
    sizes = {"S": short, "L": long}
    found = [sizes[pattern[i % len(pattern)].upper()] for i in range(layers)]
    return (*found[:-1], long)
