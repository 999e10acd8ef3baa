"""Continuous batching: which sequences run in the next step, and running it. Synchronous, one thread.

A step reads up to `prefill_tokens` positions of waiting prompts, then decodes one token for every running
sequence. Running sequence i lives in cache row i; the one being read (there is at most one) lives in the row
after them, so that it can join without moving.
"""

from collections import deque
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.engines.base import Chunk, FinishReason, Sampling, Usage
from ghostvis_cli.engines.local.cache import ImageCache, PrefixCache, common_prefix, identities
from ghostvis_cli.engines.local.decode import Decode, Eager
from ghostvis_cli.engines.local.rows import Rows
from ghostvis_cli.engines.local.sampling import logprob, penalise, sample
from ghostvis_cli.engines.local.text_stream import TextStream
from ghostvis_cli.model.ghostvis import GhostVis
from ghostvis_cli.prompt import VISION_ROW, Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(eq=False)
class Sequence:
    """One request on its way. `filled` counts the positions whose keys and values are in the cache."""

    prompt: Prompt
    pixels: "Ordered[NDArray[Any] | None]"  # preprocessed, one per picture; None where its rows are known
    sampling: Sampling
    identity: "NDArray[np.int64]"
    text: TextStream
    generator: torch.Generator | None
    output: list[int] = field(default_factory=list)
    filled: int = 0
    cached_tokens: int = 0
    done: bool = False
    vision_rows: Tensor | None = None  # (pictures x N, D), while the prompt is being read

    @classmethod
    def start(
        cls, prompt: Prompt, pixels: "Ordered[NDArray[Any] | None]", sampling: Sampling, image_tokens: int
    ) -> "Sequence":
        generator = None
        if sampling.temperature > 0:
            generator = torch.Generator()
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed)
        identity = identities(prompt, image_tokens)
        return cls(prompt, pixels, sampling, identity, TextStream(sampling.stop), generator)

    @property
    def usage(self) -> Usage:
        prompt = self.prompt
        return Usage(len(prompt.ids), len(self.output), self.cached_tokens, prompt.image_tokens)

    @property
    def capacity(self) -> int:
        """Positions it may come to need."""
        return len(self.prompt.ids) + self.sampling.max_tokens


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
        self.reading: Sequence | None = None
        self.running: list[Sequence] = []
        self.events: list[tuple[Sequence, Chunk]] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.running)

    def submit(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is; what it has cached stays useful to others."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            sequence.done = True
        elif not sequence.done:
            self._leave(sequence)

    def step(self) -> list[tuple[Sequence, Chunk]]:
        """One round; the chunks it produced, in order."""
        self.events = []
        self._read_prompts()
        if self.running:
            self._decode()
        return self.events

    def abandon(self) -> list[Sequence]:
        """After a failure: drop every sequence and the cache's rows; the caller tells their owners."""
        dropped = [*self.running, *([self.reading] if self.reading else []), *self.waiting]
        for sequence in dropped:
            sequence.done = True
        self.running, self.reading = [], None
        self.waiting.clear()
        self.rows = Rows(self.model.config.decoder, device=self.device, dtype=self.rows.dtype)
        return dropped

    # --- reading prompts

    def _read_prompts(self) -> None:
        budget = self.prefill_tokens
        while budget > 0 and (sequence := self.reading or self._admit()):
            start, end = sequence.filled, min(sequence.filled + budget, len(sequence.prompt.ids))
            hidden = self._read_chunk(sequence, start, end)
            sequence.filled = end
            budget -= end - start
            if end == len(sequence.prompt.ids):
                self.reading, sequence.vision_rows = None, None
                self.running.append(sequence)
                self._choose([sequence], self.model.decoder.logits(hidden[:, -1]))

    def _admit(self) -> Sequence | None:
        """Give the longest-waiting sequence a row, begun with the longest known beginning of its prompt."""
        if not self.waiting or len(self.running) >= self.max_batch:
            return None
        sequence, row = self.waiting[0], len(self.running)
        self.rows.reserve(row + 1, sequence.capacity)
        self.reading = self.waiting.popleft()
        most = len(sequence.identity) - 1  # the last position is always computed: its logits are needed
        shared, entry = self.prefixes.best(sequence.identity[:most])
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
        return sequence

    def _read_chunk(self, sequence: Sequence, start: int, end: int) -> Tensor:
        """Run positions start to end of one prompt: hidden rows (1, T, D)."""
        decoder = self.model.decoder
        ids = np.asarray(sequence.prompt.ids[start:end], dtype=np.int64)
        vision = ids == VISION_ROW
        ids[vision] = 0  # any id: its row is replaced
        x = decoder.embed(torch.from_numpy(ids).to(self.device)[None])
        if vision.any():
            first = sequence.prompt.ids[:start].count(VISION_ROW)
            rows = self._vision_rows(sequence)[first : first + int(vision.sum())]
            x[0, torch.from_numpy(vision).to(self.device)] = rows
        positions = torch.arange(start, end, device=self.device)[None]
        step = decoder.plan(positions, first_row=len(self.running), length=end)
        return decoder.trunk(x, step, self.rows.cache)

    def _vision_rows(self, sequence: Sequence) -> Tensor:
        """All of a prompt's picture rows (pictures x N, D); pictures not seen before go through the tower."""
        if sequence.vision_rows is None:
            images = sequence.prompt.images
            new = {
                image.digest: pixels
                for image, pixels in zip(images, sequence.pixels, strict=True)
                if pixels is not None and image.digest not in self.images
            }
            known = {
                image.digest: rows for image in images if (rows := self.images.get(image.digest)) is not None
            }
            if new:
                batch = torch.from_numpy(np.stack(list(new.values()))).to(self.device)
                encoded = self.model.encode_images(batch)
                known |= dict(zip(new, encoded, strict=True))
                self.images.put(new, encoded)
            sequence.vision_rows = torch.cat([known[image.digest] for image in images])
        return sequence.vision_rows

    # --- decoding

    def _decode(self) -> None:
        batch = list(self.running)
        logits = self.decode(
            self.rows,
            [sequence.output[-1] for sequence in batch],
            [sequence.filled for sequence in batch],
            self.reading.filled if self.reading else 0,
        )
        for sequence in batch:
            sequence.filled += 1
        self._choose(batch, logits)

    def _choose(self, batch: list[Sequence], logits: Tensor) -> None:
        """The next token of each sequence from logits (B, V), and what follows from it."""
        likeliest = logits.argmax(dim=-1).tolist()
        for sequence, row, greedy in zip(batch, logits, likeliest, strict=True):
            sampling = sequence.sampling
            token = greedy
            if sampling.temperature > 0 or sampling.repetition_penalty != 1:
                adjusted = row
                if sampling.repetition_penalty != 1:
                    seen = {*sequence.prompt.ids, *sequence.output} - {VISION_ROW}
                    adjusted = penalise(
                        row, torch.tensor(sorted(seen), device=self.device), sampling.repetition_penalty
                    )
                token = sample(adjusted, sampling, sequence.generator)
            self._accept(sequence, token, row)

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

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of its row, keep what it computed, and close the gap."""
        sequence.done = True
        ids = np.concatenate((sequence.identity, np.asarray(sequence.output, dtype=np.int64)))[
            : sequence.filled
        ]
        if sequence is self.reading:
            self.prefixes.put(ids, self.rows, len(self.running))
            self.reading = None
            return
        row, last = self.running.index(sequence), len(self.running) - 1
        self.prefixes.put(ids, self.rows, row)
        if row != last:
            self.rows.copy(last, row, self.running[last].filled)
            self.running[row] = self.running[last]
        self.running.pop()
        if self.reading:
            self.rows.copy(last + 1, last, self.reading.filled)
