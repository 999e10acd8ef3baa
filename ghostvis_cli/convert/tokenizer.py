"""The tokenizer as transformers reads it: the same ids for the same text, and the chat template.

Training never reads special tokens out of text (format specification, section 6.3), and readers of tokenizer.json
always do. So the chat template puts a mark behind every `<` of a message, which hides a typed `<|bos|>` from the
search for special tokens, and the normaliser, which runs after that search, takes the marks away again.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from ghostvis_cli.checkpoint.tokenizer import IMAGE_TOKEN, Tokenizer
from ghostvis_cli.checkpoint.tokenizer_json import BEHIND, CHARACTERS, ITSELF, LITERAL_IMAGE_TOKEN, OPEN
from ghostvis_cli.errors import ModelError
from ghostvis_cli.model.config import Layout

MARKS = ((OPEN, OPEN + ITSELF), ("<", "<" + OPEN + BEHIND))  # in this order


def image_token(layout: Layout | None) -> str:
    """How the directory's tokenizer spells the id that an image's rows replace."""
    return LITERAL_IMAGE_TOKEN if layout == "prepend_literal" else IMAGE_TOKEN


def escaped(text: str) -> str:
    """Text in which a rendered prompt has no special token, and which encodes to the ids of the text itself."""
    for plain, marked in MARKS:
        text = text.replace(plain, marked)
    return text


def tokenizer_json(tokenizer: Tokenizer, layout: Layout | None = None) -> dict[str, Any]:
    """The contents of tokenizer.json: byte-level BPE with the file's own split pattern and ids."""
    by_id = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    spelled = {token: _spelled(token) for token, _ in by_id}
    specials = _specials(tokenizer, layout)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(name) | {"id": id_} for name, id_ in specials.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [_replace(OPEN + BEHIND, ""), _replace(OPEN + ITSELF, OPEN)],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": tokenizer.pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": _begun(specials["<|bos|>"]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spelled[token]: id_ for token, id_ in by_id} | specials,
            "merges": [[spelled[a], spelled[b]] for a, b in _merges(tokenizer.ranks)],
        },
    }


def _begun(bos: int) -> dict[str, Any]:
    """A text begins with BOS, as training's do. The chat template writes its own, and is encoded without this."""
    begin = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [bos], "tokens": ["<|bos|>"]}},
    }


def _replace(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def tokenizer_config(tokenizer: Tokenizer, layout: Layout | None, max_positions: int) -> dict[str, Any]:
    specials = _specials(tokenizer, layout)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(id_): _added(name) for name, id_ in specials.items()},
        "additional_special_tokens": list(specials),
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|assistant_end|>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "padding_side": "left",
    }


def _specials(tokenizer: Tokenizer, layout: Layout | None) -> dict[str, int]:
    ordered = sorted(tokenizer.specials.items(), key=lambda item: item[1])
    return {image_token(layout) if name == IMAGE_TOKEN else name: id_ for name, id_ in ordered}


def _added(name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": name, **flags, "special": True}


def _spelled(token: bytes) -> str:
    return "".join(map(CHARACTERS.__getitem__, token))


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that makes each longer token, in rank order: its bytes, merged by smaller ranks down to two."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            first, second = _merged(token, ranks, rank)
            yield first, second


def _merged(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        pairs = [(ranks.get(a + b, below), i) for i, (a, b) in enumerate(pairwise(pieces))]
        rank, at = min(pairs)
        if rank >= below:
            raise ModelError(
                f"the tokenizer's token {token!r} can't be put together from smaller ones",
                hint="use the tokenizer.pkl that training wrote",
            )
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def chat_template(layout: Layout | None) -> str:
    """Jinja that renders a conversation to the very ids of `prompt.render` and `prompt.render_for_reply`.

    Content is a string, or a list of {"type": "text"} and {"type": "image"} parts. One image token an image: the
    processor repeats it. None for a text model.
    """
    token = image_token(layout)
    in_turn = {"inline": token, "prepend_slots": token, "prepend_literal": IMAGE_TOKEN}.get(layout or "", "")
    ahead = layout not in (None, "inline")
    return (
        _TEMPLATE.replace("AHEAD", _AHEAD.replace("TOKEN", token) if ahead else "")
        .replace("IN_TURN", in_turn)
        .replace("REFUSAL", _REFUSAL if layout is None else "")
        .replace("ESCAPED", _ESCAPED)
        .replace("\n", "")
    )


# Jinja reads the escapes as Python does.
_ESCAPED = "".join(f"|replace({plain!a}, {marked!a})" for plain, marked in MARKS)
_REFUSAL = "{{ raise_exception('this model reads text only') }}"
_AHEAD = """\
{%- for message in messages %}{% if message.content is not string %}
{%- for part in message.content %}{% if part.type == 'image' %}TOKEN{% endif %}{% endfor %}
{%- endif %}{% endfor %}"""
# A line break follows each image that anything follows, unless that begins with one (prompt.with_line_breaks).
_TEMPLATE = """\
{%- macro parts(content) %}
{%- if content is string %}{{ content ESCAPED }}{% else %}
{%- for part in content %}
{%- if not loop.first and loop.previtem.type == 'image' %}
{%- if part.type != 'text' or not part.text.startswith('\\n') %}{{ '\\n' }}{% endif %}
{%- endif %}
{%- if part.type == 'image' %}REFUSALIN_TURN{% else %}{{ part.text ESCAPED }}{% endif %}
{%- endfor %}{% endif %}
{%- endmacro %}
{%- set turns = namespace(system='', role='', user=false) %}
AHEAD<|bos|>
{%- for message in messages %}
{%- if message.role == 'system' %}{% set turns.system = turns.system ~ parts(message.content) ~ '\\n\\n' %}
{%- elif message.role not in ['user', 'assistant'] %}
{{- raise_exception('a message is from the system, the user or the assistant') }}
{%- else %}
{%- if message.role == turns.role %}{{ '\\n\\n' }}
{%- else %}{% if turns.role %}<|{{ turns.role }}_end|>{% endif %}<|{{ message.role }}_start|>{% endif %}
{%- if message.role == 'user' %}{{ turns.system }}{% set turns.system = '' %}{% set turns.user = true %}{% endif %}
{{- parts(message.content) }}
{%- set turns.role = message.role %}
{%- endif %}
{%- endfor %}
{%- if turns.system %}{{ raise_exception('a system message must be followed by a user message') }}{% endif %}
{%- if not turns.user %}{{ raise_exception('no message is from the user') }}{% endif %}
{%- if turns.role == 'user' %}<|user_end|>{% if add_generation_prompt %}<|assistant_start|>{% endif %}
{%- elif not add_generation_prompt %}<|assistant_end|>{% endif %}"""
