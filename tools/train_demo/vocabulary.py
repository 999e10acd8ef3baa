"""The demonstration's tokenizer: byte-level BPE learned from the generated text, in GhostVis's file form."""

import pickle
from pathlib import Path
from random import Random

from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from tools.train_demo.chat import talk
from tools.train_demo.questions import ask, ask_two
from tools.train_demo.scenes import sample_scene

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIALS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
    "<|image|>",
)
VOCABULARY = 1024


def corpus(seed: int, lines: int = 40_000) -> list[str]:
    rng = Random(f"{seed}/corpus")
    text: list[str] = []
    while len(text) < lines:
        scene = sample_scene(rng)
        asked = ask_two((scene, sample_scene(rng)), rng, False) if rng.random() < 0.15 else ask(scene, rng)
        text += ["\n" + asked.question, asked.answer, *talk(rng)]
    return text


def learn(text: list[str], size: int = VOCABULARY) -> Tokenizer:
    """Train the merges; single bytes come first, in byte order."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trained

    model = Trained(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=[],
    )
    model.train_from_iterator(text, trainer)
    letters = _byte_of_letter()
    merged = sorted(((id_, word) for word, id_ in model.get_vocab().items() if len(word) > 1))
    ranks = {bytes([byte]): byte for byte in range(256)}
    for _, word in merged:
        ranks[bytes(letters[letter] for letter in word)] = len(ranks)
    return Tokenizer(PATTERN, ranks, {name: len(ranks) + at for at, name in enumerate(SPECIALS)})


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's table of printable stand-ins, backwards."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in shown}
    for at, byte in enumerate(byte for byte in range(256) if byte not in shown):
        table[chr(256 + at)] = byte
    return table


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.pkl` and `token_bytes.pt` as a GhostVis base directory has them."""
    import tiktoken
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    encoding = tiktoken.Encoding(
        "rustbpe",
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.specials,
    )
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding, protocol=4))
    plain = len(tokenizer.ranks)
    lengths = [
        len(tokenizer.decode([id_]).encode()) if id_ < plain else 0 for id_ in range(tokenizer.vocab_size)
    ]
    torch.save(torch.tensor(lengths, dtype=torch.int32), folder / "token_bytes.pt")
