"""Large float32 matrices in oneDNN's own order: on a CPU they multiply 2 to 9 times as fast as `F.linear` does.

The order is opaque and made once, at load; values and sums stay float32. `F.linear` hands small batches to a
general matrix routine that reaches a quarter of the memory's speed (docs/measurements.md has the figures).
The two operators are the ones that torch's own compiler emits for frozen CPU graphs.
"""

import torch
from torch import Tensor, nn

# Below this many elements the operator's own overhead is larger than what it saves.
LEAST_ELEMENTS = 2**18


class PackedLinear(nn.Module):
    """Takes a Linear's place. `weight` is the packed tensor: it still tells dtype and device, nothing else."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return packed


def pack(model: nn.Module) -> None:
    """Replace every large Linear of a float32 CPU model, in place, one at a time."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            # Exactly nn.Linear: MultiheadAttention reads its own subclass's weight directly.
            if type(child) is nn.Linear and child.weight.numel() >= LEAST_ELEMENTS:
                setattr(parent, name, PackedLinear(child))
