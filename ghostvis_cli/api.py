"""The Python API: plain functions over the engine protocol, for scripts and notebooks.

    from ghostvis_cli import create_sglang_engine

    with create_sglang_engine(source="sft", model_tag="vlm_1.5b") as engine:
        texts = engine.generate(prompts=["What is this?"], images=["photo.jpg"], max_tokens=100)

An event loop of its own runs in a thread of its own, so it works where a loop already runs (a notebook).
"""

import asyncio
import json
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

from ghostvis_cli.encoding import well_formed
from ghostvis_cli.engines.base import (
    CHAT_MAX_TOKENS,
    Completion,
    Engine,
    EngineInfo,
    GenerateRequest,
    complete,
)
from ghostvis_cli.engines.factory import make_engine
from ghostvis_cli.errors import EngineError, InputError
from ghostvis_cli.image_limits import ImageLimits
from ghostvis_cli.images import EncodedImage, load_image
from ghostvis_cli.profile import Resolved, resolve
from ghostvis_cli.profile.readers import heeded
from ghostvis_cli.prompt import Message

if TYPE_CHECKING:
    from PIL.Image import Image

    from ghostvis_cli.bench.schema import Report

T = TypeVar("T")
LAST_WORDS_S = 5.0
# A path or URL, encoded bytes, a PIL image, or one that was loaded before.
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image | EncodedImage"
Images: TypeAlias = "Sequence[ImageSource | Sequence[ImageSource] | None] | ImageSource | None"


def create_sglang_engine(
    source: str | None = None,
    model_tag: str | None = None,
    step: int | None = None,
    *,
    checkpoint_path: str | os.PathLike[str] | None = None,
    base_dir: str | os.PathLike[str] | None = None,
    layout: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    tensor_parallel_size: int | None = None,
    base_url: str | None = None,
    profile: str | None = None,
) -> "GhostVisSGLangEngine":
    """Load a model (or connect to a server) by the words of training. What is left out comes from the profile.

    SGLang runs it where it is usable, else the local engine, whose `info.notices` then say why; a profile or
    variable that chooses an engine is obeyed. SGLang's first start for a checkpoint also converts it.
    Raises a GhostvisError with a hint where the model or engine can't be used.
    """
    flags = {
        "model.source": source,
        "model.model_tag": model_tag,
        "model.step": step,
        "model.checkpoint_path": checkpoint_path,
        "model.base_dir": base_dir,
        "model.layout": layout,
        "engine.device": device,
        "engine.dtype": dtype,
        "engine.tensor_parallel_size": tensor_parallel_size,
        "engine.base_url": base_url,
    }
    return GhostVisSGLangEngine(_with_sglang(resolve(profile, flags=flags)))


def _with_sglang(resolved: Resolved) -> Resolved:
    """With SGLang as the engine, where none was chosen and it can be used; else with a notice of why not."""
    engine = resolved.profile.engine
    if engine.kind == "auto" and engine.base_url is None:
        from ghostvis_cli.sglang.runtime import why_not

        if reason := why_not(device=engine.device):
            told = f"{reason}: the local engine runs the model"
            resolved = replace(resolved, notices=(*resolved.notices, told))
        else:
            profile = replace(resolved.profile, engine=replace(engine, kind="sglang"))
            resolved = replace(resolved, profile=profile)
    return heeded(resolved, (resolved.profile.engine.chosen_kind,))


class GhostVisSGLangEngine:
    """A running engine, called synchronously. Close it, or use it as a context manager."""

    def __init__(self, resolved: Resolved) -> None:
        self._profile, self._notices = resolved.profile, resolved.notices
        self._chat_defaults: dict[str, Any] = (
            {} if resolved.chose("sampling.max_tokens") else {"max_tokens": CHAT_MAX_TOKENS}
        )
        self._closing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ghostvis-api", daemon=True)
        self._thread.start()
        try:
            self._engine: Engine = self._wait(make_engine(resolved.profile))
        except BaseException:
            self._stop()
            raise

    @property
    def info(self) -> EngineInfo:
        info = self._engine.info
        return replace(info, notices=(*self._notices, *info.notices))

    def generate(self, prompts: Sequence[str] | str, images: Images = None, **sampling: Any) -> list[str]:
        """One answer per prompt, all run together.

        images: None; one image, shared by every prompt; or one entry per prompt, each None, an image or
        several. sampling: fields of `Sampling` (max_tokens, temperature, top_p, top_k, seed, stop, ...).
        """
        return [done.text for done in self.complete(prompts, images, **sampling)]

    def complete(
        self, prompts: Sequence[str] | str, images: Images = None, **sampling: Any
    ) -> list[Completion]:
        """As `generate`, with token ids, finish reason and usage."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        for text in texts:
            well_formed(text, "a prompt")
        attached = self._spread(images, len(texts))
        system = [Message.of("system", self._profile.system)] if self._profile.system else []
        settings = self._sampling(sampling)
        requests = [
            GenerateRequest((*system, Message.of("user", text, sources)), sampling=settings)
            for text, sources in zip(texts, attached, strict=True)
        ]
        return self._wait(_complete_all(self._engine, requests))

    def chat(self, messages: Sequence[Mapping[str, str]], images: Images = None, **sampling: Any) -> str:
        """The reply to a conversation of {"role": ..., "content": ...}.

        images: an image (or a list of images) belongs to the last user message; a list with one entry per
        message, of which some are None, puts each where it stands.
        """
        turns = self._turns(messages, images)
        request = GenerateRequest(turns, sampling=self._sampling({**self._chat_defaults, **sampling}))
        return self._wait(complete(self._engine, request)).text

    def benchmark(
        self,
        num_prompts: int = 100,
        prompt_len: int | None = None,
        output_len: int = 64,
        with_vision: bool = False,
        *,
        concurrency: int | None = None,
        repeats: int = 1,
        seed: int = 42,
    ) -> "Report":
        """What `ghostvis bench` measures, on this engine: figures in `report.runs[0].figures`, times in seconds.

        Lengths are in tokens, prompts counted in common words. Greedy; answers run to their full length.
        """
        from ghostvis_cli.bench.job import Job, measure_engine
        from ghostvis_cli.bench.lengths import Length
        from ghostvis_cli.bench.schema import Load
        from ghostvis_cli.bench.workload import Spec

        length = None if prompt_len is None else Length("fixed", prompt_len)
        spec = Spec(seed, num_prompts, length, Length("fixed", output_len), with_vision)
        loads = () if concurrency is None else (Load(concurrency),)
        job = Job(spec, loads=loads, repeats=repeats, details=True, command="engine.benchmark()")
        return self._wait(measure_engine(job, self._profile, self._engine))

    def close(self) -> None:
        """Give the model back. Calls that are still running end with an EngineError."""
        with self._closing:
            if self._thread.is_alive():
                self._wait(self._shut_down())
                self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- inside

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on our loop; Ctrl-C here cancels it there, so that the engine stops too."""
        if not self._thread.is_alive():
            work.close()
            raise EngineError("the engine is closed", hint="create_sglang_engine(...) makes a new one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _shut_down(self) -> None:
        """Close the engine, and let requests that wait for it fail before the loop ends."""
        await self._engine.aclose()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=LAST_WORDS_S)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _sampling(self, changes: Mapping[str, Any]) -> Any:
        """The profile's sampling with these fields changed; an unknown name is a TypeError, as for any call."""
        stop = changes.get("stop")
        if isinstance(stop, str | list):
            changes = {**changes, "stop": (stop,) if isinstance(stop, str) else tuple(stop)}
        if isinstance(schema := changes.get("json_schema"), Mapping):
            changes = {**changes, "json_schema": json.dumps(schema)}
        return self._profile.sampling.changed(**changes)

    def _spread(self, images: Any, count: int) -> list[list[EncodedImage]]:
        """Images per prompt. One image for several prompts is loaded once."""
        if images is None:
            return [[] for _ in range(count)]
        if not isinstance(images, list | tuple):
            shared = [self._load(images)]
            return [shared for _ in range(count)]
        if len(images) != count:
            raise InputError(
                f"{len(images)} entries of images for {count} prompts", hint="one entry per prompt"
            )
        return [self._entry(entry) for entry in images]

    def _entry(self, entry: Any) -> list[EncodedImage]:
        if entry is None:
            return []
        return [self._load(one) for one in entry] if isinstance(entry, list | tuple) else [self._load(entry)]

    def _turns(self, messages: Sequence[Mapping[str, str]], images: Any) -> tuple[Message, ...]:
        by_turn: list[list[EncodedImage]] = [[] for _ in messages]
        if isinstance(images, list | tuple) and len(images) == len(messages) and None in images:
            by_turn = [self._entry(entry) for entry in images]
        elif images is not None:
            asked = [i for i, message in enumerate(messages) if dict(message).get("role") == "user"]
            if not asked:
                raise InputError("there is no user message that an image could belong to")
            by_turn[asked[-1]] = self._entry(images)
        turns = [_message(message, sources) for message, sources in zip(messages, by_turn, strict=True)]
        if self._profile.system and (not turns or turns[0].role != "system"):
            turns.insert(0, Message.of("system", self._profile.system))
        return tuple(turns)

    def _load(self, source: Any) -> EncodedImage:
        limits: ImageLimits = self._profile.images
        if isinstance(source, EncodedImage):
            return source
        if not isinstance(source, str | bytes | os.PathLike) and not hasattr(source, "getexif"):
            raise InputError(f"an image is a path, URL, bytes or PIL image, not a {type(source).__name__}")
        return load_image(source, limits=limits)


def _message(message: Mapping[str, str], images: Sequence[EncodedImage]) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"a message is a mapping, not a {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise InputError('a message is {"role": "system" | "user" | "assistant", "content": text}')
    return Message.of(role, content, images)  # type: ignore[arg-type]


async def _complete_all(engine: Engine, requests: Sequence[GenerateRequest]) -> list[Completion]:
    """Run all at once. Where one fails, the others are cancelled and its error is raised."""
    tasks = [asyncio.create_task(complete(engine, request)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
