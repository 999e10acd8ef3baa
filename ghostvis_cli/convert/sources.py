"""The project's own modules that decide what a converted directory holds, found by following imports.

A list or a version number could be forgotten. All that the converter imports, or copies into a directory, is
found here.
"""

import ast
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
AS_TEXT = re.compile(rb'"(\w+/\w+\.py)"')  # how convert.remote_code names what it copies


def digest(package: Path = PACKAGE) -> str:
    """SHA-256 of their code."""
    found = sha256()
    for file in sources(package):
        found.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def sources(package: Path = PACKAGE) -> list[Path]:
    """All that `convert.run` imports, or names as text to copy, and what those import in turn."""
    found: set[Path] = set()
    waiting = [package / "convert" / "run.py"]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imported(file, package)
    return sorted(found)


def _imported(file: Path, package: Path) -> Iterator[Path]:
    content = file.read_bytes()
    yield from (place for name in AS_TEXT.findall(content) if (place := package / name.decode()).is_file())
    for name in _names(ast.parse(content)):
        first, *rest = name.split(".")
        place = package.joinpath(*rest)
        # The package itself holds the version and the names of the Python API: nothing of the converter.
        if first == package.name and rest:
            yield from (each for each in (place.with_suffix(".py"), place / "__init__.py") if each.is_file())


def _names(node: ast.AST) -> Iterator[str]:
    """What it imports when it runs, in functions too. Of `from a import b` both a and a.b: b may be a module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif isinstance(child, ast.stmt):
            yield from _names(child)
