"""Images on their way into SGLang: what is remembered, what is refused, and what a refusal says."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ghostvis_cli import demo
from ghostvis_cli.image_limits import ImageLimits
from ghostvis_cli.images import load_image
from ghostvis_cli.model.preprocess import crop
from ghostvis_cli.sglang.plugin import BACKGROUND_VARIABLE, HOSTS_VARIABLE, IMAGE_KEY_VARIABLE
from ghostvis_cli.sglang.plugin.media import CACHE_VARIABLE, ImageStore, LoadedImage
from tests import sites
from tests.pictures import data_url, encoded, png

SIZE = 16
SQUARE_MB = SIZE * SIZE * 3 / 2**20


def refusal(images: ImageStore, source: object) -> str:
    with pytest.raises(ValueError, match=r"^image 1 ") as caught:
        images.load(source, "image 1")
    error = caught.value
    assert error.__context__ is None or error.__suppress_context__, (
        "a log would show what clients aren't told"
    )
    return str(caught.value)


@pytest.mark.parametrize("path", demo.EXAMPLES, ids=lambda path: path.name)
def test_the_square_is_the_one_the_local_engine_sees(path: Path) -> None:
    square = ImageStore(112, hosts=frozenset()).load(path.read_bytes(), "image 1").pixels
    assert square.flags.writeable, "torch would warn in the server's log"
    assert square.shape == (112, 112, 3)
    assert square.tobytes() == crop(load_image(path).pil(), 112).tobytes()


@pytest.mark.parametrize(("background", "grey"), [(None, 255), ("black", 0)])
def test_a_transparent_image_is_laid_on_the_servers_ground(
    monkeypatch: pytest.MonkeyPatch, background: str | None, grey: int
) -> None:
    monkeypatch.delenv(BACKGROUND_VARIABLE, raising=False)
    if background is not None:
        monkeypatch.setenv(BACKGROUND_VARIABLE, background)
    clear = png((200, 0, 0, 0), (SIZE, SIZE), "RGBA")
    assert set(ImageStore(SIZE, hosts=frozenset()).load(clear, "image 1").pixels.flat) == {grey}


@pytest.mark.parametrize("wrap", [bytes, data_url], ids=["bytes", "data-url"])
def test_a_repeated_source_is_the_remembered_image_itself(wrap) -> None:
    images = ImageStore(SIZE, hosts=frozenset())
    first = images.load(wrap(png()), "image 1")
    assert images.load(wrap(png()), "image 2") is first


def test_a_remembered_image_is_not_decoded_again() -> None:
    images = ImageStore(SIZE, hosts=frozenset())
    known = images.load(png(), "image 1")
    images.limits = ImageLimits(max_bytes=1)  # nothing could be decoded any more
    assert images.load(png(), "image 1") is known
    assert "not a whole image" in refusal(images, png("blue"))


def test_equal_pixels_in_other_bytes_have_one_identity_and_other_pixels_another() -> None:
    images = ImageStore(SIZE, hosts=frozenset())
    image = Image.effect_noise((30, 40), 90).convert("RGB")
    identities = []
    for form, options in (("PNG", {}), ("PNG", {"compress_level": 0}), ("BMP", {})):
        identities.append(images.load(encoded(image, form, **options), "image 1").identity)
    assert len(set(identities)) == 1
    assert images.load(png(), "image 1").identity != identities[0]


def test_identities_of_another_process_are_others() -> None:
    """Each process makes its key when it makes its `ImageStore`."""
    one, other = (ImageStore(SIZE, hosts=frozenset()).load(png(), "image 1") for _ in range(2))
    assert one.pixels.tobytes() == other.pixels.tobytes()
    assert one.identity != other.identity


def test_only_as_many_images_are_kept_as_fit_and_the_longest_unused_goes_first() -> None:
    images = ImageStore(SIZE, hosts=frozenset(), cache_mb=2 * SQUARE_MB)
    red, blue = images.load(png("red"), "image 1"), images.load(png("blue"), "image 1")
    assert images.load(png("red"), "image 1") is red
    images.load(png("green"), "image 1")
    assert images.load(png("red"), "image 1") is red
    assert images.load(png("blue"), "image 1") is not blue


def test_a_cache_without_room_keeps_nothing_and_still_answers() -> None:
    images = ImageStore(SIZE, hosts=frozenset(), cache_mb=0)
    first, second = (images.load(png(), "image 1") for _ in range(2))
    assert first is not second
    assert first.identity == second.identity


def test_the_caches_size_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "0.5")
    assert ImageStore(SIZE).cache_bytes == 2**19
    monkeypatch.setenv(CACHE_VARIABLE, "some")
    with pytest.raises(ValueError, match="GHOSTVIS_PICTURE_CACHE_MB is 'some': a number of megabytes"):
        ImageStore(SIZE)


def test_threads_that_load_at_once_get_what_each_asked_for() -> None:
    images = ImageStore(SIZE, hosts=frozenset(), cache_mb=3 * SQUARE_MB)
    colors = ("red", "lime", "blue", "white", "black")
    files = {color: png(color) for color in colors}

    def load(number: int) -> tuple[str, LoadedImage]:
        color = colors[number % len(colors)]
        return color, images.load(files[color], "image 1")

    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(load, range(200)))
    for color, image in loaded:
        assert Image.fromarray(image.pixels).getpixel((0, 0)) == Image.new("RGB", (1, 1), color).getpixel(
            (0, 0)
        )
    assert len({image.identity for _, image in loaded}) == len(colors)


# What is refused


@pytest.mark.parametrize(
    "source",
    [
        "/etc/passwd",
        "etc/passwd",
        "-",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "ftp://127.0.0.1/secret.png",
        "http://127.0.0.1:1/secret.png",
        "http://[::1]/secret.png",
        "http://[",
        "https://secret.example/a.png",
        " data:image/png;base64,AAAA",
        base64.b64encode(png()).decode(),
        "",
        Path("/etc/passwd"),
        {"url": "secret"},
        ["secret"],
        None,
        7,
    ],
    ids=repr,
)
def test_everything_but_data_urls_and_bytes_is_refused_unread(source: object) -> None:
    text = refusal(ImageStore(SIZE, hosts=frozenset()), source)
    assert text == "image 1 must be a data: URL"


@pytest.mark.parametrize(
    "content",
    [b"", b"secret words, no image", png()[:-35], b"GIF89a secret", b"<svg>secret</svg>"],
    ids=["empty", "text", "truncated", "gif", "svg"],
)
@pytest.mark.parametrize("wrap", [bytes, data_url], ids=["bytes", "data-url"])
def test_what_is_no_whole_image_is_refused_without_being_repeated(wrap, content: bytes) -> None:
    text = refusal(ImageStore(SIZE, hosts=frozenset()), wrap(content))
    assert text.startswith("image 1 is not a whole image in a known format, or larger than 64,000,000 pixels")
    assert "secret" not in text


@pytest.mark.parametrize("url", ["data:", "data:,", "data:image/png;base64,se~ret!", "data:image/png;base64"])
def test_a_bad_data_url_is_refused(url: str) -> None:
    assert "not a whole image" in refusal(ImageStore(SIZE, hosts=frozenset()), url)


def test_an_image_of_too_many_pixels_is_refused_by_its_header() -> None:
    large = png("black", (9000, 9000), "1")
    images = ImageStore(SIZE, hosts=frozenset())
    assert "larger than 64,000,000 pixels" in refusal(images, large)
    images.limits = replace(images.limits, max_pixels=81_000_000)
    assert images.load(large, "image 1").pixels.max() == 0


# Addresses


class Site(sites.Site):
    asked = 0

    def respond(self) -> None:
        type(self).asked += 1
        if self.path == "/away":
            return self.answer(302, location="/red.png")
        content = png("red" if Site.asked % 2 else "blue") if self.path == "/turns.png" else png("red")
        return self.answer(200 if self.path.endswith(".png") else 404, content)


@pytest.fixture
def site() -> Iterator[str]:
    Site.asked = 0
    with sites.serving(Site) as url:
        yield url


def open_to(host: str) -> ImageStore:
    return ImageStore(SIZE, hosts=frozenset({host}), limits=ImageLimits(allow_private=True))


def test_an_image_of_an_allowed_host_is_fetched(site: str) -> None:
    images = open_to("127.0.0.1")
    assert images.load(f"{site}/red.png", "image 1").identity == images.load(png(), "image 1").identity


def test_an_address_is_fetched_anew_each_time_since_its_image_may_change(site: str) -> None:
    images = open_to("127.0.0.1")
    first, second = (images.load(f"{site}/turns.png", "image 1") for _ in range(2))
    assert first.identity != second.identity


def test_a_host_that_is_not_allowed_is_never_asked(site: str) -> None:
    assert refusal(open_to("images.example"), f"{site}/red.png") == (
        "image 1 must be a data: URL, or an http(s) URL of images.example"
    )
    assert Site.asked == 0


@pytest.mark.parametrize(
    "spelling", ["http://images.example@{host}/red.png", "http://{host}#@images.example/"]
)
def test_no_spelling_passes_one_host_off_as_another(site: str, spelling: str) -> None:
    refusal(open_to("images.example"), spelling.format(host=site.removeprefix("http://")))
    assert Site.asked == 0


def test_an_allowed_hosts_redirect_is_not_followed(site: str) -> None:
    assert refusal(open_to("127.0.0.1"), f"{site}/away") == "image 1 could not be fetched as an image"
    assert Site.asked == 1


@pytest.mark.parametrize("path", ["/missing", "/"])
def test_what_went_wrong_at_an_allowed_host_is_not_told(site: str, path: str) -> None:
    assert refusal(open_to("127.0.0.1"), site + path) == "image 1 could not be fetched as an image"


def test_an_allowed_name_that_leads_into_the_private_network_is_not_followed(site: str) -> None:
    images = ImageStore(SIZE, hosts=frozenset({"localhost"}))
    assert refusal(images, site.replace("127.0.0.1", "localhost") + "/red.png") == (
        "image 1 could not be fetched as an image"
    )
    assert Site.asked == 0


def test_allowed_hosts_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOSTS_VARIABLE, " Images.example, ,other.example")
    assert ImageStore(SIZE).hosts == {"images.example", "other.example"}
    monkeypatch.delenv(HOSTS_VARIABLE)
    assert ImageStore(SIZE).hosts == frozenset()


def test_processes_that_share_a_key_know_an_image_by_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def identity() -> bytes:
        return ImageStore(SIZE, hosts=frozenset()).load(png(), "image 1").identity

    assert identity() != identity()
    monkeypatch.setenv(IMAGE_KEY_VARIABLE, "7" * 64)
    assert identity() == identity()
