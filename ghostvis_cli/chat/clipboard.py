"""The clipboard, by whichever program of this system reads it: an image if it holds one, else its text."""

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence

from ghostvis_cli.chat.surface import Clip
from ghostvis_cli.errors import EngineError, InputError

TIMEOUT_S = 10.0
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/tiff")
POWERSHELL_IMAGE = (
    "Add-Type -AssemblyName System.Windows.Forms; $p = [Windows.Forms.Clipboard]::GetImage(); if ($p) { "
    "$m = New-Object IO.MemoryStream; $p.Save($m, [Drawing.Imaging.ImageFormat]::Png); "
    "[Convert]::ToBase64String($m.ToArray()) }"
)


def read() -> Clip:
    """What the clipboard holds. Over SSH that is the far machine's: terminals paste text themselves."""
    for program, is_there, reader in READERS:
        if is_there() and shutil.which(program):
            clip = reader()
            if clip.image or clip.text:
                return clip
            raise InputError("the clipboard is empty")
    raise EngineError(
        "no program here reads the clipboard", hint="install wl-clipboard or xclip, or /image PATH"
    )


def _wayland() -> Clip:
    types = _output("wl-paste", "--list-types").decode(errors="replace").split()
    if kind := _image_type(types):
        return Clip(image=_output("wl-paste", "--type", kind))
    return Clip(text=_text("wl-paste", "--no-newline"))


def _x11() -> Clip:
    ask = ("xclip", "-selection", "clipboard", "-out", "-target")
    if kind := _image_type(_output(*ask, "TARGETS").decode(errors="replace").split()):
        return Clip(image=_output(*ask, kind))
    return Clip(text=_text("xclip", "-selection", "clipboard", "-out"))


def _macos() -> Clip:
    found = re.search(rb"PNGf([0-9A-F]+)", _output("osascript", "-e", "the clipboard as «class PNGf»"))
    return Clip(image=bytes.fromhex(found[1].decode())) if found else Clip(text=_text("pbpaste"))


def _windows() -> Clip:
    shell = ("powershell.exe", "-NoProfile", "-STA", "-Command")
    if image := _output(*shell, POWERSHELL_IMAGE).strip():
        return Clip(image=base64.b64decode(image))
    return Clip(text=_text(*shell, "Get-Clipboard -Raw").replace("\r\n", "\n"))


Reader = tuple[str, Callable[[], bool], Callable[[], Clip]]
READERS: Sequence[Reader] = (
    ("wl-paste", lambda: "WAYLAND_DISPLAY" in os.environ, _wayland),
    ("xclip", lambda: "DISPLAY" in os.environ, _x11),
    ("pbpaste", lambda: True, _macos),
    ("powershell.exe", lambda: True, _windows),
)


def _image_type(types: Sequence[str]) -> str | None:
    return next((kind for kind in IMAGE_TYPES if kind in types), None)


def _text(*command: str) -> str:
    return _output(*command).decode(errors="replace")


def _output(*command: str) -> bytes:
    """What a program prints; nothing where it fails, as these do on an empty clipboard."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{command[0]} does not answer", hint="/image PATH") from error
    return done.stdout if done.returncode == 0 else b""
