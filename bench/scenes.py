# SPDX-License-Identifier: Apache-2.0
"""How near mapping a scene comes to the model's own speed, with random weights.

    python -m bench scenes                                     # the tiny preset, 1536 x 1536 pixels
    python -m bench scenes --preset vitb --device cuda --size 8192x8192 --out bench/results/FOLDER/scenes.jsonl

Three things are timed in turns: the forward passes of all tiles alone, the whole map by drseg predict, and the same map
in one thread. drseg predict reads, writes and keeps blocks in threads of their own. Both maps must have the same bytes,
or no row is written.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import record
from bench.command import command_parser, pixels, positive, rows_file
from bench.scene_memory import write_scene
from drseg_core.config.load import load_config, override
from drseg_core.evaluation.inference import Predictor
from drseg_core.models.build import build_model
from drseg_core.models.tiling import tile_starts
from drseg_core.scenes import predict

_MAPS = ("threads", "one_thread")
_NAMES = ("roof", "road", "tree", "grass", "water", "soil", "car", "rail")


class _Here:
    """Does at once, in this thread, what a thread would be given."""

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def _no_thread(name: str) -> Iterator[_Here]:
    yield _Here()


def random_predictor(preset: str, device: str) -> Predictor:
    """A model of a preset with random weights, and its tiles."""
    config = override(load_config(preset), {"model.clip.weights": None, "model.dino.weights": None})
    torch.manual_seed(0)
    tiles = {name: getattr(config.evaluation, name) for name in ("tile_size", "overlap", "batch_size")}
    return Predictor(build_model(config.model), _NAMES, mode="tile", device=device, **tiles)


def forward_seconds(predictor: Predictor, height: int, width: int) -> float:
    """The forward passes of a map, and nothing else."""
    side, overlap, batch = predictor.tile_size, predictor.overlap, predictor.batch_size
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (batch, 3, side, side), generator=generator).to(torch.uint8).to(predictor.device)
    columns = len(tile_starts(width, side, overlap))
    begin = time.perf_counter()
    for _ in tile_starts(height, side, overlap):
        for first in range(0, columns, batch):
            predictor.forward(tiles[: min(batch, columns - first)])
    if predictor.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def map_seconds(predictor: Predictor, scene: Path, out: Path) -> float:
    """A whole map, its blocks kept."""
    begin = time.perf_counter()
    predict.predict_scene(predictor, scene, out, work=predict.Work({}), progress=False)
    return time.perf_counter() - begin


def measure(predictor: Predictor, size: tuple[int, int], repeats: int, folder: Path) -> dict[str, Any]:
    """Medians of turns.

    Raises:
        RuntimeError: the maps differ.
    """
    scene = write_scene(folder / "scene.tif", *size)
    found: dict[str, list[float]] = {"forward": [], "threads": [], "one_thread": []}
    for turn in range(repeats + 1):
        maps = [folder / f"{name}{turn}.tif" for name in ("threads", "one")]
        seconds = {"forward": forward_seconds(predictor, *size), "threads": map_seconds(predictor, scene, maps[0])}
        with mock.patch.object(predict, "gdal_thread", _no_thread):
            seconds["one_thread"] = map_seconds(predictor, scene, maps[1])
        if maps[0].read_bytes() != maps[1].read_bytes():
            raise RuntimeError("scenes: the maps differ; expected the same bytes with threads and without")
        # the first loads what is loaded once
        for name in found if turn else ():
            found[name].append(seconds[name])
    middle = {name: statistics.median(values) for name, values in found.items()}
    # of turns, as other processes may take a share of the machine
    shares = [[model / whole for model, whole in zip(found["forward"], found[name], strict=True)] for name in _MAPS]
    return {
        **{f"{name}_s": round(value, 3) for name, value in middle.items()},
        "share_of_model": round(statistics.median(shares[0]), 3),
        "share_of_model_one_thread": round(statistics.median(shares[1]), 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("scenes", __doc__)
    parser.add_argument("--preset", default="tiny", help="tiny by default")
    parser.add_argument("--size", type=pixels, default="1536x1536", metavar="WxH", help="of the scene in pixels")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, default=1, help="of torch on a CPU: others read and write")
    parser.add_argument("--out", type=rows_file, help="JSON-lines file to add the row to")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    width, height = args.size
    size = f"{width}x{height}"
    with tempfile.TemporaryDirectory(prefix="drseg-scenes-") as folder:
        try:
            figures = measure(random_predictor(args.preset, args.device), (height, width), args.repeats, Path(folder))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    case = {"op": "scene", "case": size, "preset": args.preset, "threads": args.threads}
    print(
        f"{args.preset}, {size}: forward passes {figures['forward_s']:.2f} s, map {figures['threads_s']:.2f} s "
        f"({figures['share_of_model']:.0%} of the model's speed), in one thread {figures['one_thread_s']:.2f} s "
        f"({figures['share_of_model_one_thread']:.0%})"
    )
    if args.out:
        record.append(args.out, [{**case, **figures, **record.environment(args.device)}])
    return 0
