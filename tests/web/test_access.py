"""Who gets into the page, and what it hands out, asked over HTTP without a browser."""

import asyncio
import shutil
import signal
import socket
import stat
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from ghostvis_cli.chat.conversation import Conversation
from ghostvis_cli.images import from_bytes
from ghostvis_cli.profile import resolve
from ghostvis_cli.web.desk import Desk
from ghostvis_cli.web.page import opened
from ghostvis_cli.web.server import MOST_BYTES
from ghostvis_cli.web.view import View
from tests import hubs
from tests.commands.processes import run, until
from tests.web.pages import DEMO, Page, as_file, page

SHAPES, CIRCLE = Path("ghostvis_cli/demo/three-shapes.jpg"), Path("ghostvis_cli/demo/red-circle.png")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with page(tmp_path_factory.mktemp("page"), *DEMO) as started:
        started.enter()
        yield started


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page that other machines may open."""
    with page(
        tmp_path_factory.mktemp("keyed"), *DEMO, "--host", "0.0.0.0", GHOSTVIS_WEB_KEY="sesame"
    ) as started:
        started.client.base_url = started.url.replace("0.0.0.0", "127.0.0.1")
        started.client.auth = ("", "sesame")
        yield started


def last_of(events: list[dict]) -> list:
    assert events[-2]["msg"] == "process_completed"
    return events[-2]["output"]["data"]


# --- the way in


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/gradio_api/queue/data?session_hash=a", "/export/md"]
)
def test_without_the_token_nothing_is_shown(shown: Page, path: str):
    answer = httpx2.get(shown.url + path)
    assert answer.status_code == 401
    assert "address that ghostvis printed" in answer.text


def test_a_wrong_token_opens_nothing(shown: Page):
    assert httpx2.get(f"{shown.url}/?token={shown.token[:-1]}").status_code == 401


def test_the_token_becomes_a_cookie_that_scripts_cannot_read(shown: Page):
    answer = httpx2.get(shown.address)
    assert answer.status_code == 303
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert shown.token not in answer.headers["set-cookie"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", ""])
def test_a_name_that_was_bound_to_this_machine_is_refused(shown: Page, host: str):
    assert shown.client.get("/", headers={"host": host}).status_code in (400, 403)


def test_a_page_of_another_origin_is_refused(shown: Page):
    headers = {"origin": "https://evil.example"}
    assert shown.client.post("/gradio_api/queue/join", headers=headers, json={}).status_code == 403
    assert shown.client.get("/config", headers={"sec-fetch-site": "cross-site"}).status_code == 403


@pytest.mark.parametrize("host", ["192.168.1.5:7860", "chat.example"])
def test_with_a_key_a_page_of_another_origin_is_refused_too(keyed: Page, host: str):
    for foreign in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        headers = {"host": host, **foreign}
        assert keyed.client.get("/config", headers=headers).status_code == 403
        answer = keyed.client.post("/gradio_api/upload", headers=headers, files={"files": ("a.png", b"x")})
        assert answer.status_code == 403
    answer = keyed.client.get("/config", headers={"host": host, "origin": f"https://{host}"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_beyond_this_machine_only_with_a_key(tmp_path: Path):
    ended = run("chat", "--web", "--host", "0.0.0.0", "--port", "0", *DEMO)
    assert ended.returncode == 2
    assert b"GHOSTVIS_WEB_KEY" in ended.stderr


def test_with_a_key_it_is_the_password(tmp_path: Path):
    with page(tmp_path, *DEMO, "--host", "0.0.0.0", GHOSTVIS_WEB_KEY="sesame") as shown:
        assert "sesame" not in shown.address
        address = shown.url.replace("0.0.0.0", "127.0.0.1")
        refused = httpx2.get(address)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        assert httpx2.get(address, auth=("", "wrong")).status_code == 401
        assert httpx2.get(address, auth=("anyone", "sesame")).status_code == 200


def test_options_of_the_page_are_refused_without_it():
    assert run("chat", "--port", "0").returncode == 2


def test_an_image_that_is_not_there_is_said_before_there_is_a_page_or_a_model():
    ended = run("chat", "--web", "--port", "0", "--checkpoint-path", "no-such.pt", "-i", "no-such.png")
    assert (ended.returncode, ended.stdout) == (3, b"")
    assert b"no-such.png" in ended.stderr


def test_a_model_of_a_hub_is_fetched_for_the_page_as_for_the_terminal(tmp_path: Path):
    (flat := tmp_path / "flat").mkdir()
    for name in ("chatsft_checkpoints/vlm_tiny/*", "tokenizer/*"):
        for path in Path("ghostvis_cli/demo/base").glob(name):
            shutil.copy(path, flat)
    with hubs.running() as hub:
        hub.repositories["owner/tiny"] = hubs.Repository(flat)
        with page(tmp_path, "--hf", "owner/tiny", **hub.env, HF_HOME=str(tmp_path / "hf")) as shown:
            shown.enter()
    assert any(path.endswith("model_005000.pt") for _, path, _ in hub.asked)


# --- what it hands out


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file={folder}/../../etc/passwd",
        "/gradio_api/file={folder}/../state",
        "/gradio_api/file=http://127.0.0.1:1/x",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/proxy=http://127.0.0.1:1/x",
        "/gradio_api/info/../../monitoring",
        "/monitoring",
        "/gradio_api/deep_link",
        "/gradio_api/runs",
        "/gradio_api/vibe-code/",
        "/gradio_api/mcp",
        "/export/exe",
    ],
)
def test_there_are_no_other_files_and_routes(shown: Page, path: str):
    assert shown.client.get(path.format(folder=shown.folder)).status_code in (403, 404)


def test_a_file_of_this_machine_cannot_be_given_as_an_upload(shown: Page, tmp_path: Path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(SHAPES.read_bytes())
    events = shown.submit("What is this?", as_file(str(secret)))
    assert not any(event.get("success") and "secret" in str(event) for event in events)
    assert "secret.jpg" not in str(list(shown.folder.rglob("*")))


def test_an_address_given_as_an_upload_is_not_fetched(shown: Page):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.jpg"
        events = shown.submit("What is this?", as_file(url, url=url))
        assert not any(event.get("success") and "a.jpg" in str(event) for event in events)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_process_asks_no_other_host(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as outside:
        way_out = f"http://127.0.0.1:{outside.getsockname()[1]}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), way_out)
        with page(tmp_path, *DEMO, **proxies, NO_PROXY="127.0.0.1") as shown:
            shown.enter()
            shown.client.get("/")
            shown.submit("What can you do?")
            assert shown.end().code == 0
        outside.setblocking(False)
        with pytest.raises(BlockingIOError):
            outside.accept()


def test_the_address_on_a_browsers_command_line_is_good_once(tmp_path: Path):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    with page(tmp_path, *DEMO, "--open", BROWSER=f"{browser} %s") as shown:
        written = tmp_path / "opened"
        until(lambda: written.exists() and written.read_text().endswith("\n"))
        address = written.read_text().strip()
        assert address.startswith(f"{shown.url}/?token=") and address != shown.address
        assert [httpx2.get(address).status_code for _ in range(2)] == [303, 401]
        assert [httpx2.get(shown.address).status_code for _ in range(2)] == [303, 303]


def test_uploads_lie_in_a_folder_of_the_user_alone(shown: Page):
    assert shown.upload("a.jpg", SHAPES.read_bytes()).status_code == 200
    assert stat.S_IMODE(shown.folder.stat().st_mode) == 0o700


def test_an_upload_that_is_no_image_is_refused_and_the_message_is_not_sent(shown: Page):
    (path,) = shown.upload("a.png", b"<svg onload=alert(1)>").json()
    _status, messages, notices, _, box, _ = last_of(shown.submit("What is this?", as_file(path)))
    assert "a.png: seems to be" in notices
    assert not any("What is this?" in str(message) for message in messages)
    assert "value" not in box  # what was typed stays


def test_an_upload_is_held_to_the_profiles_limits(tmp_path: Path):
    with page(tmp_path, *DEMO, "--set", "images.max_bytes=1000", "--set", "images.max_pixels=100") as shown:
        shown.enter()
        assert shown.upload("a.jpg", SHAPES.read_bytes()).status_code == 413
        small = BytesIO()
        Image.new("L", (20, 20)).save(small, "PNG")
        (path,) = shown.upload("b.png", small.getvalue()).json()
        notices = last_of(shown.submit("What is this?", as_file(path)))[2]
        assert "b.png: 20 x 20 is more than 100 pixels" in notices


def test_uploads_that_take_up_too_much_are_refused_and_gone_once_they_are_sent(tmp_path: Path):
    with page(tmp_path, *DEMO) as shown:
        shown.enter()
        (path,) = shown.upload("a.jpg", SHAPES.read_bytes()).json()
        with (shown.folder / "others").open("wb") as others:
            others.truncate(MOST_BYTES)
        refused = shown.upload("b.jpg", SHAPES.read_bytes())
        assert (refused.status_code, "no room" in refused.text) == (413, True)
        (shown.folder / "others").unlink()
        shown.submit("What is in this picture?", as_file(path))
        assert not Path(path).exists()
        assert shown.upload("b.jpg", SHAPES.read_bytes()).status_code == 200


def test_an_image_cannot_be_fetched_once_the_conversation_has_it_no_more(tmp_path: Path):
    with page(tmp_path, *DEMO) as shown:
        shown.enter()
        (path,) = shown.upload("a.jpg", SHAPES.read_bytes()).json()
        shown.submit("What is in this picture?", as_file(path))
        (image,) = shown.folder.glob("*.webp")
        assert shown.client.get(f"/gradio_api/file={image}").status_code == 200
        shown.submit("/clear")
        assert shown.client.get(f"/gradio_api/file={image}").status_code == 403
        shown.submit("/undo")
        assert shown.client.get(f"/gradio_api/file={image}").status_code == 200


def test_the_original_of_an_image_that_was_not_sent_goes_with_the_conversation(tmp_path: Path):
    desk = Desk(Conversation(resolve(flags={}, env={})))
    view = View(desk, tmp_path)
    desk.chat.session.attach([from_bytes(SHAPES.read_bytes(), SHAPES.name)])
    view.pending()
    asyncio.run(view.draw())
    assert list(tmp_path.rglob("three-shapes.jpg"))
    desk.chat.session.clear()
    asyncio.run(view.draw())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_images_that_come_while_others_are_drawn_are_drawn_as_well(tmp_path: Path):
    desk = Desk(Conversation(resolve(flags={}, env={})))
    first, second = (from_bytes(path.read_bytes(), path.name) for path in (SHAPES, CIRCLE))

    async def draw() -> None:
        desk.chat.session.attach([first])
        drawing = asyncio.create_task(View(desk, tmp_path).draw())
        await asyncio.sleep(0)  # it is at the first one
        desk.chat.session.attach([second])
        await drawing

    asyncio.run(draw())
    assert len(list(tmp_path.glob("*.webp"))) == 2


def test_scripts_are_the_pages_own_and_nothing_is_loaded_from_elsewhere(shown: Page):
    answer = shown.client.get("/")
    policy = answer.headers["content-security-policy"]
    scripts = next(part for part in policy.split("; ") if part.startswith("script-src"))
    assert "unsafe" not in scripts
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy
    assert answer.headers["x-dns-prefetch-control"] == "off"  # else names in links would be looked up


@pytest.mark.parametrize("style", ["md", "json", "html"])
def test_the_conversation_is_exported_as_a_file(shown: Page, style: str):
    shown.submit("What can you do?")
    answer = shown.client.get(f"/export/{style}")
    assert answer.headers["content-disposition"].endswith(f'.{style}"')
    assert "What can you do?" in answer.text


@pytest.mark.parametrize(
    ("event", "more"),
    [
        ("edit", {"event_data": {"index": 2, "value": "Who?", "previous_value": ""}}),
        ("undo", {}),
        ("clear", {}),
    ],
)
def test_a_tab_from_before_a_restart_changes_nothing_and_catches_up(
    tmp_path: Path, event: str, more: dict[str, Any]
):
    """The server knows nothing of it; it may show anything."""
    with page(tmp_path, *DEMO) as shown:
        shown.enter()
        for text in ("What can you do?", "Who are you?"):
            shown.submit(text)
        before = shown.client.get("/export/json").json()
        _status, messages, notices, *_ = last_of(shown.act("of-old", event, None, **more))
        assert "this was not done" in notices
        assert shown.client.get("/export/json").json() == before
        assert "Who are you?" in str(messages)
        shown.act("of-old", "undo", None)
        assert len(shown.client.get("/export/json").json()["messages"]) == 2


# --- the end


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGHUP, 129)], ids=lambda v: str(v)
)
def test_a_signal_ends_it_and_takes_the_uploads_along(tmp_path: Path, number: signal.Signals, code: int):
    with page(tmp_path, *DEMO) as shown:
        shown.enter()
        shown.upload("a.jpg", SHAPES.read_bytes())
        shown.submit("What can you do?")
        ended = shown.end(number)
    assert ended.code == code
    assert not list(shown.temporary.glob("ghostvis-scratch-*"))
    assert (next((shown.state / "chats").iterdir()) / "session.jsonl").read_text().count("\n") == 2


def begin_upload(shown: Page) -> socket.socket:
    """A connection with half of an image in it."""
    cookies = "; ".join(f"{name}={value}" for name, value in shown.client.cookies.items())
    host = shown.url.removeprefix("http://")
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nCookie: {cookies}\r\nContent-Length: 9000000\r\n"
        "Content-Type: multipart/form-data; boundary=xx\r\n\r\n--xx\r\n"
        'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    )
    connection = socket.create_connection((host.split(":")[0], int(host.split(":")[1])))
    before = len(list(shown.folder.rglob("*")))
    connection.sendall(head.encode() + bytes(2_000_000))
    until(lambda: len(list(shown.folder.rglob("*"))) > before)
    return connection


def test_an_upload_that_is_cut_off_by_either_side_leaves_nothing(tmp_path: Path):
    with page(tmp_path, *DEMO) as shown:
        shown.enter()
        begin_upload(shown).close()
        with begin_upload(shown):
            ended = shown.end()
    assert (ended.code, ended.err) == (0, "")
    assert not list(shown.temporary.glob("ghostvis-scratch-*"))


@pytest.mark.parametrize("name", ["..", "photo", "", "x" * 300, "a#b?.png", "a.png\0", "é" * 200 + ".jpg"])
def test_an_image_stands_in_the_box_again_whatever_its_name_is(tmp_path: Path, name: str):
    from gradio_client.utils import is_valid_file

    desk = Desk(Conversation(resolve(flags={}, env={})))
    image = from_bytes(SHAPES.read_bytes(), "three-shapes.jpg")
    desk.chat.session.attach([replace(image, name=name)])
    (shown,) = View(desk, tmp_path).pending()
    path = Path(shown["path"])
    assert path.parent.parent == tmp_path
    assert path.read_bytes() == SHAPES.read_bytes()
    assert is_valid_file(str(path), ["image"])


async def test_gradio_fetches_no_address_that_it_gets_as_a_file(tmp_path: Path):
    """It would refuse this machine's by itself; those of others it would fetch."""
    import gradio
    from gradio import processing_utils

    desk = Desk(Conversation(resolve(flags={}, env={})))
    async with opened(desk, View(desk, tmp_path)):
        with pytest.raises(gradio.Error, match="not fetched"):
            await processing_utils.async_ssrf_protected_download("https://example.com/a.jpg", str(tmp_path))
