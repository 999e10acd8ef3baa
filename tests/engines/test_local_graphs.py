"""What the local engine does on a GPU, run on a CPU: shapes replayed, prompts read together, steps begun early.

Flash attention over sequences of different lengths exists for CUDA alone; here PyTorch gets it for CPUs, written
from its definition. A graph is a function that runs again on inputs of its own.
"""

import gc
import random
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ghostvis_cli.checkpoint.load import LoadedModel, load_model
from ghostvis_cli.convert.tensors import one_thread
from ghostvis_cli.engines.base import Sampling
from ghostvis_cli.engines.local.decode import Padded, compile_layers
from ghostvis_cli.engines.local.grammar import Grammar
from ghostvis_cli.engines.local.graphs import Graphs
from ghostvis_cli.engines.local.prefill import padded
from ghostvis_cli.engines.local.sampling import draws, sample
from ghostvis_cli.engines.local.scheduler import Scheduler
from ghostvis_cli.engines.local.sequence import Sequence
from ghostvis_cli.errors import GhostvisError
from ghostvis_cli.prompt import Prompt
from tests.engines.test_local_generations import run, sequence
from tests.engines.tiny import IMAGE_TOKENS, TOKENIZER, tiny_model
from tests.nanochat import VOCABULARY, Shape, write


def flash_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    places: Tensor,
    longest: int,
    capacity: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, ...]:
    assert seqused_k is not None and scale is not None
    assert {starts.dtype, places.dtype, seqused_k.dtype} == {torch.int32}
    assert k.stride(-1) == 1 and int(seqused_k.max()) <= capacity
    group, seen = q.size(1) // k.size(1), []
    left = capacity if window_size_left in (None, -1) else window_size_left
    for s, used in enumerate(seqused_k.tolist()):
        ours, first = q[starts[s] : starts[s + 1]], int(places[s])
        assert len(ours) <= longest
        keys, values = (x[first : first + used].repeat_interleave(group, 1) for x in (k, v))
        position = torch.arange(used - len(ours), used)[:, None]
        column = torch.arange(used)
        hidden = (column < position - left) | ((column > position) if causal else False)
        scores = torch.einsum("qhd,khd->hqk", ours, keys) * scale
        seen.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    nothing = q.new_empty(0)
    return torch.cat(seen), nothing, nothing, nothing, nothing


@pytest.fixture(scope="module", autouse=True)
def _flash() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash_on_cpu, "CPU")
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode(), one_thread():
        yield


class Replaying:
    """Stands for CUDA's capture: the function again, on inputs that stay where they are."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        self.captured += 1
        static = [each.clone() for each in inputs]

        def replay(*given: Tensor) -> Tensor:
            self.replayed += 1
            for ours, theirs in zip(static, given, strict=True):
                ours.copy_(theirs)
            return compute(*static)

        return replay


def on_gpu(
    model: LoadedModel, replaying: Replaying | None = None, *, varlen: bool = True, **settings: Any
) -> Scheduler:
    """The scheduler as a GPU has it."""
    graphs = Graphs(lambda: replaying or Replaying())
    decode = Padded(model.model.decoder, graphs=graphs)
    chosen: dict[str, Any] = {"ahead": True, "together": 64, "graphs": graphs} | settings
    return Scheduler(model.model, model.tokenizer, decode=decode, varlen=varlen, **chosen)


def crowd(count: int, seed: int = 0, *, vocabulary: int = 200, **sampling: Any) -> list[Sequence]:
    """Prompts that share beginnings in many ways, answers of many lengths."""
    rng = random.Random(seed)
    common = [rng.randrange(vocabulary) for _ in range(90)]
    return [
        sequence(
            common[: rng.randrange(0, 90)] + [rng.randrange(vocabulary) for _ in range(rng.randrange(1, 30))],
            rng.randrange(1, 40),
            **(sampling | ({"seed": i} if sampling else {})),
        )
        for i in range(count)
    ]


def alone(model: LoadedModel, sequences: list[Sequence]) -> list[list[int]]:
    """Each by itself, as a CPU does it."""
    plain = [sequence(list(each.prompt.ids)) for each in sequences]
    for ours, theirs in zip(plain, sequences, strict=True):
        ours.sampling = theirs.sampling
        if theirs.generator is not None:
            ours.generator = torch.Generator().manual_seed(theirs.sampling.seed or 0)
    return [run(Scheduler(model.model, model.tokenizer, prefix_cache_bytes=0), each)[0] for each in plain]


@pytest.mark.parametrize("varlen", [True, False], ids=["varlen", "masked"])
@pytest.mark.parametrize("prefill_tokens", [9, 64, 4096])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 20}], ids=["greedy", "drawn"])
def test_a_crowd_answers_as_each_would_alone(
    varlen: bool, prefill_tokens: int, sampling: dict[str, Any]
) -> None:
    model, replaying = tiny_model(vision=False), Replaying()
    sequences = crowd(40, **sampling)
    expected = alone(model, sequences)
    scheduler = on_gpu(model, replaying, varlen=varlen, max_batch=16, prefill_tokens=prefill_tokens)
    assert run(scheduler, *sequences) == expected
    assert replaying.replayed > replaying.captured > 1
    assert any(each.cached_tokens for each in sequences)


@pytest.mark.parametrize("varlen", [True, False], ids=["varlen", "masked"])
@pytest.mark.parametrize("name", ["n3", "n5", "n6", "n7"])
def test_a_crowd_of_every_generation_answers_as_each_would_alone(
    name: str, varlen: bool, tmp_path: Any
) -> None:
    model = load_model(write(tmp_path, name, Shape(seq=40, layers=2)))
    sequences = crowd(20, 1, vocabulary=VOCABULARY)
    expected = alone(model, sequences)
    assert run(on_gpu(model, varlen=varlen, max_batch=8, prefill_tokens=50), *sequences) == expected


def drawn_alone(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One row, step by step, with PyTorch's own draw."""
    if sampling.temperature < 1e-6:
        return int(logits.argmax())
    values, ids = logits, torch.arange(len(logits))
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0:
        values, ids = logits.topk(min(sampling.top_k or len(logits), len(logits)))
    p = torch.softmax(values / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= sampling.top_p, 0)
    p = p.masked_fill(p < sampling.min_p * p.max(), 0)
    return int(ids[torch.multinomial(p, 1, generator=generator)])


FILTERS = [
    *((0.7, 50, 0.9, 0.0), (0.0, 0, 1.0, 0.0), (1.5, 400, 1.0, 0.1), (1e-9, 0, 0.5, 0.0), (1.0, 0, 1.0, 0.0)),
    *(
        (1.0, 1, 1.0, 0.0),
        (0.3, 1000, 0.2, 0.3),
        (2.0, 17, 1e-9, 0.0),
        (1.0, 500, 1.0, 0.0),
        (5.0, 0, 0.9, 0.0),
    ),
    *((5.0, 20, 0.99, 0.05), (0.5, 0, 1.0, 0.2), (2.0, 0, 1.0, 0.0)),
]


@pytest.mark.parametrize("which", [range(13), (0, 2, 7), (4, 12), (1, 4), (3,), (0,)])
def test_a_batch_draws_what_each_row_would_draw_alone(which: Iterable[int]) -> None:
    """Top-k, top-p, min-p, none of them and greedy side by side, and rounds of draws from one generator each."""
    chosen = [
        Sampling(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in (FILTERS[i] for i in which)
    ]
    logits = 3 * torch.randn(len(chosen), 500, generator=torch.Generator().manual_seed(0))
    ours, theirs = ([torch.Generator().manual_seed(i) for i in range(len(chosen))] for _ in "12")
    for _ in range(50):
        together = sample(logits, chosen, draws(chosen, ours, 500)).tolist()
        assert together == [drawn_alone(*each) for each in zip(logits, chosen, theirs, strict=True)]
        logits = logits.roll(1, 1) * 0.99


def steps(scheduler: Scheduler, *sequences: Sequence, count: int) -> None:
    for each in sequences:
        scheduler.submit(each)
    for _ in range(count):
        scheduler.step()


def test_a_step_that_began_early_disturbs_nobody_when_others_end_join_or_are_abandoned() -> None:
    model = tiny_model(vision=False)
    stay, leave, join = (sequence(list(range(first, first + 20)), 60) for first in (40, 80, 120))
    expected = alone(model, [stay, leave, join])
    scheduler = on_gpu(model)
    steps(scheduler, leave, stay, count=20)
    assert scheduler.flight is not None
    scheduler.abort(leave)
    steps(scheduler, count=3)
    assert run(scheduler, join) == [expected[2]]
    assert stay.output == expected[0]
    assert leave.output == expected[1][: len(leave.output)]


def test_what_is_kept_of_an_answer_that_ended_early_is_right(tmp_path: Any) -> None:
    """Its last step ran on beyond the end; whoever shares the beginning reads what was kept."""
    model = tiny_model(vision=False)
    scheduler = on_gpu(model)
    first = sequence(list(range(40, 60)), 30)
    (answer,) = run(scheduler, first)
    follow = sequence([*range(40, 60), *answer, 7, 8, 9], 20)
    (expected,) = alone(model, [follow])
    assert run(scheduler, follow) == [expected]
    assert follow.cached_tokens >= 20 + len(answer) - 1


def test_a_stop_string_and_an_end_of_turn_are_seen_though_the_next_step_has_begun() -> None:
    model = tiny_model(vision=False)
    ids = list(range(40, 60))
    (whole,) = alone(model, [sequence(ids, 40)])
    text = model.tokenizer.decode(whole)
    stopped = sequence(ids, 40, stop=(text[10:12],))
    plain = sequence(ids, 40, stop=(text[10:12],))
    (expected,) = run(Scheduler(model.model, model.tokenizer), plain)
    assert run(on_gpu(model), stopped) == [expected]
    assert len(expected) < len(whole)


def test_prompts_are_read_together_and_a_shared_beginning_once() -> None:
    model = tiny_model(vision=False)
    scheduler = on_gpu(model, prefill_tokens=4096)
    sequences = [sequence([*range(40, 90), i], 5) for i in range(10)]
    others = [sequence([200 + i] * 20, 5) for i in range(10)]
    expected = alone(model, [*sequences, *others])
    assert run(scheduler, *sequences, *others) == expected
    assert [each.cached_tokens for each in sequences[1:]] == [50] * 9


class Tower:
    """How many images a model is given at a time."""

    def __init__(self, model: LoadedModel) -> None:
        self.batches: list[int] = []
        assert model.model.vision is not None
        model.model.vision.register_forward_pre_hook(lambda _, given: self.batches.append(len(given[0])))


def with_image(index: int) -> Sequence:
    pixels = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(index)).numpy()

    class Image:
        digest = f"{index + 1:064x}"[::-1]

    images: Any = (Image(),)
    prompt = Prompt((1, 2, *[-1] * IMAGE_TOKENS, 30 + index), (0,) * (3 + IMAGE_TOKENS), images)
    return Sequence.start(
        prompt, [pixels], Sampling(max_tokens=6, temperature=0, ignore_eos=True), IMAGE_TOKENS
    )


class Prompts(Replaying):
    """Counts those graphs that read prompts: what they give are rows of many positions."""

    def __call__(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        self.sizes = [*getattr(self, "sizes", []), *inputs[0].shape[1:2]]
        return super().__call__(compute, inputs)


@pytest.mark.parametrize(
    ("length", "read"), [(1, 64), (64, 64), (65, 128), (300, 512), (512, 512), (513, 768), (1500, 1536)]
)
def test_prompts_are_read_by_graphs_of_few_sizes(length: int, read: int) -> None:
    assert padded(length) == read


@pytest.mark.parametrize("length", [1, 64, 65, 300, 513, 620], ids="{} positions".format)
def test_a_prompt_read_by_a_graph_is_answered_as_without(length: int) -> None:
    """The longest would be padded beyond the context's end: they are read as they are."""
    model, replaying = tiny_model(vision=False), Prompts()
    rng = random.Random(length)
    prompts = [sequence([rng.randrange(200) for _ in range(length)], 5) for _ in range(4)]
    expected = alone(model, prompts)
    scheduler = on_gpu(model, replaying, prefix_cache_bytes=0)
    assert [run(scheduler, each)[0] for each in prompts] == expected
    fits = padded(length) <= model.model.config.decoder.max_positions
    assert (padded(length) in replaying.sizes) == fits


def test_images_of_waiting_prompts_are_seen_together() -> None:
    model = tiny_model()
    tower = Tower(model)
    expected = [
        run(Scheduler(model.model, TOKENIZER, prefix_cache_bytes=0), with_image(i))[0] for i in range(20)
    ]
    assert tower.batches == [1] * 20
    tower.batches.clear()
    scheduler = on_gpu(model, graphs=Graphs(Replaying))
    assert run(scheduler, *(with_image(i) for i in range(20))) == expected
    assert tower.batches == [16, 4]


def test_an_image_that_fails_in_a_crowd_fails_alone() -> None:
    model = tiny_model()
    sequences = [with_image(i) for i in range(8)]
    expected = [
        run(Scheduler(model.model, TOKENIZER, prefix_cache_bytes=0), with_image(i))[0] for i in range(8)
    ]
    sequences[3].images = [sequences[3].images[0][:, :10]]
    scheduler, failed = on_gpu(model), []
    for each in sequences:
        scheduler.submit(each)
    while scheduler.busy:
        failed += [of for of, event in scheduler.step() if isinstance(event, GhostvisError)]
    assert failed == [sequences[3]]
    assert [each.output for each in sequences if each not in failed] == expected[:3] + expected[4:]


def together(model: LoadedModel, *sequences: Sequence) -> dict[Sequence, GhostvisError]:
    """Run them in one batch; who failed, and of what."""
    scheduler = on_gpu(model)
    failed: dict[Sequence, GhostvisError] = {}
    for each in sequences:
        scheduler.submit(each)
    while scheduler.busy:
        failed |= {of: event for of, event in scheduler.step() if isinstance(event, GhostvisError)}
    return failed


DRAWN: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "top_p": 1.0}


def test_a_row_that_cannot_be_drawn_ends_alone_and_no_neighbour_draws_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(vision=False)
    asked = [DRAWN | {"seed": 1}, DRAWN | {"seed": 2, "top_p": 0.5}, {}, DRAWN | {"seed": 3}]
    sequences = [
        sequence(list(range(n, n + 20)), 30, **each) for n, each in zip((40, 60, 80, 99), asked, strict=True)
    ]
    expected = alone(model, sequences)

    def fails(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(torch.Tensor, "cumsum", fails)
    failed = together(model, *sequences)
    assert list(failed) == [sequences[1]] and "no luck" in str(failed[sequences[1]])
    assert [each.output for each in sequences if each not in failed] == [expected[i] for i in (0, 2, 3)]


def test_a_grammar_that_breaks_ends_its_own_answer_alone() -> None:
    class Breaks(Grammar):
        def __init__(self, after: int) -> None:
            self.left = after

        def allowed(self, size: int) -> Tensor:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("no luck")
            return torch.ones(size, dtype=torch.bool)

        def take(self, token: int) -> None:
            pass

    model = tiny_model(vision=False)
    sequences = [sequence(list(range(n, n + 20)), 30, **DRAWN, seed=n) for n in (40, 60, 80, 99)]
    expected = alone(model, sequences)
    for broken, after in ((sequences[0], 0), (sequences[2], 5)):
        broken.sampling, broken.grammar = broken.sampling.changed(regex=".*"), Breaks(after)
    assert set(together(model, *sequences)) == {sequences[0], sequences[2]}
    assert [len(sequences[i].output) for i in (0, 2)] == [0, 5]
    assert [sequences[i].output for i in (1, 3)] == [expected[1], expected[3]]


def test_where_no_graph_can_be_captured_decoding_goes_on_and_one_line_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuses() -> Replaying:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    model = tiny_model(vision=False)
    sequences = crowd(6)
    expected = alone(model, sequences)
    decode = Padded(model.model.decoder, graphs=Graphs(refuses))
    scheduler = Scheduler(model.model, model.tokenizer, decode=decode, ahead=True)
    assert run(scheduler, *sequences) == expected
    (record,) = caplog.records
    assert "operation not permitted" in record.message and "and more" not in record.message


def test_graphs_of_memory_that_is_gone_are_not_replayed() -> None:
    """The cache grows while answers do: every address in a graph is another one then."""
    model, replaying = tiny_model(vision=False), Replaying()
    grows = sequence(list(range(40, 60)), 500)
    (expected,) = alone(model, [grows])
    scheduler = on_gpu(model, replaying)
    before = scheduler.rows.cache
    assert run(scheduler, grows) == [expected]
    assert scheduler.rows.cache is not before
    assert replaying.captured == 3  # 256, 512 and 640 positions


def test_a_kind_of_graphs_that_cannot_be_captured_leaves_the_others_theirs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class NoPrompts(Replaying):
        def __call__(
            self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]
        ) -> Callable[..., Tensor]:
            if inputs[0].is_floating_point():
                raise torch.cuda.OutOfMemoryError("no memory for so many rows")
            return super().__call__(compute, inputs)

    model, replaying = tiny_model(vision=False), NoPrompts()
    sequences = crowd(12)
    expected = alone(model, sequences)
    scheduler = on_gpu(model, replaying, max_batch=4)
    assert run(scheduler, *sequences) == expected
    assert scheduler.graphs is not None and scheduler.graphs.failed == {"prompts"}
    assert replaying.replayed > replaying.captured > 0
    assert "graphs of prompts are off" in caplog.text


@pytest.mark.parametrize("on_a_gpu", [True, False])
def test_a_long_prompt_alone_does_not_make_the_rows_of_an_earlier_batch_as_long(on_a_gpu: bool) -> None:
    model = tiny_model(vision=False)
    scheduler = on_gpu(model) if on_a_gpu else Scheduler(model.model, model.tokenizer)
    run(scheduler, *crowd(16))
    assert scheduler.rows.cache.rows >= 16
    scheduler.rows.idle_bytes = scheduler.rows.cache.layers.nbytes  # as if they took much
    long = sequence([random.Random(4).randrange(200) for _ in range(500)], 6)
    (expected,) = alone(model, [long])
    assert run(scheduler, long) == [expected]
    assert scheduler.rows.cache.rows <= 2 and scheduler.rows.cache.capacity >= 500


def test_padding_takes_no_more_memory_than_the_prompt_needs() -> None:
    model = tiny_model(vision=False)
    scheduler = on_gpu(model, prefix_cache_bytes=0)
    scheduler.rows.reserve(4, 512)
    cache = scheduler.rows.cache
    rng = random.Random(3)
    long = sequence([rng.randrange(200) for _ in range(500)], 6)
    run(scheduler, long)
    follows = sequence([*long.prompt.ids[:440], *[rng.randrange(200) for _ in range(65)]], 6)
    (expected,) = alone(model, [follows])
    running = sequence(list(long.prompt.ids[:440]), 40)
    scheduler.submit(running)
    scheduler.step()
    scheduler.submit(follows)
    while not follows.done:
        scheduler.step()
    assert follows.cached_tokens == 440 and follows.output == expected
    assert scheduler.rows.cache is cache  # 440 and 128 are more than 512


class Refusing(Replaying):
    def __call__(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        raise RuntimeError("not now")


def test_graphs_hold_no_memory_that_is_given_back() -> None:
    model = tiny_model(vision=False)
    graphs = Graphs(Refusing)  # a real one holds no function, as the one that stands for it does
    decode = Padded(model.model.decoder, graphs=graphs)
    scheduler = Scheduler(model.model, model.tokenizer, decode=decode, varlen=True, graphs=graphs)
    run(scheduler, sequence([1, 2, 3], 5))
    cache = weakref.ref(scheduler.rows.cache)
    scheduler.rows.reset()
    gc.collect()
    assert cache() is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_layers_are_compiled_once_for_all_of_them_and_change_no_token(tmp_path: Any) -> None:
    """As on a GPU: what lies between two attentions and the head, for batches of 1 and 2."""
    model = load_model(write(tmp_path, "n7", Shape(seq=40, layers=4)))
    sequences = crowd(8, 1, vocabulary=VOCABULARY)
    expected = alone(model, sequences)
    torch._dynamo.reset()
    counters["stats"].clear()
    compile_layers(model.model.decoder)
    scheduler = on_gpu(model, max_batch=2)
    assert run(scheduler, *sequences) == expected
    compiled = counters["stats"]["unique_graphs"]
    assert 0 < compiled <= 12  # of any number of layers, and of prompts
    scheduler.rows.reserve(8, 512)
    assert run(scheduler, *crowd(8, 1, vocabulary=VOCABULARY)) == expected
    assert counters["stats"]["unique_graphs"] == compiled  # and of a cache of any size


def test_all_graphs_can_be_captured_before_the_first_request() -> None:
    model, replaying = tiny_model(vision=False), Replaying()
    scheduler = on_gpu(model, replaying, max_batch=6)
    scheduler.warm_up()
    assert replaying.captured == 4  # 1, 2, 4, and 6 as 8
    sequences = crowd(6)
    for each in sequences:
        each.sampling = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    expected = alone(model, sequences)
    assert run(scheduler, *sequences) == expected
