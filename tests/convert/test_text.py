"""A converted text model is a stock transformers model: same logits, same ids, same prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ghostvis_cli.errors import ModelError
from ghostvis_cli.prompt import Message, Role, render, render_for_reply, render_text
from tests.conftest import DATA, Reference
from tests.convert.conversions import converted

transformers = pytest.importorskip("transformers")
CLASS_OF = {"text_swiglu": "Qwen3ForCausalLM", "text_relu2_nano1_pad": "NanoChatForCausalLM"}
# Format specification, section 10: transformers' rotary tables are not rounded to bfloat16; nothing else differs.
# Seen there: 0.021 for swiglu, 0.018 for relu2, whose argmax agrees in 99.4%.
SOFTCAP = 15.0
LOGIT_TOLERANCE, LEAST_AGREEMENT = 0.021, 0.994


@pytest.fixture(scope="module")
def directory(text_reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(text_reference.checkpoint(), tmp_path_factory.mktemp("text") / text_reference.case)


def test_unmodified_transformers_gives_the_local_models_logits(
    text_reference: Reference, directory: Path
) -> None:
    ours = text_reference.load().model.decoder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert type(theirs).__name__ == CLASS_OF[text_reference.case]
    ids = torch.tensor(text_reference.facts["prompts"]["long"])[None]
    with torch.inference_mode():
        expected, got = ours(ours.embed(ids)), theirs(ids).logits
    if text_reference.case == "text_swiglu":  # transformers' Qwen3 does not read the cap; SGLang's does
        got = SOFTCAP * torch.tanh(got / SOFTCAP)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= LOGIT_TOLERANCE
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() >= LEAST_AGREEMENT


def test_the_configuration_says_all_that_servers_ask_for(text_reference: Reference, directory: Path) -> None:
    decoder = text_reference.load().model.config.decoder
    config = json.loads((directory / "config.json").read_text())
    tokenizer = text_reference.load().tokenizer
    assert config["architectures"] == [CLASS_OF[text_reference.case]]
    assert config["dtype"] == "float32"
    assert config["head_dim"] == decoder.head_dim
    assert config["rms_norm_eps"] == 2.0**-23
    assert config["final_logit_softcapping"] == 15
    assert config["vocab_size"] == decoder.vocab_size
    assert config["intermediate_size"] % 128 == 0
    assert config["max_position_embeddings"] == 10 * decoder.sequence_len
    ends = [tokenizer.special("<|assistant_end|>"), tokenizer.special("<|bos|>")]
    assert config["eos_token_id"] == ends
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == ends


def test_padded_vocabulary_rows_are_left_out(text_reference: Reference, directory: Path) -> None:
    vocab_size = text_reference.load().model.config.decoder.vocab_size
    with safe_open(directory / "model.safetensors", "pt") as file:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert file.get_slice(name).get_shape()[0] == vocab_size


def test_every_recorded_text_gets_the_ids_it_got_in_training(
    text_reference: Reference, directory: Path
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = text_reference.load().tokenizer
    bos = ours.special("<|bos|>")
    assert theirs.encode("") == [bos]
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
        assert theirs.encode(text) == list(render_text(text, ours).ids) == [bos, *ours.encode(text)]
        assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == text
    for id_ in range(ours.vocab_size):
        assert theirs.decode([id_]) == ours.decode([id_])
    for name, id_ in ours.specials.items():
        assert theirs.convert_tokens_to_ids(name) == id_
        assert theirs.encode(f"a{name}b", add_special_tokens=False) == [
            *ours.encode("a"),
            id_,
            *ours.encode("b"),
        ]


TEXTS = [
    "Hello world",
    "  two  spaces\n\n\r\nand\ttabs ",
    "it's I'LL we've 1234567 3.14",
    "naïve Ünïcödé 漢字かな 한국어 العربية 🙂👩‍👩‍👧 \u200b\u00a0",
    "".join(map(chr, range(0x20, 0x2500))),
    "<|not a token|> <|bos",
    "\x00\x01\x7f",
    "x" * 300,
]


def test_merges_give_the_ids_of_whole_files() -> None:
    from tokenizers import Tokenizer

    from ghostvis_cli.checkpoint.tokenizer import Tokenizer as Ours
    from ghostvis_cli.convert.tokenizer import tokenizer_json

    for case in ("_tok_ghost", "text_relu2_nano1_pad"):
        ours = Ours.load(DATA / case / "tokenizer" / "tokenizer.pkl")
        theirs = Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
        for file in sorted(DATA.parent.glob("unit/*.py"))[:3]:
            text = file.read_text()
            assert theirs.encode(text, add_special_tokens=False).ids == _plain(ours, text)


def test_a_vocabulary_that_merges_can_not_build_is_refused() -> None:
    from ghostvis_cli.checkpoint.tokenizer import Tokenizer as Ours
    from ghostvis_cli.convert.tokenizer import tokenizer_json

    ours = Ours.load(DATA / "_tok_ghost" / "tokenizer" / "tokenizer.pkl")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abcd": 256}
    with pytest.raises(ModelError, match="can't be put together"):
        tokenizer_json(Ours(ours.pattern, ranks, ours.specials))


def _plain(tokenizer, text):
    """Ids of a text whose special strings count as special, as these files have it."""
    import re

    pattern = "(" + "|".join(map(re.escape, tokenizer.specials)) + ")"
    pieces = re.split(pattern, text)
    ids: list[int] = []
    for piece in pieces:
        ids += [tokenizer.special(piece)] if piece in tokenizer.specials else tokenizer.encode(piece)
    return ids


CONVERSATIONS = [
    [("user", "Hi")],
    [("user", "")],
    [("system", "Be brief."), ("user", "Hi")],
    [
        ("system", "a"),
        ("system", "b"),
        ("user", "Hi"),
        ("user", "there"),
        ("assistant", "Yes"),
        ("assistant", "?"),
        ("system", "late"),
        ("user", "c"),
        ("system", "later"),
        ("user", "d"),
    ],
    [("assistant", "Welcome!"), ("user", "Hi")],
    [("system", "s"), ("assistant", "Welcome!"), ("user", "Hi"), ("assistant", "It is <|bos|> a")],
    [("system", " \n"), ("user", "\n"), ("assistant", " yes\n"), ("user", "{{ more }} {% if %}")],
]


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_the_chat_template_gives_the_ids_of_our_own_prompts(
    text_reference: Reference, directory: Path, turns: list[tuple[Any, str]], as_list: bool
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = text_reference.load().tokenizer
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if as_list else text}
        for role, text in turns
    ]
    expected = render_for_reply([Message.of(role, text) for role, text in turns], ours)
    got = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert got == list(expected.ids)


def test_a_closed_conversation_renders_as_in_training(text_reference: Reference, directory: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    turns: list[tuple[Role, str]] = [("user", "Hi"), ("assistant", "Hello.")]
    got = theirs.apply_chat_template([{"role": r, "content": t} for r, t in turns], return_dict=False)
    expected = render([Message.of(role, text) for role, text in turns], text_reference.load().tokenizer)
    assert got == list(expected.ids)


@pytest.mark.parametrize(
    "turns", [[("assistant", "Hi")], [("user", "a"), ("system", "x")], [("system", "x")], [("tool", "x")]]
)
def test_the_chat_template_refuses_what_no_model_was_trained_on(
    directory: Path, turns: list[tuple[str, str]]
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    with pytest.raises(Exception, match=r"is from the|must be followed"):
        theirs.apply_chat_template([{"role": r, "content": t} for r, t in turns])


def test_a_text_models_template_refuses_images(directory: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    with pytest.raises(Exception, match="reads text only"):
        theirs.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_the_id_of_an_image_is_not_spelled_as_the_text_that_one_layout_has_there() -> None:
    """Directories in use have this name in their tokenizer."""
    from ghostvis_cli.convert.tokenizer import image_token

    assert [image_token(layout) for layout in ("inline", "prepend_literal")] == ["<|image|>", "<|picture|>"]
