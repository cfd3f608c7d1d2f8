# SPDX-License-Identifier: Apache-2.0
"""What stands beside a file of weights about the normalisation of pixels is not passed over."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from drseg_core.checkpoints.encoders import load_encoders
from drseg_core.config.schema import ClipConfig, DinoConfig, RemoteConfig
from drseg_core.errors import CheckpointError, ConfigError
from drseg_core.models.baselines.remote import RemoteGuidance
from drseg_core.models.clip import ClipEncoder, open_clip_model
from drseg_core.models.dino import DinoPrior
from drseg_core.models.pixel_statistics import NORMALIZATIONS, described_normalization

CLIP = ClipConfig(name="drseg-tiny", weights=None, image_size=64, guidance_blocks=(0, 1))
DINO = DinoConfig(name="drseg-tiny", weights=None, image_size=64)
HALF, OWN = [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.save(open_clip_model(CLIP, True)[0].state_dict(), folder / "clip.pt")
    torch.save(DinoPrior(DINO).encoder.state_dict(), folder / "prior.pt")
    return folder


@pytest.fixture
def beside(files: Path, tmp_path: Path) -> Any:
    """``beside(mean, deviation, file)``: the folder of the weights with such a description."""

    def write(mean: Any, deviation: Any, file: str = "preprocessor_config.json") -> Path:
        for name in ("clip.pt", "prior.pt"):
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(files / name)
        content: Any = {"image_mean": mean, "image_std": deviation}
        if file.startswith("open_clip"):
            content = {"model_cfg": {}, "preprocess_cfg": {"mean": mean, "std": deviation}}
        (tmp_path / file).write_text(json.dumps(content))
        return tmp_path

    return write


def means(module: Any) -> list[float]:
    return [round(float(value), 3) for value in module.pixel_mean.flatten()]


@pytest.mark.parametrize("file", ["preprocessor_config.json", "open_clip_config.json"])
def test_a_clip_that_needs_others_says_which(beside, file):
    folder = beside(HALF, HALF, file)
    config = dataclasses.replace(CLIP, weights=str(folder / "clip.pt"))
    with pytest.raises(ValueError, match=r"expected model\.clip\.normalization half, got null") as caught:
        ClipEncoder(config)
    assert "\n" not in str(caught.value)
    told = dataclasses.replace(config, normalization="half")
    assert means(ClipEncoder(told)) == HALF
    # a checkpoint of it needs no file
    (folder / "clip.pt").unlink()
    assert means(ClipEncoder(told, read_weights=False)) == HALF


def test_openai_s_are_taken_without_a_word(beside, caplog):
    folder = beside(NORMALIZATIONS["clip"].mean, NORMALIZATIONS["clip"].deviation)
    with caplog.at_level(logging.WARNING, "drseg_core"):
        found = ClipEncoder(dataclasses.replace(CLIP, weights=str(folder / "clip.pt")))
    assert means(found) == [0.481, 0.458, 0.408] and not caplog.records


def test_another_choice_is_taken_with_a_word(beside, logged):
    folder = beside(HALF, HALF)
    clip = dataclasses.replace(CLIP, weights=str(folder / "clip.pt"), normalization="imagenet")
    prior = dataclasses.replace(DINO, weights=str(folder / "prior.pt"))
    assert means(ClipEncoder(clip)) == [0.485, 0.456, 0.406] and means(DinoPrior(prior)) == [0.43, 0.411, 0.296]
    first, second = logged()
    assert "has the pixel statistics of half; model.clip.normalization=imagenet is taken" in first
    assert "has the pixel statistics of half; model.dino.normalization=sat is taken" in second


def test_statistics_that_nothing_has_are_refused(beside, logged):
    folder = beside(OWN, HALF)
    with pytest.raises(CheckpointError, match=r"pixel statistics are not supported; expected those of sat, .*0\.1"):
        ClipEncoder(dataclasses.replace(CLIP, weights=str(folder / "clip.pt")))
    prior = dataclasses.replace(DINO, weights=str(folder / "prior.pt"), normalization="clip")
    assert means(DinoPrior(prior)) == [0.481, 0.458, 0.408]
    assert "are not supported" in logged()[0] and logged()[0].endswith("model.dino.normalization=clip is taken")


def test_maps_from_words_take_what_is_described(beside, logged):
    folder = beside(HALF, HALF)
    clip = dataclasses.replace(CLIP, weights=str(folder / "clip.pt"))
    prior = dataclasses.replace(DINO, weights=str(folder / "prior.pt"))
    found = load_encoders(clip, prior, offline=True)
    assert means(found.clip) == means(found.prior) == HALF and not logged()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"image_mean": 3, "image_std": [1, 1, 1]}',
        '{"image_mean": [1, 2], "image_std": [1, 1, 1]}',
        "1e",
    ],
)
def test_what_says_nothing_is_passed_over(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(content)
    assert described_normalization(tmp_path / "clip.pt") is None


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="normalization is unknown; expected sat, .* or null, got 'x'"):
        open_clip_model(dataclasses.replace(CLIP, normalization="x"), True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="normalization is unknown"):
        load_encoders(dataclasses.replace(CLIP, normalization="x"), DINO)  # type: ignore[arg-type]


def test_a_remote_clip_has_those_of_openai_whatever_is_described(beside, logged):
    """It has no option for others, so it must not be told to set one."""
    folder = beside(HALF, HALF)
    config = RemoteConfig(name="drseg-tiny", weights=str(folder / "clip.pt"), image_size=64, guidance_blocks=(0, 1))
    assert means(RemoteGuidance(config)) == [0.481, 0.458, 0.408]
    assert "has the pixel statistics of half" in logged()[0]
