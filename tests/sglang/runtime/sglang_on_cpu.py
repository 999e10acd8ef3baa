"""Makes torchvision importable beside a CPU torch, in every process of the environment (a .pth file loads this).

The package index has torchvision for CUDA only; its binary part can't load, and then its Python part asks in vain
for two operators. Declaring them is enough: SGLang uses the Python part alone.
"""

import importlib.abc
import sys
from typing import Any


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch._ghostvis_torchvision = library  # type: ignore[attr-defined]  # declared as long as this lives


sys.meta_path.insert(0, _BeforeTorchvision())
