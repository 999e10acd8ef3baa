"""Float32 matrices in oneDNN's own order: on a CPU large products run 2 to 9 times as fast as in `F.linear`.

The order is opaque and made once, at load; values and sums stay float32. `F.linear` hands its work to a general
matrix routine that on some processors reaches a quarter of their speed (docs/measurements.md has the figures).
The two operators are the ones that torch's own compiler emits for frozen CPU graphs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The operator costs some 10 us whatever it does: small products are left to F.linear.
LEAST_PRODUCTS = 300_000
LEAST_ELEMENTS = 2**14
# From here on one row is enough work, so the plain copy is not kept.
ALWAYS_ELEMENTS = 2**18


class PackedLinear(nn.Module):
    """Takes a Linear's place. A large one keeps only `weight` packed, which still tells dtype and device."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        elements = linear.weight.numel()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.weight = self.packed if elements >= ALWAYS_ELEMENTS else linear.weight.detach()
        self.bias = linear.bias
        self.least_rows = 0 if elements >= ALWAYS_ELEMENTS else LEAST_PRODUCTS / elements

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out); few rows are not worth the packed form."""
        if x.numel() // x.size(-1) < self.least_rows:
            return F.linear(x, self.weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return product


def pack(model: nn.Module) -> None:
    """Replace every Linear of a float32 CPU model that is worth it, in place, one at a time."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.numel() >= LEAST_ELEMENTS:
                setattr(parent, name, PackedLinear(child))
