# SPDX-License-Identifier: Apache-2.0
"""A run keeps how its images were read, and maps read theirs so."""

from __future__ import annotations

import json

import numpy as np
import pytest

from drseg_core.checkpoints.run import load_run
from drseg_core.config.load import override
from drseg_core.config.reading import Reading
from drseg_core.scenes.predict import predict, predict_scene
from drseg_core.training.loop import train
from tests.data.test_own_images import folder, write
from tests.evaluation.fake import color_image
from tests.scenes.test_predict import predictor, read, truth
from tests.training.conftest import config

__all__ = ["config"]
rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
RNG = np.random.default_rng(0)


def deep(label) -> np.ndarray:
    return color_image(label).numpy().astype(np.uint16) * 11 + 500


def test_a_cloud_changes_no_label_elsewhere(tmp_path):
    scene = deep(truth())
    cloudy = scene.copy()
    cloudy[:, :10, :27] = 60_000
    kept = Reading(scale=((500.0, 3305.0),), depth="uint16")
    clear, _ = read(
        predict_scene(predictor(), write(tmp_path / "a.tif", scene), tmp_path / "clear.tif", reading=kept).classes
    )
    clouds, _ = read(
        predict_scene(predictor(), write(tmp_path / "b.tif", cloudy), tmp_path / "cloud.tif", reading=kept).classes
    )
    outside = np.ones((50, 70), bool)
    outside[:10, :27] = False
    assert (~outside).mean() > 0.075 and np.array_equal(clear[0][outside], clouds[0][outside])
    assert np.array_equal(clear[0], truth().numpy())
    # what the scene alone tells is another scale
    own, _ = read(predict_scene(predictor(), tmp_path / "b.tif", tmp_path / "own.tif").classes)
    assert (own[0] != truth().numpy())[outside].any()


def test_bgr(tmp_path):
    image = color_image(truth()).numpy()[::-1].copy()
    tagged = write(tmp_path / "bgr.tif", image, colors=["blue", "green", "red"])
    data, _ = read(predict_scene(predictor(), tagged, tmp_path / "map.tif").classes)
    assert np.array_equal(data[0], truth().numpy())
    data, _ = read(predict_scene(predictor(), tagged, tmp_path / "wrong.tif", bands=(1, 2, 3)).classes)
    assert (data[0] == truth().numpy()).mean() < 0.9


def test_a_run_keeps_its_scale(tmp_path, config, caplog):
    scene = RNG.integers(300, 3000, size=(3, 40, 40)).astype(np.uint16)
    root = folder(tmp_path / "set", [scene, scene // 2])
    small = override(config, {"train.iterations": 1})
    run = train(small, f"folder:{root}", tmp_path / "run", device="cpu", show_progress=False)
    kept = load_run(run).config.reading
    assert kept.depth == "uint16" and kept.scale.count(";") == 2
    # the configuration it began with is none other
    more = override(small, {"train.iterations": 2})
    train(more, f"folder:{root}", run, resume=True, device="cpu", show_progress=False)
    assert load_run(run).step == 2 and load_run(run).config.reading == kept
    caplog.set_level("INFO", "drseg_core")
    path = write(tmp_path / "scene.tif", scene)
    predict(run, path, out=tmp_path / "a.tif", tile_size=32, overlap=8, progress=False)
    assert f"uint16 scaled by {kept.scale} (as given or as in training)" in caplog.text
    predict(run, path, out=tmp_path / "b.tif", scale="auto", tile_size=32, overlap=8, progress=False)
    assert "measured, 2 and 98 % of this scene" in caplog.text
    eight = write(tmp_path / "eight.tif", (scene // 12).astype(np.uint8))
    predict(run, eight, out=tmp_path / "c.tif", tile_size=32, overlap=8, progress=False)
    assert "the scale of the run is for uint16, this is uint8" in caplog.text


def test_every_command_takes_the_options(tmp_path, drseg, small):
    scene = RNG.integers(300, 3000, size=(4, 40, 40)).astype(np.uint16)
    scene[:, :8] = 7
    root = folder(tmp_path / "set", [scene, scene])
    (root / "train").rename(root / "val")
    folder(root, [scene, scene])
    words = ["--bands", "4,3,2", "--nodata", "7", "--scale", "200,3100"]
    run = tmp_path / "run"
    assert drseg("data", "check", "folder", root, *words)[0] == 0
    assert drseg("train", *small, "--data", f"folder:{root}", "--out", run, *words, "--device", "cpu")[0] == 0
    kept = load_run(run).config.reading
    assert (kept.bands, kept.nodata, kept.scale, kept.depth) == ("4,3,2", 7.0, "200,3100", "uint16")
    evaluation = ["evaluate", run, "--data", f"folder:{root}", "--out", tmp_path / "m.json"]
    assert drseg(*evaluation)[0] == 0
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["reading"]["scale"] == "200,3100" and result["ignored_pixels"] == 2 * 8 * 40
    assert drseg("rank", run, "--data", f"folder:{root}", "--out", tmp_path / "c.safetensors")[0] == 0
    image = root / "val/images/0.tif"
    assert drseg("predict", run, image, "--out", tmp_path / "map.tif", *words)[0] == 0
    data, _ = read(tmp_path / "map.tif")
    assert (data[0, :8] == 255).all() and not (data[0, 8:] == 255).any()
    for words, said in ((["--scale", "9,1"], "--scale"), (["--bands", "red"], "--bands")):
        code, _, errors = drseg("predict", run, image, "--out", tmp_path / "no.tif", *words)
        assert code == 2 and said in errors.splitlines()[0]


@pytest.mark.promise("C51")
@pytest.mark.parametrize("command", ["train", "evaluate", "rank", "data"])
def test_options_that_a_benchmark_would_ignore_are_refused(tmp_path, drseg, small, command):
    words = {
        "train": ["train", *small, "--data", "dlrsd:sets", "--out", tmp_path / "run"],
        "evaluate": ["evaluate", "run", "--data", "dlrsd:sets", "--out", tmp_path / "m.json"],
        "rank": ["rank", "run", "--data", "dlrsd:sets", "--out", tmp_path / "c.safetensors"],
        "data": ["data", "check", "dlrsd", tmp_path],
    }[command]
    code, _, errors = drseg(*words, "--nodata", 0)
    assert code == 2 and "--nodata is for a set of your own; expected --data folder:PATH, got dlrsd:" in errors
