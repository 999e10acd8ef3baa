"""Continuous batching: which sequences run in the next step, and running it. Synchronous, one thread.

A step prefills up to `prefill_tokens` positions of waiting prompts, then decodes one token for every running
sequence. Running sequence i lives in cache row i; the one in prefill (there is at most one) lives in the row
after them, so that it can join without moving.
"""

from collections import deque
from collections.abc import Sequence as Ordered
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.engines.base import Chunk, FinishReason, Sampling, Usage
from ghostvis_cli.engines.local.cache import ImageCache, PrefixCache, common_prefix, identities
from ghostvis_cli.engines.local.decode import Decode, Eager
from ghostvis_cli.engines.local.failures import explained
from ghostvis_cli.engines.local.rows import IDLE_BYTES, Rows
from ghostvis_cli.engines.local.sampling import logprob, penalise, sample
from ghostvis_cli.engines.text_stream import TextStream
from ghostvis_cli.errors import GhostvisError
from ghostvis_cli.model.ghostvis import GhostVis
from ghostvis_cli.prompt import VISION_ROW, Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    ImageInput: TypeAlias = (
        "NDArray[Any] | Tensor"  # preprocessed pixels (3, S, S), or rows (N, D) already known
    )
Event: TypeAlias = Chunk | GhostvisError  # an error ends its sequence, as a chunk with a finish reason does


@dataclass(eq=False)
class Sequence:
    """One request on its way. `filled` counts the positions whose keys and values are in the cache."""

    prompt: Prompt
    images: "Ordered[ImageInput]"  # one per image of the prompt
    sampling: Sampling
    identity: "NDArray[np.int64]"
    text: TextStream
    generator: torch.Generator | None
    output: list[int] = field(default_factory=list)
    filled: int = 0
    cached_tokens: int = 0
    done: bool = False
    vision_rows: Tensor | None = None  # (images x N, D), during prefill

    @classmethod
    def start(
        cls, prompt: Prompt, images: "Ordered[ImageInput]", sampling: Sampling, image_tokens: int
    ) -> "Sequence":
        generator = None
        if sampling.temperature > 0:
            generator = torch.Generator()
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed)
        identity = identities(prompt, image_tokens)
        return cls(prompt, images, sampling, identity, TextStream(sampling.stop), generator)

    @property
    def usage(self) -> Usage:
        prompt = self.prompt
        return Usage(len(prompt.ids), len(self.output), self.cached_tokens, prompt.image_tokens)

    def last(self, count: int) -> list[int]:
        """The latest ids, of which the answer's last one is not in the cache yet."""
        return [*self.prompt.ids[-count:], *self.output][-count:]

    def seen(self) -> list[int]:
        """Ids that a repetition penalty falls on: each id of prompt and answer once."""
        return sorted({*self.prompt.ids, *self.output} - {VISION_ROW})


class Scheduler:
    def __init__(
        self,
        model: GhostVis,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 32,
        prefill_tokens: int = 512,
        prefix_cache_bytes: int = 512 * 1024**2,
        decode: Decode | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        weight = model.decoder.lm_head.weight
        self.device = weight.device
        self.rows = Rows(model.config.decoder, device=weight.device, dtype=weight.dtype)
        self.decode = decode or Eager(model.decoder)
        self.prefixes = PrefixCache(prefix_cache_bytes)
        self.images = ImageCache()
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None
        self.running: list[Sequence] = []
        self.events: list[tuple[Sequence, Event]] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    def submit(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is; what it has cached stays useful to others."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            sequence.done = True
        elif not sequence.done:
            self._leave(sequence)

    def step(self) -> list[tuple[Sequence, Event]]:
        """One round; what it produced, in order. A fault of one sequence is its own; a fault of all ends all."""
        try:
            self._prefill()
            if self.running:
                self._decode()
        except Exception as error:
            self.abandon(explained(error))
        return self.take_events()

    def abandon(self, reason: GhostvisError) -> None:
        """Drop every sequence with this reason, and start afresh."""
        for sequence in [*self.running, *([self.prefilling] if self.prefilling else []), *self.waiting]:
            sequence.done = True
            self.events.append((sequence, reason))
        self.running, self.prefilling = [], None
        self.waiting.clear()
        with suppress(Exception):  # no memory for new rows: the old ones stay, and their content is not used
            self.rows.reset()

    def take_events(self) -> list[tuple[Sequence, Event]]:
        events, self.events = self.events, []
        return events

    # --- prefill

    def _prefill(self) -> None:
        budget = self.prefill_tokens
        while budget > 0 and (sequence := self.prefilling or self._admit()):
            start, end = sequence.filled, min(sequence.filled + budget, len(sequence.prompt.ids))
            budget -= end - start
            try:
                hidden = self._prefill_chunk(sequence, start, end)
            except Exception as error:
                self._fail(sequence, error)
                continue
            sequence.filled = end
            if end == len(sequence.prompt.ids):
                self.prefilling, sequence.vision_rows = None, None
                self.running.append(sequence)
                self._choose([sequence], self.model.decoder.logits(hidden[:, -1]))

    def _admit(self) -> Sequence | None:
        """The longest-waiting sequence for which there is a row."""
        while self.waiting and len(self.running) < self.max_batch:
            self.prefilling = sequence = self.waiting.popleft()
            try:
                self._begin(sequence)
            except Exception as error:
                self._fail(sequence, error)
            else:
                return sequence
        return None

    def _begin(self, sequence: Sequence) -> None:
        """Give it a cache row that starts with the longest prefix of its prompt that is cached or running."""
        row = len(self.running)
        self.rows.reserve(row + 1, len(sequence.prompt.ids) + 1)
        most = len(sequence.identity) - 1  # the last position is always computed: its logits are needed
        shared, entry = self.prefixes.match(sequence.identity[:most])
        live, source = max(
            (
                (common_prefix(s.identity[: s.filled], sequence.identity[:most]), i)
                for i, s in enumerate(self.running)
            ),
            default=(0, 0),
        )
        if live > shared:
            self.rows.copy(source, row, live)
        elif entry is not None:
            self.rows.copy_in(row, entry.layers, shared)
        sequence.filled = sequence.cached_tokens = max(live, shared)

    def _prefill_chunk(self, sequence: Sequence, start: int, end: int) -> Tensor:
        """Run positions start to end of one prompt: hidden rows (1, T, D)."""
        decoder = self.model.decoder
        begin = max(0, start - decoder.config.reach)
        ids = sequence.prompt.ids[begin:end]
        images = None
        if rows := ids.count(VISION_ROW):
            first = sequence.prompt.ids[:begin].count(VISION_ROW)
            images = self._vision_rows(sequence)[first : first + rows]
        x = decoder.embed(torch.tensor([ids], device=self.device), images)
        positions = torch.arange(start, end, device=self.device)[None]
        step = decoder.plan(positions, first_row=len(self.running), length=end)
        return decoder.trunk(x, step, self.rows.cache)

    def _vision_rows(self, sequence: Sequence) -> Tensor:
        """All of a prompt's image rows (images x N, D); images not seen before go through the tower."""
        if sequence.vision_rows is None:
            digests = [image.digest for image in sequence.prompt.images]
            rows: dict[str, Tensor] = {}
            for digest, image in zip(digests, sequence.images, strict=True):
                known = image if isinstance(image, Tensor) else rows.get(digest)
                known = self.images.get(digest) if known is None else known
                if known is None:
                    pixels = torch.from_numpy(image).to(self.device)
                    known = self.model.encode_images(pixels[None])[0]
                rows[digest] = known
                self.images.insert(digest, known)
            sequence.vision_rows = torch.cat([rows[digest] for digest in digests])
        return sequence.vision_rows

    # --- decoding

    def _decode(self) -> None:
        batch = list(self.running)
        self.rows.reserve(len(batch), max(sequence.filled for sequence in batch) + 1)
        logits = self.decode(
            self.rows,
            [sequence.last(1 + self.model.decoder.config.reach) for sequence in batch],
            [sequence.filled for sequence in batch],
            self.prefilling.filled if self.prefilling else 0,
        )
        for sequence in batch:
            sequence.filled += 1
        self._choose(batch, logits)

    def _choose(self, batch: list[Sequence], logits: Tensor) -> None:
        """The next token of each sequence from logits (B, V), and what follows from it."""
        likeliest = logits.argmax(dim=-1).tolist()
        for sequence, row, greedy in zip(batch, logits, likeliest, strict=True):
            try:
                self._accept(sequence, self._pick(sequence, row, greedy), row)
            except Exception as error:
                if sequence.done:  # its row could not be closed up, which breaks all sequences
                    raise
                self._fail(sequence, error)

    def _pick(self, sequence: Sequence, logits: Tensor, greedy: int) -> int:
        sampling = sequence.sampling
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(sequence.seen(), device=self.device)
            logits = penalise(logits, seen, sampling.repetition_penalty)
        elif sampling.temperature == 0:
            return greedy
        return sample(logits, sampling, sequence.generator)

    def _accept(self, sequence: Sequence, token: int, logits: Tensor) -> None:
        sampling = sequence.sampling
        if token in self.tokenizer.stop_ids and not sampling.ignore_eos:
            self._finish(sequence, "stop", Chunk(text=sequence.text.finish()))
            return
        sequence.output.append(token)
        special = token >= len(self.tokenizer.ranks)  # markup is not text; its id is in token_ids
        text = sequence.text.push(b"" if special else self.tokenizer.token_bytes(token))
        chunk = Chunk(text, (token,))
        if sampling.logprobs is not None:
            chunk = replace(chunk, logprobs=(logprob(logits, token, sampling.logprobs),))
        if sequence.text.stopped:
            self._finish(sequence, "stop", chunk)
        elif len(sequence.output) >= sampling.max_tokens:
            self._finish(sequence, "length", replace(chunk, text=text + sequence.text.finish()))
        else:
            self.events.append((sequence, chunk))

    def _finish(self, sequence: Sequence, reason: FinishReason, last: Chunk) -> None:
        self.events.append((sequence, replace(last, finish_reason=reason, usage=sequence.usage)))
        self._leave(sequence)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End one sequence with an error of its own. What it cached may be wrong, so it is not kept."""
        self.events.append((sequence, explained(error)))
        sequence.filled = 0
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of its row, keep what it computed, and close the gap."""
        sequence.done = True
        last = len(self.running) - 1
        if sequence is self.prefilling:
            self._keep(sequence, last + 1)
            self.prefilling = None
        else:
            row = self.running.index(sequence)
            self._keep(sequence, row)
            if row != last:
                self.rows.copy(last, row, self.running[last].filled)
                self.running[row] = self.running[last]
            self.running.pop()
            if self.prefilling:
                self.rows.copy(last + 1, last, self.prefilling.filled)
        if not self.busy and self.rows.nbytes > IDLE_BYTES:
            self.rows.reset()

    def _keep(self, sequence: Sequence, row: int) -> None:
        """Remember a row's positions for others; where there is no room for that, remember nothing at all."""
        output = np.asarray(sequence.output, dtype=np.int64)
        ids = np.concatenate((sequence.identity, output))[: sequence.filled]
        try:
            self.prefixes.insert(ids, self.rows, row)
        except (RuntimeError, MemoryError):
            self.prefixes.clear()
