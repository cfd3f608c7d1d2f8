# SPDX-License-Identifier: Apache-2.0
"""A user's own images of every kind, from the check to the map: evaluate scores the map of predict, pixel for pixel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drseg_core.checkpoints.run import load_run
from drseg_core.evaluation.metrics import ConfusionMatrix
from tests.data.test_own_images import write
from tests.scenes.test_predict import read

rasterio = pytest.importorskip("rasterio")
from rasterio.transform import from_origin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
PLACE = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_600_000, 0.5, 0.5)}
# smaller than a tile, one pixel more than some, long and narrow
SIZES = [(37, 53), (65, 33), (31, 97), (1, 70), (32, 32)]
COLOR = np.array([[120, 100, 80], [200, 40, 40], [40, 60, 200]], np.uint8)


def labels(number: int, size: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 3, (size[0] // 8 + 1, size[1] // 8 + 1))
    return np.kron(coarse, np.ones((8, 8), int))[: size[0], : size[1]].astype(np.uint8)


def image(path: Path, kind: str, mask: np.ndarray) -> np.ndarray:
    """Write an image of one kind; which pixels of it are valid."""
    rng = np.random.default_rng(1)
    rgb = np.clip(COLOR[mask].astype(int) + rng.integers(-9, 9, (*mask.shape, 3)), 1, 255).transpose(2, 0, 1)
    valid = np.indices(mask.shape)[1] >= 5
    if kind == "sentinel":
        deep = (rgb * 40 + 300).astype(np.uint16)
        data = np.concatenate([deep[::-1], deep[:1]])
        data[:, ~valid] = 0
        write(path, data, descriptions=["B02", "B03", "B04", "B08"], nodata=0, **PLACE)
    elif kind == "float":
        data = (rgb / 255).astype(np.float32)
        data[:, ~valid] = np.nan
        write(path, data, **PLACE)
    elif kind == "bgr":
        write(path, rgb[::-1].astype(np.uint8), ["blue", "green", "red"], **PLACE)
        return np.ones_like(valid)
    elif kind in ("rgba8", "rgba16"):
        dtype = np.uint8 if kind == "rgba8" else np.uint16
        alpha = np.where(valid, np.iinfo(dtype).max, 0)
        write(path, np.concatenate([rgb, alpha[None]]).astype(dtype), ["red", "green", "blue", "alpha"], **PLACE)
    elif kind == "gray_alpha":
        write(path, np.stack([rgb[0], np.where(valid, 255, 0)]).astype(np.uint8), ["gray", "alpha"], **PLACE)
    elif kind == "palette":
        write(path, mask[None], photometric="palette", **PLACE)
        with rasterio.open(path, "r+") as file:
            file.write_colormap(1, {i: (*map(int, color), 255) for i, color in enumerate(COLOR)})
        return np.ones_like(valid)
    elif kind == "png_alpha":
        alpha = np.where(valid, 255, 0)
        Image.fromarray(np.concatenate([rgb, alpha[None]]).astype(np.uint8).transpose(1, 2, 0)).save(path)
    return valid


KINDS = ["sentinel", "float", "bgr", "rgba8", "rgba16", "gray_alpha", "palette", "png_alpha"]


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_check_to_the_map(kind, drseg, small, tmp_path):
    root, run = tmp_path / "set", tmp_path / "run"
    suffix = ".png" if kind == "png_alpha" else ".tif"
    inside = {}
    for split in ("train", "val"):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for number, size in enumerate(SIZES):
            mask = labels(number, size)
            Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")
            inside[number] = image(root / split / "images" / f"{number}{suffix}", kind, mask), mask
    (root / "classes.txt").write_text("bare soil\nred roof\nblue pond\n")
    assert drseg("data", "check", "folder", root)[0] == 0
    assert drseg("train", *small, "--data", f"folder:{root}", "--out", run, "--device", "cpu")[0] == 0
    code, _, _ = drseg("evaluate", run, "--data", f"folder:{root}", "--out", tmp_path / "m.json")
    result = json.loads((tmp_path / "m.json").read_text())
    assert code == 0 and result["evaluation"]["mode"] == "tile"
    confusion = ConfusionMatrix(3)
    for number, (valid, mask) in inside.items():
        out = tmp_path / f"{number}.tif"
        code, _, errors = drseg("predict", run, root / "val/images" / f"{number}{suffix}", "--out", out)
        assert code == 0 and ("bands 1, 2, 3" not in errors or kind not in ("sentinel", "bgr"))
        found = read(out)[0][0]
        assert np.array_equal(found == 255, ~valid)
        confusion.update(torch.from_numpy(found), torch.from_numpy(np.where(valid, mask, 255)))
    assert result["confusion"] == confusion.matrix.tolist()
    assert result["ignored_pixels"] == sum(int((~valid).sum()) for valid, _ in inside.values())
    depth = {"sentinel": "uint16", "float": "float32", "rgba16": "uint16"}.get(kind)
    assert load_run(run).config.reading.depth == depth
