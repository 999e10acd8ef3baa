"""Images from everywhere, good and bad: real files, a real web server, and every failure an InputError."""

import base64
import gzip
import io
import os
import random
import socket
import struct
import threading
import tracemalloc
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from ghostvis_cli.errors import ExitCode, InputError, UsageError
from ghostvis_cli.image_limits import ImageLimits
from ghostvis_cli.images import EncodedImage, from_bytes, load_image
from tests import sites
from tests.pictures import encoded

OPEN = ImageLimits(allow_private=True, timeout_s=60)


def noise(mode: str = "RGB", size: tuple[int, int] = (7, 5), seed: int = 0) -> Image.Image:
    """An image whose pixels all differ, so that no turn or channel swap goes unseen."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, random.Random(seed).randbytes(size[0] * size[1] * bands))


def oriented(kind: str, tag: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return encoded(noise(), kind, exif=exif, **options)


def decoded(image: EncodedImage) -> Image.Image:
    """What a server makes of the bytes it is sent, if it ignores EXIF."""
    return Image.open(io.BytesIO(image.data)).convert("RGB")


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_image(source, **options)
    assert caught.value.code == ExitCode.INPUT
    assert "\n" not in caught.value.message
    return caught.value.message


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A greyscale PNG that promises width x height and holds only the given chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IEND", b"")


# Pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_with_nothing_to_change_keeps_its_bytes(tmp_path: Path, kind: str) -> None:
    original = encoded(noise(), kind)
    path = tmp_path / "photo"
    path.write_bytes(original)

    image = load_image(str(path))

    assert (image.data, image.mime, image.name) == (original, f"image/{kind.lower()}", str(path))
    assert (image.width, image.height) == (7, 5)
    assert image.pil().mode == "RGB"
    assert image.pil().tobytes() == decoded(image).tobytes()


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_applied(kind: str, tag: int) -> None:
    original = oriented(kind, tag, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(original)))

    image = from_bytes(original, "photo")

    assert image.pil().tobytes() == expected.tobytes()
    assert (image.width, image.height) == ((7, 5) if tag < 5 else (5, 7))
    assert decoded(image).tobytes() == image.pil().tobytes()


def test_an_image_held_sideways_comes_out_upright() -> None:
    image = from_bytes(oriented("PNG", 6), "photo")
    assert image.pil().getpixel((4, 0)) == noise().getpixel((0, 0))  # the first pixel ends up top right


def test_nothing_turns_an_upright_image_a_second_time() -> None:
    image = from_bytes(oriented("JPEG", 6), "photo")
    assert ImageOps.exif_transpose(image.pil()).size == (image.width, image.height)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(image.data))).size == (image.width, image.height)


def test_damaged_exif_tags_do_not_stop_an_image_from_being_turned() -> None:
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x011A, 5, 1, 0xFFFFFF)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    assert from_bytes(encoded(noise(), "JPEG", exif=exif), "photo").width == 5


def raw_png(bits: int, colour_type: int, row: bytes, width: int, *chunks: bytes) -> bytes:
    """One row of pixels, in any of PNG's kinds."""
    header = struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [png_chunk(b"IHDR", header), *chunks, pixels, png_chunk(b"IEND", b"")]
    )


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def key(*values: int) -> bytes:
    return png_chunk(b"tRNS", words(*values))


def palette(alphas: bytes) -> tuple[bytes, bytes]:
    return png_chunk(b"PLTE", bytes(range(10, 100, 10))), png_chunk(b"tRNS", alphas)


def half_hidden(mode: str) -> Image.Image:
    """Its left half is opaque (10, 20, 30), its right half transparent, with red hidden under it."""
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    image.paste((10, 20, 30, 255), (0, 0, 4, 8))
    return image.convert("LA").convert(mode) if mode in ("LA", "La") else image.convert(mode)


def pixels_of(image: EncodedImage) -> list[int]:
    """The first row's red."""
    return list(image.pil().getchannel(0).crop((0, 0, image.width, 1)).tobytes())


@pytest.mark.parametrize(("original", "expected"), [
    (raw_png(8, 6, bytes([9, 9, 9, 0, 9, 9, 9, 255, 0, 0, 0, 128]), 3), [255, 9, 127]),
    (raw_png(16, 6, words(9, 9, 9, 0, 0x2000, 0, 0, 65535), 2), [255, 32]),
    (raw_png(8, 4, bytes([9, 0, 9, 255]), 2), [255, 9]),
    (raw_png(16, 4, words(9, 0, 0x2000, 65535), 2), [255, 32]),
    (raw_png(8, 3, bytes([0, 1, 2]), 3, *palette(bytes([0, 128]))), [255, 147, 70]),
    (raw_png(1, 3, bytes([0b01000000]), 2, *palette(bytes([0]))), [255, 40]),
    (raw_png(8, 2, bytes([1, 2, 3, 1, 2, 4]), 2, key(1, 2, 3)), [255, 1]),
    (raw_png(16, 2, words(0x1234, 0, 0, 0x5678, 0, 0), 2, key(0x1234, 0, 0)), [255, 0x56]),
    (raw_png(8, 0, bytes([5, 6]), 2, key(5)), [255, 6]),
    (raw_png(1, 0, bytes([0b00000000]), 2, key(0)), [255, 255]),
    (raw_png(2, 0, bytes([0b00011011]), 4, key(1)), [0, 255, 170, 255]),
    (raw_png(4, 0, bytes([0x34]), 2, key(3)), [255, 68]),
    (raw_png(16, 0, words(300, 301, 44), 3, key(300)), [255, 1, 0]),
], ids=["RGBA", "RGBA-16", "LA", "LA-16", "P", "P-1", "RGB-key", "RGB-16-key", "L-key", "L-1-key", "L-2-key",
        "L-4-key", "L-16-key"])  # fmt: skip
def test_what_a_png_hides_under_alpha_is_laid_on_white(original: bytes, expected: list[int]) -> None:
    image = from_bytes(original, "icon.png")
    assert pixels_of(image) == expected
    assert decoded(image).tobytes() == image.pil().tobytes()
    assert Image.open(io.BytesIO(image.data)).mode == "RGB"
    assert "transparent parts are shown on white" in next(image.details)


@pytest.mark.parametrize(("kind", "options"), [
    ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {}), ("GIF", {}), ("PNG", {"save_all": True}),
])  # fmt: skip
def test_every_format_with_alpha_is_laid_on_white(kind: str, options: dict[str, Any]) -> None:
    turned = half_hidden("RGBA").transpose(Image.Transpose.ROTATE_90)
    moving = {"append_images": [turned]} if "save_all" in options else {}
    image = from_bytes(encoded(half_hidden("RGBA"), kind, **options, **moving), "icon")
    assert pixels_of(image)[0] < 20
    assert pixels_of(image)[4:] == [255] * 4
    assert decoded(image).tobytes() == image.pil().tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La"])
def test_premultiplied_images_in_memory_are_laid_on_white_too(mode: str) -> None:
    assert pixels_of(load_image(half_hidden(mode)))[4:] == [255] * 4


def test_a_transparent_gif_colour_and_canvas_that_no_frame_covers_are_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 200, 0, 0])
    assert pixels_of(from_bytes(encoded(image, "GIF", transparency=1), "x")) == [255] * 8
    wider = bytearray(encoded(image, "GIF"))
    wider[6] = 10  # of the canvas; the frame stays 8 wide
    assert pixels_of(from_bytes(bytes(wider), "x")) == [200] * 8 + [255] * 2


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_image_with_an_alpha_channel_keeps_every_pixel(mode: str) -> None:
    image = noise(mode)
    image.putalpha(255)
    loaded = from_bytes(encoded(image), "logo.png")
    assert loaded.pil().tobytes() == image.convert("RGB").tobytes()
    assert not list(loaded.details)


@pytest.mark.parametrize(
    ("background", "red"), [("black", 0), ("grey", 128), ("#0a141e", 10), ("C86400", 200)]
)
def test_the_ground_can_be_another(background: str, red: int) -> None:
    limits = ImageLimits(background=background)
    image = from_bytes(raw_png(8, 6, bytes([9, 9, 9, 0]), 1), "icon.png", limits)
    assert pixels_of(image) == [red]
    assert f"shown on {background}" in next(image.details)


def test_a_ground_that_is_no_colour_is_refused() -> None:
    with pytest.raises(UsageError, match="background is 'transparent', not white, black, grey or #rrggbb"):
        ImageLimits(background="transparent")


def test_transformers_is_given_the_same_opaque_image(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from ghostvis_cli.hf.processor import GhostVisImageProcessor

    half_hidden("RGBA").save(tmp_path / "icon.png")
    processor = GhostVisImageProcessor(image_size=8)
    white, from_file, in_memory = (
        processor.preprocess(each)["pixel_values"][0]
        for each in (load_image(tmp_path / "icon.png").pil(), str(tmp_path / "icon.png"), half_hidden("RGBA"))
    )
    assert (white == from_file).all()
    assert (white == in_memory).all()


@pytest.mark.parametrize(("mode", "kind"), [("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"),
                                            ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("RGB", "BMP"),
                                            ("RGB", "PPM"), ("RGB", "AVIF")])  # fmt: skip
def test_every_colour_mode_becomes_rgb(mode: str, kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    original = encoded(noise("L").convert("P") if mode == "P" else noise("RGB").convert(mode), kind)

    image = from_bytes(original, "x")

    assert image.pil().mode == "RGB"
    assert image.pil().tobytes() == Image.open(io.BytesIO(original)).convert("RGB").tobytes()
    assert decoded(image).tobytes() == image.pil().tobytes()


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    shades = Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0, 257 * 100, 65535))
    for kind in ("PNG", "TIFF"):
        assert list(from_bytes(encoded(shades, kind), "scan").pil().getchannel(0).tobytes()) == [0, 100, 255]


def test_a_dark_sixteen_bit_image_stays_dark() -> None:
    shades = Image.frombytes("I;16", (2, 1), struct.pack("<2H", 0, 200))
    assert max(from_bytes(encoded(shades), "scan").pil().tobytes()) <= 1


@pytest.mark.parametrize(("mode", "code", "values"), [
    ("F", "f", (0.0, 0.5, 1.0)),
    ("F", "f", (0, 128, 255)),
    ("F", "f", (-40, 0, 40)),
    ("I", "i", (-70000, 0, 70000)),
    ("I", "i", (0, 32896, 65535)),
])  # fmt: skip
def test_wide_and_floating_point_grey_is_scaled_instead_of_clipped(mode: str, code: str, values: Any) -> None:
    image = Image.frombytes(mode, (3, 1), struct.pack(f"=3{code}", *values))
    assert list(from_bytes(encoded(image, "TIFF"), "scan").pil().getchannel(0).tobytes()) == [0, 128, 255]


def test_floats_that_are_no_numbers_do_not_crash() -> None:
    image = Image.frombytes("F", (3, 1), struct.pack("=3f", float("nan"), float("inf"), -1.0))
    with suppress(InputError):
        assert from_bytes(encoded(image, "TIFF"), "scan").width == 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_several_is_the_image(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 250))
    image = from_bytes(encoded(first, kind, save_all=True, append_images=[second]), "moving")

    red, _, blue = image.pil().getpixel((4, 4))  # type: ignore[misc]
    assert red > 200 and blue < 50
    assert not getattr(Image.open(io.BytesIO(image.data)), "is_animated", False) or kind == "MPO"


def test_a_phones_two_image_jpeg_is_sent_as_the_jpeg_it_begins_with() -> None:
    original = encoded(noise(), "MPO", save_all=True, append_images=[noise(seed=1)])
    image = from_bytes(original, "phone.jpg")
    assert (image.data, image.mime) == (original, "image/jpeg")


def test_a_sixteen_bit_colour_png_is_sent_as_the_eight_bits_the_local_engine_sees() -> None:
    row = b"\0" + struct.pack(">3H", 0x12FF, 0x8000, 0xFFFF)
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    original = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(row))
    image = from_bytes(original + png_chunk(b"IEND", b""), "deep.png")
    assert image.data[24] == 8
    assert decoded(image).tobytes() == image.pil().tobytes()


# Identity and helpers


def test_the_same_pixels_in_another_format_have_the_same_identity() -> None:
    as_png, as_bmp = (from_bytes(encoded(noise(), kind), kind) for kind in ("PNG", "BMP"))
    assert as_png.digest == as_bmp.digest
    assert as_png.digest != from_bytes(encoded(noise(seed=1)), "other").digest


def test_size_is_part_of_the_identity() -> None:
    flat, tall = (from_bytes(encoded(Image.new("RGB", size)), "x") for size in ((4, 2), (2, 4)))
    assert flat.digest != tall.digest


def test_an_image_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    image = from_bytes(encoded(noise()), "x")
    monkeypatch.delattr("PIL.Image.open")
    assert image.pil() is image.pil()


def test_an_image_made_by_hand_decodes_its_own_bytes() -> None:
    loaded = from_bytes(encoded(noise()), "x")
    by_hand = EncodedImage("x", loaded.data, loaded.mime, loaded.width, loaded.height)
    assert by_hand.digest == loaded.digest
    assert by_hand.data == loaded.data


def test_an_image_that_was_turned_is_encoded_only_for_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = from_bytes(oriented("JPEG", 6), "x")
    monkeypatch.setattr("ghostvis_cli.images._png", lambda rgb: b"a png of " + str(rgb.size).encode())
    assert turned.pil().size == (turned.width, turned.height)
    assert turned.data == b"a png of " + str((turned.width, turned.height)).encode()


def test_a_data_url_leads_back_to_the_same_bytes() -> None:
    image = from_bytes(encoded(noise()), "x")
    again = load_image(image.data_url())
    assert (again.data, again.name) == (image.data, "data: URL")


def test_a_crop_that_loses_over_a_fifth_is_announced() -> None:
    notices = from_bytes(encoded(Image.new("RGB", (160, 90))), "wide.png").notices
    assert list(notices) == ["wide.png: the model sees the central square, 56 % of the picture"]


@pytest.mark.parametrize("size", [(100, 100), (100, 80), (80, 100)])
def test_a_crop_that_loses_a_fifth_or_less_is_not_announced(size: tuple[int, int]) -> None:
    assert not list(from_bytes(encoded(Image.new("RGB", size)), "x").notices)


@pytest.mark.parametrize(("kind", "said"), [
    ("GIF", "x: an animation: the model sees its first frame"),
    ("WEBP", "x: an animation: the model sees its first frame"),
    ("PNG", "x: an animation: the model sees its first frame"),
    ("TIFF", "x: several pages: the model sees the first"),
])  # fmt: skip
def test_frames_and_pages_that_the_model_does_not_see_are_announced(kind: str, said: str) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    assert list(from_bytes(encoded(first, kind, save_all=True, append_images=[second]), "x").notices) == [
        said
    ]
    assert not list(from_bytes(encoded(first, kind), "x").notices)


def test_the_depth_map_beside_a_phones_photo_is_not_announced() -> None:
    original = encoded(noise(size=(8, 8)), "MPO", save_all=True, append_images=[noise(size=(8, 8), seed=1)])
    assert not list(from_bytes(original, "phone.jpg").notices)


# Sources


def test_paths_bytes_streams_and_images_give_the_same_pixels(tmp_path: Path, monkeypatch: Any) -> None:
    original = encoded(noise())
    (tmp_path / "a b.png").write_bytes(original)
    monkeypatch.setenv("HOME", str(tmp_path))
    sources: list[Any] = [
        "~/a b.png",
        tmp_path / "a b.png",
        (tmp_path / "a b.png").as_uri(),
        original,
        noise(),
    ]
    digests = {load_image(source).digest for source in sources}
    digests.add(load_image("-", stdin=io.BytesIO(original)).digest)
    assert digests == {from_bytes(original, "x").digest}


def test_a_leading_tilde_can_be_meant_literally(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "~x.png").write_bytes(encoded(noise()))
    monkeypatch.chdir(tmp_path)
    assert load_image("./~x.png").width == 7


def test_a_pipe_is_read_like_a_file() -> None:
    reader, writer = os.pipe()
    os.write(writer, encoded(noise()))
    os.close(writer)
    assert load_image(f"/dev/fd/{reader}").width == 7
    os.close(reader)


def test_the_callers_image_is_left_alone() -> None:
    image = Image.open(io.BytesIO(oriented("PNG", 6)))
    assert load_image(image).width == 5
    assert (image.size, image.getexif()[0x0112]) == ((7, 5), 6)


@pytest.mark.parametrize("encode", [
    lambda content: "data:image/png;base64," + base64.b64encode(content).decode(),
    lambda content: "DATA:;base64," + base64.urlsafe_b64encode(content).decode().rstrip("="),
    lambda content: "data:image/png;name=x.png;base64," + base64.encodebytes(content).decode(),
    lambda content: "data:image/png;base64," + base64.b64encode(content).decode().replace("+", "%2B"),
    lambda content: "data:image/png," + "".join(f"%{byte:02X}" for byte in content),
])  # fmt: skip
def test_data_urls_are_read_in_every_spelling(encode: Callable[[bytes], str]) -> None:
    original = encoded(noise())
    assert load_image(encode(original)).data == original


@pytest.mark.parametrize(("url", "reason"), [
    ("data:image/png", "no comma"),
    ("data:image/png;base64,", "empty"),
    ("data:image/png;base64,%%%", "not valid base64"),
    ("data:image/png;base64,!" + "A" * 45_000_000, "larger than 32 MiB"),
    ("data:image/png;base64,aGVsbG8=", "a text file"),
    ("data:text/html,<html>", "an HTML page"),
])  # fmt: skip
def test_a_bad_data_url_is_refused_without_being_repeated(url: str, reason: str) -> None:
    message = refusal(url)
    assert message.startswith("data: URL: ")
    assert reason in message


def test_a_closed_stdin_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert "closed" in refusal("-")


def test_a_terminal_is_not_waited_for() -> None:
    controller, terminal = os.openpty()
    with open(terminal, "rb", buffering=0) as stream:  # noqa: PTH123
        assert refusal("-", stdin=stream) == "stdin: a terminal, not an image"
    os.close(controller)


def test_files_that_cannot_be_read_are_refused_by_name_and_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert refusal(str(tmp_path / "none.png")) == f"{tmp_path}/none.png: No such file or directory"
    assert "Is a directory" in refusal(str(tmp_path))
    assert "empty" in refusal(tmp_path / "empty.png")
    assert "null byte" in refusal("a\0b.png")
    assert "too long" in refusal("x" * 5000)
    assert refusal("") == "'': No such file or directory"
    assert "No such file" in refusal(Path("-"))
    assert "another machine" in refusal("file://server/share/a.png")
    assert "only http" in refusal("ftp://host/a.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked.png").write_bytes(encoded(noise()))
    (tmp_path / "locked.png").chmod(0)
    assert "Permission denied" in refusal(tmp_path / "locked.png")


def test_names_are_safe_to_print_on_a_terminal() -> None:
    message = refusal("evil\x1b[31m\nname\udcff.png")
    assert message == "evil?[31m?name?.png: No such file or directory"


# Broken, huge, or something else


@pytest.mark.parametrize(("content", "meaning", "command"), [
    (b"%PDF-1.7 ...", "a PDF document", "pdftoppm"),
    (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC photo", "heif-convert"),
    (b"\0\0\0\x18ftypisom\0\0\0\0", "a video", "ffmpeg"),
    (b"<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns='...'/>", "an SVG drawing", "rsvg-convert"),
    (b"\n<!DOCTYPE html><meta charset=utf-8>", "an HTML page", None),
    (b"dear diary", "a text file", None),
    (b"\x89PNG\r\n\x1a\n", "a damaged image", None),
    (b"\0\1\2\3\4\5", "not an image in a known format", None),
    (b"<!>" * 700, "a text file", None),
])  # fmt: skip
def test_what_is_not_an_image_is_called_what_it_is(
    tmp_path: Path, content: bytes, meaning: str, command: str | None
) -> None:
    path = tmp_path / "my file"
    path.write_bytes(content)
    with pytest.raises(InputError, match=meaning) as caught:
        load_image(path)
    if command:
        assert caught.value.hint is not None
        assert caught.value.hint.startswith(command)
        assert f"'{path}'" in caught.value.hint


def test_programs_disguised_as_images_are_not_run() -> None:
    assert "a PostScript file" in refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")


def test_size_is_checked_before_decoding() -> None:
    assert "10000 x 10000 is more than 64,000,000 pixels" in refusal(png(10_000, 10_000))
    assert "more than 64,000,000 pixels" in refusal(png(100_000, 100_000))
    assert "more than 64,000,000 pixels" in refusal(png(8_001, 8_000))
    assert "truncated" in refusal(png(8_000, 8_000))  # within the limit, and no pixels in it
    assert "more than 30 pixels" in refusal(noise(), limits=ImageLimits(max_pixels=30))


def test_a_ribbon_is_refused_before_it_is_resized() -> None:
    assert "100 times" in refusal(encoded(Image.new("L", (1, 101))))
    assert load_image(encoded(Image.new("L", (1, 100)))).height == 100


def test_an_image_without_pixels_is_refused() -> None:
    refusal(png(0, 5))
    assert "no pixels" in refusal(Image.new("RGB", (0, 5)))
    refusal(b"P6 0 5 255\n")


@pytest.mark.parametrize("chunk", [
    png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 80_000_000, 1)),
    png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 80_000_000, 1)),
], ids=["zTXt", "iTXt"])  # fmt: skip
def test_compressed_metadata_cannot_explode(chunk: bytes) -> None:
    refusal(png(1, 1, chunk, png_chunk(b"IDAT", zlib.compress(b"\0\0"))))


def test_bytes_are_counted_before_they_are_all_read(tmp_path: Path) -> None:
    limits = ImageLimits(max_bytes=1000)
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 10**12)
    for source in (tmp_path / "sparse.png", "/dev/zero", b"x" * 1001, "data:image/png;base64," + "A" * 1400):
        assert refusal(source, limits=limits).endswith(": larger than 1000 bytes")
    assert "1000 bytes" in refusal("-", stdin=io.BytesIO(b"x" * 1001), limits=limits)
    assert "32 MiB" in refusal(tmp_path / "sparse.png")


def test_a_file_that_is_too_large_is_not_read_at_all(tmp_path: Path) -> None:
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 10**9)
    tracemalloc.start()
    refusal(tmp_path / "sparse.png")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5_000_000


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF"])
def test_a_truncated_file_is_refused_or_whole_but_never_part_of_an_image(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    original = encoded(noise(size=(24, 16)), kind)
    whole = from_bytes(original, "x").digest
    refused = 0
    for length in range(0, len(original), max(1, len(original) // 150)):
        try:
            assert from_bytes(original[:length], "x").digest == whole, f"partial image at {length}"
        except InputError:
            refused += 1
    assert refused > 75


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 1},
    "optimised": {"optimize": True, "subsampling": 0},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_is_the_image_or_refused(mode: str, options: dict[str, Any]) -> None:
    original = encoded(noise(mode, size=(40, 24)), "JPEG", **options)
    whole = from_bytes(original, "x").digest
    for short in (original[:-1], original[:-2], original[:-2] + bytes(100)):
        image = from_bytes(short, "x")
        assert (image.digest, image.mime) == (whole, "image/jpeg" if mode != "CMYK" else "image/png")
        assert decoded(image).tobytes() == image.pil().tobytes()
    for length in range(2, len(original) - 2, 3):
        for short in (original[:length], original[:length] + bytes(200)):
            with suppress(InputError):
                assert from_bytes(short, "x").digest == whole, f"partial image at {length}"
    refusal(original[: len(original) * 9 // 10])


def test_a_jpeg_without_its_end_may_end_with_zeros_of_its_own() -> None:
    flat = [Image.new("RGB", (width, 40), (200, 200, 200)) for width in range(8, 136, 8)]
    originals = [encoded(image, "JPEG", subsampling=0, optimize=True) for image in flat]
    own = [data for data in originals if data[:-2].endswith(b"\0")]
    assert own, "another encoder: try other sizes"
    for data in own:
        assert from_bytes(data[:-2], "x").digest == from_bytes(data, "x").digest
        for cut in (data[:-3], data[:-4], data[:-4] + bytes(9)):
            with pytest.raises(InputError, match="truncated"):
                from_bytes(cut, "x")


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_cut_between_two_scans_or_restarts_is_refused(options: dict[str, Any]) -> None:
    original = encoded(noise(size=(40, 24)), "JPEG", **options)
    marks = [place for place in range(len(original) - 2) if original[place] == 0xFF and original[place + 1]]
    for place in marks:
        refusal(original[:place])


ORIGINALS = [
    encoded(noise(size=(9, 9)), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
]
ORIGINALS += [oriented(kind, 6) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]


def test_flipped_bytes_give_an_image_or_an_input_error() -> None:
    given_ = Counter[str]()

    @settings(max_examples=1500, derandomize=True)
    @given(
        st.sampled_from(ORIGINALS),
        st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=12),
    )
    def flip(original: bytes, flips: list[tuple[int, int]]) -> None:
        damaged = bytearray(original)
        for place, value in flips:
            damaged[place % len(damaged)] = value
        try:
            image = from_bytes(bytes(damaged), "x")
        except InputError:
            given_["refusal"] += 1
        else:
            given_["image"] += 1
            assert image.pil().size == (image.width, image.height)

    flip()
    assert min(given_["refusal"], given_["image"]) > 150, given_


@settings(max_examples=300, derandomize=True)
@given(st.sampled_from([b"", *(original[:16] for original in ORIGINALS)]), st.binary(max_size=300))
def test_random_bytes_never_cause_anything_but_an_input_error(beginning: bytes, rest: bytes) -> None:
    with suppress(InputError):
        from_bytes(beginning + rest, "x")


def test_pillows_warnings_stay_off_stderr() -> None:
    damaged = bytearray(encoded(noise(), "TIFF"))
    damaged[struct.unpack_from("<I", damaged, 4)[0]] += 40  # more tags than there are
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress(InputError):
            from_bytes(bytes(damaged), "x")
        assert not caught
        with suppress(Exception):
            warnings.simplefilter("always")
            Image.open(io.BytesIO(damaged)).load()
        assert caught, "this file is meant to make Pillow warn"


# The web

IMAGE = encoded(noise())


class Site(sites.Site):
    """Answers by path; as a proxy it gets whole URLs and answers by their path too."""

    seen: ClassVar[list[tuple[str, str | None]]] = []
    stop: ClassVar[threading.Event] = threading.Event()

    def drip(self, content: bytes) -> None:
        with suppress(OSError):
            for byte in content:
                self.wfile.write(bytes([byte]))
                if self.stop.wait(0.02):
                    return
        self.close_connection = True

    def respond(self) -> None:
        self.seen.append((self.path, self.headers.get("Host")))
        path = self.path if self.path[0] == "/" else "/" + self.path.split("/", 3)[3]
        target = path.partition("?to=")[2]
        match path.partition("?")[0]:
            case "/ok" | "/ok.jpg":
                self.answer(200, IMAGE, Content_Type="text/plain")
            case "/to":
                self.answer(302, Location=target)
            case "/loop":
                self.answer(302, Location="/loop")
            case "/page":
                self.answer(200, b"<html>", Content_Type="image/png")
            case "/huge":
                self.answer(200, Content_Length="99999999999")
            case "/endless":
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                with suppress(OSError):
                    while not self.stop.is_set():
                        self.wfile.write(bytes(65536))
                self.close_connection = True
            case "/gzip":
                self.answer(200, gzip.compress(IMAGE), Content_Encoding="gzip")
            case "/gzip-bomb":
                self.answer(200, gzip.compress(bytes(50_000_000), 1), Content_Encoding="gzip")
            case "/bad-gzip":
                self.answer(200, b"no gzip", Content_Encoding="gzip")
            case "/cut":
                self.answer(200, IMAGE[:20], Content_Length=str(len(IMAGE)))
                self.close_connection = True
            case "/drip":
                self.drip(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(9999))
            case "/drip-head":
                self.drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 9999)
            case _:
                self.answer(404, b"nothing here")


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with sites.serving(Site) as url:
        yield url
        Site.stop.set()


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    Site.seen.clear()


def test_a_url_is_fetched_and_known_by_its_bytes_not_its_content_type(site: str) -> None:
    image = load_image(f"{site}/ok", limits=OPEN)
    assert (image.data, image.name) == (IMAGE, f"{site}/ok")


def test_what_follows_a_question_mark_is_never_repeated(site: str) -> None:
    assert load_image(f"{site}/ok?token=secret#part", limits=OPEN).name == f"{site}/ok"
    for path in ("none", "page", "cut", "loop", "huge"):
        assert "secret" not in refusal(f"{site}/{path}?token=secret", limits=OPEN)


def test_a_password_in_a_url_is_refused_and_not_repeated(site: str) -> None:
    message = refusal(site.replace("//", "//ann:secret@") + "/ok", limits=OPEN)
    assert "password" in message
    assert "secret" not in message
    assert Site.seen == []
    assert "secret" not in refusal("ftp://ann:secret@host/a.png?secret")


@pytest.mark.parametrize(("path", "reason"), [
    ("none", "the server answered 404 Not Found"),
    ("page", "seems to be an HTML page"),
    ("huge", "larger than 100000 bytes"),
    ("endless", "larger than 100000 bytes"),
    ("gzip-bomb", "larger than 100000 bytes"),
    ("bad-gzip", "not fetched: "),
    ("cut", "not fetched: "),
    ("loop", "more than 3 redirects"),
    ("to?to=file:///etc/passwd", "not http or https"),
    ("to?to=ftp://images.invalid/", "not http or https"),
    ("to?to=http://[", "not fetched: "),
])  # fmt: skip
def test_a_bad_answer_is_refused_with_the_reason(site: str, path: str, reason: str) -> None:
    limits = ImageLimits(allow_private=True, timeout_s=5, max_bytes=100_000)
    assert reason in refusal(f"{site}/{path}", limits=limits)


def test_an_encoding_nobody_asked_for_is_undone(site: str) -> None:
    assert load_image(f"{site}/gzip", limits=OPEN).data == IMAGE


def test_redirects_are_followed_up_to_the_limit(site: str) -> None:
    assert load_image(f"{site}/to?to=/to?to=/ok", limits=OPEN).data == IMAGE
    refusal(f"{site}/to?to=/to?to=/ok", limits=ImageLimits(allow_private=True, max_redirects=1))


@pytest.mark.parametrize("path", ["drip", "drip-head"])
def test_a_server_that_drips_is_left_at_the_deadline_and_its_thread_ends(site: str, path: str) -> None:
    message = refusal(f"{site}/{path}", limits=ImageLimits(allow_private=True, timeout_s=0.3))
    assert "0.3 s" in message
    for thread in threading.enumerate():
        if thread.name == "image-fetch":
            thread.join(60)
            assert not thread.is_alive()


def test_a_host_that_does_not_listen_is_an_input_error() -> None:
    assert "refused" in refusal("http://127.0.0.1:1/a.png", limits=OPEN)


@pytest.mark.parametrize("url", ["http://", "http:///a.png", "http://[/", "http://h:x/", "http://127.0.0.1:99999/",
                                 "http://a..b/", "http://\N{SNOWMAN}/", f"http://{'a' * 300}/"])  # fmt: skip
def test_impossible_urls_are_input_errors(url: str) -> None:
    refusal(url, limits=OPEN)


PRIVATE = ["127.0.0.1", "localhost", "0x7f000001", "2130706433", "0.0.0.0", "10.0.0.1", "172.16.0.1",
           "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1", "[::1]", "[::]",
           "[fe80::1]", "[fc00::1]", "[fec0::1]", "[ff02::1]", "[::ffff:127.0.0.1]", "[::7f00:1]",
           "[64:ff9b::7f00:1]", "[2002:7f00:1::]"]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused_in_every_spelling(host: str) -> None:
    assert "not a public address" in refusal(f"http://{host}/a.png")


def test_private_addresses_are_refused_before_anything_is_asked_of_them(site: str) -> None:
    assert "not a public address" in refusal(f"{site}/ok")
    assert Site.seen == []


@pytest.fixture
def proxied(site: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("http_proxy", site)
    return site


def test_a_proxy_is_used_and_resolves_names_itself(proxied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def only_numbers(host: str, *rest: Any, **named: Any) -> Any:
        numeric = named.get("flags", 0) & socket.AI_NUMERICHOST
        assert host != "images.invalid" or numeric, "looked up here"
        return real(host, *rest, **named)

    monkeypatch.setattr("socket.getaddrinfo", only_numbers)
    assert load_image("http://images.invalid/ok.jpg?x=1").data == IMAGE
    assert Site.seen == [("http://images.invalid/ok.jpg?x=1", "images.invalid")]


@pytest.mark.parametrize("host", ["8.8.8.8", "[2606:4700::1111]", "[64:ff9b::808:808]", "[::ffff:8.8.8.8]"])
def test_public_addresses_are_let_through(proxied: str, host: str) -> None:
    assert load_image(f"http://{host}/ok").data == IMAGE


def test_a_network_in_no_proxy_holds_for_images(proxied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_image("http://192.0.2.7/ok", limits=OPEN).data == IMAGE
    monkeypatch.setenv("no_proxy", "198.51.100.0/24, 192.0.2.0/24")  # addresses that nobody has
    refusal("http://192.0.2.7/ok", limits=ImageLimits(allow_private=True, timeout_s=0.3))
    assert len(Site.seen) == 1


@pytest.mark.parametrize("host", PRIVATE)
def test_a_redirect_to_a_private_address_is_refused(proxied: str, host: str) -> None:
    message = refusal(f"http://images.invalid/to?to=http://{host}/ok")
    assert message.startswith("http://images.invalid/to: ")
    assert "not a public address" in message
    assert len(Site.seen) == 1


def test_loopback_is_never_proxied(proxied: str, site: str) -> None:
    assert load_image(f"{site}/ok", limits=OPEN).data == IMAGE
    assert Site.seen[0][0] == "/ok"


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(2, 1, 6, "", ("8.8.8.8", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: answers)
    assert "10.0.0.1" in refusal("http://mixed.invalid/a.png")


def test_the_address_that_was_checked_is_the_one_connected_to(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lookups = socket.getaddrinfo, []

    def rebinding(host: str, *rest: Any, **named: Any) -> Any:
        if host != "rebind.invalid":
            return real(host, *rest, **named)
        lookups.append(host)
        return real("127.0.0.1" if len(lookups) == 1 else "127.0.0.2", *rest, **named)

    monkeypatch.setattr("socket.getaddrinfo", rebinding)
    port = site.rpartition(":")[2]
    assert load_image(f"http://rebind.invalid:{port}/ok", limits=OPEN).data == IMAGE
    assert lookups == ["rebind.invalid"]
    assert Site.seen == [("/ok", f"rebind.invalid:{port}")]


@pytest.fixture
def secure_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Starts a TLS server with a certificate for the given name, trusted through SSL_CERT_FILE."""
    with ExitStack() as stack:

        def start(name: str) -> str:
            tls = sites.server_tls(sites.certificates(tmp_path, f"DNS:{name}"))
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
            return stack.enter_context(sites.serving(Site, tls)).replace("127.0.0.1", "localhost")

        yield start


def test_tls_is_verified_against_the_name_although_the_address_is_dialled(
    secure_site: Callable[[str], str],
) -> None:
    assert load_image(f"{secure_site('localhost')}/ok", limits=OPEN).data == IMAGE


def test_a_certificate_for_another_name_is_refused(secure_site: Callable[[str], str]) -> None:
    assert "certificate" in refusal(f"{secure_site('other.invalid')}/ok", limits=OPEN).lower()


def test_a_redirect_from_https_to_http_is_refused(secure_site: Callable[[str], str], site: str) -> None:
    message = refusal(f"{secure_site('localhost')}/to?to={site}/ok", limits=OPEN)
    assert "from https to http" in message
    assert len(Site.seen) == 1
