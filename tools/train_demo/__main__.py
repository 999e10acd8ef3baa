"""python -m tools.train_demo: train, resume, evaluate, export, draw the examples. See README.md here."""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.train_demo.evaluate import Table

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "ghostvis_cli" / "demo"


def main() -> None:
    options = _parser().parse_args()
    if options.examples:
        from tools.train_demo.examples import draw

        draw(options.examples)
    elif options.evaluate:
        _evaluate(options)
    else:
        _train(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tools.train_demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where the run keeps its files")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="how many steps the whole run has (repeatable)")
    length.add_argument("--minutes", type=float, help="how long the whole run takes instead (default: 60)")
    parser.add_argument("--until", type=int, help="stop at this step; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved step")
    parser.add_argument("--seed", type=int, default=1, help="of the run, or of the questions to --evaluate")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--workers", type=int, help="processes that make pictures and rows (default: all cores but one)"
    )
    parser.add_argument(
        "--pictures", type=int, help="pictures in the training pool (default: 160000; cpu 20000)"
    )
    parser.add_argument("--share", type=float, help="of the full batch sizes (default: 1; cpu 1/16)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument(
        "--evaluate", type=Path, metavar="BASE", help="evaluate the model in this base directory"
    )
    parser.add_argument("--count", type=int, default=200, help="questions a type in the evaluation")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="BASE",
        help=f"write the model here (default: OUT/base; ships from {DEMO})",
    )
    parser.add_argument("--examples", type=Path, metavar="FOLDER", help="draw the example pictures and stop")
    return parser


def _train(options: argparse.Namespace) -> None:
    import torch

    from tools.train_demo.evaluate import as_text, evaluate
    from tools.train_demo.export import rounded, write
    from tools.train_demo.train import Plan, Trainer

    cuda = options.device.startswith("cuda")
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
    workers = options.workers if options.workers is not None else max(1, (os.cpu_count() or 2) - 1)
    plan = Plan(
        seed=options.seed,
        steps=options.steps,
        minutes=None if options.steps else (options.minutes or 60.0),
        pictures=options.pictures or (160_000 if cuda else 20_000),
        share=options.share or (1.0 if cuda else 1 / 16),
        compiled=options.compile,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(plan, options.out, device=options.device, workers=workers)
    if options.resume:
        trainer.resume()
    trainer.train(until=options.until)
    machine = _machine(options.device)
    print(
        f"trained {trainer.step} steps in {trainer.elapsed_s / 60:.1f} minutes on {machine}", file=sys.stderr
    )
    model = rounded(trainer.model).eval()
    facts: dict[str, Any] = {
        "user_config": {**asdict(plan), "device": options.device},
        "training": {
            "minutes": round(trainer.elapsed_s / 60, 1),
            "machine": machine,
            "torch": torch.__version__,
        },
    }
    base = options.export or options.out / "base"
    path = write(model, trainer.tokenizer, base, trainer.step, facts)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    table = evaluate(model, trainer.tokenizer, count=options.count)
    print(as_text(table))
    _note(base, table)


def _note(base: Path, table: "Table") -> None:
    """Put the evaluation into the meta file."""
    from tools.train_demo.export import MODEL_TAG, SOURCE

    meta = max((base / SOURCE / MODEL_TAG).glob("meta_*.json"))
    written = json.loads(meta.read_text(encoding="utf-8"))
    written["evaluation"] = {
        part: {k: round(v, 4) for k, v in scores.items()} for part, scores in table.items()
    }
    meta.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _machine(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"


def _evaluate(options: argparse.Namespace) -> None:
    from tools.train_demo.evaluate import as_text, evaluate
    from tools.train_demo.export import load

    model, tokenizer = load(options.evaluate)
    table = evaluate(model.to(options.device), tokenizer, seed=options.seed, count=options.count)
    print(as_text(table))
    _note(options.evaluate, table)


if __name__ == "__main__":
    main()
