"""The local engine's asynchronous face: requests in, chunks out, one step thread that owns the model."""

import asyncio
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from ghostvis_cli.checkpoint.choose import choose_layout
from ghostvis_cli.checkpoint.load import LoadedModel, load_model
from ghostvis_cli.checkpoint.locate import Checkpoint
from ghostvis_cli.engines.base import Chunk, Closing, EngineInfo, GenerateRequest
from ghostvis_cli.engines.local.decode import Decode, Eager, Padded, compiled, prepare_compiler
from ghostvis_cli.engines.local.device import fitting_batch, has_varlen, without_cudnn_attention
from ghostvis_cli.engines.local.failures import explained
from ghostvis_cli.engines.local.grammar import Grammars
from ghostvis_cli.engines.local.graphs import Graphs
from ghostvis_cli.engines.local.packing import pack
from ghostvis_cli.engines.local.rows import token_bytes
from ghostvis_cli.engines.local.scheduler import Event, Scheduler
from ghostvis_cli.engines.local.sequence import Sequence
from ghostvis_cli.engines.rendering import Renderer
from ghostvis_cli.errors import EngineError, GhostvisError, UsageError
from ghostvis_cli.model.config import Layout
from ghostvis_cli.model.decoder import Decoder
from ghostvis_cli.model.preprocess import preprocess
from ghostvis_cli.threads import in_daemon_thread, too_small_to_share

if TYPE_CHECKING:
    from ghostvis_cli.engines.local.sequence import ImageInput
    from ghostvis_cli.images import EncodedImage

# Waking the caller's thread for each token costs a small model more than the token. 4 ms are not noticed.
DELIVER_EVERY_S = 0.004
GraphMode: TypeAlias = Literal["met", "start", "off"]
PREFILL_TOKENS, PREFILL_TOKENS_ON_CUDA = 512, 4096
TOGETHER_ON_CUDA = 64  # prompts in one forward
COMPILES = (
    "decoding is compiled: first answers wait for the compiler, what it makes is kept for later runs",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LocalSettings:
    """`auto` device: CUDA, then Apple's MPS, then CPU. `auto` dtype: bfloat16 on CUDA, float32 elsewhere.

    graphs (CUDA) makes a decoding step one launch, captured when a batch size is met for the second time, or all at
    the start. compile makes fewer operations of a step, after seconds of compiling: on a CPU of the whole step,
    for each batch size, and with a C++ compiler installed; on CUDA of a layer, beside the graphs.
    """

    device: str = "auto"
    dtype: str = "auto"
    layout: Layout | None = None  # None: as the file says
    max_batch: int | None = None  # None: 32; on CUDA as many as half of the free memory has room for
    prefill_tokens: int | None = None  # None: 512; on CUDA 4096
    prefix_cache_mb: int = 512
    graphs: GraphMode = "met"
    compile: bool = False
    threads: int | None = None  # on a CPU; None: one for a small model, else what torch takes


class LocalEngine(Closing):
    """Runs a loaded model. Requests are batched as they come and leave; see `Scheduler` for how."""

    server = None

    def __init__(self, loaded: LoadedModel, settings: LocalSettings = LocalSettings()) -> None:
        self.tokenizer = loaded.tokenizer
        self._config = loaded.model.config
        layout, layout_notices = choose_layout(self._config, settings.layout)
        self._scheduler = _make_scheduler(loaded, settings)
        self._capture_first = settings.graphs == "start" and self._scheduler.graphs is not None
        decoder, vision, checkpoint = self._config.decoder, self._config.vision, loaded.checkpoint
        self.info = EngineInfo(
            kind="local",
            model=str(checkpoint.path),
            device=str(self._scheduler.device),
            dtype=str(self._scheduler.rows.dtype).removeprefix("torch."),
            context_tokens=decoder.max_positions,
            trained_tokens=decoder.sequence_len,
            image_tokens=vision.num_tokens if vision else 0,
            layout=layout,
            source=checkpoint.source,
            tag=checkpoint.tag,
            step=checkpoint.step,
            notices=(*loaded.notices, *layout_notices, *(COMPILES if settings.compile else ())),
            kv_token_bytes=self._scheduler.rows.token_bytes,
            max_batch=self._scheduler.max_batch,
            image_pixels=vision.tower.image_size if vision else None,
            checkpoint=checkpoint,
        )
        self._renderer = Renderer(
            loaded.tokenizer, layout or "inline", self.info.image_tokens, decoder.max_positions
        )
        self._grammars = Grammars(loaded.tokenizer)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._owners: dict[
            Sequence, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Chunk | GhostvisError]]
        ] = {}
        self._closed = False
        self._ended: GhostvisError | None = None  # why the step thread runs no more
        self._threads, self._compiles = _choose_threads(loaded.model, settings), settings.compile
        self._thread = threading.Thread(target=self._run, name="ghostvis-step", daemon=True)
        self._thread.start()

    @classmethod
    async def load(cls, checkpoint: Checkpoint, settings: LocalSettings = LocalSettings()) -> "LocalEngine":
        """Read a checkpoint and start its engine, without blocking the loop."""
        return await in_daemon_thread(partial(cls.open, checkpoint, settings), "ghostvis-load")

    @classmethod
    def open(cls, checkpoint: Checkpoint, settings: LocalSettings) -> "LocalEngine":
        device = choose_device(settings.device)
        try:
            dtype = choose_dtype(settings.dtype, device)
            loaded = load_model(checkpoint, device=device, dtype=dtype)
            # The compiler has matrix code of its own, and can't take in what we packed.
            if device.type == "cpu" and dtype == torch.float32 and not settings.compile:
                pack(loaded.model)
            return cls(loaded, settings)
        except (RuntimeError, MemoryError) as error:
            raise explained(error) from error

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        if self._closed:
            raise EngineError("the engine is closed")
        prompt, sampling = await self._renderer.prompt(request)
        images: list[ImageInput] = []
        if prompt.images:
            images = await asyncio.to_thread(lambda: [self._image(image) for image in prompt.images])
        grammar = await asyncio.to_thread(self._grammars.of, sampling) if sampling.has_grammar else None
        sequence = Sequence.start(prompt, images, sampling, self.info.image_tokens, grammar)
        chunks: asyncio.Queue[Chunk | GhostvisError] = asyncio.Queue()
        self._owners[sequence] = asyncio.get_running_loop(), chunks
        try:
            if self._ended is not None:
                raise self._ended
            submit = partial(self._scheduler.submit, sequence, request.prompt_logprobs, request.answer)
            self._inbox.put(submit)
            finished = False
            while not finished:
                chunk = await chunks.get()
                if isinstance(chunk, GhostvisError):
                    raise chunk
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            self._owners.pop(sequence, None)
            if not sequence.done:
                self._inbox.put(partial(self._scheduler.abort, sequence))

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    # --- the caller's side

    def _image(self, image: "EncodedImage") -> "ImageInput":
        """What the step thread needs of an image: its rows where they are known, else its pixels."""
        vision = self._config.vision
        assert vision is not None, "render refuses images for text models"
        known = self._scheduler.images.get(image.digest)
        if known is not None:
            return known
        return preprocess(image.pil(), vision.tower.image_size, vision.image_mean, vision.image_std)

    # --- the step thread's side

    def _run(self) -> None:
        reason: GhostvisError = EngineError("the engine was closed")
        try:
            self._work()
        except BaseException as error:  # whatever it is: no request may wait for a thread that has ended
            reason = explained(error)
        # Requests registered before this are told here; later ones find it set.
        self._ended = reason
        self._deliver([(sequence, reason) for sequence in self._owners.copy()])
        self._scheduler.abandon(reason)

    def _work(self) -> None:
        """Step until the engine is closed."""
        events: list[tuple[Sequence, Event]] = []
        delivered = 0.0
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        if self._compiles:
            prepare_compiler(self._scheduler.device)
        with torch.inference_mode():
            if self._capture_first:
                try:
                    self._scheduler.warm_up()
                except (
                    Exception
                ) as error:  # too little memory for all at once: they are captured as they come
                    self._scheduler.abandon(explained(error))
            while self._drain():
                events += self._scheduler.step()
                now = time.monotonic()
                if now - delivered >= DELIVER_EVERY_S or any(_urgent(*event) for event in events):
                    self._deliver(events)
                    events, delivered = [], now
        self._deliver(events)

    def _drain(self) -> bool:
        """Do what callers asked for, waiting where there is nothing to run; False once the engine is closed."""
        while True:
            try:
                job = self._inbox.get(block=not (self._scheduler.busy or self._scheduler.events))
            except queue.Empty:
                return True
            if job is None:
                return False
            try:
                job()
            except Exception as error:  # as after a failed step: half moved rows can't be used
                self._scheduler.abandon(explained(error))
                return True

    def _deliver(self, events: "Ordered[tuple[Sequence, Event]]") -> None:
        """Hand a step's results over, waking each event loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = defaultdict(list)
        for sequence, event in events:
            if owner := self._owners.get(sequence):
                loop, chunks = owner
                by_loop[loop].append(partial(chunks.put_nowait, event))
        for loop, puts in by_loop.items():
            try:
                loop.call_soon_threadsafe(_call_all, puts)
            except RuntimeError:  # the loop is closed
                continue


def _urgent(sequence: Sequence, event: Event) -> bool:
    """A first token is timed, and an end is waited for."""
    return isinstance(event, GhostvisError) or event.finish_reason is not None or len(sequence.output) <= 1


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def choose_device(wanted: str) -> torch.device:
    """The device for "auto", "cpu", "cuda:1"... EngineError or UsageError where it can't be used."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {wanted!r} can't be used: {reason}", hint="--device cpu") from error
    return device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if wanted not in DTYPES:
        raise UsageError(f"no dtype named {wanted!r}", hint=f"one of auto, {', '.join(DTYPES)}")
    return DTYPES[wanted]


def _make_scheduler(loaded: LoadedModel, settings: LocalSettings) -> Scheduler:
    """With what a device is good at: on CUDA graphs, prompts read together, steps begun early."""
    decoder = loaded.model.decoder
    weight, config = decoder.lm_head.weight, decoder.config
    on_cuda = weight.device.type == "cuda"
    without_cudnn_attention(weight.device)
    row_bytes = config.sequence_len * token_bytes(config, weight.dtype)
    graphs = Graphs() if on_cuda and settings.graphs != "off" else None
    return Scheduler(
        loaded.model,
        loaded.tokenizer,
        max_batch=settings.max_batch or fitting_batch(weight.device, row_bytes),
        prefill_tokens=settings.prefill_tokens or (PREFILL_TOKENS_ON_CUDA if on_cuda else PREFILL_TOKENS),
        prefix_cache_bytes=settings.prefix_cache_mb * 1024**2,
        decode=_choose_decode(decoder, settings, graphs),
        varlen=has_varlen(config, weight.device, weight.dtype),
        ahead=on_cuda,
        together=TOGETHER_ON_CUDA if on_cuda else 1,
        graphs=graphs,
    )


def _choose_decode(decoder: Decoder, settings: LocalSettings, graphs: Graphs | None) -> Decode:
    if settings.compile:
        return compiled(decoder, graphs)
    on_cuda = decoder.lm_head.weight.device.type == "cuda"
    return Padded(decoder, graphs=graphs) if on_cuda else Eager(decoder)


def _choose_threads(model: torch.nn.Module, settings: LocalSettings) -> int | None:
    """Threads for the step thread's operations; None leaves torch's own choice."""
    parameters = list(model.parameters())
    small = too_small_to_share(sum(parameter.numel() for parameter in parameters))
    return (
        1 if settings.threads is None and small and parameters[0].device.type == "cpu" else settings.threads
    )
