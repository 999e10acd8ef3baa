"""The page: Gradio's components, and what their events ask of the desk.

Handlers run in the server's event loop, as the conversation does. There is no gr.HTML: it evaluates text as a
script, which the server's policy forbids.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import Response
from gradio import processing_utils

from ghostvis_cli.chat.commands import exported, profile_names, session_names
from ghostvis_cli.chat.settings import plain, settable
from ghostvis_cli.chat.slash import FORMATS
from ghostvis_cli.web.desk import Action, Desk
from ghostvis_cli.web.view import ACTIVE, View

STYLE = Path(__file__).with_name("page.css")
QUIET: Any = {"show_progress": "hidden", "api_visibility": "private"}
# Gradio's own, quiet, in the fonts of the system: none is fetched.
LOOKS: Any = {"primary_hue": "blue", "neutral_hue": "slate", "spacing_size": "sm", "radius_size": "md",
              "font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # fmt: skip
OFF: Any = dict.fromkeys(("run_history", "show_error", "ssr_mode", "pwa", "mcp_server"), False)


@asynccontextmanager
async def opened(desk: Desk, view: View) -> AsyncIterator[FastAPI]:
    """The application, with Gradio's queue running."""
    processing_utils.async_ssrf_protected_download = _refuse  # Gradio would fetch addresses it gets as files
    page = build(desk, view)
    page.queue(default_concurrency_limit=None)
    app = FastAPI(openapi_url=None)
    app.get("/export/{style}")(partial(export, desk))
    most, theme = desk.chat.profile.images.max_bytes, gr.themes.Default(**LOOKS)
    gr.mount_gradio_app(
        app, page, path="", footer_links=[], max_file_size=most, theme=theme, css_paths=STYLE, **OFF
    )
    page.has_launched = True  # only then files must be of its own folder
    page.run_startup_events()
    await page.run_extra_startup_events()
    try:
        yield app
    finally:
        page.close(verbose=False)


async def _refuse(url: str, *_: object, **__: object) -> str:
    raise gr.Error("files are uploaded, not fetched")


async def export(desk: Desk, style: str) -> Response:
    if style not in FORMATS:
        return Response(status_code=404)
    name = desk.chat.file.name if desk.chat.file else "conversation"
    headers = {"content-disposition": f'attachment; filename="{name}.{style}"'}
    return Response(await exported(desk.chat, style), media_type="text/plain", headers=headers)


def build(desk: Desk, view: View) -> gr.Blocks:
    with gr.Blocks(title="ghostvis", analytics_enabled=False, fill_height=True) as page:
        with gr.Sidebar(open=False):
            menu = Menu(desk)
        with gr.Column(elem_id="main", scale=1):
            status = gr.Markdown(elem_id="status")
            chat = gr.Chatbot(
                elem_id="chat",
                show_label=False,
                container=False,
                scale=1,
                buttons=["copy"],
                editable="user",
                group_consecutive_messages=False,
                allow_tags=ACTIVE,
                latex_delimiters=[],
                placeholder="Drop, paste or choose an image, and ask about it.",
            )
            notices = gr.Markdown(elem_id="notices")
            make_room = gr.Button("Leave out the oldest turns, and send it", visible=False, size="sm")
            box = gr.MultimodalTextbox(
                elem_id="box",
                show_label=False,
                container=False,
                file_types=["image"],
                file_count="multiple",
                placeholder="Message",
                max_plain_text_length=10_000_000,  # what is longer would become a file
                autofocus=True,
            )
            shown_last = gr.State()  # in this tab: another one may have gone on
    seen = [status, chat, notices, make_room, box, shown_last]

    def shown(lines: list[str], **typed: Any) -> list[Any]:
        """All of it as it is now; `value` is what the box then holds, else it keeps what it has."""
        busy, room = desk.busy, gr.update(visible=desk.too_long > 0)
        write = gr.update(submit_btn=not busy, stop_btn=busy, **typed)
        return [view.status(), view.messages(), view.lines(lines), room, write, desk.mark]

    async def watched(lines: list[str], **typed: Any) -> AsyncIterator[list[Any]]:
        """All of it; while a reply is coming that alone, and then all of it once more."""
        busy = True
        while busy:
            await view.draw()
            busy = desk.busy
            yield shown(lines, **typed)
            typed, before, rest = {}, view.messages(), [gr.skip()] * 4
            async for text in desk.watch():
                busy = True  # perhaps since now: another tab asked
                yield [gr.skip(), [*before, *view.coming(text)], *rest]

    async def settled(typed: dict[str, Any], last: list[dict[str, Any]] | None, *, whole: bool) -> list[Any]:
        """A message that was not answered stands in the box again, before what was typed since."""
        draft, text, again = desk.chat.session.draft or "", typed["text"], gr.skip()
        files = {each["path"]: each for each in view.pending()}
        if not (text.startswith(draft) and files.keys() <= set(typed["files"])):  # else it is there already
            texts = [text] if text.startswith(draft) else [draft, text]
            files |= {path: path for path in typed["files"]}
            again = {"text": "\n\n".join(filter(None, texts)), "files": list(files.values())}
        return [again, *menu.shown(last, whole=whole)]

    def on(event: Any, act: Callable[..., AsyncIterator[Any]], *inputs: Any, whole: bool = False) -> None:
        """Show what comes of it as it comes, then bring the box and the menu up to date."""
        event(act, [shown_last, *inputs], seen, **QUIET).then(
            partial(settled, whole=whole), [box, menu.last], [box, *menu.parts], **QUIET
        )

    def doing(action: Callable[..., Action]) -> Callable[..., AsyncIterator[Any]]:
        async def act(mark: int | None, *given: Any) -> AsyncIterator[list[Any]]:
            _, lines = await desk.at(mark, action(*given))
            async for each in watched(lines):
                yield each

        return act

    async def load(_mark: None) -> AsyncIterator[list[Any]]:
        async for each in watched(desk.lines):
            yield each

    async def submit(mark: int | None, typed: dict[str, Any]) -> AsyncIterator[list[Any]]:
        sent, lines = await desk.at(mark, desk.send(typed["text"], [Path(name) for name in typed["files"]]))
        async for each in watched(lines, **({"value": {"text": "", "files": []}} if sent else {})):
            yield each

    async def edit(mark: int | None, typed: dict[str, Any], changed: gr.EditData) -> AsyncIterator[list[Any]]:
        text = str(changed.value)

        async def change() -> None:
            nonlocal text
            turn = view.turn_at(int(changed.index))
            text = view.text_of(turn, text)
            await desk.edit(turn, text)

        done, lines = await desk.at(mark, change())
        both = {**typed, "text": "\n\n".join(filter(None, [text, typed["text"]]))}
        async for each in watched(lines, **({} if done else {"value": both})):
            yield each

    with page:
        on(page.load, load)
        on(box.submit, submit, box)
        on(chat.edit, edit, box)
        on(chat.retry, doing(lambda: desk.do("regen")))
        on(chat.undo, doing(lambda: desk.do("undo")))
        on(chat.clear, doing(lambda: desk.do("clear")))
        on(make_room.click, doing(lambda: desk.make_room(desk.too_long)))
        box.stop(desk.stop, **QUIET)
        menu.listen(lambda event, action, *inputs: on(event, doing(action), *inputs, whole=True))
    return page


class Menu:
    """Sessions, profile, system message and sampling. `parts` take what `shown` returns."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.session = gr.Dropdown(label="Session")
        with gr.Row():
            self.new = gr.Button("New", size="sm", min_width=60)
            self.delete = gr.Button("Delete", size="sm", min_width=60)
        with gr.Row(visible=False) as self.sure:
            self.yes = gr.Button("Delete it", variant="stop", size="sm", min_width=60)
            self.no = gr.Button("Keep it", size="sm", min_width=60)
        self.name = gr.Textbox(label="Name (Enter renames it)", max_lines=1)
        with gr.Row():
            for style in FORMATS:
                gr.Button(f"↓ {style}", link=f"/export/{style}", size="sm", min_width=60)
        self.profile = gr.Dropdown(label="Profile")
        self.system = gr.Textbox(label="System message", lines=2)
        with gr.Row():
            self.fields = {name: gr.Textbox(label=name, max_lines=1, min_width=120) for name in settable()}
        self.last = gr.State()  # what this tab shows
        self.parts = [self.session, self.name, self.profile, self.system, *self.fields.values(), self.last]

    def shown(self, before: list[dict[str, Any]] | None, *, whole: bool) -> list[Any]:
        """What has changed since `before`, or the whole menu: a field that somebody types in is else left alone."""
        now = self._now()
        kept = before if before is not None and not whole else [{}] * len(now)
        return [
            *(gr.skip() if new == old else gr.update(**new) for new, old in zip(now, kept, strict=True)),
            now,
        ]

    def _now(self) -> list[dict[str, Any]]:
        chat = self.desk.chat
        name, sampling = chat.file.name if chat.file else "not saved", chat.profile.sampling
        return [
            {"choices": list(dict.fromkeys([name, *session_names()])), "value": name},
            {"value": name},
            {"choices": profile_names(), "value": chat.profile.name},
            {"value": chat.session.system or ""},
            *({"value": plain(getattr(sampling, each)), "info": chat.origin(each)} for each in self.fields),
        ]

    def listen(self, on: Callable[..., None]) -> None:
        desk = self.desk
        on(self.session.input, desk.open, self.session)
        on(self.new.click, lambda: desk.now(desk.chat.renew))
        on(self.name.submit, lambda name: desk.now(lambda: desk.chat.rename(name.strip())), self.name)
        on(self.profile.input, lambda name: desk.do("profile", name), self.profile)
        on(self.system.blur, self._system, self.system)
        for name, field in self.fields.items():
            on(field.submit, partial(self._set, name), field)
            on(field.blur, partial(self._set, name), field)
        self.delete.click(lambda: gr.Row(visible=True), None, self.sure, **QUIET)
        gr.on([self.yes.click, self.no.click], lambda: gr.Row(visible=False), None, self.sure, **QUIET)
        on(self.yes.click, lambda: desk.now(desk.chat.delete))

    async def _set(self, name: str, value: str) -> None:
        if value != plain(getattr(self.desk.chat.profile.sampling, name)):
            await self.desk.now(lambda: self.desk.chat.set([(name, value)]))

    async def _system(self, text: str) -> None:
        if text != (self.desk.chat.session.system or ""):
            await self.desk.do("system", text or "-")
