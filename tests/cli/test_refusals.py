# SPDX-License-Identifier: Apache-2.0
"""What is refused before a run folder exists, and checkpoints whose sources moved or changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from drseg_core.checkpoints.checkpoint import content_hash, newest_checkpoint
from drseg_core.config.load import load_config
from drseg_core.models.build import build_model
from drseg_core.models.clip import TINY
from tests.cli.test_exit_codes import check

LONG = "a " * 2500


@pytest.mark.promise("C51")
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", -1),
        ("train.batch_size", 0),
        ("train.crop_size", 0),
        ("train.workers", -1),
        ("train.warmup_iterations", -1),
        ("train.iterations", 0),
        ("train.seconds", 0),
        ("train.log_every", 0),
        ("train.checkpoint_every", 0),
        ("train.keep_checkpoints", 0),
        ("train.nan_limit", 0),
        ("train.learning_rate", 0),
        ("train.weight_decay", -1),
        ("train.gradient_clip", 0),
        ("train.clip_learning_rate_scale", -1),
        ("train.alignment_weight", -1),
        ("model.aggregator.layers", -1),
        ("model.aggregator.heads", 0),
        ("model.aggregator.heads", 5),
        ("model.aggregator.width", 0),
        ("model.aggregator.mlp_hidden", 0),
        ("model.spsd.alpha", 1.5),
        ("model.spsd.semantic_ratio", 1.0),
        ("model.spsd.prototypes_per_class", 0),
        ("model.graph.k", -1),
        ("model.graph.gamma", 0),
        ("model.graph.gamma", 1e-40),
        ("model.graph.decay", -1),
        ("model.graph.edge_hidden", 0),
        ("model.graph.layers", 0),
        ("model.graph.hidden", 0),
        ("model.graph.dropout", 1.0),
        ("model.fusion.tau", 0),
        ("model.clip.image_size", 0),
        ("model.clip.template", "no braces"),
        ("model.dino.image_size", 0),
        ("model.remote.image_size", 0),
        ("model.decoder.widths", "[0,8]"),
        ("model.decoder.guidance_widths", "[0,8]"),
        ("model.decoder.guidance_hidden", "[8,0]"),
        ("evaluation.tile_size", 0),
        ("evaluation.overlap", 32),
        ("evaluation.batch_size", 0),
    ],
)
def test_numbers_out_of_range_are_2(drseg, small, data, tmp_path, option, value):
    out = tmp_path / "run"
    check(drseg("train", *small, "--data", data, "--out", out, f"--{option}={value}"), 2, option, "expected")
    assert not out.exists()


@pytest.mark.promise("C51")
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model.dino.image_size", 33], 2, "multiple of 8"),
        (["--init", "nope"], 4, "nope"),
        (["--init", "x" * 5000], 4, "init"),
        (["--model.spsd.channels", "nope"], 4, "nope"),
        (["--config", "x" * 5000], 2, "load_config"),
    ],
)
def test_what_cannot_be_used_leaves_no_run_folder(drseg, small, data, tmp_path, words, code, said):
    out = tmp_path / "run"
    check(drseg("train", *small, "--data", data, "--out", out, *words), code, said)
    assert not out.exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--polygons", "map.gpkg", "--min-area=-1"], "min_area is out of range; expected a finite number, at least 0"),
        (["--polygons", "map.gpkg", "--min-area", "1e400"], "min_area is out of range"),
        (["--min-area", 50], "min_area is for polygons; expected polygons beside it, got 50.0 alone"),
        (["--asset", "red"], "asset is for STAC items"),
    ],
)
@pytest.mark.promise("C51")
def test_options_of_a_map_that_mean_nothing_are_2(drseg, run, folder, tmp_path, monkeypatch, words, said, more):
    monkeypatch.chdir(tmp_path)
    image = folder / "val" / "images" / "0.png"
    check(drseg("predict", run, image, "--out", "map.tif", *words, *more), 2, said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "predict"])
def test_an_output_path_that_is_too_long_is_2(drseg, small, data, run, folder, command):
    image = folder / "val" / "images" / "0.png"
    words = [*small, "--data", data] if command == "train" else [run, image]
    check(drseg(command, *words, "--out", "/tmp/" + "x" * 5000), 2)


@pytest.mark.parametrize("name", [LONG, ", car"])
def test_class_names_that_cannot_be_prompts(drseg, small, run, folder, tmp_path, name):
    odd = tmp_path / "data"
    shutil.copytree(folder, odd)
    (odd / "classes.txt").write_text(f"bare soil\n{name}\nblue pond\n")
    data = ["--data", f"folder:{odd}", "--out", tmp_path / "out"]
    for words in (["train", *small], ["evaluate", run], ["rank", run]):
        check(drseg(*words, *data), 3, "class")
        assert not (tmp_path / "out").exists()
    image = folder / "val" / "images" / "0.png"
    check(drseg("predict", run, image, "--out", tmp_path / "map.tif", "--classes", f"a; {name}"), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.promise("C53")
def test_nothing_that_a_terminal_obeys_is_printed(drseg, run, folder, tmp_path):
    odd = "\x1b]0;title\x07\x9b2J"
    code, output, errors = drseg("predict", run, tmp_path / f"{odd}.tif", "--out", tmp_path / "map.tif")
    assert code == 3 and "\\x1b]0;title\\x07\\x9b2J.tif is not a file" in errors
    # nor logged, on the way
    copied = tmp_path / f"set{odd}"
    shutil.copytree(folder, copied)
    (copied / "val" / "masks" / "0.png").unlink()
    _, more, warned = drseg("data", "check", copied)
    for text in (output, errors, more, warned):
        assert all(letter.isprintable() or letter == "\n" for letter in text), ascii(text)


def test_a_class_given_twice_is_2(drseg, tmp_path):
    check(drseg("predict", "run", "image.tif", "--out", tmp_path / "map.tif", "--classes", "a; a"), 2, "twice")


def test_a_run_outlives_the_weight_file_it_began_with(drseg, small, data, folder, tmp_path):
    from open_clip.model import CLIP

    torch.manual_seed(3)
    file = tmp_path / "clip.pt"
    torch.save(CLIP(**TINY).state_dict(), file)
    out, image = tmp_path / "run", folder / "val" / "images" / "0.png"
    words = [*small, "--model.clip.weights", file, "--model.fusion.kind", "none"]
    assert drseg("train", *words, "--data", data, "--out", out)[0] == 0
    file.rename(tmp_path / "moved.pt")
    assert drseg("predict", out, image, "--out", tmp_path / "map.tif")[0] == 0
    code, text, _ = drseg("train", "--data", data, "--out", out, "--resume", "--train.iterations", 3)
    assert code == 0 and "steps: 3" in text


@pytest.mark.promise("C32")
def test_a_prior_with_other_weights_is_4(drseg, small, data, tmp_path):
    file, out = tmp_path / "prior.pt", tmp_path / "run"

    def write(factor: float) -> None:
        prior = build_model(load_config("tiny").model).dino.encoder
        torch.save({name: value * factor for name, value in prior.state_dict().items()}, file)

    write(1.0)
    assert drseg("train", *small, "--model.dino.weights", file, "--data", data, "--out", out)[0] == 0
    evaluation = ["evaluate", out, "--data", data, "--out", tmp_path / "m.json", "--overwrite"]
    assert drseg(*evaluation)[0] == 0
    write(2.0)
    check(drseg(*evaluation), 4, "model.dino.weights")
    check(drseg("train", "--data", data, "--out", out, "--resume", "--train.iterations", 3), 4, "model.dino.weights")
    write(1.0)
    assert drseg(*evaluation)[0] == 0


def test_a_checkpoint_with_an_unknown_option_is_4(drseg, run, data, tmp_path):
    later = tmp_path / "run"
    shutil.copytree(run, later)
    file: Path = newest_checkpoint(later).path / "checkpoint.json"
    description = json.loads(file.read_text())
    del description["sha256"]
    description["config"]["model"]["graph"]["novel"] = 1
    file.write_text(json.dumps({**description, "sha256": content_hash(description)}))
    check(drseg("evaluate", later, "--data", data, "--out", tmp_path / "m.json"), 4, "novel")


def test_a_full_disk_while_channels_are_saved_is_7(drseg, run, data, tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    check(drseg("rank", run, "--data", data, "--out", tmp_path / "c.safetensors"), 7, "No space left")
    assert list(tmp_path.iterdir()) == []


def test_rank_takes_the_configuration_of_the_run_wherever_it_stands(drseg, run, data, tmp_path):
    from drseg_core.checkpoints.channels import load_channels

    first, last = tmp_path / "first.safetensors", tmp_path / "last.safetensors"
    assert drseg("rank", run, "--data", data, "--out", first)[0] == 0
    assert drseg("rank", "--data", data, "--overwrite", "--out", last, run)[0] == 0
    for file in (first, last):
        # what the run was given, not the default of 100
        assert load_channels(file).metadata["prototypes_per_class"] == 5


def test_features_that_cannot_be_kept(drseg, run, small, data, tmp_path, monkeypatch):
    import safetensors.torch

    words = ["--data", data, "--out", tmp_path / "m.json"]
    (tmp_path / "file").write_text("x")
    check(drseg("evaluate", run, *words, "--prior-cache", tmp_path / "file"), 2, "folder is a file")
    check(drseg("evaluate", run, *words, "--prior-cache-gb", 1), 2, "expected --prior-cache DIR beside it")
    size = ["--prior-cache", tmp_path / "features", "--prior-cache-gb=-1"]
    check(drseg("evaluate", run, *words, *size), 2, "--prior-cache-gb is out of range; expected a number >= 0")
    baseline = tmp_path / "baseline"
    assert drseg("train", *small, "--model.fusion.kind", "none", "--data", data, "--out", baseline)[0] == 0
    check(drseg("evaluate", baseline, *words, "--prior-cache", tmp_path / "features"), 2, "no prior")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    code, _, errors = drseg("evaluate", run, *words, "--prior-cache", tmp_path / "features")
    # below the progress bar
    assert code == 7 and "No space left" in errors.splitlines()[-1]
    assert list((tmp_path / "features").iterdir()) == [] and not (tmp_path / "m.json").exists()
