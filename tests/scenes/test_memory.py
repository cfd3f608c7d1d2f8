# SPDX-License-Identifier: Apache-2.0
"""A scene is mapped in pieces: what is in memory is bounded, and the map is that of one piece."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.scene_memory import BOUND, PixelModel, measured
from drseg_core.data.raster import WHOLE_MB
from drseg_core.evaluation import inference
from drseg_core.evaluation.inference import Predictor
from drseg_core.scenes.predict import predict_scene
from drseg_core.scenes.reader import open_scene
from tests.evaluation.fake import COLORS, ColorModel, color_image
from tests.scenes.test_predict import read, truth, write

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
SIZES = [(70, 1100), (1100, 70), (600, 520), (20, 17)]


@pytest.mark.promise("C46")
@pytest.mark.parametrize("size", [(2000, 30_000), (30_000, 2000)])
def test_memory_is_bounded_in_both_directions(size):
    """Most of it is nodata, so that it does not take long; a strip holds all its sums all the same."""
    assert measured(*size, 100, valid=(300, 600))["bytes"] <= BOUND


@pytest.mark.promise("C36")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tile, overlap", [(16, 4), (32, 20), (64, 0), (128, 32)])
@pytest.mark.parametrize("columns", [48, 512, None])
def test_the_map_is_that_of_one_piece(size, tile, overlap, columns):
    label = truth(*size)
    image = color_image(label)
    predictor = Predictor(ColorModel(), list(COLORS), mode="tile", tile_size=tile, overlap=overlap, batch_size=3)
    found = torch.full(size, 9, dtype=torch.uint8)
    score = torch.zeros(size)
    strips = predictor.strips(size[1], columns)
    random.Random(0).shuffle(strips)
    for left, right in strips:
        for piece in predictor.strip(lambda a, b, c, d: (image[:, a:b, c:d], None), *size, left, right):
            part = piece.prediction.class_index
            place = slice(piece.top, piece.top + len(part)), slice(piece.left, piece.left + part.shape[1])
            assert (found[place] == 9).all()
            found[place], score[place] = part, piece.prediction.score
            of_best = torch.stack([piece.score_of(c) for c in range(4)]).gather(0, part[None].long())[0]
            assert torch.equal(of_best, piece.prediction.score)
    assert torch.equal(found, label.to(torch.uint8))
    # the same sums in the same order, to the last bit
    assert torch.equal(score, predictor(image).score)


@pytest.mark.promise("C46")
def test_strips_keep_their_sums_small(monkeypatch):
    predictor = Predictor(PixelModel(100), [f"c{i}" for i in range(100)], mode="tile")
    strips = predictor.strips(30_000)
    assert strips[0][0] == 0 and strips[-1][1] == 30_000
    assert all(a[1] == b[0] for a, b in zip(strips, strips[1:], strict=False))
    assert 4 * 102 * 384 * max(b - a for a, b in strips) <= inference.SUMS_BYTES


@pytest.mark.promise("C46")
@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 70), slice(120, 500)])
def test_tiles_without_data_cost_nothing(tmp_path, rows):
    label = truth(500, 90)
    image = color_image(label).numpy()
    valid = np.zeros((500, 90), bool)
    valid[rows, :40] = True
    path = write(tmp_path / "in.tif", np.where(valid, image, 0).astype(np.uint8), nodata=0)
    model = ColorModel()
    predictor = Predictor(model, list(COLORS), mode="tile", tile_size=32, overlap=20, batch_size=1)
    data, _ = read(predict_scene(predictor, path, tmp_path / "map.tif", progress=False).classes)
    assert np.array_equal(data[0], np.where(valid, label.numpy(), 255))
    touched = sum(
        valid[y : y + 32, x : x + 32].any()
        for y in inference.tile_starts(500, 32, 20)
        for x in inference.tile_starts(90, 32, 20)
    )
    assert len(model.batches) == touched


def test_a_file_that_cannot_be_read_in_parts_says_so(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr("drseg_core.data.raster.WHOLE_MB", 0)
    pixels = np.zeros((3, 64, 80), np.uint8)

    def said(path: Path) -> str | None:
        with open_scene(path) as scene:
            return scene.window_warning()

    tiled = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    assert said(write(tmp_path / "tiled.tif", pixels, **tiled)) is None
    assert "one.tif: it is stored in one block" in said(write(tmp_path / "one.tif", pixels, blockysize=64))
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "plain.jpg")
    assert said(tmp_path / "plain.jpg") is None
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "scans.jpg", progressive=True)
    assert "scans.jpg: it is interlaced, so all" in said(tmp_path / "scans.jpg")
    # of a size that Pillow opens for nobody
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    assert said(tmp_path / "plain.jpg") is None and "it is interlaced" in said(tmp_path / "scans.jpg")
    monkeypatch.setattr("drseg_core.data.raster.WHOLE_MB", WHOLE_MB)
    assert said(tmp_path / "scans.jpg") is None
