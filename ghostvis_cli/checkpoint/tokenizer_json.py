"""A tokenizer.json read as the tiktoken encoding that it was made of: byte-level BPE with a split pattern.

Data without trust: whatever would make other ids than tiktoken does (another normaliser, merges in another order, a
model that is not BPE) is refused by name.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ghostvis_cli.errors import ModelError, printable

IMAGE_TOKEN = "<|image|>"
# In layout prepend_literal the nine characters <|image|> are text, so the token needs another name there.
LITERAL_IMAGE_TOKEN = "<|picture|>"
# Characters that Unicode keeps for programs' own use. The first one opens a mark, and so must be marked itself.
OPEN, ITSELF, BEHIND = "\ufdd0\ufdd1\ufdd2"
# How a Split says that the pattern finds the pieces: the gaps are pieces too, or are none.
WHOLE_PIECES = (("Isolated", False), ("Removed", True))


def _characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else the next free one from 256 on."""
    printing = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


CHARACTERS = _characters()
_BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


def encoding(contents: object) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Split pattern, ranks and special tokens of a parsed tokenizer.json; ModelError where it is another kind."""
    try:
        if not isinstance(contents, Mapping):
            raise ModelError("it is no JSON object")
        model, names = contents["model"], {each["id"]: each["content"] for each in contents["added_tokens"]}
        if model.get("type", "BPE") != "BPE":
            raise ModelError(f"its model is {printable(str(model['type']))}, not byte-level BPE")
        ranks = {
            bytes(map(_BYTES.__getitem__, text)): id_
            for text, id_ in model["vocab"].items()
            if id_ not in names
        }
        _check_merges(model["merges"], ranks)
        _check_normalizer(contents.get("normalizer"))
        specials = {IMAGE_TOKEN if name == LITERAL_IMAGE_TOKEN else name: id_ for id_, name in names.items()}
        return _pattern(contents["pre_tokenizer"]), ranks, specials
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(
            f"it is no byte-level BPE with a split pattern ({type(error).__name__}: {printable(str(error))[:60]})"
        ) from error


def _check_normalizer(normalizer: Mapping[str, Any] | None) -> None:
    """None, or the one that `ghostvis convert` writes: it takes the chat template's marks away."""
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    for part in parts:
        if part["type"] != "Replace" or not str(part["pattern"].get("String", "")).startswith(OPEN):
            raise ModelError(f"it changes text before it splits it ({printable(str(part['type']))})")


def _pattern(pre_tokenizer: Mapping[str, Any]) -> str:
    """The pattern of a Split into pieces, before a ByteLevel that splits no further."""
    split, spell = pre_tokenizer["pretokenizers"]
    pattern = split["pattern"]["Regex"]
    if split["type"] != "Split" or (split["behavior"], split["invert"]) not in WHOLE_PIECES:
        raise ModelError("its pieces are not what a split pattern finds")
    if spell["type"] != "ByteLevel" or spell.get("add_prefix_space") or spell.get("use_regex", True):
        raise ModelError("its pre-tokenizer is not byte-level alone")
    return str(pattern)


def _check_merges(merges: list[Any], ranks: Mapping[bytes, int]) -> None:
    """tiktoken merges by the rank of the result: the list must be in that order, and make every longer token."""
    made = []
    for merge in merges:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        made.append(ranks[bytes(map(_BYTES.__getitem__, first + second))])
    in_order = all(before <= after for before, after in pairwise(made))
    if not in_order or not {id_ for token, id_ in ranks.items() if len(token) > 1} <= set(made):
        raise ModelError("its merges are not those of its token ids: tiktoken would split words otherwise")
