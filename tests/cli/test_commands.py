# SPDX-License-Identifier: Apache-2.0
"""What each command does when all is well."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from drseg_core.checkpoints.channels import load_channels
from drseg_core.checkpoints.checkpoint import newest_checkpoint
from drseg_core.cli import doctor
from drseg_core.cli.predict import areas_text
from drseg_core.config.load import load_config


def test_train_writes_a_run_and_says_what_is_next(drseg, run, data):
    assert newest_checkpoint(run).step == 2
    assert (run / "manifest.json").is_file()


def test_resume_takes_the_configuration_of_the_run(drseg, data, small, tmp_path):
    out = tmp_path / "run"
    assert drseg("train", *small, "--data", data, "--out", out, "--seed", 7)[0] == 0
    code, text, _ = drseg("train", "--data", data, "--out", out, "--resume", "--train.iterations", 3)
    assert code == 0 and "steps: 3" in text and f"next: drseg evaluate {out}" in text
    assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 7


def test_options_win_over_the_file_wherever_they_stand(drseg, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("model:\n  graph:\n    k: 9\n    layers: 3\n")
    for words in (["--model.graph.k", 5, "--config", file], [f"--config={file}", "--model.graph.k=5"]):
        code, text, _ = drseg("train", *words, "--print_config")
        assert code == 0
        graph = yaml.safe_load(text)["model"]["graph"]
        assert (graph["k"], graph["layers"], graph["gamma"]) == (5, 3, 1.0)


def test_a_printed_configuration_is_read_back(drseg, tmp_path):
    text = drseg("train", "--config", "tiny", "--train.seconds", 2.5, "--print_config")[1]
    (tmp_path / "printed.yaml").write_text(text)
    assert drseg("train", "--config", tmp_path / "printed.yaml", "--print_config")[1] == text
    assert yaml.safe_load(text)["train"]["seconds"] == 2.5


@pytest.mark.parametrize("preset", ["paper", "tiny", "vitb", "vitl"])
def test_presets_by_name(drseg, preset):
    assert yaml.safe_load(drseg("train", "--config", preset, "--print_config")[1])["model"]["clip"]["name"]


def test_rank_a_run_and_train_with_it(drseg, run, data, small, tmp_path):
    out = tmp_path / "channels.safetensors"
    code, text, _ = drseg("rank", run, "--data", data, "--out", out, "--model.spsd.prototypes_per_class", 4)
    assert code == 0 and "semantic and" in text
    ranking = load_channels(out)
    # 32 structural channels, whose LayerNorm of weight 1 has a norm of their root
    assert f"norm of the structural channels: {ranking.structural_norm:.2f} in CLIP, " in text
    assert f"; 5.66 after a LayerNorm of weight 1, {100 * ranking.structural_share(32**0.5):.0f} %" in text
    assert f"model.graph.norm_scale match sets {ranking.norm_scale:.4f}" in text
    assert ranking.metadata["prototypes_per_class"] == 4 and ranking.metadata["prototypes"] <= 12
    assert ranking.metadata["backbone"] == "drseg-tiny" and ranking.metadata["semantic_ratio"] == 0.5
    words = ["--data", data, "--out", tmp_path / "run", "--model.spsd.channels", out, "--init", run]
    code, _, errors = drseg("train", *small, *words)
    assert code == 0 and "tensors taken from" in errors


def test_rank_a_weight_file_without_a_prior(drseg, data, small, tmp_path):
    open_clip = pytest.importorskip("open_clip.model")
    from safetensors.torch import save_file

    from drseg_core.models.clip import ARCHITECTURES

    state = open_clip.CLIP(**ARCHITECTURES["drseg-tiny"]).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "clip.safetensors")
    words = ["--data", data, "--out", tmp_path / "c.safetensors", "--model.dino.weights", "absent.safetensors"]
    code, text, errors = drseg("rank", tmp_path / "clip.safetensors", *small, *words)
    assert code == 0, errors
    assert "channels of drseg-tiny" in text
    assert load_channels(tmp_path / "c.safetensors").metadata["backbone"] == "drseg-tiny"


def test_evaluate_writes_the_promised_keys(drseg, run, data, tmp_path):
    out = tmp_path / "metrics.json"
    code, text, _ = drseg("evaluate", run, "--data", data, "--split", "val", "--out", out)
    assert code == 0 and "mIoU" in text
    result = json.loads(out.read_text())
    assert set(result) >= {"mIoU", "mACC", "fwIoU", "pACC", "per_class", "versions", "command", "data"}
    assert set(result["per_class"]) == {"bare soil", "red roof", "blue pond"}
    assert len(result["data"]["sha256"]) == 64 and result["data"]["split"] == "val"
    assert result["step"] == 2 and result["versions"]["torch"]
    tiled = tmp_path / "tiled.json"
    code, _, _ = drseg(
        "evaluate", run, "--data", data, "--out", tiled, "--mode", "tile", "--tile-size", 32, "--overlap", 16
    )
    assert code == 0 and json.loads(tiled.read_text())["evaluation"]["overlap"] == 16


def test_evaluate_says_that_the_configuration_does_not_choose_tiles_of_an_own_set(drseg, run, data, tmp_path):
    def printed(*words):
        code, text, errors = drseg("evaluate", run, "--data", data, "--out", tmp_path / "m.json", "--overwrite", *words)
        assert code == 0, errors
        return text

    said = "of a set of your own --mode alone decides this, whatever evaluation.mode of the run is"
    assert load_config(run / "config.yaml").evaluation.mode == "whole"
    text = printed()
    assert "mode tile: " in text and said in text
    text = printed("--mode", "whole")
    assert "mode whole: " in text and said not in text


def test_kept_features_change_nothing(drseg, run, data, tmp_path):
    """Whole images and tiles, the first time and the second; other class names read what was kept, too."""
    cache = tmp_path / "features"

    def scores(*words):
        code, _, errors = drseg("evaluate", run, "--data", data, "--out", tmp_path / "m.json", "--overwrite", *words)
        assert code == 0, errors
        result = json.loads((tmp_path / "m.json").read_text())
        result.pop("command")
        return result, errors

    for words in (["--mode", "whole"], ["--mode", "tile", "--tile-size", 32, "--overlap", 16]):
        plain, errors = scores(*words)
        assert "prior cache" not in errors
        first, said = scores(*words, "--prior-cache", cache)
        assert "0 batches of images read" in said
        second, said = scores(*words, "--prior-cache", cache)
        assert ", 0 computed" in said and " 0 batches" not in said
        assert plain == first == second
    assert cache.is_dir() and {path.suffix for path in cache.iterdir()} == {".safetensors"}


def test_precision_is_said_and_kept_with_the_scores(drseg, run, data, tmp_path):
    def scores(*words):
        code, _, errors = drseg("evaluate", run, "--data", data, "--out", tmp_path / "m.json", "--overwrite", *words)
        assert code == 0, errors
        return json.loads((tmp_path / "m.json").read_text()), errors

    plain, errors = scores()
    assert (plain["precision"], plain["compiled"]) == ("float32", False) and "precision" not in errors
    reduced, errors = scores("--precision", "bfloat16")
    assert (reduced["precision"], reduced["compiled"]) == ("bfloat16", False) and "precision: bfloat16" in errors
    # other sums, so other scores: the option reaches the model
    assert reduced["calibration"] != plain["calibration"]
    chosen, errors = scores("--precision", "auto")
    assert f"precision: {chosen['precision']}" in errors


@pytest.mark.parametrize("dry", [False, True])
def test_predict_passes_precision_and_compile_on(drseg, run, folder, tmp_path, monkeypatch, dry):
    pytest.importorskip("rasterio")
    from drseg_core.evaluation import inference

    made = []
    monkeypatch.setattr(inference, "compiled_network", lambda network, device: made.append(device) or network)
    words = ["predict", run, folder / "val" / "images" / "0.png", "--out", tmp_path / "map.tif", "--compile"]
    code, _, errors = drseg(*words, "--precision", "bfloat16", *(["--dry-run"] if dry else []))
    assert code == 0 and len(made) == 1 and "precision: bfloat16, compiled" in errors


def test_names_without_a_pixel_are_told():
    table = "class,pixels,percent,area_m2,method\nroad,3,100.0,,no place known\ncar,0,0.0,,no place known\n"
    assert areas_text(table).splitlines()[-1] == "  no pixel: car"
    assert "no pixel:" not in areas_text(table.replace(",0,", ",1,"))


def test_predict_maps_an_image(drseg, run, folder, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    image = folder / "val" / "images" / "0.png"
    out = tmp_path / "map.tif"
    code, text, _ = drseg("predict", run, image, "--classes", "building; open  field ;pavement", "--out", out)
    assert code == 0
    said, *lines = text.splitlines()
    assert said == "classes: building; open field; pavement" and lines[0] == "share of each class:"
    names = [line.split("/")[-1] for line in lines if line.startswith("written")]
    assert names == [
        "map.tif", "map_overlay.png", "map_uncertainty.tif", "map_areas.csv", "map.tif.aux.xml", "map.qml",
    ]  # fmt: skip
    with rasterio.open(out) as raster:
        index = raster.read(1)
        assert index.shape == Image.open(image).size[::-1] and set(np.unique(index)) <= {0, 1, 2}
        assert "open field" in str(raster.tags()) + str(raster.tags(1))


def test_one_checkpoint_can_be_named(drseg, run, data, tmp_path):
    newest = newest_checkpoint(run).path
    assert drseg("evaluate", newest, "--data", data, "--out", tmp_path / "m.json")[0] == 0


@pytest.mark.promise("C25")
def test_doctor_reports(drseg, monkeypatch):
    code, text, _ = drseg("doctor")
    assert code == 0
    for word in ("torch ", "torchvision ", "cpu:", "cuda", "knn_graph on cpu", "no problems found"):
        assert word in text
    assert "reference" in text and "not triton: " in text


def test_demo_is_started_with_its_arguments(drseg, monkeypatch, tmp_path):
    import sys
    import types

    calls = []
    fake = types.ModuleType("drseg_core.cli.demo")
    fake.run = lambda out, **options: calls.append((out, options))
    monkeypatch.setitem(sys.modules, "drseg_core.cli.demo", fake)
    assert drseg("demo", "--out", tmp_path / "demo", "--seed", 3)[0] == 0
    assert calls[0][0] == tmp_path / "demo" and calls[0][1]["seed"] == 3


def test_doctor_says_which_backend_runs_only_if_named(monkeypatch):
    row = {"op": "csc", "device": "cpu", "available": True, "reason": None}
    rows = [{**row, "backend": "native", "place": 0}, {**row, "backend": "triton", "place": None}]
    monkeypatch.setattr("drseg_core.ops.backend_report", lambda: rows)
    assert list(doctor.kernel_lines()) == ["csc on cpu: native", "  triton: only if named (interpreted)"]


def test_doctor_says_a_reason_of_several_ops_once(monkeypatch):
    row = {"backend": "triton", "device": "cpu", "available": False, "place": None}
    named = (("csc", "no GPU"), ("knn_graph", "no GPU"), ("linear_map", "left out"))
    monkeypatch.setattr(
        "drseg_core.ops.backend_report", lambda: [{**row, "op": op, "reason": why} for op, why in named]
    )
    assert list(doctor.kernel_lines()) == [
        "not triton: no GPU",
        "csc on cpu: nothing runs",
        "knn_graph on cpu: nothing runs",
        "linear_map on cpu: nothing runs",
        "  not triton: left out",
    ]


@pytest.mark.parametrize("command", ["demo", "train", "rank", "evaluate", "predict", "doctor"])
def test_help_has_examples(drseg, command):
    code, text, _ = drseg(command, "--help")
    assert code == 0
    assert text.startswith(f"usage: drseg {command}")
    assert "example" in text and f"drseg {command}" in text.split("example")[1]
    assert "None" not in text.split("The whole model")[0]


def test_help_is_quick_and_needs_no_torch(process):
    started = process("--help")
    text, _ = started.communicate(timeout=120)
    assert started.returncode == 0 and "drseg COMMAND --help" in text
    import os
    import subprocess
    import sys

    # what takes seconds is not loaded
    for words in (["--help"], ["train", "--help"]):
        code = f"import sys; from drseg_core.cli.main import main; main({words}); sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ, cwd=os.getcwd())
        assert done.returncode == 0 and b"usage: drseg" in done.stdout


def test_version(drseg):
    import drseg_core

    code, text, _ = drseg("--version")
    assert code == 0 and text.strip() == f"drseg {drseg_core.__version__}"


def test_options_of_predict_are_in_a_persons_order(drseg):
    text = drseg("predict", "--help")[1]
    order = [
        *("RUN ", "IMAGE ", "--classes ", "--threshold ", "--out ", "--overwrite ", "--scores ", "--polygons "),
        *(
            "--bands ",
            "--nodata ",
            "--scale ",
            "--gsd ",
            "--aoi ",
            "--mode ",
            "--tile-size ",
            "--dry-run ",
            "--device ",
        ),
    ]
    places = [text.index(f"\n  {word}") for word in order]
    assert places == sorted(places) and "%%" not in text
