"""The training pictures: rendered once, by all cores, into one file; shown many times with new questions."""

import multiprocessing
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from ghostvis_cli.model.preprocess import crop
from tools.train_demo.progress import Progress
from tools.train_demo.rows import pool_scene
from tools.train_demo.scenes import Pixels, render

CHUNK = 500


def picture(seed: int, index: int) -> Image.Image:
    """The pool's picture as a file would hold it."""
    return render(pool_scene(seed, index), Random(f"{seed}/pixels/{index}"))


def _chunk(job: tuple[int, int, int, int]) -> Pixels:
    seed, first, last, size = job
    return np.stack([np.asarray(crop(picture(seed, index), size)) for index in range(first, last)])


def training_pictures(folder: Path, seed: int, count: int, size: int, workers: int) -> Pixels:
    """(count, size, size, 3) uint8: read from `folder`, or rendered into it."""
    path = folder / f"pictures_{seed}_{count}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        pool = np.lib.format.open_memmap(part, "w+", np.uint8, (count, size, size, 3))
        jobs = [(seed, first, min(first + CHUNK, count), size) for first in range(0, count, CHUNK)]
        with (
            multiprocessing.get_context("fork").Pool(max(1, workers)) as processes,
            Progress("pictures") as progress,
        ):
            for at, pixels in enumerate(processes.imap(_chunk, jobs)):
                pool[jobs[at][1] : jobs[at][2]] = pixels
                progress.show(jobs[at][2] / count)
        pool.flush()
        part.rename(path)
    loaded: Pixels = np.load(path, mmap_mode="c")  # torch wants writable memory; nothing reaches the file
    return loaded
