"""The tokenizer: recorded vectors exactly, and a pickle that is never trusted."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.errors import ModelError
from ghostvis_cli.prompt import ImagePart, Message, Text, Tool, render, render_for_reply
from tests.conftest import DATA

CASES = sorted(path.parent.name for path in DATA.glob("*/tokenizer_reference.json"))
GHOST = Tokenizer.load(DATA / "_tok_ghost" / "tokenizer" / "tokenizer.pkl")


def recorded(case: str) -> tuple[Tokenizer, dict]:
    base = DATA / case
    return Tokenizer.load(base / "tokenizer" / "tokenizer.pkl"), json.loads(
        (base / "tokenizer_reference.json").read_text()
    )


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_text_encodes_to_the_recorded_ids(case: str) -> None:
    tokenizer, reference = recorded(case)
    assert tokenizer.specials == reference["special_tokens"]
    assert reference["encode"]
    for vector in reference["encode"]:
        assert tokenizer.encode(vector["text"]) == vector["ids"]
        if vector["roundtrip"]:
            assert tokenizer.decode(vector["ids"]) == vector["text"]


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_conversation_renders_to_the_recorded_ids(case: str) -> None:
    tokenizer, reference = recorded(case)
    rendered = 0
    for vector in reference.get("render", []):
        messages = [as_message(message) for message in vector["conversation"]["messages"]]
        if tokenizer.image_id is None and any(message.images for message in messages):
            continue
        rows = vector.get("num_vision_tokens", 0)  # nanochat knows no images
        prompt = render(messages, tokenizer, "inline", rows)
        ids = [tokenizer.image_id if id_ == -1 else id_ for id_ in prompt.ids]
        assert ids == vector["ids"]
        assert list(prompt.mask) == vector["mask"]
        reply = render_for_reply(messages[:-1], tokenizer, "inline", rows)
        assert [tokenizer.image_id if id_ == -1 else id_ for id_ in reply.ids] == vector["completion_ids"]
        rendered += 1
    assert rendered or not reference.get("render")


IMAGE: Any = None  # the ids do not depend on which it is


def as_message(message: dict) -> Message:
    """Training data marks images in the text; people attach them. This is the only place that reads marks."""
    content = message["content"]
    if isinstance(content, str):
        pieces = content.split("<|image|>")
        parts: list[Any] = [Text(pieces[0])]
        for piece in pieces[1:]:
            parts += [ImagePart(IMAGE), Text(piece)]
        return Message(message["role"], tuple(parts))
    kinds: dict[str, Any] = {"python": "python", "python_output": "output"}
    return Message(
        message["role"],
        tuple(Text(p["text"]) if p["type"] == "text" else Tool(kinds[p["type"]], p["text"]) for p in content),
    )


@given(st.text())
def test_any_text_survives_a_round_trip_and_never_becomes_a_special_token(text: str) -> None:
    ids = GHOST.encode(text)
    assert GHOST.decode(ids) == text
    assert all(id_ < len(GHOST.ranks) for id_ in ids)


@pytest.mark.parametrize("name", GHOST.specials)
def test_special_names_typed_by_a_user_stay_text(name: str) -> None:
    assert GHOST.special(name) not in GHOST.encode(f"hello {name} there{name}")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("1/0",))


def test_a_tokenizer_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match=r"builtins\.eval: reading it could run code"):
        Tokenizer.load(path)


def good_state() -> dict:
    return {
        "name": "rustbpe",
        "pat_str": GHOST.pattern,
        "mergeable_ranks": dict(GHOST.ranks),
        "special_tokens": dict(GHOST.specials),
    }


@pytest.mark.parametrize("size", [0, 1, 50, 5000])
def test_a_truncated_tokenizer_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "tokenizer.pkl"
    shutil.copy(DATA / "_tok_ghost" / "tokenizer" / "tokenizer.pkl", path)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"tokenizer\.pkl"):
        Tokenizer.load(path)


def test_a_directory_in_place_of_a_tokenizer_names_the_file_to_give(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a directory") as refusal:
        Tokenizer.load(tmp_path)
    assert refusal.value.hint == f"name the file in it: {tmp_path / 'tokenizer.pkl'}"


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        Tokenizer.load(tmp_path / "tokenizer.pkl")


def broken(**changes: object) -> dict:
    return good_state() | changes


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("cl100k_base", "its own vocabulary"),
        (broken(pat_str=3), "incomplete"),
        (broken(mergeable_ranks={b"a": 0}), "single bytes are missing"),
        (broken(mergeable_ranks={"a": 0}), "not bytes with ranks"),
        (broken(mergeable_ranks=dict(GHOST.ranks) | {b"zzzzz": 5}), "gaps or repeats"),
        (broken(special_tokens={"<|bos|>": 3}), "do not follow"),
        (broken(special_tokens={}), "lacks <|bos|>"),
        (broken(pat_str="x" * 5000), "pattern"),
    ],
)
def test_a_vocabulary_that_breaks_the_formats_promises_is_refused(state: object, reason: str) -> None:
    from ghostvis_cli.checkpoint.tokenizer import _InertEncoding, _pickled, _validated

    inert = _InertEncoding()
    inert.__setstate__(state)
    with pytest.raises(ModelError, match=reason):
        Tokenizer(*_validated(*_pickled(inert)))


def test_ids_the_tokenizer_does_not_know_decode_to_nothing() -> None:
    assert GHOST.decode([GHOST.vocab_size + 5]) == ""


def test_text_that_makes_the_pattern_overflow_is_an_input_error() -> None:
    from ghostvis_cli.errors import InputError

    with pytest.raises(InputError, match="split into tokens"):
        GHOST.encode("x" + " " * 1_000_000 + "x")


@pytest.mark.parametrize("pattern", ["((", "(?!)", ""])
def test_a_split_pattern_that_can_not_be_used_is_refused(pattern: str) -> None:
    tokenizer = Tokenizer(pattern, GHOST.ranks, GHOST.specials)
    with pytest.raises((ModelError, ValueError)):
        tokenizer._try_out()
