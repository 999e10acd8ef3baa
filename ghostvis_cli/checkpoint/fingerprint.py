"""A checkpoint's identity by its content, independent of name and place."""

import hashlib
import zipfile

from ghostvis_cli.checkpoint import safetensors
from ghostvis_cli.checkpoint.generations import NONE_SET
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.errors import ModelError


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over every tensor's CRC-32 (a torch file is a zip and holds them), the meta file, the tokenizer and
    what the user set of the model's constants.

    Reads kilobytes of a file of gigabytes; changes when one weight does, and not when the file is moved. Of a
    directory in Hugging Face's format, whose files hold no sums, it reads all.
    """
    digest = hashlib.sha256()
    try:
        if checkpoint.hf:
            return f"sha256:{_of_directory(checkpoint)}"
        with zipfile.ZipFile(checkpoint.path) as archive:
            for entry in archive.infolist():
                digest.update(f"{entry.filename}:{entry.file_size}:{entry.CRC}\n".encode())
        for path in (checkpoint.meta_path, checkpoint.tokenizer_path):
            digest.update(path.read_bytes() if path.exists() else b"-")
        if checkpoint.constants != NONE_SET:
            digest.update(repr(checkpoint.constants).encode())
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"{checkpoint.path} can't be read again: {error}") from error
    return f"sha256:{digest.hexdigest()}"


def _of_directory(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    for path in (*safetensors.files(checkpoint.path), checkpoint.meta_path, checkpoint.tokenizer_path):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
