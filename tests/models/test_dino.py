# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from drseg_core.config.schema import DinoConfig
from drseg_core.errors import CheckpointError
from drseg_core.models.dino import TINY, DinoPrior
from drseg_core.nn.resample import resample

CONFIG = DinoConfig(name="drseg-tiny", weights=None, image_size=128)


def encoder(**options):
    import timm

    return timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0, img_size=128, **TINY)


def test_features_are_the_patch_tokens_after_the_final_norm() -> None:
    prior = DinoPrior(CONFIG)
    image = torch.rand(2, 3, 128, 128)
    features = prior(image, (16, 16))
    mean, deviation = torch.tensor([0.430, 0.411, 0.296]), torch.tensor([0.213, 0.156, 0.143])
    pixels = (image - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    tokens = prior.encoder.forward_features(pixels)
    prefix = prior.encoder.num_prefix_tokens
    assert prefix == 5 and tokens.shape[1] == prefix + 256
    expected = tokens[:, prefix:].transpose(1, 2).unflatten(2, (16, 16))
    torch.testing.assert_close(features, expected)
    assert prior.width == 96


@pytest.mark.parametrize("normalization", ["sat", "imagenet", "clip"])
def test_normalizations_differ(normalization: str) -> None:
    prior = DinoPrior(dataclasses.replace(CONFIG, normalization=normalization))
    base = DinoPrior(CONFIG)
    image = torch.rand(1, 3, 128, 128)
    assert torch.allclose(prior(image, (16, 16)), base(image, (16, 16))) == (normalization == "sat")


def test_random_weights_follow_their_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = DinoPrior(CONFIG).state_dict()
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    second = DinoPrior(CONFIG).state_dict()
    other = DinoPrior(dataclasses.replace(CONFIG, seed=1)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_frozen_without_gradient_and_always_in_evaluation_mode() -> None:
    prior = DinoPrior(CONFIG)
    holder = torch.nn.ModuleList([prior]).train()
    assert not any(module.training for module in prior.modules()) and holder.training
    assert not any(parameter.requires_grad for parameter in prior.parameters())
    image = torch.rand(1, 3, 128, 128, requires_grad=True)
    assert not prior(image, (16, 16)).requires_grad


def test_any_image_is_resized() -> None:
    prior = DinoPrior(CONFIG)
    image = torch.rand(1, 3, 50, 200)
    resized = F.interpolate(image, size=(128, 128), mode="bilinear", align_corners=False)
    torch.testing.assert_close(prior(image, (16, 16)), prior(resized, (16, 16)))


def test_resampling_to_the_clip_grid() -> None:
    x = torch.randn(2, 5, 12, 8)
    assert resample(x, (12, 8)) is x
    torch.testing.assert_close(resample(x, (6, 4)), F.avg_pool2d(x, 2))
    torch.testing.assert_close(resample(x, (4, 8)), F.avg_pool2d(x, (3, 1)))
    expected = F.interpolate(x, size=(7, 5), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resample(x, (7, 5)), expected)
    assert resample(x, (24, 24)).shape == (2, 5, 24, 24)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "teacher", "meta"])
def test_weights_from_files(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = encoder().eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / ("prior.safetensors" if kind == "safetensors" else "prior.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pt":
        torch.save({"model": state}, path)
    elif kind == "teacher":
        torch.save({"teacher": {f"module.backbone.{key}": value for key, value in state.items()}}, path)
    else:
        # names of the original DINOv3 release, which timm translates
        original = {}
        for key, value in state.items():
            key = key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma")
            original[key.replace("gamma_2", "ls2.gamma")] = value
        original["mask_token"] = torch.zeros(1, 96)
        torch.save(original, path)
    prior = DinoPrior(dataclasses.replace(CONFIG, weights=str(path)))
    for key, value in prior.encoder.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_a_plain_vision_transformer_serves_too() -> None:
    prior = DinoPrior(DinoConfig(name="test_vit", weights=None, image_size=96, normalization="imagenet"))
    assert prior(torch.rand(1, 3, 64, 64), (6, 6)).shape == (1, prior.width, 6, 6)


@pytest.mark.parametrize("name", ["drseg-tiny", "resnet18"])
def test_constant_features_are_the_same_everywhere(name: str) -> None:
    own = DinoConfig(name=name, weights=None, image_size=64, guidance_blocks=(0, 1))
    plain, constant = DinoPrior(own), DinoPrior(dataclasses.replace(own, features="constant"))
    image = torch.rand(2, 3, 64, 64)
    features = constant(image, (4, 4))
    assert features.shape == plain(image, (4, 4)).shape and bool((features == 1).all())
    if name == "drseg-tiny":
        # what guides a decoder stays
        for found, expected in zip(
            constant.maps(image, (0, 1)).guidance, plain.maps(image, (0, 1)).guidance, strict=True
        ):
            assert torch.equal(found, expected)


def test_a_convolutional_encoder_serves_too() -> None:
    prior = DinoPrior(DinoConfig(name="test_convnext", weights=None, image_size=64, normalization="imagenet"))
    assert prior(torch.rand(1, 3, 64, 64), (8, 8)).shape == (1, prior.width, 8, 8)


def test_default_is_the_satellite_model_of_timm() -> None:
    import timm

    config = DinoConfig()
    assert timm.is_model(config.name.split(".")[0])
    pretrained = timm.get_pretrained_cfg(config.name)
    assert pretrained.mean == (0.430, 0.411, 0.296) and pretrained.std == (0.213, 0.156, 0.143)
    with torch.device("meta"):
        prior = DinoPrior(dataclasses.replace(config, weights=None))
    assert prior.width == 1024 and len(prior.encoder.blocks) == 24


def test_bad_configurations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name is unknown"):
        DinoPrior(DinoConfig(name="vit_nothing", weights=None))
    with pytest.raises(ValueError, match="normalization is unknown"):
        DinoPrior(dataclasses.replace(CONFIG, normalization="x"))
    with pytest.raises(CheckpointError, match="no published weights"):
        DinoPrior(dataclasses.replace(CONFIG, weights="pretrained"))
    with pytest.raises(CheckpointError, match="not found"):
        DinoPrior(dataclasses.replace(CONFIG, weights="nowhere.pth"))
    path = tmp_path / "other.pt"
    torch.save({key: value for key, value in encoder().state_dict().items() if "blocks.1." not in key}, path)
    with pytest.raises(CheckpointError, match="missing: blocks.1"):
        DinoPrior(dataclasses.replace(CONFIG, weights=str(path)))
