"""The page: Gradio's components, and what their events ask of the desk.

Handlers run in the server's event loop, as the conversation does. There is no gr.HTML: it evaluates text as a
script, which the server's policy forbids.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeAlias

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
Typed: TypeAlias = dict[str, Any]  # text and files, as the box has them
Sending: TypeAlias = tuple[Typed, asyncio.Task[bool]]
NOTHING: Typed = {"text": "", "files": []}
OFF: Any = dict.fromkeys(("run_history", "show_error", "ssr_mode", "pwa", "mcp_server"), False)


@asynccontextmanager
async def opened(desk: Desk, view: View) -> AsyncIterator[FastAPI]:
    """The application, with Gradio's queue running."""
    processing_utils.async_ssrf_protected_download = _refuse  # Gradio would fetch addresses it gets as files
    page = build(desk, view)
    page.queue(default_concurrency_limit=None, api_open=False)
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


@dataclass
class Tab:
    """What one tab was shown, and what is to go out of its box or into it."""

    mark: int | None = None  # of the conversation; another tab may have gone on
    lines: list[str] = field(default_factory=list)
    count: int = 0  # of what was asked for here
    asked: dict[Any, bool] = field(default_factory=dict)  # of fields that changed: whether it was done
    sending: list[Sending] = field(default_factory=list)  # what was taken out of the box
    sent: Typed = field(default_factory=lambda: NOTHING)  # of what the box has
    refused: list[Typed] = field(default_factory=list)  # what goes back into the box
    draft: Typed = field(default_factory=lambda: NOTHING)  # what was put into the box

    def settle(self, typed: Typed, draft: Typed) -> Any:
        """What the box is to have; `typed` is what it has now."""
        text, sent = typed["text"].removeprefix(self.sent["text"]).lstrip("\n"), _paths(self.sent)
        files = [path for path in typed["files"] if path not in sent and Path(path).exists()]
        back, self.sent, self.refused = self.refused, NOTHING, []
        texts = [*(each["text"] for each in back), text]
        files = [*(file for each in back for file in each["files"]), *files]
        if is_new := draft != self.draft:
            self.draft = draft
            files = [*draft["files"], *(path for path in files if path not in _paths(draft))]
            if not text.startswith(draft["text"]):  # else it is there already
                texts = [draft["text"], *texts]
        box = {"text": "\n\n".join(filter(None, texts)), "files": files}
        as_it_is = not back and not is_new and {**box, "files": _paths(box)} == typed
        return gr.skip() if as_it_is else box


def _paths(typed: Typed) -> list[str]:
    return [file["path"] if isinstance(file, dict) else file for file in typed["files"]]


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
            state = gr.State(Tab())
            begun = gr.State(0)  # another number once something was done: the page then settles box and menu
    seen = [status, chat, notices, make_room, box]
    around: Any = ([state, box, menu.last], [box, *menu.parts])

    def shown(tab: Tab) -> list[Any]:
        """All of it as it is now."""
        tab.mark, busy = desk.mark, desk.busy
        room, write = gr.update(visible=desk.too_long > 0), gr.update(submit_btn=not busy, stop_btn=busy)
        messages = [*view.messages(), *view.coming(desk.coming)]
        return [view.status(), messages, view.lines(tab.lines), room, write]

    async def watch(tab: Tab) -> AsyncIterator[list[Any]]:
        """A reply as it comes, and then all once more."""
        busy = True
        while busy:
            before, rest = view.messages(), [gr.skip()] * 3
            async for text in desk.watch():
                yield [gr.skip(), [*before, *view.coming(text)], *rest]
            await view.draw()
            busy = desk.busy  # perhaps again: another tab asked
            yield shown(tab)

    def draft() -> Typed:
        """A message that was not answered, or images for the next one."""
        return {"text": desk.chat.session.draft or "", "files": view.pending()}

    async def settled(tab: Tab, typed: Typed, last: list[dict[str, Any]] | None) -> list[Any]:
        """The box with what was refused, and a draft that is new; what was typed since stays."""
        asked, tab.asked = tab.asked, {}
        return [tab.settle(typed, draft()), *menu.shown(last, asked)]

    def on(event: Any, act: Callable[..., Any], *inputs: Any, **how: Any) -> None:
        """Do it, and show what comes of it as it comes. Box and menu are settled meanwhile and after."""

        @wraps(act)  # Gradio reads from the signature what it takes
        async def ask(tab: Tab, *given: Any) -> AsyncIterator[list[Any]]:
            done = await act(tab, *given)
            tab.count = count = tab.count + 1
            tab.asked |= dict.fromkeys(inputs, done)
            await view.draw()
            yield [*shown(tab), count]
            async for now in watch(tab):
                if tab.count != count:  # what was asked for since watches, too
                    return
                yield [*now, gr.skip()]

        event(ask, [state, *inputs], [*seen, begun], **QUIET, **how).then(settled, *around, **QUIET)

    async def do(tab: Tab, action: Action, sent: Typed | None = None) -> bool:
        """Whether it was done. Where it `sent` something, that is no draft any more, and leaves the box."""
        done, tab.lines = await desk.at(tab.mark, action)
        if done and sent is not None:
            tab.sent, tab.draft = sent, NOTHING
        return done

    def doing(action: Callable[..., Action]) -> Callable[..., Any]:
        async def act(tab: Tab, *given: Any) -> bool:
            return await do(tab, action(*given))

        return act

    def sending_draft(action: Callable[[], Action]) -> Callable[..., Any]:
        """Of what sends the draft, if there is one."""

        async def act(tab: Tab) -> bool:
            return await do(tab, action(), None if desk.chat.session.draft is None else draft())

        return act

    async def load(tab: Tab) -> None:
        tab.lines, tab.draft = desk.lines, NOTHING

    async def take(tab: Tab, typed: Typed) -> Any:
        """Without the queue, so that what is typed from now on is the next message.

        What is typed before the page has the answer is lost: a server can't see it.
        """
        if typed == NOTHING:
            return gr.skip()
        files = [Path(name) for name in typed["files"]]
        sent = asyncio.create_task(do(tab, desk.send(typed["text"], files), NOTHING))
        tab.sending.append((typed, sent))
        return NOTHING

    async def submit(tab: Tab) -> None:
        while tab.sending:  # nothing: it was Enter in an empty box
            typed, sent = tab.sending.pop(0)
            done = False
            try:
                done = await asyncio.shield(sent)
            finally:
                if not done:
                    tab.refused.append(typed)

    async def edit(tab: Tab, changed: gr.EditData) -> None:
        text = str(changed.value)

        async def change() -> None:
            nonlocal text
            turn = view.turn_at(int(changed.index))
            text = view.text_of(turn, text)
            await desk.edit(turn, text)

        if not await do(tab, change()):
            tab.refused.append({**NOTHING, "text": text})

    with page:
        begun.change(settled, *around, **QUIET)
        on(page.load, load)
        taken = box.submit(take, [state, box], box, queue=False, **QUIET)
        on(taken.then, submit, trigger_mode="multiple")
        on(chat.edit, edit)
        on(chat.retry, sending_draft(lambda: desk.do("regen")))
        on(chat.undo, doing(lambda: desk.do("undo")))
        on(chat.clear, doing(lambda: desk.do("clear")))
        on(make_room.click, sending_draft(lambda: desk.make_room(desk.too_long)))
        box.stop(desk.stop, **QUIET)
        menu.listen(lambda event, action, *inputs: on(event, doing(action), *inputs))
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

    def shown(self, before: list[dict[str, Any]] | None, asked: dict[Any, bool]) -> list[Any]:
        """What has changed since `before`: somebody may be typing in the other fields.

        A field that was `asked` for gets its value back, but for a system message that was refused: it may be long.
        """
        now = self._now()
        fields = zip(self.parts[:-1], now, before or [{}] * len(now), strict=True)
        stays = self.system if asked.get(self.system) is False else None
        return [
            *(
                gr.skip() if part is stays or (new == old and part not in asked) else gr.update(**new)
                for part, new, old in fields
            ),
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
        for name, setting in self.fields.items():
            on(setting.submit, partial(self._set, name), setting)
            on(setting.blur, partial(self._set, name), setting)
        self.delete.click(lambda: gr.Row(visible=True), None, self.sure, **QUIET)
        gr.on([self.yes.click, self.no.click], lambda: gr.Row(visible=False), None, self.sure, **QUIET)
        on(self.yes.click, lambda: desk.now(desk.chat.delete))

    async def _set(self, name: str, value: str) -> None:
        if value != plain(getattr(self.desk.chat.profile.sampling, name)):
            await self.desk.now(lambda: self.desk.chat.set([(name, value)]))

    async def _system(self, text: str) -> None:
        if text != (self.desk.chat.session.system or ""):
            await self.desk.do("system", text or "-")
