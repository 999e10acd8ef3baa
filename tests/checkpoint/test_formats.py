"""Files that are no torch zip are called what they are, with what to do; only a cut one is called damaged."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from ghostvis_cli.checkpoint import locate
from ghostvis_cli.checkpoint.header import read_header
from ghostvis_cli.checkpoint.load import read_meta
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.errors import ModelError

WEIGHTS = {"a": torch.ones(3)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def saved(**how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(WEIGHTS, file, **how)
    return file.getvalue()


def tarred(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("model_000001.pt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def arrays(save: Callable[..., None], *given: Any, **named: Any) -> bytes:
    file = io.BytesIO()
    save(file, *given, **named)
    return file.getvalue()


FILES: dict[str, tuple[bytes, str, str]] = {
    "safetensors": (safetensors.torch.save(WEIGHTS), "a safetensors file", "safetensors.torch"),
    "LFS pointer": (POINTER, "a Git LFS pointer", "git lfs pull"),
    "annex pointer": (b"/annex/objects/SHA256E-s1--0.pt\n", "a git-annex pointer", "git annex get"),
    "old torch": (saved(_use_new_zipfile_serialization=False), "before 1.6", "weights_only=True"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle", "state_dict"),
    "web page": (b"\n<!DOCTYPE html><html><head>", "a web page", "download"),
    "web page behind a mark": (b"\xef\xbb\xbf<HTML>", "a web page", "download"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "a web page", "download"),
    "words": (b"Entry not found", "begins 'entry not found'", "download"),
    "JSON": (b'{"error": "gated"}', "a text", "download"),
    "words in other letters": ("Zugriff verweigert: für Sie gesperrt ".encode() * 60, "a text", "download"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file", "checkpoint"),
    "gzip": (gzip.compress(saved()), "compressed with gzip", "gunzip"),
    "bzip2": (bz2.compress(saved()), "compressed with bzip2", "bunzip2"),
    "xz": (lzma.compress(saved()), "compressed with xz", "xz -dc"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(90), "compressed with zstd", "zstd"),
    "tar": (tarred(saved()), "a tar archive", "tar -xf"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(90), "a 7z archive", "7z x"),
    "npy": (arrays(np.save, np.ones(3)), "a NumPy array", "torch.save"),
    "npz": (arrays(np.savez, a=np.ones(3)), "NumPy arrays", "torch.save"),
    "zip of a checkpoint": (zipped("run/model_000001.pt", saved()), "holds run/model_000001.pt", "unzip"),
    "any zip": (zipped("a.txt", b""), "not one that torch.save wrote", "torch.save"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file", "torch.save"),
    "nothing": (b"", "is empty", "copy it again"),
    "zeros": (bytes(5000), "filled with zeros", "copy it again"),
    "a cut one": (saved()[:-30], "damaged or incomplete", "copy it again"),
    "noise": (bytes(range(255, 0, -1)) * 9, "not a file that torch.save wrote", "copy it again"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_called_what_it_is_with_what_to_do(case: str, tmp_path: Path) -> None:
    content, called, hint = FILES[case]
    path = tmp_path / "model_000001.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model_000001.pt") as refusal:
        read_header(path)
    assert called in refusal.value.message and hint in str(refusal.value.hint)
    assert ("damaged or incomplete" in refusal.value.message) == (case == "a cut one")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model_000001.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ModelError, match="TorchScript"):
        read_header(path)


def test_the_advice_for_the_old_format_works(tmp_path: Path) -> None:
    path = tmp_path / "it's one.pt"
    path.write_bytes(saved(_use_new_zipfile_serialization=False))
    with pytest.raises(ModelError) as refusal:
        read_header(path)
    subprocess.run(["bash", "-c", str(refusal.value.hint)], check=True, env=_with_this_python())
    assert read_header(path)["a"].shape == (3,)


def _with_this_python() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_what_lies_beside_the_weights_is_called_what_it_is_too(tmp_path: Path) -> None:
    for name in ("model_000001.pt", "meta_000001.json", "tokenizer.pkl"):
        (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"meta_000001.json is a Git LFS pointer"):
        read_meta(Checkpoint(tmp_path / "model_000001.pt"))
    with pytest.raises(ModelError, match=r"tokenizer.pkl is a Git LFS pointer"):
        Tokenizer.load(tmp_path / "tokenizer.pkl")


# --- directories


def test_a_file_of_a_directory_names_the_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b'{"a":{}}')
    with pytest.raises(ModelError, match="Hugging Face's format") as refusal:
        read_header(tmp_path / "model.safetensors")
    assert str(tmp_path) in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("files", "called"),
    [
        (["config.json", "pytorch_model.bin"], "in Hugging Face's format, without model.safetensors"),
        (["archive/data.pkl", "archive/version"], "an unpacked torch file"),
        (["__0_0.distcp", ".metadata"], "split over ranks"),
        (["notes.txt"], "holds no model_<step>.pt"),
    ],
)
def test_other_directories_are_called_what_they_are(files: list[str], called: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({}))
    with pytest.raises(ModelError) as refusal:
        locate.from_path(tmp_path)
    assert called in refusal.value.message and refusal.value.hint
