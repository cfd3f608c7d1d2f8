# SPDX-License-Identifier: Apache-2.0
"""Hours of work at small size: whether memory, open files or caches grow.

    python -m bench long                          # an hour each of training, maps and graphs, side by side
    python -m bench long --seconds 60 --only graphs

Training is one call of the tiny preset. Maps are of scenes of ever other sizes, by one model. Graphs are PDGR forward
and backward on grids of ever other sizes. Each has a process of its own, and looks at itself after every step, map or
graph. What grows as a process warms up is left out: slopes are of the second half of the time.
"""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import drseg_core as drseg
from bench import record
from bench.command import command_parser, rows_file
from drseg_core.config.load import load_config, override
from drseg_core.data.synthetic import write_scenes
from drseg_core.files import write_text_atomic
from drseg_core.nn import PDGR
from drseg_core.ops.knn_graph import registration as knn_registration
from drseg_core.scenes.synthetic import write_synthetic_scene
from drseg_core.training.loop import train


class Sample(NamedTuple):
    """Seconds since the start, resident MiB, open files, and what caches of drseg hold."""

    seconds: float
    memory: float
    files: int
    cached: int


def look(began: float) -> Sample:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        time.monotonic() - began,
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(list(Path("/proc/self/fd").iterdir())),
        cached(),
    )


@functools.cache
def _caches() -> list[Any]:
    found = [one for one in gc.get_objects() if isinstance(one, functools._lru_cache_wrapper)]
    return [one for one in found if one.__module__.startswith(("drseg_core", "drseg_kernels"))]


def cached() -> int:
    """Entries of every ``functools.cache`` of drseg that was there at the first call, and kept decay tables."""
    return sum(one.cache_info().currsize for one in _caches()) + len(knn_registration._kept)


def training(seconds: float, seen: Callable[[], None], folder: Path) -> None:
    write_scenes(folder / "data", splits={"train": 12}, size=64)
    config = load_config("tiny")
    small = {"train.seconds": seconds, "train.iterations": 10**7, "train.checkpoint_every": 50}
    config = override(config, {**small, "train.crop_size": 64, "train.batch_size": 2})
    train(config, f"folder:{folder / 'data'}", folder / "run", show_progress=False, on_step=lambda _: seen())


def maps(seconds: float, seen: Callable[[], None], folder: Path) -> None:
    run = folder / "run"
    write_scenes(folder / "data", splits={"train": 2}, size=64)
    config = override(load_config("tiny"), {"train.iterations": 1, "train.crop_size": 64, "train.batch_size": 1})
    train(config, f"folder:{folder / 'data'}", run, show_progress=False)
    model, draw, began = drseg.load(run), random.Random(0), time.monotonic()
    while time.monotonic() - began < seconds:
        scene = folder / "scene.tif"
        write_synthetic_scene(scene, width=draw.randint(40, 300), height=draw.randint(40, 300))
        out = folder / "map.tif"
        drseg.predict(model, scene, classes=["building", "road", "tree"], out=out)
        for path in (scene, *folder.glob("map*")):
            path.unlink()
        seen()


def graphs(seconds: float, seen: Callable[[], None], folder: Path) -> None:
    draw, began = random.Random(0), time.monotonic()
    pdgr = PDGR(channels=32, prior_dim=24, k=20, edge_hidden=32)
    while time.monotonic() - began < seconds:
        h, w, batch = draw.randint(1, 40), draw.randint(1, 40), draw.randint(1, 3)
        features = torch.randn(batch, 32, h, w, requires_grad=True)
        pdgr(features, torch.randn(batch, 24, h, w)).square().mean().backward()
        pdgr.zero_grad(set_to_none=True)
        seen()


KINDS = {"training": training, "maps": maps, "graphs": graphs}


def measure(kind: str, seconds: float) -> dict[str, Any]:
    """What a process held over its time: slopes in MiB an hour, and files and cached entries half way and last."""
    began, samples = time.monotonic(), list[Sample]()

    def seen() -> None:
        # often enough for a slope, seldom enough for hours
        if not samples or time.monotonic() - began - samples[-1].seconds > seconds / 2000:
            samples.append(look(began))

    with tempfile.TemporaryDirectory(prefix="drseg-long-") as folder:
        KINDS[kind](seconds, seen, Path(folder))
    return {"kind": kind, "asked_s": seconds, **summary(samples)}


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Of the second half of the time."""
    half = [sample for sample in samples if sample.seconds >= samples[-1].seconds / 2]
    hours = np.array([sample.seconds for sample in half]) / 3600
    slope = float(np.polyfit(hours, [sample.memory for sample in half], 1)[0]) if len(half) > 2 else float("nan")
    fifth = max(len(half) // 5, 1)
    return {
        "samples": len(samples),
        "seconds": round(samples[-1].seconds),
        "memory_mib": [round(statistics.median(s.memory for s in part), 1) for part in (half[:fifth], half[-fifth:])],
        "mib_per_hour": round(slope, 2),
        "files": [max(sample.files for sample in part) for part in (half[:fifth], half[-fifth:])],
        "cached": [half[0].cached, half[-1].cached],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("long", __doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="of each kind")
    parser.add_argument("--only", choices=list(KINDS), action="append", help="some kinds")
    parser.add_argument("--out", type=rows_file, help="also write the rows here, as JSON lines")
    args = parser.parse_args(arguments)
    kinds = args.only or list(KINDS)
    with multiprocessing.get_context("spawn").Pool(len(kinds)) as pool:
        rows = pool.starmap(measure, [(kind, args.seconds) for kind in kinds])
    for row in rows:
        print(
            f"{row['kind']}: {row['samples']} looks in {row['seconds']} s; from half way to the end "
            f"memory {row['memory_mib'][0]} to {row['memory_mib'][1]} MiB ({row['mib_per_hour']:+} MiB an hour), "
            f"open files {row['files'][0]} to {row['files'][1]}, cached {row['cached'][0]} to {row['cached'][1]}"
        )
    if args.out is not None:
        where = record.environment("cpu")
        write_text_atomic(args.out, "".join(json.dumps({**row, **where}) + "\n" for row in rows))
    return 0
