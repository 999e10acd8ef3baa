"""One YAML file as mappings whose entries know their lines. Knows YAML and its traps, no settings.

Nothing is constructed from YAML tags: the nodes are read as they are, so a value keeps its line and spelling.
"""

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ghostvis_cli.encoding import decode
from ghostvis_cli.errors import InputError, UsageError
from ghostvis_cli.profile.secrets import redact

if TYPE_CHECKING:
    from yaml.nodes import MappingNode, Node, ScalarNode

LARGEST_BYTES = 2**18  # the parser takes a second for 100 KiB
MOST_DIGITS = 40  # that a message shows
YAML_TAG = "tag:yaml.org,2002:"


class Fault(NamedTuple):
    """One thing to put right. `where` is a file, a variable or an option; only a file has a line."""

    where: str
    key: str
    reason: str
    line: int = 0

    def __str__(self) -> str:
        where = f"{self.where}:{self.line}" if self.line else self.where
        return redact(": ".join(part for part in (where, self.key, self.reason) if part))


def refuse(faults: list[Fault], *, hint: str | None = None) -> None:
    """Raise one UsageError that lists every fault, if there is one."""
    lines = list(dict.fromkeys(str(fault) for fault in faults))  # an alias repeats what is wrong behind it
    if len(lines) == 1:
        raise UsageError(lines[0], hint=hint)
    if lines:
        raise UsageError("\n".join([f"{len(lines)} faults in the settings:", *lines]), hint=hint)


class Entry(NamedTuple):
    name: str
    line: int
    node: "Node"


@dataclass
class Document:
    """A file being read: its name in messages, and what was found wrong with it so far."""

    shown: str
    faults: list[Fault] = field(default_factory=list)

    def fault(self, line: int, key: str, reason: str) -> None:
        self.faults.append(Fault(self.shown, key, reason, line))

    def mapping(self, node: "Node", prefix: str) -> "MappingNode | None":
        """The node if it is a mapping, else a fault."""
        from yaml.nodes import MappingNode

        if isinstance(node, MappingNode) and node.tag == YAML_TAG + "map":
            return node
        self.fault(line_of(node), prefix.rstrip("."), f"must be a mapping (name: value), not {what(node)}")
        return None

    def entries(self, node: "MappingNode", prefix: str = "") -> dict[str, Entry]:
        """The mapping's entries by name. Doubled and odd keys are faults."""
        found: dict[str, Entry] = {}
        for key, value in node.value:
            name, line = self._name(key, prefix), line_of(key)
            if name is None:
                continue
            if name in found:
                self.fault(line, prefix + name, f"stands twice, first in line {found[name].line}")
                continue
            found[name] = Entry(name, line, value)
        return found

    def _name(self, key: "Node", prefix: str) -> str | None:
        if key.tag == YAML_TAG + "str" and key.value != "<<":
            return str(key.value)
        merges = "<< (merging) is not read, YAML 1.2 has none of it; inherit with `extends: NAME`"
        reason = merges if key.value == "<<" else f"a key must be text; YAML reads {what(key)} here"
        self.fault(line_of(key), prefix.rstrip("."), reason)
        return None


def line_of(node: "Node") -> int:
    return int(node.start_mark.line) + 1


def what(node: "Node") -> str:
    """The node in words, as YAML understands it."""
    from yaml.nodes import MappingNode, ScalarNode

    if not isinstance(node, ScalarNode):
        return "a mapping" if isinstance(node, MappingNode) else "a list"
    match node.tag.removeprefix(YAML_TAG):
        case "null":
            return "nothing" if not node.value else "null"
        case "str":
            return "text"
        case "bool":
            return str(node.value).lower()
        case "int":
            return f"the number {_number(node)}"
        case "float":
            return "a number"
        case other:
            return f"something tagged {other}"


def _number(node: "ScalarNode") -> str:
    from ghostvis_cli.profile.yaml12 import whole

    try:
        return str(whole(node.value))[:MOST_DIGITS]
    except ValueError:  # tagged !!int and no number, or thousands of digits
        return "it can't read"


def read(path: Path, document: Document) -> "Node | None":
    """The root of a file, or None and a fault with its line. OSError where the file can't be opened."""
    if not stat.S_ISREG(path.stat().st_mode):
        document.fault(1, "", "is not a file")
        return None
    with path.open("rb") as file:
        encoded = file.read(LARGEST_BYTES + 1)
    if len(encoded) > LARGEST_BYTES:
        document.fault(1, "", f"is larger than {LARGEST_BYTES // 1024} KiB")
        return None
    try:
        text = decode(encoded, "")
    except InputError as error:
        fault = error.__cause__
        start = fault.start if isinstance(fault, UnicodeDecodeError) else 0
        document.fault(encoded.count(b"\n", 0, start) + 1, "", "is not UTF-8; save the file in that encoding")
        return None
    return compose(text, document)


def compose(text: str, document: Document) -> "Node | None":
    """The root node of one YAML document, or None and a fault."""
    import yaml

    from ghostvis_cli.profile.yaml12 import Loader

    try:
        root = yaml.compose(text, Loader=Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.fault(line, "", f"holds the control character U+{int(error.character):04X}")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document.fault(mark.line + 1 if mark else 1, "", _in_words(error.problem or ""))
    except RecursionError:
        document.fault(1, "", "is nested too deeply")
    except (ValueError, OverflowError) as error:  # PyYAML's own, of \U00110000 and %YAML with many digits
        document.fault(1, "", f"is not YAML: {error}")
    else:
        if root is None:
            document.fault(1, "", "is empty")
        return root
    return None


def _in_words(problem: str) -> str:
    """The parser's complaint, with what to do about the common ones."""
    if "'\\t'" in problem:
        return "holds a tab where YAML wants spaces"
    if problem == "but found another document":
        return "holds a second document (---); a profile file is one"
    if "mapping values are not allowed" in problem:
        return "is not YAML: a second `: ` in the line; text that holds one wants quotes"
    if "cannot start any token" in problem or "alias" in problem:
        problem += "; text that begins with a sign wants quotes"
    return f"is not YAML: {problem}"
