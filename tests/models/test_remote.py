# SPDX-License-Identifier: Apache-2.0
"""A second, frozen CLIP guides the decoder: RemoteCLIP in RSKT-Seg's decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from drseg_core.config.load import load_config
from drseg_core.config.schema import ClipConfig, ModelConfig, RemoteConfig
from drseg_core.errors import CheckpointError
from drseg_core.models.baselines.remote import RemoteGuidance
from drseg_core.models.build import build_model
from drseg_core.models.clip import ARCHITECTURES, ClipEncoder
from drseg_core.models.count import ParameterCount, count_parameters
from drseg_core.models.decoder import Decoder
from drseg_core.models.weights import check_left_out, left_out_hashes, load_into, model_state

CONFIG = RemoteConfig(name="drseg-tiny", image_size=64, guidance_blocks=(0, 1))
NAMES = ["water", "red roof", "bare soil"]


@pytest.fixture
def weight_file(tmp_path: Path) -> Path:
    from open_clip.model import CLIP

    state = CLIP(**ARCHITECTURES["drseg-tiny"]).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "remote.safetensors")
    return tmp_path / "remote.safetensors"


@pytest.fixture
def guided(tiny_config: ModelConfig) -> ModelConfig:
    """The tiny model with a tiny second CLIP on a grid of its own."""
    decoder = dataclasses.replace(tiny_config.decoder, remote_clip=True)
    return dataclasses.replace(tiny_config, decoder=decoder, remote=dataclasses.replace(CONFIG, image_size=32))


@torch.no_grad()
def test_outputs_are_those_of_the_blocks(weight_file: Path) -> None:
    remote = RemoteGuidance(dataclasses.replace(CONFIG, weights=str(weight_file), guidance_blocks=(1, 0)))
    whole = ClipEncoder(
        ClipConfig(name="drseg-tiny", weights=str(weight_file), image_size=64, guidance_blocks=(1, 0), trainable="none")
    )
    image = torch.rand(2, 3, 64, 64)
    found, expected = remote(image), whole(image).guidance
    assert [tuple(maps.shape) for maps in found] == [(2, 96, 8, 8)] * 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # another size comes down to the tower's
    larger = torch.nn.functional.interpolate(image, size=(80, 40), mode="bilinear", align_corners=False)
    resized = torch.nn.functional.interpolate(larger, size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.equal(remote(larger)[0], remote(resized)[0])


def test_no_more_of_the_tower_is_kept_than_is_computed() -> None:
    first, both = (RemoteGuidance(dataclasses.replace(CONFIG, guidance_blocks=blocks)) for blocks in ((0, 0), (0, 1)))
    assert (len(first.visual.blocks), len(both.visual.blocks)) == (1, 2)
    image = torch.rand(1, 3, 64, 64)
    names = {name for name, _ in both.named_parameters()}
    for parameter in both.parameters():
        assert not parameter.requires_grad
        parameter.requires_grad_(True)
    outputs = RemoteGuidance.forward.__wrapped__(both, image)
    torch.stack(outputs).square().mean().backward()
    assert {name for name, value in both.named_parameters() if value.grad is not None} == names


def test_remote_clip_at_768_pixels_has_the_grid_of_clip() -> None:
    with torch.device("meta"):
        remote = RemoteGuidance(RemoteConfig())
        maps = remote(torch.empty(1, 3, 100, 80))
    assert [tuple(value.shape) for value in maps] == [(1, 768, 24, 24)] * 2


def test_widths_of_the_published_decoder() -> None:
    """160 and 80 channels with the second CLIP, 192 and 96 with the prior too (RSKT-Seg)."""
    for prior, joined in ((None, (160, 80)), (1024, (192, 96))):
        decoder = Decoder(128, 1024, prior_dim=prior, remote_dim=768)
        layers = [stage.join for stage in decoder.stages]
        assert tuple(layer.conv.in_channels + layer.conv_guidance.in_channels for layer in layers) == joined
    # the projections are those of CLIP's own guidance
    for own, other in zip(Decoder(128, 768).guidance, decoder.remote_guidance, strict=True):
        assert [value.shape for value in own.parameters()] == [value.shape for value in other.parameters()]


@torch.no_grad()
def test_guidance_of_three_sources_is_joined_in_order() -> None:
    options: dict[str, Any] = {"widths": (8, 6), "guidance_widths": (4, 3), "guidance_hidden": (10, 9)}
    decoder = Decoder(16, 20, prior_dim=7, remote_dim=5, **options)
    sources = [[torch.randn(1, width, 4, 4) for _ in range(2)] for width in (20, 7, 5)]
    seen: list[torch.Tensor] = []
    decoder.stages[1].join.conv_guidance.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    clip, prior, remote = map(tuple, sources)
    decoder(torch.randn(1, 16, 2, 4, 4), clip, prior, remote_guidance=remote)
    layers = (decoder.guidance, decoder.prior_guidance, decoder.remote_guidance)
    expected = torch.cat([layer[1](maps[1]) for layer, maps in zip(layers, sources, strict=True)], dim=1)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("kind", ["ugaf", "none"])
def test_a_model_is_guided_and_trained_around_it(guided: ModelConfig, kind: str) -> None:
    model = build_model(dataclasses.replace(guided, fusion=dataclasses.replace(guided.fusion, kind=kind)))
    image = torch.rand(2, 3, 64, 64)
    logits = model(image, model.tokenize(NAMES)).logits
    assert logits.shape == (2, 3, 32, 32)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert not name.startswith("remote.") or not parameter.requires_grad, name
    with torch.no_grad():
        before, again = (model(image, model.tokenize(NAMES)).logits for _ in range(2))
        assert torch.equal(before, again)
        model.remote.visual.conv1.weight.mul_(2)
        assert not torch.equal(model(image, model.tokenize(NAMES)).logits, before)


def test_it_is_off_by_default(tiny) -> None:
    assert tiny.remote is None and not any("remote" in name for name in tiny.state_dict())


def test_parameters_by_hand() -> None:
    config = load_config("vitb").model
    clip, dino = (dataclasses.replace(part, weights=None) for part in (config.clip, config.dino))
    config = dataclasses.replace(config, clip=clip, dino=dino)
    guided = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, remote_clip=True))
    with torch.device("meta"):
        plain, counts = (count_parameters(build_model(some)) for some in (config, guided))
    width = 768
    # 8 of 12 blocks (two norms, four projections, the MLP), patches of 32 px, class token, 7 x 7 + 1 positions, a norm
    block = 2 * 2 * width + 4 * width * (width + 1) + 2 * 4 * width**2 + 5 * width
    assert counts["remote"] == ParameterCount(0, 8 * block + 3 * 32**2 * width + width + 50 * width + 2 * width)
    # two enlargements and reductions, and 32 and 16 more channels into the stages
    first = width * 256 * 4 + 256 + 256 * 32 * 9 + 32
    second = width * 128 * 16 + 128 + 128 * 16 * 9 + 16
    more = first + second + 32 * 64 * 9 + 16 * 32 * 9
    assert counts["decoder"].total == plain["decoder"].total + more
    assert counts["total"].trainable == plain["total"].trainable + more


def test_frozen_weights_from_a_file_are_left_out_of_checkpoints_and_checked(
    guided: ModelConfig, weight_file: Path
) -> None:
    random = model_state(build_model(guided))
    assert any(name.startswith("remote.") for name in random)
    config = dataclasses.replace(guided, remote=dataclasses.replace(guided.remote, weights=str(weight_file)))
    model = build_model(config)
    state, hashes = model_state(model), left_out_hashes(model)
    assert not any(name.startswith("remote.") for name in state) and "remote" in hashes
    other = build_model(config)
    load_into(other, state, name="a")
    check_left_out(other, hashes, name="a")
    other.remote.visual.conv1.weight.data[0] += 1
    with pytest.raises(CheckpointError, match="model.remote.weights are not those"):
        check_left_out(other, hashes, name="a")


def test_what_cannot_be(guided: ModelConfig, weight_file: Path) -> None:
    with pytest.raises(CheckpointError, match="RemoteGuidance: weights 'openai' not found; .* path of a file"):
        RemoteGuidance(RemoteConfig(weights="openai"))
    with pytest.raises(CheckpointError, match="does not fit the architecture"):
        RemoteGuidance(RemoteConfig(weights=str(weight_file)))
    with pytest.raises(ValueError, match=r"guidance_blocks is out of range for drseg-tiny; expected two of 0..2"):
        RemoteGuidance(dataclasses.replace(CONFIG, guidance_blocks=(1, 3)))
    with pytest.raises(ValueError, match="image_size does not fit drseg-tiny; expected a multiple of 8, got 60"):
        RemoteGuidance(dataclasses.replace(CONFIG, image_size=60))
    with pytest.raises(ValueError, match="remote_clip needs a decoder"):
        build_model(dataclasses.replace(guided, fusion=dataclasses.replace(guided.fusion, kind="cosine")))
