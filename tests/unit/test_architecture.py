"""Imports go one way: no circles, and from floor to floor downwards. docs/architecture.md draws the floors."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "ghostvis_cli"
FOLDERS = {PACKAGE: PACKAGE, "commands": f"{PACKAGE}.commands", "profiles": f"{PACKAGE}.profiles"}

# From the roof down; __init__ is the package itself, whose names are those of api. A module that is named nowhere
# is the ground, and may import the ground alone.
FLOORS = (
    ("commands",),
    ("__init__", "cli", "api", "chat", "batch", "bench", "doctor", "serve", "sglang", "convert"),
    ("engines", "answer"),
    ("prompt", "images", "fetch"),
    ("checkpoint", "hf", "profile"),
    ("model", "demo", "profiles"),
    (),
)
# What climbs all the same, and why.
CLIMBS = {
    ("engines.factory", "sglang.engine"): "the one place that turns a profile into an engine",
}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


def imports(file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Every module of ours that a file imports: at its top, in a function, for types."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known or node.module in known:
                    yield inner if inner in known else node.module


def graph() -> dict[str, set[str]]:
    known = modules()
    assert len(known) > 200, "the folders are not where this test looks"
    return {name: set(imports(file, known)) - {name} for name, file in known.items()}


def floor(module: str) -> int:
    part = [*module.split("."), "__init__"][1]
    return next((number for number, names in enumerate(FLOORS) if part in names), len(FLOORS) - 1)


def short(module: str) -> str:
    return module.removeprefix(PACKAGE).removeprefix(".") or "__init__"


def test_no_module_imports_itself_by_a_detour() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_imports_go_down_from_floor_to_floor() -> None:
    climbing = {
        (short(module), short(other))
        for module, others in graph().items()
        for other in others
        if floor(other) < floor(module)
    }
    assert climbing == set(CLIMBS)
