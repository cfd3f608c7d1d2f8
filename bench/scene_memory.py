# SPDX-License-Identifier: Apache-2.0
"""Peak memory of mapping a large scene above what the program and the model hold.

    python -m bench.scene_memory                        # 30000 x 2000 and 2000 x 30000, 100 classes
    python -m bench.scene_memory --size 30000x2000 --classes 31

The model looks at one pixel at a time and costs nothing, so all that counts is reading, blending and writing. Each
scene is mapped in a process of its own; GDAL's cache is part of the peak.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.command import command_parser, pixels, positive
from drseg_core.data.dataset import IGNORE
from drseg_core.testing.memory import high_water

BOUND = 10**9


class Output(NamedTuple):
    logits: Tensor
    uncertainty: Tensor


class PixelModel(torch.nn.Module):
    """Scores class c by how near the red value of a pixel is to c; the map is that of every pixel alone."""

    def __init__(self, classes: int, reduce: int = 4) -> None:
        super().__init__()
        self.classes, self.reduce = classes, reduce

    def tokenize(self, names: Sequence[str]) -> Tensor:
        return torch.arange(len(names))[:, None]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0].float() / max(self.classes - 1, 1)

    def forward(self, image: Tensor, text: Tensor) -> Output:
        small = torch.nn.functional.avg_pool2d(image[:, :1], self.reduce)
        return Output(-8 * (small - text[None, :, None, None]).abs(), small)


def write_scene(path: Path, height: int, width: int, *, valid: tuple[int, int] | None = None) -> Path:
    """A tiled 8-bit GeoTIFF of noise; all but the first ``valid`` rows and columns is nodata."""
    import rasterio
    from rasterio.windows import Window

    profile: dict[str, Any] = {"driver": "GTiff", "count": 3, "dtype": "uint8", "height": height, "width": width}
    profile |= {"tiled": True, "blockxsize": 256, "blockysize": 256, "nodata": 0, "sparse_ok": True}
    generator = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile) as file:
            bottom, right = valid or (height, width)
            for top in range(0, bottom, 256):
                rows = min(256, bottom - top)
                data = generator.integers(1, 256, size=(3, rows, right), dtype=np.uint8)
                file.write(data, window=Window(0, top, right, rows))
    return path


def measure(scene: Path, classes: int, out: Path) -> dict[str, float]:
    """Map a scene with the stub; seconds, and bytes above what the process held before."""
    from drseg_core.evaluation.inference import Predictor
    from drseg_core.scenes.predict import predict_scene

    torch.set_num_threads(1)
    names = [f"class {i}" for i in range(classes)]
    predictor = Predictor(PixelModel(classes), names, mode="tile", tile_size=384, overlap=128)
    # what is loaded at first use is no part of the scene
    small = write_scene(out / "small.tif", 400, 400)
    predict_scene(predictor, small, out / "small_map.tif", progress=False)
    before, begin = high_water(), time.perf_counter()
    predict_scene(predictor, scene, out / "map.tif", progress=False)
    return {"seconds": time.perf_counter() - begin, "bytes": high_water() - before}


def measured(height: int, width: int, classes: int, *, valid: tuple[int, int] | None = None) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        scene = write_scene(Path(folder) / "scene.tif", height, width, valid=valid)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(measure, (scene, classes, Path(folder)))


def main(words: Sequence[str] | None = None) -> int:
    parser = command_parser("scene_memory", __doc__)
    # no command of python -m bench
    parser.prog = "python -m bench.scene_memory"
    parser.add_argument("--size", type=pixels, action="append", metavar="WxH", help="size of a scene in pixels")
    parser.add_argument("--classes", type=positive, default=100, help="at most 255")
    args = parser.parse_args(words)
    if args.classes > IGNORE:
        parser.error(f"argument --classes: {args.classes} is out of range; expected 1 to {IGNORE}")
    worst = 0.0
    for width, height in args.size or ((30000, 2000), (2000, 30000)):
        found = measured(height, width, args.classes)
        worst = max(worst, found["bytes"])
        print(json.dumps({"size": f"{width}x{height}", "classes": args.classes, **found}), flush=True)
    print(f"largest: {worst / 1e6:.0f} MB above the model; bound {BOUND / 1e6:.0f} MB")
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
