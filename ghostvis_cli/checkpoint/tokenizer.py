"""The tokenizer a checkpoint was trained with: a pickled tiktoken encoding or a tokenizer.json, not trusted."""

import asyncio
import json
import pickle
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostvis_cli.checkpoint import pickles, tokenizer_json
from ghostvis_cli.checkpoint.formats import instead
from ghostvis_cli.errors import InputError, ModelError, limit_reached, one_line

if TYPE_CHECKING:
    import tiktoken

REQUIRED_SPECIALS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
IMAGE_TOKEN = tokenizer_json.IMAGE_TOKEN
SAMPLE = "Hello, world! 1234\n\n  Größe 日本 🙂\t<|bos|>"
FILE_LIMIT_BYTES = 64 * 1024**2


class _InertEncoding:
    """Stands in for tiktoken.core.Encoding while unpickling: keeps the state, does nothing with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _InertEncoding
        raise ModelError(f"it holds a {module}.{name}: reading it could run code, so it was not read")


class Tokenizer:
    """Text <-> ids. Special tokens exist only by name through `special`: text never becomes one."""

    def __init__(self, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> None:
        self.pattern, self.ranks, self.specials = pattern, ranks, specials
        missing = [name for name in REQUIRED_SPECIALS if name not in specials]
        if missing:
            raise ModelError(
                f"the tokenizer lacks {', '.join(missing)}", hint="use the one trained with the model"
            )
        self._names = {id_: name for name, id_ in specials.items()}

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        return tiktoken.Encoding(
            "ghostvis", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.specials
        )

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read `tokenizer.pkl` or `tokenizer.json`; ModelError with file and reason where it can't be used."""
        try:
            if path.stat().st_size > FILE_LIMIT_BYTES:
                raise ModelError("larger than any tokenizer")
            tokenizer = cls(*_validated(*_encoding(path)))
            tokenizer._try_out()
            return tokenizer
        except FileNotFoundError:
            raise ModelError(
                f"no tokenizer: {path} does not exist",
                hint=f"copy the training run's {path.name} there, or beside the weights",
            ) from None
        except IsADirectoryError:
            hint = f"name the file in it: {path / 'tokenizer.pkl'}"
            raise ModelError(f"tokenizer {path} is a directory", hint=hint) from None
        except OSError as error:
            unread = ModelError(f"tokenizer {path} can't be read: {error.strerror or error}")
            raise limit_reached(error) or unread from error
        except ModelError as error:
            raise ModelError(f"tokenizer {path}: {error.message}", hint=error.hint) from None
        except Exception as error:  # a hostile pickle can fail in any way at all
            damaged = ModelError(f"tokenizer {path} is damaged ({type(error).__name__}: {error})")
            is_json = path.suffix == ".json"
            raise limit_reached(error) or instead(path, *["{"] * is_json) or damaged from error

    def _try_out(self) -> None:
        """Refuse a split pattern that can't be compiled or loses text."""
        try:
            _ = self._encoding
        except ImportError:
            return  # a remote-only installation, where doctor may still look at files
        try:
            intact = self.decode(self.encode(SAMPLE)) == SAMPLE
        except InputError as error:
            raise ModelError(f"its split pattern can't be used: {error.message}") from None
        if not intact:
            raise ModelError("its split pattern loses text")

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + len(self.specials)

    @property
    def image_id(self) -> int | None:
        """The id of `<|image|>`, which tokenizers of the d32 era lack."""
        return self.specials.get(IMAGE_TOKEN)

    @cached_property
    def longest_token_bytes(self) -> int:
        return max(map(len, self.ranks))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        return frozenset((self.special("<|assistant_end|>"), self.special("<|bos|>")))

    def special(self, name: str) -> int:
        return self.specials[name]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; `<|bos|>` typed by a user is just seven characters."""
        try:
            return self._encoding.encode_ordinary(text)
        except (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
            raise
        except BaseException as error:  # the pattern's own stack overflow is a panic, which is no Exception
            unsplit = InputError(f"the text can't be split into tokens: {one_line(error)}")
            raise limit_reached(error) or unsplit from None

    def token_bytes(self, id_: int) -> bytes:
        """The bytes one id stands for; a special's name; nothing for ids the tokenizer does not know."""
        if id_ in self._names:
            return self._names[id_].encode()
        return self._encoding.decode_single_token_bytes(id_) if 0 <= id_ < len(self.ranks) else b""

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")


def _encoding(path: Path) -> tuple[Any, Any, Any]:
    """Split pattern, ranks and special tokens as the file has them, each of any type."""
    if path.suffix == ".json":
        return tokenizer_json.encoding(json.loads(path.read_text(encoding="utf-8")))
    return _pickled(pickles.load(path.read_bytes(), _Unpickler))


def _pickled(content: object) -> tuple[Any, Any, Any]:
    state = content.state if isinstance(content, _InertEncoding) else None
    if not isinstance(state, dict):
        raise ModelError("it is not a pickled tiktoken encoding with its own vocabulary")
    return state.get("pat_str"), state.get("mergeable_ranks"), state.get("special_tokens")


def _validated(pattern: Any, ranks: Any, specials: Any) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Check all that the format promises, so that no later code has to."""
    if not isinstance(pattern, str) or not isinstance(ranks, dict) or not isinstance(specials, dict):
        raise ModelError("its vocabulary is incomplete")
    if not all(isinstance(key, bytes) and type(rank) is int for key, rank in ranks.items()):
        raise ModelError("its merges are not bytes with ranks")
    if not all(isinstance(key, str) and type(id_) is int for key, id_ in specials.items()):
        raise ModelError("its special tokens are not names with ids")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelError("its ranks have gaps or repeats")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ModelError("some single bytes are missing from it, so some text could not be encoded")
    if sorted(specials.values()) != list(range(len(ranks), len(ranks) + len(specials))):
        raise ModelError("its special tokens do not follow its merges")
    if len(pattern) > 4096:
        raise ModelError("its split pattern is longer than any tokenizer's")
    return pattern, ranks, specials
