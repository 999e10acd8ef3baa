"""The memory that a verification takes, and which kind of it fits. Without torch."""

from dataclasses import replace

from ghostvis_cli import sizes
from ghostvis_cli.convert.plan import Plan
from ghostvis_cli.errors import MemoryLimitError
from ghostvis_cli.model.config import GhostVisConfig

NOTABLE_BYTES = 2 * 10**9


def fitted(plan: Plan, free_bytes: float) -> tuple[Plan, str | None]:
    """The plan, layer by layer where the whole does not fit or that was asked for, and a line about it.

    MemoryLimitError where neither fits: better now than after minutes of writing.
    """
    model = plan.classified
    whole = verification_bytes(model.config, model.parameters)
    if free_bytes >= whole and not plan.settings.by_layer:
        told = f"verification will take up to {sizes.shown(whole)} of memory; --no-verify skips it"
        return plan, told if whole > NOTABLE_BYTES else None
    needed = verification_bytes_by_layer(model.config, model.parameters)
    if free_bytes < needed:
        raise MemoryLimitError(
            f"verification takes up to {sizes.shown(needed)} of memory even layer by layer, "
            f"{sizes.shown(free_bytes)} are free",
            hint="--no-verify",
        )
    why = f", since the whole model would take {sizes.shown(whole)}" if free_bytes < whole else ""
    told = (
        f"verification will run layer by layer{why}: in up to {sizes.shown(needed)} of memory, "
        "without greedy answers; --no-verify skips it"
    )
    return replace(plan, settings=replace(plan.settings, by_layer=True)), told


def verification_bytes(config: GhostVisConfig, parameters: int) -> int:
    """What a verification takes: one model in float32 at a time, and two sets of logits of the fixed prompts."""
    return 4 * parameters + 2 * 4 * config.decoder.vocab_size * _fixed_positions(config) + 10**9


def verification_bytes_by_layer(config: GhostVisConfig, parameters: int) -> int:
    """Layer by layer: two layers or two vision parts in float32, and one in the file's dtype while it is read."""
    decoder = config.decoder
    width, heads = decoder.n_embd, decoder.n_head + 2 * decoder.n_kv_head
    matrices = 3 if decoder.mlp_type == "swiglu" else 2
    layer = width * (width + heads * decoder.head_dim + matrices * decoder.intermediate_size)
    table = decoder.vocab_size * decoder.kv_width  # a value embedding
    tables = 2 * decoder.vocab_size * width + len(decoder.value_layers) * table
    vision = parameters - decoder.n_layer * layer - tables
    part = max(layer + table if decoder.value_layers else layer, vision if config.vision else 0)
    rows = 4 * 4 * _fixed_positions(config) * (width + decoder.intermediate_size)
    # The last term: libraries, the tokenizers, slices of the head, pages of the files.
    return 3 * 4 * part + rows + 1_500_000_000


def _fixed_positions(config: GhostVisConfig) -> int:
    """An upper bound of positions of all fixed prompts together."""
    return 1000 + 10 * (config.vision.num_tokens if config.vision else 0)
