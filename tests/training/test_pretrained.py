# SPDX-License-Identifier: Apache-2.0
"""A model folder gives back the very same model, or says why not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from drseg_core.config.load import override
from drseg_core.config.schema import ClipConfig, DinoConfig, ModelConfig
from drseg_core.errors import CheckpointError, ConfigError, ResourceError
from drseg_core.models.dino import DinoPrior
from drseg_core.training import pretrained
from drseg_core.training.licences import UNKNOWN, licence_notes
from drseg_core.training.loop import train
from drseg_core.training.pretrained import from_pretrained, open_model, save_pretrained
from drseg_core.training.rank_channels import load_channels, weights_hash
from drseg_core.training.run import LoadedRun, load_run, training_data

NAMES = ["green meadow", "bare soil"]
FILES = {"README.md", "channels.safetensors", "classes.txt", "config.json", "manifest.json", "model.safetensors"}


@pytest.fixture(scope="module")
def run(config, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(override(config, {"train.iterations": 2}), data, folder, show_progress=False)


@pytest.fixture(scope="module")
def with_prior(config, data, tmp_path_factory) -> tuple[Path, Path]:
    """A run whose frozen prior came from a file, and the file."""
    home = tmp_path_factory.mktemp("private place")
    prior = DinoPrior(DinoConfig(name="drseg-tiny", weights=None, image_size=32, seed=7))
    file = home / "satellite.safetensors"
    save_file({name: value.clone() for name, value in prior.encoder.state_dict().items()}, file)
    options = override(config, {"train.iterations": 1, "model.dino.weights": str(file)})
    return train(options, data, home / "run", show_progress=False), file


def outputs(loaded: LoadedRun) -> list[torch.Tensor]:
    image = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = loaded.model(image, loaded.model.tokenize(NAMES))
    return [value for value in found if value is not None]


def equal(first: LoadedRun, second: LoadedRun) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(first), outputs(second), strict=True))


def test_round_trip_is_bit_equal(run, data, tmp_path):
    before = load_run(run)
    folder = save_pretrained(before, tmp_path / "model")
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    after = from_pretrained(folder)
    assert not after.model.training and after.step == 2 and after.class_names == before.class_names
    assert after.config == before.config and len(outputs(after)) == 4
    assert equal(before, after) and weights_hash(before.model) == weights_hash(after.model)
    # once more, from what was loaded: file by file the same, but for nothing
    again = save_pretrained(after, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_the_ranking_the_classes_and_the_origin_are_inside(run, tmp_path):
    folder = save_pretrained(load_run(run), tmp_path / "model")
    ranking = load_channels(folder / "channels.safetensors")
    model = from_pretrained(folder).model
    assert torch.equal(ranking.semantic_index, model.spsd.semantic_index)
    assert (folder / "classes.txt").read_text().splitlines() == ["bare soil", "red roof", "blue pond"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["spec"] == "folder" and manifest["data"]["samples"] == 5
    assert manifest["parameters"]["total"]["trainable"] > 0 and "command" not in manifest
    assert training_data(from_pretrained(folder)) == "folder"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "drseg" in file.metadata()


def test_a_prior_that_was_left_out_is_asked_for_and_checked(with_prior, tmp_path):
    run, file = with_prior
    before = load_run(run)
    folder = save_pretrained(before, tmp_path / "model")
    description = json.loads((folder / "config.json").read_text())
    assert description["config"]["model"]["dino"]["weights"] == "satellite.safetensors"
    assert list(description["left_out"]) == ["dino"]
    for path in folder.iterdir():
        assert b"private place" not in path.read_bytes(), path.name
    with pytest.raises(CheckpointError, match=r"satellite\.safetensors' not found"):
        from_pretrained(folder)
    after = from_pretrained(folder, weights={"dino": str(file)})
    assert equal(before, after)
    other = tmp_path / "other.safetensors"
    prior = DinoPrior(DinoConfig(name="drseg-tiny", weights=None, image_size=32, seed=8))
    save_file({name: value.clone() for name, value in prior.encoder.state_dict().items()}, other)
    with pytest.raises(CheckpointError, match="model.dino.weights are not those"):
        from_pretrained(folder, weights={"dino": str(other)})
    with pytest.raises(ConfigError, match="expected one of clip, dino, got 'dyno'"):
        from_pretrained(folder, weights={"dyno": str(file)})


def test_a_prior_may_go_along(with_prior, tmp_path):
    run, _ = with_prior
    before = load_run(run)
    folder = save_pretrained(before, tmp_path / "model", include_frozen=True)
    assert json.loads((folder / "config.json").read_text())["left_out"] == {}
    assert equal(before, from_pretrained(folder))
    assert "| dino | drseg-tiny | satellite.safetensors |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "channels.safetensors", "classes.txt", "config.json"])
def test_damage_is_noticed(run, tmp_path, name):
    folder = save_pretrained(load_run(run), tmp_path / "model")
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} (is|was not).* damaged") as caught:
        from_pretrained(folder)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be read" if name != "config.json" else "config.json"):
        from_pretrained(folder)


def test_the_card_may_be_edited_and_a_newer_format_is_refused(run, tmp_path):
    folder = save_pretrained(load_run(run), tmp_path / "model")
    (folder / "README.md").write_text("mine\n")
    from_pretrained(folder)
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**description, "format_version": 2}))
    with pytest.raises(CheckpointError, match="newer format; expected at most 1, got 2"):
        from_pretrained(folder)


def test_a_folder_in_use_and_a_foreign_ranking_are_refused(run, tmp_path):
    loaded = load_run(run)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="folder is in use"):
        save_pretrained(loaded, tmp_path)
    ranking = load_channels(run / "channels.safetensors")
    other = dataclasses.replace(ranking, score=-ranking.score).split_again(0.5)
    with pytest.raises(CheckpointError, match="expected the ranking behind its split"):
        save_pretrained(loaded, tmp_path / "model", channels=other)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("late", [False, True])
def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch, late):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "file_hash" if late else "save_weights", full)
    with pytest.raises(ResourceError, match=r"model could not be written \(\[Errno 28\] No space left"):
        save_pretrained(load_run(run), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_from_the_hub(run, tmp_path, monkeypatch):
    import huggingface_hub

    folder = save_pretrained(load_run(run), tmp_path / "model")
    asked: list[tuple] = []

    def snapshot(name, **options):
        asked.append((name, options["revision"], options["local_files_only"], set(options["allow_patterns"])))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    loaded = from_pretrained("somebody/drseg-vitl", revision="v1", local_files_only=True)
    assert asked == [("somebody/drseg-vitl", "v1", True, FILES)]
    assert equal(loaded, load_run(run))

    def fail(*arguments, **options):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="cannot be fetched; .* got OSError: no route to host$"):
        from_pretrained("somebody/drseg-vitl")
    with pytest.raises(CheckpointError, match="not found; expected a folder, or owner/name on the hub"):
        from_pretrained(tmp_path / "absent")


def test_open_model_takes_runs_checkpoints_and_folders(run, tmp_path):
    folder = save_pretrained(load_run(run), tmp_path / "model")
    paths = [run, run / "checkpoints" / "step-00000002", folder]
    first, *others = [open_model(path) for path in paths]
    assert all(equal(first, other) for other in others)


def test_licences():
    (clip, dino) = licence_notes(ModelConfig(), {"clip"})
    assert clip == {
        "part": "clip",
        "architecture": "ViT-L-14-336-quickgelu",
        "weights": "openai",
        "licence": "MIT (OpenAI)",
        "included": True,
    }
    assert (dino["licence"], dino["weights"], dino["included"]) == ("dinov3-license", "pretrained", False)
    local = ModelConfig(clip=ClipConfig(weights="RemoteCLIP-ViT-L-14.pt"), dino=DinoConfig(weights="sat.pth"))
    (clip, dino) = licence_notes(local, {"clip"})
    assert clip["licence"] == UNKNOWN
    assert dino["licence"] == "dinov3-license, if the file is the published one"
    nothing = ModelConfig(clip=ClipConfig(weights=None), dino=DinoConfig(name="drseg-tiny", weights=None))
    assert [note["licence"] for note in licence_notes(nothing, {"clip"})] == ["none: no published weights"] * 2
