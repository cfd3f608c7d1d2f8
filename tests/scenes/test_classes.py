# SPDX-License-Identifier: Apache-2.0
"""Synonyms, colours and the class for the rest, on a map; and evaluate, which scores that map."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from drseg_core.checkpoints.run import load_run
from drseg_core.errors import ConfigError
from drseg_core.evaluation.inference import Predictor
from drseg_core.evaluation.metrics import ConfusionMatrix
from drseg_core.scenes.predict import predict, predict_scene
from tests.cli.conftest import data, folder, run
from tests.evaluation.fake import COLORS, ColorModel, color_image
from tests.scenes.test_predict import read, truth, write

__all__ = ["data", "folder", "run"]
rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.mark.parametrize("mode", ["whole", "tile"])
def test_the_best_synonym_counts(mode):
    label = truth()
    options = {"mode": mode, "tile_size": 32, "overlap": 8}
    predictor = Predictor(ColorModel(), ["lit", "dark"], synonyms=[["red", "green", "blue"], ["dark"]], **options)
    found = predictor(color_image(label))
    assert torch.equal(found.class_index, (label == 0).to(torch.uint8))
    alone = Predictor(ColorModel(), list(COLORS), **options)(color_image(label))
    assert torch.allclose(found.score, alone.score)
    with pytest.raises(ConfigError, match="synonyms do not fit; expected one or more words for each of 2 classes"):
        Predictor(ColorModel(), ["a", "b"], synonyms=[["red"]])


def test_pixels_below_the_threshold_are_other(tmp_path):
    image = color_image(truth()).numpy()
    image[:, :10, :] = 120
    path = write(tmp_path / "in.tif", image)
    predictor = Predictor(ColorModel(), list(COLORS), mode="tile", tile_size=32, overlap=8)
    score = predictor(torch.from_numpy(image)).score.numpy()
    threshold = float((score[:10].max() + score[10:].min()) / 2)
    assert score[:10].max() < score[10:].min()
    files = predict_scene(
        predictor, path, tmp_path / "map.tif", threshold=threshold, colors=[(1, 2, 3), None, None, None], progress=False
    )
    found, _ = read(files.classes)
    assert (found[0, :10] == 4).all() and np.array_equal(found[0, 10:], truth().numpy()[10:])
    with rasterio.open(files.classes) as raster:
        tags = raster.tags()
        assert json.loads(tags["class_names"]) == [*COLORS, "other"] and float(tags["threshold"]) == threshold
        assert json.loads(tags["words"]) == [[name] for name in COLORS]
        assert raster.colormap(1)[0][:3] == (1, 2, 3) and raster.colormap(1)[4][:3] == (128, 128, 128)
    for wrong in (-0.1, 1.5):
        with pytest.raises(ConfigError, match="threshold is out of range; expected 0 to 1"):
            predict_scene(predictor, path, tmp_path / "no.tif", threshold=wrong, progress=False)


def test_the_reading_of_classes_is_printed(drseg, run, folder, tmp_path):
    image = folder / "val" / "images" / "0.png"
    classes = "red roof, bare soil#808080; glacier"
    code, text, errors = drseg("predict", run, image, "--classes", classes, "--out", tmp_path / "map.tif")
    assert code == 0 and text.splitlines()[0] == "classes: red roof (or bare soil); glacier"
    assert "the run never learned 'glacier', which may come out badly" in errors
    with rasterio.open(tmp_path / "map.tif") as raster:
        assert raster.colormap(1)[0][:3] == (128, 128, 128)
        assert json.loads(raster.tags()["class_names"]) == ["red roof", "glacier"]


def test_evaluate_scores_the_map_that_predict_makes(drseg, run, folder, data, tmp_path):
    confusion = ConfusionMatrix(3)
    for path in sorted((folder / "val" / "images").iterdir()):
        files = predict(load_run(run), path, out=tmp_path / f"{path.stem}.tif", progress=False)
        mask = np.array(Image.open(folder / "val" / "masks" / path.name))
        confusion.update(torch.from_numpy(read(files.classes)[0][0]), torch.from_numpy(mask))
    out = tmp_path / "m.json"
    code, text, _ = drseg("evaluate", run, "--data", data, "--out", out)
    result = json.loads(out.read_text())
    assert code == 0 and result["confusion"] == confusion.matrix.tolist() and result["evaluation"]["mode"] == "tile"
    assert "mode tile: tiles of 32 pixels, overlap 8, at native resolution" in text
    code, text, _ = drseg("evaluate", run, "--data", data, "--out", out, "--overwrite", "--mode", "whole")
    assert code == 0 and "mode whole: each image in one piece" in text
    assert json.loads(out.read_text())["confusion"] != confusion.matrix.tolist()
