# SPDX-License-Identifier: Apache-2.0
"""``drseg.load`` and ``drseg.predict`` are what the command does, and a program pays for what it uses alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import drseg_core as drseg
from drseg_core.checkpoints.pretrained import save_pretrained
from drseg_core.cli.main import main
from drseg_core.errors import CheckpointError, ConfigError, RasterError
from drseg_core.processor import WAITING_OF_USERS

pytest.importorskip("rasterio")
NAMES = ["building", "open field", "pavement"]


@pytest.fixture
def image(folder: Path) -> Path:
    return folder / "val" / "images" / "0.png"


def test_predict_is_that_of_the_command(run, image, tmp_path):
    words = ["--classes", "; ".join(NAMES), "--tile-size", "32", "--overlap", "16"]
    assert main(["predict", str(run), str(image), *words, "--out", str(tmp_path / "command.tif")]) == 0
    options = {"classes": NAMES, "tile_size": 32, "overlap": 16, "progress": False}
    for name, model in (("path", run), ("text", str(run)), ("loaded", drseg.load(run))):
        files = drseg.predict(model, image, out=tmp_path / f"{name}.tif", **options)
        assert files._fields[:3] == ("classes", "overlay", "uncertainty")
        assert files.classes == tmp_path / f"{name}.tif" and len(files.present()) == 6
        for path in files.present():
            twin = tmp_path / path.name.replace(name, "command", 1)
            assert path.read_bytes() == twin.read_bytes(), path.name


def test_a_loaded_model_is_read_once_and_knows_its_classes(run, image, tmp_path):
    model = drseg.load(run)
    assert not model.model.training and model.class_names == ("bare soil", "red roof", "blue pond")
    drseg.predict(model, image, out=tmp_path / "a.tif", progress=False)
    drseg.predict(model, image, out=tmp_path / "b.tif", classes=model.class_names, progress=False)
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    with pytest.raises(ConfigError, match="exists; expected a new path, or overwrite"):
        drseg.predict(model, image, out=tmp_path / "a.tif", progress=False)
    drseg.predict(model, image, out=tmp_path / "a.tif", overwrite=True, mode="whole", bands=[3, 2, 1], progress=False)
    assert (tmp_path / "a.tif").read_bytes() != (tmp_path / "b.tif").read_bytes()


def test_nothing_is_written_where_something_is_missing(run, image, tmp_path):
    with pytest.raises(CheckpointError, match="not found"):
        drseg.predict(tmp_path / "absent", image, out=tmp_path / "map.tif")
    with pytest.raises(RasterError, match="absent.tif"):
        drseg.predict(run, tmp_path / "absent.tif", out=tmp_path / "map.tif")
    with pytest.raises(ConfigError, match="device: name is unknown"):
        drseg.predict(run, image, out=tmp_path / "map.tif", device="gpu")
    assert list(tmp_path.iterdir()) == []


def test_load_takes_names_on_the_hub_where_no_folder_has_them(run, tmp_path, monkeypatch):
    import huggingface_hub

    folder = save_pretrained(drseg.load(run), tmp_path / "model")
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["revision"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert drseg.load("somebody/model", revision="v1").path == folder and asked == [("somebody/model", "v1")]
    (tmp_path / "somebody").mkdir()
    folder.rename(tmp_path / "somebody" / "model")
    assert drseg.load("somebody/model").path == Path("somebody/model") and len(asked) == 1


def test_weights_of_no_part_are_refused(run):
    with pytest.raises(ConfigError, match="load_run: weights name no part; expected one of clip, dino, remote"):
        drseg.load(run, weights={"text": "file"})


def test_the_package_says_what_is_in_it():
    assert {"load", "predict", "nn", "ops"} <= set(dir(drseg)) & set(drseg.__all__)
    assert all(hasattr(drseg, name) for name in drseg.__all__)
    assert drseg.nn.PDGR.__module__ == "drseg_core.nn.pdgr" and drseg.ops.knn_graph.__name__ == "knn_graph"
    with pytest.raises(AttributeError, match="module 'drseg_core' has no attribute 'absent'"):
        _ = drseg.absent


IMPORTS = """
import json, sys
import drseg_core as drseg
first = "torch" in sys.modules or "numpy" in sys.modules
import torch
given = set(sys.modules)
drseg.nn.PDGR, drseg.ops.knn_graph, drseg.load
heavy = ["timm", "open_clip", "torchvision", "rasterio", "matplotlib", "triton"]
heavy += ["drseg_kernels", "huggingface_hub", "sympy"]
found = [name for name in heavy if name in sys.modules and name not in given]
libraries = [str(path) for path in torch.ops.loaded_libraries]
print(json.dumps([first, found, torch.cuda.is_initialized(), libraries]))
"""


@pytest.mark.promise("C27")
def test_importing_is_free():
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [False, [], False, []]


WAITING = """
import os, {first}
import drseg_core as drseg
drseg.load
print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(("first", "waiting"), [("sys", "passive"), ("torch", "None")])
def test_a_door_that_loads_torch_has_threads_that_sleep(first, waiting):
    given = {name: value for name, value in os.environ.items() if name not in WAITING_OF_USERS}
    call = [sys.executable, "-c", WAITING.format(first=first)]
    result = subprocess.run(call, env=given, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == waiting
