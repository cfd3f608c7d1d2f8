# SPDX-License-Identifier: Apache-2.0
"""What else the prior can give: keys, values, inner blocks, its own grid, and guidance of the decoder."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drseg_core.config.schema import DinoConfig
from drseg_core.models.build import build_model
from drseg_core.models.decoder import Decoder
from drseg_core.models.dino import DinoPrior
from drseg_core.nn.resample import resample

V3 = DinoConfig(name="drseg-tiny", weights=None, image_size=64)
V1 = DinoConfig(name="test_vit", weights=None, image_size=96, normalization="imagenet")
V3_BIAS = DinoConfig(name="vit_small_patch16_dinov3_qkvb", weights=None, image_size=64)
NAMES = ["water", "red roof", "bare soil"]


def attention_input(prior: DinoPrior, image: torch.Tensor, layer: int) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    block = prior.encoder.blocks[layer]
    handle = block.norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    prior(image, (1, 1))
    handle.remove()
    return seen[0][:, prior.encoder.num_prefix_tokens :]


@pytest.mark.parametrize("config", [V3, V1, V3_BIAS], ids=["dinov3", "dinov1", "dinov3 with biases"])
@pytest.mark.parametrize(("features", "place"), [("key", 1), ("value", 2)])
@pytest.mark.parametrize("layer", [None, 0])
@torch.no_grad()
def test_keys_and_values(config: DinoConfig, features: str, place: int, layer: int | None) -> None:
    prior = DinoPrior(dataclasses.replace(config, features=features, layer=layer))
    attention = prior.encoder.blocks[-1 if layer is None else layer].attn
    for name in ("q_bias", "v_bias"):
        if getattr(attention, name, None) is not None:
            nn.init.normal_(getattr(attention, name))
    image = torch.rand(2, 3, config.image_size, config.image_size)
    y = attention_input(prior, image, len(prior.encoder.blocks) - 1 if layer is None else layer)
    width = prior.width
    expected = y @ attention.qkv.weight[place * width : (place + 1) * width].T
    if attention.qkv.bias is not None:
        expected = expected + attention.qkv.bias[place * width : (place + 1) * width]
    elif getattr(attention, "v_bias", None) is not None and features == "value":
        expected = expected + attention.v_bias
    side = prior.grid[0]
    found = prior(image, (side, side))
    torch.testing.assert_close(found, expected.transpose(1, 2).unflatten(2, (side, side)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_inner_block_and_guidance_come_from_one_pass() -> None:
    prior = DinoPrior(dataclasses.replace(V3, layer=0))
    image = torch.rand(1, 3, 64, 64)
    first, last = prior.encoder.forward_intermediates(
        (image - prior.pixel_mean) / prior.pixel_deviation, indices=[0, 1], norm=True, intermediates_only=True
    )
    torch.testing.assert_close(prior(image, (8, 8)), first)
    runs: list[int] = []
    prior.encoder.patch_embed.register_forward_hook(lambda module, inputs, output: runs.append(1))
    maps = prior.maps(image, (1, 0))
    torch.testing.assert_close(maps.features, first)
    torch.testing.assert_close(maps.guidance[0], last)
    torch.testing.assert_close(maps.guidance[1], first)
    assert len(runs) == 1


def test_options_that_an_encoder_cannot_meet() -> None:
    with pytest.raises(ValueError, match="layer is out of range for drseg-tiny; expected 0..1, got 2"):
        DinoPrior(dataclasses.replace(V3, layer=2))
    convolutional = DinoConfig(name="test_convnext", weights=None, image_size=64, normalization="imagenet")
    with pytest.raises(ValueError, match="features of test_convnext are its tokens only"):
        DinoPrior(dataclasses.replace(convolutional, features="key"))
    with pytest.raises(ValueError, match="test_convnext has no patches"):
        _ = DinoPrior(convolutional).grid


def finer(variant, **options):
    """The tiny model whose prior has 16 x 16 patches, twice as many as CLIP on each side."""
    config = variant("dino", image_size=128, **options.pop("dino", {}))
    graph = dataclasses.replace(config.graph, **options.pop("graph", {}))
    decoder = dataclasses.replace(config.decoder, **options.pop("decoder", {}))
    return dataclasses.replace(config, graph=graph, decoder=decoder)


class Scale(nn.Module):
    """Stands for PDGR: notes the shapes and doubles the features."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, features, prior):
        self.shapes.append((*features.shape[2:], *prior.shape[2:]))
        return 2 * features


@torch.no_grad()
def test_the_graph_on_the_grid_of_the_prior(variant) -> None:
    model = build_model(finer(variant, graph={"grid": "prior"})).eval()
    model.pdgr = Scale()
    image = torch.rand(1, 3, 64, 64)
    features = model.dense_features(image)
    rectified = model.rectify(features, image)
    assert model.pdgr.shapes == [(16, 16, 16, 16)] and rectified.shape == features.shape
    semantic, structural = model.spsd.semantic_index, model.spsd.structural_index
    assert torch.equal(rectified[:, semantic], features[:, semantic])
    enlarged = F.interpolate(features[:, structural], size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(rectified[:, structural], 2 * F.avg_pool2d(enlarged, 2))


@torch.no_grad()
def test_by_default_a_finer_prior_is_averaged(variant) -> None:
    model = build_model(finer(variant)).eval()
    seen: list[torch.Tensor] = []
    model.pdgr.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    image = torch.rand(1, 3, 64, 64)
    model.rectify(model.dense_features(image), image)
    torch.testing.assert_close(seen[0], F.avg_pool2d(model.dino.maps(image).features, 2))


def test_a_graph_on_the_same_grid_is_the_same_either_way(variant, tiny) -> None:
    other = build_model(variant("graph", grid="prior"))
    other.load_state_dict(tiny.state_dict())
    image = torch.rand(1, 3, 64, 64)
    features = tiny.dense_features(image)
    torch.testing.assert_close(other.eval().rectify(features, image), tiny.eval().rectify(features, image))


@pytest.mark.parametrize("scale", [1, 2])
def test_the_prior_guides_the_decoder(variant, scale: int) -> None:
    guided = {"dino_guidance": True}
    blocks = {"guidance_blocks": (0, 1)}
    config = finer(variant, dino=blocks, decoder=guided)
    if scale == 1:
        config = dataclasses.replace(config, dino=dataclasses.replace(config.dino, image_size=64))
    model = build_model(config)
    strides = [project[0].stride[0] for project in model.decoder.prior_guidance]
    assert strides == ([2, 4] if scale == 1 else [1, 2])
    runs: list[int] = []
    model.dino.encoder.patch_embed.register_forward_hook(lambda module, inputs, output: runs.append(1))
    logits = model(torch.rand(2, 3, 64, 64), model.tokenize(NAMES)).logits
    assert logits.shape == (2, 3, 32, 32) and len(runs) == 1
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    # what the prior says is looked at, not only joined
    assert all(project[0].weight.grad.any() for project in model.decoder.prior_guidance)


def test_widths_of_the_published_decoder() -> None:
    """128 and 64 channels with CLIP's guidance alone, 160 and 80 with the prior's too (RSKT-Seg)."""
    for prior, joined in ((None, (128, 64)), (768, (160, 80))):
        decoder = Decoder(128, 768, prior_dim=prior, prior_scale=2)
        layers = [stage.join for stage in decoder.stages]
        assert tuple(layer.conv.in_channels + layer.conv_guidance.in_channels for layer in layers) == joined
    first, second = (project[0] for project in decoder.prior_guidance)
    assert tuple(first.weight.shape) == (768, 256, 1, 1) and tuple(second.weight.shape) == (768, 128, 2, 2)


@torch.no_grad()
def test_guidance_of_both_sources_is_joined_in_order() -> None:
    decoder = Decoder(16, 20, widths=(8, 6), guidance_widths=(4, 3), guidance_hidden=(10, 9), prior_dim=7)
    embedding = torch.randn(1, 16, 2, 4, 4)
    clip, prior = ([torch.randn(1, width, 4, 4) for _ in range(2)] for width in (20, 7))
    seen: list[torch.Tensor] = []
    decoder.stages[1].join.conv_guidance.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    decoder(embedding, tuple(clip), tuple(prior))
    expected = torch.cat((decoder.guidance[1](clip[1]), decoder.prior_guidance[1](prior[1])), dim=1)
    torch.testing.assert_close(seen[0], expected)


def test_guidance_that_cannot_be(variant) -> None:
    with pytest.raises(ValueError, match=r"guidance_blocks is out of range for drseg-tiny; expected two of 0..1"):
        config = variant("decoder", dino_guidance=True)
        build_model(dataclasses.replace(config, dino=dataclasses.replace(config.dino, guidance_blocks=(0, 2))))
    config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, kind="none"))
    with pytest.raises(ValueError, match="dino_guidance needs a prior"):
        build_model(config)


def test_rs_dino_v1_at_full_resolution_has_48_by_48_patches() -> None:
    config = DinoConfig(name="vit_base_patch8_224", weights=None, normalization="clip", guidance_blocks=(3, 7))
    with torch.device("meta"):
        prior = DinoPrior(config)
        maps = prior.maps(torch.empty(1, 3, 384, 384), config.guidance_blocks)
    assert prior.grid == (48, 48) and prior.width == 768 and len(prior.encoder.blocks) == 12
    assert [tuple(value.shape) for value in (maps.features, *maps.guidance)] == [(1, 768, 48, 48)] * 3
    assert resample(maps.features, (24, 24)).shape == (1, 768, 24, 24)
