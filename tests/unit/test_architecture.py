"""Imports go one way: no circles, and from floor to floor downwards. docs/architecture.md draws the floors.

And what others import, or give tensors to, has a docstring.
"""

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
    (
        "__init__",
        "cli",
        "api",
        "chat",
        "web",
        "batch",
        "bench",
        "doctor",
        "serve",
        "openai",
        "sglang",
        "convert",
    ),
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


# --- what crosses a folder's border is explained


def folder(module: str) -> str:
    """The package that a module lies in, however deep; the ground's modules are folders of their own."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else module


def borrowed(file: Path, own: str, known: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """(module, name) of everything of ours that a file takes from another folder, by name or by attribute."""
    tree = ast.parse(file.read_text())
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    modules[alias.asname or alias.name] = inner
                elif node.module in known and folder(node.module) != folder(own):
                    yield node.module, alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and folder(module) != folder(own):
                yield module, node.attr


def unexplained(file: Path) -> set[str]:
    """Functions and classes of a module that have no docstring."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = ast.parse(file.read_text()).body
    return {node.name for node in body if isinstance(node, kinds) and not ast.get_docstring(node)}


def test_what_crosses_a_folders_border_has_a_docstring() -> None:
    known = modules()
    taken = {each for name, file in known.items() for each in borrowed(file, name, known)}
    silent = {module: unexplained(known[module]) for module, _ in taken}
    assert sorted(f"{short(module)}.{name}" for module, name in taken if name in silent[module]) == []


TENSOR_FOLDERS = ("model", "convert", "engines/local", "sglang/plugin", "hf")


def handles_tensors(function: ast.FunctionDef) -> bool:
    arguments = function.args
    annotations = [each.annotation for each in (*arguments.args, *arguments.kwonlyargs)] + [function.returns]
    words = {
        node.id if isinstance(node, ast.Name) else node.attr
        for each in annotations
        if each is not None
        for node in ast.walk(each)
        if isinstance(node, ast.Name | ast.Attribute)
    }
    return "Tensor" in words


def public_functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            if isinstance(child, ast.FunctionDef):
                yield prefix + child.name, child
            else:
                yield from public_functions(child, f"{child.name}.")


def test_public_functions_of_tensors_say_their_shapes() -> None:
    silent = [
        f"{file.relative_to(ROOT)}: {name}"
        for each in TENSOR_FOLDERS
        for file in (ROOT / PACKAGE / each).rglob("*.py")
        for name, function in public_functions(ast.parse(file.read_text()))
        if handles_tensors(function) and not ast.get_docstring(function)
    ]
    assert silent == []
