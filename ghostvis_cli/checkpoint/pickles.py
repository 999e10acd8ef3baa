"""Pickles read without trusting them: no code runs, and nothing is allocated that the file does not hold."""

import io
import pickle
import pickletools
from typing import Any

from ghostvis_cli.errors import ModelError

MEMO_OPCODES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))


def load(content: bytes, unpickler: type[pickle.Unpickler]) -> Any:
    """What `unpickler`, which must refuse every class it does not know, makes of the content."""
    for opcode, argument, _ in pickletools.genops(content):
        # The memo is an array as long as the largest index: five bytes could ask for 32 GiB.
        if opcode.name in MEMO_OPCODES and isinstance(argument, int) and argument > len(content):
            raise ModelError("it is damaged: it numbers more objects than it can hold")
    return unpickler(io.BytesIO(content)).load()
