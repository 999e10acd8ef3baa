"""SGLang as an engine: requests in SGLang's terms, its replies as chunks. Imports neither torch nor SGLang.

Prompts and answers are exchanged as ids. Text is decoded here as in the local engine, so characters, stop strings,
ends of turns and counts are the same with both.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ghostvis_cli.convert.directory import CERTIFICATE, CONFIG, TOKENIZER, read_json
from ghostvis_cli.engines.base import (
    Chunk,
    Closing,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Sampling,
    TokenLogprob,
    Usage,
)
from ghostvis_cli.engines.rendering import Renderer
from ghostvis_cli.engines.text_stream import TextStream
from ghostvis_cli.errors import InputError, RequestError, printable
from ghostvis_cli.prompt import VISION_ROW, Prompt
from ghostvis_cli.sglang import runtime
from ghostvis_cli.sglang.process import Process, Reply

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.tokenizer import Tokenizer
    from ghostvis_cli.profile import Profile

START_S = 900.0  # weights from a network disk and CUDA graphs take minutes
HARDEST_PENALTY = 2.0  # SGLang's largest
BAD_REQUEST = 400
REASONS: dict[str, FinishReason] = {"length": "length", "abort": "abort"}  # others are ways to stop
TRAINED_SHARE = 10  # the rotary table has so many times the positions that were trained
# For log probabilities before temperature, as the protocol has them.
ENVIRONMENT = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}


class SGLangEngine(Closing):
    """A running SGLang. `start` makes one; requests run on the event loop that called it."""

    server = None

    def __init__(self, process: Process, arguments: Mapping[str, Any], context: int) -> None:
        directory = Path(arguments["model_path"])
        config = read_json(directory, CONFIG)
        self._process = process
        self._draws_repeat = bool(arguments.get("enable_deterministic_inference"))
        self._image_id: int = config.get("image_token_id", VISION_ROW)
        self.tokenizer = _tokenizer(directory)
        self.info = _described(directory, config, arguments, context)
        layout = config.get("image_layout", "inline")
        self._renderer = Renderer(self.tokenizer, layout, self.info.image_tokens, context)

    @classmethod
    async def start(
        cls,
        profile: "Profile",
        *,
        report: Callable[[str], None] | None = None,
        detail: Callable[[str], None] | None = None,
        deadline_s: float = START_S,
    ) -> Self:
        """Convert the model if needed, start SGLang, load the model.

        report takes lines for the user meanwhile, which become notices without it; detail takes SGLang's log.
        """
        runtime.require(device=profile.engine.device)
        notices: list[str] = []
        environment = runtime.environment(profile) | ENVIRONMENT
        process = await Process.start(environment, report or notices.append, detail)
        try:
            dtype = runtime.weights_dtype(profile)
            directory = Path(await process.convert(profile.model, dtype))
            if report is not None:
                report("starting SGLang, about half a minute")
            arguments = _arguments(profile, directory)
            context = await process.load(arguments, deadline_s)
            engine = cls(process, arguments, context)
        except BaseException:
            await process.aclose()
            raise
        engine.info = replace(engine.info, notices=tuple(notices))
        return engine

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        request.refuse_scoring()
        self._process.check()
        self._look_at_penalty(request.sampling.repetition_penalty)
        prompt, sampling = await self._renderer.prompt(request)
        parameters = self._parameters(sampling)
        images = await asyncio.to_thread(lambda: [image.data for image in prompt.images])
        answer = _ReplyReader(prompt, sampling, self.tokenizer)
        with self._process.request() as asked:
            ids = marked(prompt, self._image_id, self.info.image_tokens)
            await asked.ask("generate", images, ids=ids, sampling=parameters, logprobs=sampling.logprobs)
            while not answer.ended:
                if (chunk := answer.read(await asked.reply())) is not None:
                    yield chunk

    async def load(self) -> dict[str, int]:
        """Requests running and waiting in SGLang, and positions in use, as its scheduler last reported."""
        with self._process.request() as asked:
            await asked.ask("load")
            load: dict[str, int] = (await asked.reply())["load"]
            return load

    async def aclose(self) -> None:
        await self._process.aclose()

    # What is asked

    def _parameters(self, sampling: Sampling) -> dict[str, Any]:
        """SGLang's sampling parameters, without stop strings: SGLang would also find them in markup.

        SGLang applies top-p to the whole distribution, the local engine to what top-k left of it.
        """
        return {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "json_schema": sampling.json_schema,
            "regex": sampling.regex,
            "ignore_eos": sampling.ignore_eos,
            **self._seed(sampling),
        }

    def _look_at_penalty(self, penalty: float) -> None:
        if penalty > HARDEST_PENALTY:
            raise RequestError(
                f"SGLang's repetition penalty ends at {HARDEST_PENALTY:g}", hint="--engine local"
            )
        if penalty != 1:
            self._notice("SGLang's repetition penalty counts the answer's tokens, not the prompt's")

    def _seed(self, sampling: Sampling) -> dict[str, int]:
        """The seed. Draws are repeatable only where SGLang was started for it, and then every request needs one."""
        if sampling.temperature == 0:
            return {}
        if not self._draws_repeat:
            if sampling.seed is None:
                return {}
            raise RequestError(
                "SGLang repeats the draws of a seed only on a GPU, and where it was started with one",
                hint="--temperature 0, or --engine local",
            )
        if sampling.min_p > 0:  # SGLang's assertion would end the scheduler
            raise RequestError("SGLang has no min_p for draws with a seed", hint="--min-p 0")
        return {"sampling_seed": secrets.randbits(63) if sampling.seed is None else sampling.seed}

    def _notice(self, line: str) -> None:
        if line not in self.info.notices:
            self.info = replace(self.info, notices=(*self.info.notices, line))


def marked(prompt: Prompt, image_id: int, image_tokens: int) -> list[int]:
    """A prompt's ids with one image id for an image's N rows or slots; the plug-in's processor repeats it."""
    if not prompt.images:
        return list(prompt.ids)
    ids, at = [], 0
    while at < len(prompt.ids):
        is_place = prompt.ids[at] in (VISION_ROW, image_id)
        ids.append(image_id if is_place else prompt.ids[at])
        at += image_tokens if is_place else 1
    return ids


class _ReplyReader:
    """SGLang's replies to one request as chunks. As in the local engine, an end token is not counted."""

    def __init__(self, prompt: Prompt, sampling: Sampling, tokenizer: "Tokenizer") -> None:
        self._prompt, self._sampling, self._tokenizer = prompt, sampling, tokenizer
        self._text = TextStream(sampling.stop)
        self._count = 0
        self.ended = False

    def read(self, reply: Reply) -> Chunk | None:
        """The chunk for a reply."""
        reason = _reason(reply["end"])
        text, ids = "", []
        for id_ in reply["ids"]:
            if id_ in self._tokenizer.stop_ids and not self._sampling.ignore_eos:
                reason = "stop"
                break
            ids.append(id_)
            markup = id_ >= len(self._tokenizer.ranks)  # reported as an id, not as text
            text += self._text.push(b"" if markup else self._tokenizer.token_bytes(id_))
            if self._text.stopped:
                reason = "stop"
                break
        self._count += len(ids)
        chunk = Chunk(text, tuple(ids), tuple(map(_logprob, ids, reply["logprobs"] or ())), reason)
        if reason is None:
            return chunk if ids else None
        self.ended = True
        prompt = self._prompt
        usage = Usage(len(prompt.ids), self._count, reply["cached"], prompt.image_tokens)
        return replace(chunk, text=text + self._text.finish(), usage=usage)


def _reason(end: dict[str, Any] | None) -> FinishReason | None:
    """Why SGLang ended an answer; InputError or RequestError for what it refused."""
    if end is None:
        return None
    if end["type"] == "abort" and (status := end.get("status_code")):
        kind = InputError if status == BAD_REQUEST else RequestError
        raise kind(f"SGLang: {printable(' '.join(end['message'].split()))}")
    return REASONS.get(end["type"], "stop")


def _logprob(id_: int, told: Any) -> TokenLogprob:
    chosen, top = told
    return TokenLogprob(id_, chosen, tuple((other, logprob) for logprob, other in top))


def _arguments(profile: "Profile", directory: Path) -> dict[str, Any]:
    """The arguments of `sglang.Engine`: a server's, without those that only a server has."""
    arguments: dict[str, Any] = runtime.arguments(profile, directory)
    arguments.pop("enable_metrics")
    arguments["log_level"] = "info"
    on_gpu = not runtime.is_cpu(profile.engine.device)
    if profile.sampling.seed is not None and on_gpu:  # on a CPU SGLang has no attention for it
        arguments["enable_deterministic_inference"] = True
    return arguments


def _tokenizer(directory: Path) -> "Tokenizer":
    from ghostvis_cli.checkpoint.tokenizer import Tokenizer

    return Tokenizer.load(directory / TOKENIZER)


def _described(
    directory: Path, config: Mapping[str, Any], arguments: Mapping[str, Any], context: int
) -> EngineInfo:
    text, vision = config.get("text_config", config), config.get("vision_config")
    made_of = read_json(directory, CERTIFICATE)["source"]
    keys_and_values = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"]
    return EngineInfo(
        kind="sglang",
        model=made_of["path"],
        device=arguments["device"],
        dtype=arguments["dtype"],
        context_tokens=context,
        trained_tokens=text["max_position_embeddings"] // TRAINED_SHARE,
        image_tokens=vision["num_tokens"] if vision else 0,
        layout=config["image_layout"] if vision else None,
        source=made_of["source"],
        tag=made_of["tag"],
        step=made_of["step"],
        image_pixels=vision["image_size"] if vision else None,
        kv_token_bytes=keys_and_values * (4 if arguments["dtype"] == "float32" else 2),
    )
