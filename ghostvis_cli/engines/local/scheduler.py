"""Continuous batching: which sequences run in the next step, and running it. Synchronous, one thread.

A step prefills up to `prefill_tokens` positions of waiting prompts, then decodes one token for every running
sequence. Running sequence i lives in cache row i; the one in prefill (between steps there is at most one) lives in
the row after them, so that it can join without moving.

On a GPU the next decoding step begins before the last one's tokens are known here (`ahead`): it takes them where
they are. What a sequence that has ended gets that way is dropped. Rows move in the order of the device's work, so
`filled` counts a position as soon as its step has begun.
"""

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.engines.base import Chunk, FinishReason
from ghostvis_cli.engines.local.cache import ImageCache, PrefixCache, common_prefix
from ghostvis_cli.engines.local.decode import Decode, Eager
from ghostvis_cli.engines.local.device import Fetched, power_of_two, sent
from ghostvis_cli.engines.local.failures import explained
from ghostvis_cli.engines.local.graphs import Graphs
from ghostvis_cli.engines.local.prefill import Part, read_parts
from ghostvis_cli.engines.local.rows import Rows
from ghostvis_cli.engines.local.sampling import draws, logprob, sample, shaped
from ghostvis_cli.engines.local.scoring import score
from ghostvis_cli.engines.local.sequence import Sequence
from ghostvis_cli.errors import GhostvisError
from ghostvis_cli.model.ghostvis import GhostVis

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGES_TOGETHER = 16
LEAST_SHARED = 16  # positions: who shares so many with a prompt that is being read waits for it
Event: TypeAlias = Chunk | GhostvisError  # an error ends its sequence, as a chunk with a finish reason does


@dataclass(frozen=True)
class Flight:
    """A step that has begun: whose, what it chooses, on the device and on its way to the host."""

    batch: list[Sequence]
    taken: Tensor | None  # (B, 1 + reach): the tokens of a decoding step
    logits: Tensor
    chosen: Tensor  # (B,)
    fetched: Fetched


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
        varlen: bool = False,
        ahead: bool = False,
        together: int = 1,
        graphs: Graphs | None = None,
    ) -> None:
        """varlen: attention over sequences of different lengths; together: prompts and images in one forward."""
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        weight = model.decoder.lm_head.weight
        self.device = weight.device
        self.rows = Rows(model.config.decoder, device=weight.device, dtype=weight.dtype, varlen=varlen)
        self.decode = decode or Eager(model.decoder)
        self.prefixes = PrefixCache(prefix_cache_bytes)
        self.images = ImageCache()
        self.ahead, self.graphs = ahead, graphs
        self.images_together = min(together, IMAGES_TOGETHER)
        self.prompts_together = together if varlen and not model.config.decoder.reach else 1
        self.suspects = 0  # so many of those that wait failed together, and are read one by one
        self.flight: Flight | None = None
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None
        self.running: list[Sequence] = []
        self.events: list[tuple[Sequence, Event]] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    def submit(self, sequence: Sequence, alternatives: int | None = None, answer: bool = True) -> None:
        """Take a sequence in. `alternatives`: tell its prompt's probabilities first, with that many others."""
        try:
            if alternatives is not None:
                scores = score(self.model.decoder, sequence.prompt.ids, alternatives)
                self.events.append((sequence, Chunk(prompt=scores)))
        except Exception as error:
            sequence.done = True
            self.events.append((sequence, explained(error)))
            return
        if answer:
            self.waiting.append(sequence)
        else:
            sequence.done = True
            self.events.append((sequence, Chunk(finish_reason="length", usage=sequence.usage)))

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
        self.running, self.prefilling, self.flight = [], None, None
        self.waiting.clear()
        with suppress(Exception):  # no memory for new rows: the old ones stay, and their content is not used
            self.rows.reset()

    def warm_up(self) -> None:
        """Meet every batch size, twice, with room for the trained length: graphs are captured now."""
        decoder = self.model.decoder
        self.rows.reserve(self.max_batch, decoder.config.sequence_len)
        tokens = self.rows.cache.layers.new_zeros((self.max_batch, 1 + decoder.config.reach)).long()
        for n in range((self.max_batch - 1).bit_length() + 1):
            for batch in [min(1 << n, self.max_batch)] * 2:
                self.decode(self.rows, tokens[:batch], [0] * batch, 0)

    def take_events(self) -> list[tuple[Sequence, Event]]:
        events, self.events = self.events, []
        return events

    # --- prefill

    def _prefill(self) -> None:
        budget = self.prefill_tokens
        while budget > 0 and (parts := self._parts(budget)):
            budget -= sum(part.end - part.start for part in parts)
            try:
                hidden = self._read(parts)
            except Exception as error:
                self._fail_together(parts, error)
                continue
            for part in parts:
                part.sequence.filled = part.end
            whole = [part.sequence for part in parts if part.end == len(part.sequence.prompt.ids)]
            if len(whole) == len(parts):
                self.prefilling = None
            for sequence in whole:
                sequence.vision_rows = None
            self.running += whole
            if whole:
                self._land(self._choose(whole, self.model.decoder.logits(hidden[: len(whole)])))

    def _parts(self, budget: int) -> list[Part]:
        """What is read in one forward: prompts to their ends, but for the last one, which is `prefilling` now."""
        parts: list[Part] = []
        most = 1 if self.suspects else self.prompts_together
        while budget > 0 and len(parts) < most:
            sequence = self.prefilling if self.prefilling and not parts else self._admit(parts)
            if sequence is None:
                break
            self.suspects -= bool(self.suspects and sequence is not self.prefilling)
            self.prefilling = sequence
            start, end = sequence.filled, min(sequence.filled + budget, len(sequence.prompt.ids))
            parts.append(Part(sequence, start, end))
            budget -= end - start
        return parts

    def _admit(self, parts: list[Part]) -> Sequence | None:
        """The longest-waiting sequence for which there is a row, unless its beginning is just being read."""
        while self.waiting and len(self.running) + len(parts) < self.max_batch:
            sequence = self.waiting.popleft()
            try:
                self._begin(sequence, len(self.running) + len(parts))
            except Exception as error:
                self._lose(sequence, error)
                continue
            soon = (common_prefix(part.sequence.identity[: part.end], sequence.identity) for part in parts)
            if max(soon, default=0) - sequence.filled >= LEAST_SHARED:
                self.waiting.appendleft(sequence)
                return None
            return sequence
        return None

    def _begin(self, sequence: Sequence, row: int) -> None:
        """Give it a cache row that starts with the longest prefix of its prompt that is cached or running."""
        capacity = len(sequence.prompt.ids) + 1
        if row == 0:  # all the rows that an earlier batch had need not be as long as this one
            self.rows.give_back(capacity)
        self.rows.reserve(row + 1, capacity)
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

    def _read(self, parts: list[Part]) -> Tensor:
        """Run each part, in the rows after the running ones: the hidden rows of their last positions (S, D)."""
        self._see([part.sequence for part in parts])
        return read_parts(self.model.decoder, parts, self.rows, len(self.running), self.graphs)

    def _see(self, sequences: list[Sequence]) -> None:
        """Image rows (images x N, D) for prompts that have any; new images go through the tower."""
        seen: dict[str, Tensor] = {}
        new: dict[str, NDArray[Any]] = {}
        blind = [each for each in sequences if each.vision_rows is None and each.prompt.images]
        for sequence in blind:
            for image, given in zip(sequence.prompt.images, sequence.images, strict=True):
                known = given if isinstance(given, Tensor) else self.images.get(image.digest)
                if known is not None:
                    seen[image.digest] = known
                elif not isinstance(given, Tensor):
                    new[image.digest] = given
        digests = [digest for digest in new if digest not in seen]
        for at in range(0, len(digests), self.images_together):
            some = digests[at : at + self.images_together]
            seen |= zip(some, self._encode([new[digest] for digest in some]), strict=False)
        for sequence in blind:
            digests = [image.digest for image in sequence.prompt.images]
            for digest in digests:
                self.images.insert(digest, seen[digest])
            sequence.vision_rows = torch.cat([seen[digest] for digest in digests])

    def _encode(self, images: "list[NDArray[Any]]") -> Tensor:
        """Pixels (3, S, S) of each -> rows (B, N, D)."""
        count = power_of_two(len(images))  # few shapes, for graphs; with or without them alike
        images = [*images, *images[:1] * (count - len(images))]
        pixels = sent(torch.from_numpy(np.stack(images)), self.device)
        if self.graphs is None:
            return self.model.encode_images(pixels)
        return self.graphs.run(("images", count), self.model.encode_images, pixels).clone()

    # --- decoding

    def _decode(self) -> None:
        flight, self.flight = self.flight or self._launch(list(self.running)), None
        if self._goes_on(flight):
            self.flight = self._launch(flight.batch, _next_tokens(flight))
        self._land(flight)

    def _launch(self, batch: list[Sequence], tokens: Tensor | None = None) -> Flight:
        """Begin a step. `tokens` are on the device where the host does not know them yet."""
        self.rows.reserve(len(batch), max(sequence.filled for sequence in batch) + 1)
        if tokens is None:
            last = [sequence.last(1 + self.model.decoder.config.reach) for sequence in batch]
            tokens = sent(torch.tensor(last), self.device)
        filled = [sequence.filled for sequence in batch]
        logits = self.decode(self.rows, tokens, filled, self.prefilling.filled if self.prefilling else 0)
        for sequence in batch:
            sequence.filled += 1
        return self._choose(batch, logits, tokens)

    def _goes_on(self, flight: Flight) -> bool:
        """Whether the next step can begin before this one's tokens are read: nobody joins, or leaves for sure."""
        joining = self.prefilling or (self.waiting and len(self.running) < self.max_batch)
        same = self.ahead and not joining and flight.batch == self.running
        return same and all(_runs_on(sequence) for sequence in flight.batch)

    def _choose(self, batch: list[Sequence], logits: Tensor, taken: Tensor | None = None) -> Flight:
        """The next token of each sequence from logits (B, V)."""
        samplings = [each.sampling for each in batch]
        numbers = draws(samplings, [each.generator for each in batch], logits.size(-1))
        choices = self._shaped(batch, logits)
        try:
            chosen = sample(choices, samplings, numbers)
        except Exception:  # whose fault it is shows row by row
            chosen = torch.zeros(len(batch), dtype=torch.int64, device=self.device)
            for row, sequence in enumerate(batch):
                one = slice(row, row + 1)
                if sequence.done:
                    continue
                try:
                    own = None if numbers is None else numbers[one]
                    chosen[one] = sample(choices[one], samplings[one], own)
                except Exception as error:
                    self._fail(sequence, error)
        return Flight(batch, taken, logits, chosen, Fetched(chosen))

    def _shaped(self, batch: list[Sequence], logits: Tensor) -> Tensor:
        """Logits (B, V) as each sequence's penalties and grammar change them."""
        changed = [(row, each) for row, each in enumerate(batch) if each.sampling.is_shaped]
        choices = logits.clone() if changed else logits
        for row, each in changed:
            try:
                choices[row] = shaped(logits[row], each.sampling, each.seen(), each.output, each.grammar)
            except Exception as error:
                self._fail(each, error)
        return choices

    def _land(self, flight: Flight) -> None:
        """Wait for a step's tokens, and what follows from them."""
        for row, (sequence, token) in enumerate(zip(flight.batch, flight.fetched.read(), strict=True)):
            if sequence.done:  # since the step began
                continue
            try:
                self._accept(sequence, token, flight.logits, row)
            except Exception as error:
                self._fail(sequence, error)

    def _accept(self, sequence: Sequence, token: int, logits: Tensor, row: int) -> None:
        sampling = sequence.sampling
        if sequence.grammar is not None:
            sequence.grammar.take(token)
        if token in self.tokenizer.stop_ids and not (sampling.ignore_eos and sequence.grammar is None):
            self._finish(sequence, "stop", Chunk(text=sequence.text.finish()))
            return
        sequence.output.append(token)
        special = token >= len(self.tokenizer.ranks)  # markup is not text; its id is in token_ids
        text = sequence.text.push(b"" if special else self.tokenizer.token_bytes(token))
        chunk = Chunk(text, (token,))
        if sampling.logprobs is not None:
            chunk = replace(chunk, logprobs=(logprob(logits[row], token, sampling.logprobs),))
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
        """End one running sequence with an error of its own. What it cached may be wrong, so it is not kept."""
        if sequence.done:  # its row could not be closed up, which breaks all sequences
            raise error
        self.events.append((sequence, explained(error)))
        sequence.filled = 0
        self._leave(sequence)

    def _fail_together(self, parts: list[Part], error: Exception) -> None:
        """A fault of one sequence is its own: each of several is tried again alone."""
        if len(parts) == 1:
            self._lose(parts[0].sequence, error)
        else:
            self.waiting.extendleft(part.sequence for part in reversed(parts))
            self.suspects, self.prefilling = len(parts), None

    def _lose(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence that was not running yet."""
        self.events.append((sequence, explained(error)))
        sequence.filled, sequence.done = 0, True
        if sequence is self.prefilling:
            self.prefilling = None
        self._rest()

    def _rest(self) -> None:
        if not self.running:
            self.flight = None
        if not self.busy:
            self.rows.give_back()

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
        self._rest()

    def _keep(self, sequence: Sequence, row: int) -> None:
        """Remember a row's positions for others; where there is no room for that, remember nothing at all."""
        output = np.asarray(sequence.output, dtype=np.int64)
        ids = np.concatenate((sequence.identity, output))[: sequence.filled]
        try:
            self.prefixes.insert(ids, self.rows, row)
        except (RuntimeError, MemoryError):
            self.prefixes.clear()


def _next_tokens(flight: Flight) -> Tensor:
    """What the step after a decoding step takes, (B, 1 + reach), without the host."""
    assert flight.taken is not None
    return torch.cat((flight.taken[:, 1:], flight.chosen[:, None]), dim=1)


def _runs_on(sequence: Sequence) -> bool:
    """Whether, for all that is known, the token on its way is not its last, and nothing waits for it."""
    sampling = sequence.sampling
    is_last = len(sequence.output) + 1 >= sampling.max_tokens
    return not is_last and not sampling.is_shaped and sampling.logprobs is None
