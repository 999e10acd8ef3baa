"""The training loop: look first (auxiliary task alone), then look and answer, with a falling learning rate.

Batch i depends on the seed and i alone, and a checkpoint holds everything else that the next step depends on:
an interrupted run of `--steps N` continues to the very weights it would have reached.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ghostvis_cli.checkpoint.tokenizer import IMAGE_TOKEN, Tokenizer
from ghostvis_cli.model.config import GhostVisConfig
from ghostvis_cli.model.ghostvis import GhostVis
from tools.train_demo.network import Probes, answer_loss, demo_config, first_weights, place_rows, see
from tools.train_demo.pool import training_pictures
from tools.train_demo.progress import Progress
from tools.train_demo.rows import IGNORED, Batch, Batches, Renderer
from tools.train_demo.vocabulary import corpus, learn, save

CHECKPOINT = "training.pt"


@dataclass(frozen=True)
class Plan:
    """Everything that decides the result, and how long to take. Give `steps` or `minutes`, not both."""

    seed: int = 1
    steps: int | None = None
    minutes: float | None = None
    pictures: int = 160_000
    share: float = 1.0  # of the batch sizes in rows.SHAPES; a processor wants about 1/16
    look_until: float = 0.05  # of the run: the auxiliary task alone
    decay_from: float = 0.35
    probes_until: float = 0.6
    decoder_rate: float = 0.012  # Muon
    vision_rate: float = 0.006  # Muon
    row_rate: float = 0.02  # AdamW: token embedding
    head_rate: float = 0.004  # AdamW: output matrix
    other_rate: float = 0.002  # AdamW: norms, biases, positions, queries
    compiled: bool = False


class _Served(Dataset[Batch]):
    """Batches from `first` on, for DataLoader's worker processes."""

    def __init__(self, batches: Batches, first: int) -> None:
        self.batches, self.first = batches, first

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[self.first + index]


def _served(batches: Batches, first: int, workers: int) -> Iterator[Batch]:
    source = _Served(batches, first)
    if workers == 0:
        return (source[at] for at in range(len(source)))
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=range(2**30),
        num_workers=workers,
        prefetch_factor=6,
        collate_fn=_as_is,
        multiprocessing_context="fork",
    )
    return iter(loader)


def _as_is(batch: Any) -> Any:
    return batch


class Trainer:
    """The state of a run. `train` goes on from wherever it stands."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        *,
        device: str = "cpu",
        workers: int = 0,
        config: GhostVisConfig | None = None,
    ) -> None:
        self.plan, self.out, self.workers = plan, out, workers
        self.device = torch.device(device)
        self.step, self.elapsed_s, self.waited_s = 0, 0.0, 0.0
        config = config or demo_config()
        assert config.vision is not None
        self.tokenizer = _tokenizer(out, plan.seed)
        self.renderer = Renderer(self.tokenizer, config.vision.num_tokens)
        self.image_id = self.tokenizer.special(IMAGE_TOKEN)
        torch.manual_seed(plan.seed)
        self.model = GhostVis(config)
        first_weights(self.model)
        self.probes = Probes(config)
        self.model.to(self.device)
        self.probes.to(self.device)
        tower = config.vision.tower
        self.batches = Batches(
            self.renderer, plan.seed, plan.pictures, tower.image_size // tower.patch_size, plan.share
        )
        pool = training_pictures(out, plan.seed, plan.pictures, tower.image_size, max(1, workers))
        # All pictures lie on the device: 6 GB at full size, and no copying in the loop.
        self.pool = (
            torch.from_numpy(pool[:]).to(self.device)
            if self.device.type == "cuda"
            else torch.from_numpy(pool)
        )
        self.mean = torch.tensor(config.vision.image_mean, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(config.vision.image_std, device=self.device).view(3, 1, 1)
        self.optimizers = _optimizers(self.model, self.probes, plan)
        self.see: Callable[..., Any] = see
        self.trunk: Callable[..., Tensor] = self.model.decoder.trunk
        if plan.compiled:
            self.see = torch.compile(see)
            self.trunk = torch.compile(self.model.decoder.trunk)

    @property
    def progress(self) -> float:
        if self.plan.steps is not None:
            return self.step / self.plan.steps
        assert self.plan.minutes is not None
        return self.elapsed_s / (60 * self.plan.minutes)

    def train(self, *, until: int | None = None, save_every_s: float = 60.0) -> None:
        """Train to the plan's end, or to step `until`."""
        source = _served(self.batches, self.step, self.workers)
        resumed_s, started = self.elapsed_s, time.monotonic()
        saved = started
        with Progress("training") as progress:
            while self.progress < 1 and (until is None or self.step < until):
                asked = time.monotonic()
                batch = next(source)
                self.waited_s += time.monotonic() - asked
                note = self._step(batch)
                self.step += 1
                self.elapsed_s = resumed_s + time.monotonic() - started
                if note:
                    progress.show(
                        self.progress, f"step {self.step}, waited {self.waited_s:.0f} s for rows, " + note
                    )
                if time.monotonic() - saved > save_every_s:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def _step(self, batch: Batch) -> str:
        progress, plan = self.progress, self.plan
        looking = progress < plan.look_until
        weight = 0.5 * max(0.0, 1 - progress / plan.probes_until)
        self._set_rates(progress)
        ids, targets = (
            torch.from_numpy(a).to(self.device, non_blocking=True) for a in (batch.ids, batch.targets)
        )
        with self._autocast():
            assert self.model.vision is not None
            pixels = (
                self.pool[torch.from_numpy(batch.pictures).to(self.pool.device)].permute(0, 3, 1, 2).float()
                / 255
            )
            tower, rows = self.see(self.model.vision, (pixels - self.mean) / self.std)
            loss, answer, seen = torch.zeros((), device=self.device), torch.zeros(()), torch.zeros(())
            if weight > 0:
                colors, kinds = (torch.from_numpy(a).to(self.device) for a in (batch.colors, batch.kinds))
                probe, seen = self.probes(tower, rows, colors, kinds)
                loss = loss + (1.0 if looking else weight) * probe
            if not looking:
                answer = self._answer(ids, targets, rows[: batch.used])
                loss = loss + answer
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.step % 50 and self.progress < 1:
            return ""
        return f"answers {float(answer.detach()):.4f}, patches seen {float(seen):.0%}"

    def _answer(self, ids: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        decoder = self.model.decoder
        x = place_rows(decoder.embed(ids), ids, self.image_id, rows)
        positions = torch.arange(ids.size(1), device=ids.device)[None]
        hidden = self.trunk(x, decoder.plan(positions, length=ids.size(1)))
        learned = targets != IGNORED
        return answer_loss(decoder.logits(hidden[learned]), targets[learned])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def _set_rates(self, progress: float) -> None:
        warm = min(1.0, (self.step + 1) / 60)
        fall = min(1.0, (1.0 - progress) / (1.0 - self.plan.decay_from))
        momentum = 0.85 + 0.1 * min(1.0, self.step / 200)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * warm * max(0.002, fall)
                if "momentum" in group:
                    group["momentum"] = momentum

    def save(self) -> None:
        """Write the run's state beside the old one, then take its place."""
        state = {
            "plan": asdict(self.plan),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "model": self.model.state_dict(),
            "probes": self.probes.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        part = self.out / (CHECKPOINT + ".part")
        torch.save(state, part)
        part.rename(self.out / CHECKPOINT)

    def resume(self) -> None:
        state = torch.load(self.out / CHECKPOINT, map_location=self.device, weights_only=True)
        if state["plan"]["seed"] != self.plan.seed or state["plan"]["pictures"] != self.plan.pictures:
            raise SystemExit(
                f"{self.out / CHECKPOINT} was made with another --seed or --pictures: choose another --out"
            )
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self.model.load_state_dict(state["model"])
        self.probes.load_state_dict(state["probes"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _tokenizer(out: Path, seed: int) -> Tokenizer:
    folder = out / "tokenizer"
    if not (folder / "tokenizer.pkl").exists():
        save(learn(corpus(seed)), folder)
    return Tokenizer.load(folder / "tokenizer.pkl")


def _optimizers(model: GhostVis, probes: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside the networks, AdamW for everything else."""
    groups: dict[str, list[nn.Parameter]] = {"decoder": [], "vision": [], "row": [], "head": [], "other": []}
    for name, parameter in [*model.named_parameters(), *probes.named_parameters()]:
        if name == "decoder.wte.weight":
            groups["row"].append(parameter)
        elif name == "decoder.lm_head.weight":
            groups["head"].append(parameter)
        elif parameter.ndim != 2 or "position" in name or not name.startswith(("decoder", "vision")):
            groups["other"].append(parameter)
        else:
            groups["decoder" if name.startswith("decoder") else "vision"].append(parameter)
    muon = torch.optim.Muon(
        [
            {"params": groups["decoder"], "peak": plan.decoder_rate},
            {"params": groups["vision"], "peak": plan.vision_rate},
        ],
        weight_decay=0.0,
    )
    rates = {"row": plan.row_rate, "head": plan.head_rate, "other": plan.other_rate}
    adam = torch.optim.AdamW(
        [{"params": groups[name], "peak": rate} for name, rate in rates.items()],
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=next(model.parameters()).is_cuda,
    )
    return [muon, adam]
