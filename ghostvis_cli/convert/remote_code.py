"""Our transformers classes as one file, for use without this project installed.

`auto_map` names it. transformers runs it only with trust_remote_code; where `ghostvis_cli.hf` is imported,
the classes there come first.
"""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

FILE = "modeling_ghostvis.py"
PACKAGE = Path(__file__).parents[1]
# What is taken of each module, in an order in which every name is known where it is used. None is everything.
Parts: TypeAlias = dict[str, frozenset[str] | None]
TEXT: Parts = {
    "model/config.py": frozenset(("RMS_EPS", "SMEAR_CHANNELS")),
    "model/decoder.py": frozenset(("rms", "inverse_frequencies", "rotate")),
    "hf/nanochat.py": None,
}
VISION: Parts = {
    "model/config.py": frozenset(
        (
            *("TowerFamily", "ResamplerMode", "Layout", "RMS_EPS", "SMEAR_CHANNELS", "LAYER_NORM_EPS"),
            *("TowerConfig", "VisionConfig"),
        )
    ),
    "transparency.py": None,
    "model/preprocess.py": None,
    "model/decoder.py": TEXT["model/decoder.py"],
    "model/vision.py": None,
    "hf/nanochat.py": None,
    "hf/config.py": None,
    "hf/model.py": None,
    "hf/processor.py": None,
}
TEXT_CLASSES = {
    "AutoConfig": "GhostVisNanoChatConfig",
    "AutoModel": "GhostVisNanoChatModel",
    "AutoModelForCausalLM": "GhostVisNanoChatForCausalLM",
}
CLASSES = {
    "AutoConfig": "GhostVisConfig",
    "AutoModel": "GhostVisModel",
    "AutoModelForImageTextToText": "GhostVisForConditionalGeneration",
    "AutoImageProcessor": "GhostVisImageProcessor",
    "AutoProcessor": "GhostVisProcessor",
}


def auto_map(*names: str, classes: Mapping[str, str] = CLASSES) -> dict[str, Any]:
    """The `auto_map` of a configuration file, for these Auto classes."""
    return {"auto_map": {name: f"{FILE.removesuffix('.py')}.{classes[name]}" for name in names}}


def source(parts: Parts) -> str:
    """The file: this project's own modules one after the other, their imports of each other left out."""
    pieces = ['"""GhostVis for transformers. Made by ghostvis convert from the project\'s own modules."""']
    for name, wanted in parts.items():
        pieces += _statements((PACKAGE / name).read_text(encoding="utf-8"), wanted)
    return "\n\n".join(pieces) + "\n"


def _statements(text: str, wanted: frozenset[str] | None) -> list[str]:
    lines = text.splitlines()
    found = []
    for node in ast.parse(text).body:
        if not _is_ours(node) and (wanted is None or _imports(node) or _names(node) & wanted):
            decorators = getattr(node, "decorator_list", [])
            first = min((decorator.lineno for decorator in decorators), default=node.lineno)
            found.append("\n".join(lines[first - 1 : node.end_lineno]))
    return found


def _is_ours(node: ast.stmt) -> bool:
    """An import from this project, or a module's docstring."""
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").startswith("ghostvis_cli")
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _imports(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return {node.name} if isinstance(node, ast.ClassDef | ast.FunctionDef) else set()
