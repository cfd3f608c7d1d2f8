# SPDX-License-Identifier: Apache-2.0
"""Every refusal: its exit code, one line first on stderr, no traceback, nothing half written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from drseg_core.checkpoints.checkpoint import newest_checkpoint
from drseg_core.cli import doctor
from drseg_core.cli.failures import Terminated, failure
from drseg_core.errors import ConfigError, DatasetError, NumericalError
from tests.forks import Fork


def check(result, code: int, *words: str) -> None:
    found, _, errors = result
    # progress and warnings may come before
    before = ("drseg: WARNING", "drseg: INFO", "step ")
    lines = [line for line in errors.splitlines() if not line.startswith(before)]
    assert found == code, errors
    assert "Traceback" not in errors
    assert lines[0].startswith("drseg"), errors
    for word in words:
        assert word in lines[0], errors


@pytest.mark.promise("C38")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--nonsense", "1"], ["unrecognized", "--nonsense"]),
        (["train", "--data", "d", "--out", "o", "--train.ite", "7"], ["unrecognized", "--train.ite"]),
        (["data", "check", "folder", "d", "--spl", "val"], ["unrecognized", "--spl"]),
        (["train", "--data"], ["--data", "expected one argument"]),
        (["train", "--config", "tiny"], ["required: --data, --out"]),
        (["train", "--data", "d", "--out", "o", "--train.iterations", "many"], ["train.iterations", "many"]),
        (["train", "--data", "d", "--out", "o", "--model.graph.norm", "odd"], ["model.graph.norm", "odd"]),
        (["train", "--data", "d", "--out", "o", "--config", "absent"], ["absent", "not found", "tiny"]),
        (["train", "--data", "d", "--out", "o", "--resume", "--init", "x"], ["--resume", "--init"]),
        (["train", "--data", "nowhere", "--out", "o", "--config", "tiny"], ["open_dataset", "nowhere"]),
        (["fly"], ["fly", "train"]),
        ([], ["command"]),
        (["predict", "run", "image.tif", "--out", "map.tif", "--classes", " ; "], ["--classes is empty"]),
        (["predict", "run", "image.tif", "--out", "map.tif", "--bands", "red"], ["--bands", "red"]),
        (["predict", "run", "--out", "map.tif"], ["required: IMAGE"]),
        (["predict", "run", "", "--out", "map.tif"], ["the word behind run is empty"]),
        (["predict", "run", "image.tif", "--out", ""], ["the word behind --out is empty"]),
        (["predict", "run", "image.tif", "--out="], ["the word behind --out= is empty"]),
        (["view", ""], ["the word behind view is empty"]),
        (["predict", "run", "a\udcff.tif", "--out", "map.tif"], ["is no UTF-8", "udcff"]),
    ],
)
def test_usage_is_2(drseg, monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    check(drseg(*words), 2, *said)
    assert list(tmp_path.iterdir()) == []


def test_usage_stands_below_the_error(drseg):
    lines = drseg("train", "--nonsense")[2].splitlines()
    assert lines[0].startswith("drseg train: error:") and lines[1].startswith("usage: drseg train")
    assert lines[2] == "See drseg train --help."


@pytest.mark.promise("C51")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  iterationss: 3\n", ["own.yaml:2", "train.iterationss"]),
        ("train:\n  iterations: many\n", ["own.yaml:2", "train.iterations"]),
        ("seed: 1\nseed: 2\n", ["own.yaml:2", "seed"]),
        ("seed: !!python/object/apply:os.mkdir [executed]\n", ["own.yaml:1", "seed", "tag"]),
        ("train: [\n", ["own.yaml"]),
    ],
)
def test_a_bad_configuration_file_is_2_with_file_line_and_key(drseg, monkeypatch, tmp_path, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(text)
    check(drseg("train", "--config", "own.yaml", "--data", "d", "--out", "o"), 2, *said)
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]


def test_a_run_folder_in_use_is_2(drseg, small, data, tmp_path):
    (tmp_path / "letter").write_text("dear")
    check(drseg("train", *small, "--data", data, "--out", tmp_path), 2, "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]


@pytest.mark.promise("C48")
@pytest.mark.parametrize("command", ["evaluate", "rank", "predict"])
def test_outputs_are_not_overwritten_unasked(drseg, run, data, folder, tmp_path, command):
    image = folder / "val" / "images" / "0.png"
    out = tmp_path / {"evaluate": "m.json", "rank": "c.safetensors", "predict": "map.tif"}[command]
    out.write_text("mine")
    words = [command, run, *([image] if command == "predict" else ["--data", data]), "--out"]
    check(drseg(*words, out), 2, "exists")
    assert out.read_text() == "mine"
    check(drseg(*words, tmp_path), 2, "folder")
    assert drseg(*words, out, "--overwrite")[0] == 0
    assert out.read_bytes()[:4] != b"mine"


@pytest.mark.promise("C48")
def test_the_scene_is_never_overwritten(drseg, run, folder, tmp_path):
    scene = tmp_path / "scene.tif"
    shutil.copy(folder / "val" / "images" / "0.png", scene)
    before = scene.read_bytes()
    check(drseg("predict", run, scene, "--out", scene, "--overwrite"), 2, "input")
    assert scene.read_bytes() == before


@pytest.mark.parametrize("words", [["--tile-size", 33], ["--tile-size", 32, "--overlap", 32], ["--batch-size", 0]])
def test_tiles_that_cannot_be_are_2(drseg, run, folder, tmp_path, words):
    image = folder / "val" / "images" / "0.png"
    check(drseg("predict", run, image, "--out", tmp_path / "map.tif", *words), 2)
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_fit_the_model_are_2(drseg, small, data, tmp_path):
    words = [*small, "--data", data, "--out", tmp_path / "run"]
    check(drseg("train", *words, "--model.clip.name", "odd"), 2, "ClipEncoder", "odd")
    check(drseg("train", *words, "--model.spsd.semantic_ratio", 1.0), 2, "semantic_ratio")


@pytest.mark.promise("C38")
def test_missing_data_is_3(drseg, small, tmp_path):
    out = tmp_path / "run"
    check(drseg("train", *small, "--data", f"folder:{tmp_path / 'absent'}", "--out", out), 3, "absent")
    assert not out.exists()


@pytest.mark.promise("C38")
def test_masks_without_a_label_are_3(drseg, run, folder, tmp_path):
    data, out = tmp_path / "data", tmp_path / "m.json"
    shutil.copytree(folder, data)
    for path in (data / "val/masks").iterdir():
        Image.new("L", Image.open(path).size, 255).save(path)
    code, text, errors = drseg("evaluate", run, "--data", f"folder:{data}", "--out", out)
    assert code == 3 and text == "" and not out.exists()
    said = f"no mask of val of folder:{data} has a labelled pixel; expected class ids, got 255 alone"
    assert errors.splitlines()[-1] == f"drseg: error: evaluate: {said}"


@pytest.mark.promise("C35")
def test_a_damaged_image_is_3_and_the_run_can_go_on(drseg, small, folder, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(folder, broken)
    image = broken / "train" / "images" / "1.png"
    content = image.read_bytes()
    image.write_bytes(content[:60])
    out = tmp_path / "run"
    result = drseg("train", *small, "--data", f"folder:{broken}", "--out", out, "--model.fusion.kind", "none")
    check(result, 3, "1.png")
    check(drseg("evaluate", out, "--data", f"folder:{broken}", "--out", tmp_path / "m.json"), 4, "no checkpoint")
    image.write_bytes(content)
    assert drseg("train", "--data", f"folder:{broken}", "--out", out, "--resume")[0] == 0


@pytest.mark.promise("C38")
def test_a_scene_that_is_none_is_3(drseg, run, tmp_path):
    (tmp_path / "scene.tif").write_text("<html>")
    check(drseg("predict", run, tmp_path / "scene.tif", "--out", tmp_path / "map.tif"), 3, "scene.tif")
    check(drseg("predict", run, tmp_path / "absent.tif", "--out", tmp_path / "map.tif"), 3, "absent.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


@pytest.mark.promise("C29", "C38")
def test_checkpoint_trouble_is_4(drseg, run, data, small, tmp_path):
    check(drseg("evaluate", tmp_path / "absent", "--data", data, "--out", tmp_path / "m.json"), 4, "not found")
    check(drseg("train", *small, "--data", data, "--out", tmp_path / "absent", "--resume"), 4, "absent")
    other = [*small, "--model.graph.k", 4]
    check(drseg("train", *other, "--data", data, "--out", run, "--resume"), 4, "model.graph.k: 3 then, 4 now")
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    weights = newest_checkpoint(damaged).path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    check(drseg("evaluate", damaged, "--data", data, "--out", tmp_path / "m.json"), 4, "checksum mismatch")
    assert not (tmp_path / "m.json").exists()


@pytest.mark.promise("C38")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "rank"])
def test_no_gpu_is_5(drseg, run, data, folder, small, tmp_path, command):
    words = {
        "train": [*small, "--data", data, "--out", tmp_path / "run"],
        "evaluate": [run, "--data", data, "--out", tmp_path / "m.json"],
        "predict": [run, folder / "val" / "images" / "0.png", "--out", tmp_path / "map.tif"],
        "rank": [run, "--data", data, "--out", tmp_path / "c.safetensors"],
    }[command]
    check(drseg(command, *words, "--device", "cuda"), 5, "cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("C25")
def test_a_backend_that_cannot_run_is_5(drseg, small, data, tmp_path):
    words = ["--model.graph.backend", "triton", "--device", "cpu"]
    check(drseg("train", *small, "--data", data, "--out", tmp_path / "run", *words), 5, "triton")


@pytest.mark.promise("C38")
def test_a_library_that_is_missing_is_5(drseg, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    code, text, errors = drseg("doctor")
    assert code == 5 and "problem: rasterio cannot be imported" in text and "Traceback" not in errors


def test_torch_beside_another_torchvision_is_named(monkeypatch):
    versions = {"torch": "2.15.0+cpu", "torchvision": "0.30.0"}
    monkeypatch.setattr(doctor.metadata, "version", versions.__getitem__)
    assert "torch 2.15.0+cpu and torchvision 0.30.0 are of different builds" in doctor.torchvision_mismatch()
    assert "same index" in doctor.torchvision_mismatch()
    versions["torchvision"] = "0.30.0+cpu"
    assert doctor.torchvision_mismatch() is None


@pytest.mark.promise("C34", "C38")
def test_a_loss_that_is_no_number_is_6(drseg, small, data, tmp_path):
    words = ["--train.learning_rate", "1e30", "--train.nan_limit", 2, "--train.iterations", 20]
    out = tmp_path / "run"
    words += ["--train.gradient_clip", "1e30", "--train.warmup_iterations", 0]
    check(drseg("train", *small, "--data", data, "--out", out, *words), 6, "2 steps in a row", "first bad tensor")


@pytest.mark.promise("C38")
def test_memory_and_disk_are_7(drseg, small, data, tmp_path, monkeypatch):
    from drseg_core.checkpoints import checkpoint

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", full)
        check(drseg("train", *small, "--data", data, "--out", tmp_path / "a"), 7, os.strerror(errno.ENOSPC))
    assert list((tmp_path / "a" / "checkpoints").iterdir()) == []

    from drseg_core.training import loop

    def huge(*arguments, **options):
        return torch.empty(2**58, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_loss", huge)
        result = drseg("train", *small, "--data", data, "--out", tmp_path / "b")
    check(result, 7, "out of memory", "288230376151711744 bytes", "--train.batch_size")


@pytest.mark.promise("C38")
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "terminated"),
        (ConfigError("bad\nvalue"), 2, "bad value"),
        (DatasetError("image"), 3, "image"),
        (NumericalError("nan"), 6, "nan"),
        (MemoryError(), 7, "allocation refused; lower --tile-size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), 7, "20.00 GiB"),
        (OSError(errno.ENOSPC, "No space left on device"), 7, "No space left"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 7, "/x cannot be written: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x cannot be used: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 7, "error: /x cannot be used: Read-only file system"),
        (ImportError("no module"), 5, "drseg doctor"),
        (RuntimeError("operator torchvision::nms does not exist"), 5, "do not fit together"),
        (KeyError("odd"), 1, "internal error: KeyError"),
    ],
)
def test_what_errors_become(error, code, said):
    message, found = failure(error, "predict")
    assert found == code and said in message and "\n" not in message


@pytest.mark.promise("C38")
def test_an_internal_error_is_1_and_debug_shows_where(drseg, monkeypatch):
    def broken(args):
        raise KeyError("odd")

    monkeypatch.setattr(doctor, "run", broken)
    check(drseg("doctor"), 1, "internal error: KeyError: 'odd'", "--debug")
    code, _, errors = drseg("doctor", "--debug")
    assert code == 1 and errors.startswith("drseg: internal error") and "Traceback" in errors and "broken" in errors


@pytest.mark.promise("C38")
def test_a_closed_output_is_quiet(process):
    """``drseg ... | head``: the reader is gone before the first line."""
    for words in (["--help"], ["train", "--config", "tiny", "--print_config"]):
        started = process(*words)
        started.stdout.close()
        errors = started.stderr.read()
        assert started.wait(timeout=120) in (0, 141)
        assert errors == ""


def wait_for(condition, started: subprocess.Popen[str] | Fork, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert started.poll() is None, started.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.promise("C33")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_a_signal_saves_and_the_run_goes_on(drseg, process, forked, small, data, tmp_path, number, code):
    out = tmp_path / "run"
    long = [*small, "--train.iterations", "100000", "--data", data, "--out", str(out), "--train.workers", "1"]
    # a terminal that closes asks for a stop as well
    said = "SIGTERM" if number == signal.SIGHUP else number.name
    # one of them stops a process that does nothing else
    started = (process if number == signal.SIGTERM else forked)("train", *long)
    wait_for(lambda: (out / "log.jsonl").is_file() and (out / "log.jsonl").stat().st_size > 0, started)
    started.send_signal(number)
    _, errors = started.communicate()
    assert started.returncode == code, errors
    assert "Traceback" not in errors and f"stopped by {said} after step" in errors
    step = newest_checkpoint(out).step
    assert step >= 1
    result = drseg("train", *small, "--train.iterations", step, "--data", data, "--out", out, "--resume")
    check(result, 4, f"train.iterations: 100000 then, {step} now")
    assert not [path for path in Path(out / "checkpoints").iterdir() if path.name.startswith(".")]
