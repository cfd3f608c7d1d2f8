# SPDX-License-Identifier: Apache-2.0
"""Parameters of the compared methods, part by part, against those that their public code has.

The public figures were counted on the repositories' own modules, built with the sizes of their files (November 2026).
CAT-Seg, OVRS, GSNet and RSKT-Seg have every tensor of theirs, except that a linear map of a concatenation is two that
are added here, which are as many numbers.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from drseg_core.config.load import load_config, override
from drseg_core.config.methods import method_options, published_options
from drseg_core.models.build import build_model
from drseg_core.models.count import count_parameters

CLIP = {"vitb": 149_620_737, "vitl": 427_944_193}
# the image tower of ViT-B/32, for which RemoteCLIP's file is, and DINO's ViT-B/8; the positions of the latter come
# from 28 x 28 to 48 x 48 when its file is read, in the public code whenever it runs
REMOTE_IMAGE, DINO = 87_849_216, 85_807_872
RESIZED = (48**2 - 28**2) * 768
# 3x3 and 1x1 projections of the features and the words to 128 channels
PROJECTIONS = {"vitb": 589_952 + 65_664, "vitl": 884_864 + 98_432}
# transposed convolutions of two blocks' outputs, and the 3x3 convolutions after them
ENLARGED = {"vitb": 786_688 + 1_572_992, "vitl": 1_048_832 + 2_097_280}
REDUCED = 92_208
DINO_GUIDANCE = 196_864 + 393_344 + REDUCED
HEAD = 289


@functools.cache
def counted(name: str, preset: str, *, released: str | None = None) -> dict[str, int]:
    config = load_config(preset)
    options = {**method_options(name), **published_options(name, config.model.clip.name, released=released)}
    if name in ("gsnet", "rskt"):
        options.update({"model.dino.name": "vit_base_patch8_224", "model.dino.guidance_blocks": (3, 7)})
    model = override(config, options).model
    parts = {part: dataclasses.replace(getattr(model, part), weights=None) for part in ("clip", "dino", "remote")}
    with torch.device("meta"):
        counts = count_parameters(build_model(dataclasses.replace(model, **parts)))
    return {part: count.total for part, count in counts.items()} | {"trained": counts["total"].trainable}


@pytest.mark.parametrize("preset", ["vitb", "vitl"])
@pytest.mark.parametrize(
    ("name", "fusion", "stages"),
    [
        ("catseg", 6_400, 160_096 + 40_112),
        ("ovrs", 25_216, 163_202 + 40_898),
        ("gsnet", 2 * 6_400 + 1_605_760, 178_528 + 44_720),
    ],
)
def test_those_with_cat_seg_s_aggregator(name: str, fusion: int, stages: int, preset: str) -> None:
    own = counted(name, preset)
    assert own["aggregator"] == 1_354_240 + PROJECTIONS[preset] and own["fusion"] == fusion
    decoder = stages + HEAD + ENLARGED[preset] + REDUCED
    if name == "gsnet":
        # its map to the joint space is 512 wide in its code, where ViT-L's is 768
        channels = {"vitb": 512, "vitl": 768}[preset]
        assert own["project_prior"] == (4 * 768 + 1) * channels and own["dino"] == DINO + RESIZED
        decoder += DINO_GUIDANCE
    assert own["decoder"] == decoder
    # the logit scale is not used here
    assert own["clip"] == CLIP[preset] - 1


@pytest.mark.parametrize(
    ("preset", "released", "layers"), [("vitb", None, 3), ("vitl", None, 2), ("vitb", "dlrsd", 5), ("vitl", "dlrsd", 5)]
)
def test_rskt_seg(preset: str, released: str | None, layers: int) -> None:
    own = counted("rskt", preset, released=released)
    assert own["aggregator"] == layers * 830_592 + PROJECTIONS[preset]
    assert own["fusion"] == 25_216 + 6_400 + 1_605_760
    # the remote tower is as wide as ViT-B whatever CLIP is
    guidance = ENLARGED[preset] + REDUCED + ENLARGED["vitb"] + REDUCED + DINO_GUIDANCE
    assert own["decoder"] == 196_960 + 49_328 + HEAD + guidance
    assert own["project_prior"] == (4 * 768 + 1) * {"vitb": 512, "vitl": 768}[preset]
    # of the tower the last four blocks, the norm and the projection are never computed and not kept
    block = 12 * 768**2 + 13 * 768
    assert own["dino"] == DINO + RESIZED and own["remote"] == REMOTE_IMAGE - 4 * block - 2 * 768 - 768 * 512


SED_DECODER = {"vitb": 870_796 - 6_400, "vitl": 967_564 - 6_400}


@pytest.mark.parametrize(("preset", "clip"), [("vitb", 179_385_345), ("vitl", 351_772_609)])
def test_sed(preset: str, clip: int) -> None:
    own = counted("sed", preset)
    assert own["clip"] == clip - 1 and own["fusion"] == 6_400 and own["decoder"] == SED_DECODER[preset]


@pytest.mark.parametrize(("preset", "side", "position"), [("vitb", 8_219_058, 197), ("vitl", 8_730_034, 577)])
def test_san(preset: str, side: int, position: int) -> None:
    """Its paper has 8.4 M trained parameters for ViT-B."""
    own, width = counted("san", preset), {"vitb": 768, "vitl": 1024}[preset]
    assert own["side"] == side and own["clip"] == CLIP[preset] - 1
    channels = {"vitb": 512, "vitl": 768}[preset]
    # this CLIP begins without weights, so its scale is learned too
    assert own["trained"] == side + channels + position * width + 1
    if preset == "vitb":
        assert round(own["trained"] / 1e6, 1) == 8.4


@pytest.mark.parametrize(
    ("preset", "side", "integration"), [("vitb", 7_302_064, 543_632), ("vitl", 7_549_872, 728_208)]
)
def test_scan(preset: str, side: int, integration: int) -> None:
    """None are its public ones (docs/methods.md): the whole is these, and the embedding of no object."""
    own = counted("scan", preset)
    assert (own["side"], own["integrate"], own["clip"]) == (side, integration, CLIP[preset] - 1)
    assert own["total"] == CLIP[preset] + side + integration + {"vitb": 512, "vitl": 768}[preset]


def test_released_weights_trained_on_isaid_have_the_layers_of_the_files() -> None:
    for preset in ("vitb", "vitl"):
        assert counted("rskt", preset, released="isaid") == counted("rskt", preset)


def test_the_totals_that_rskt_seg_prints() -> None:
    """Millions of parameters, of ViT-B (its README).

    Of its own it counts 2 layers, one orientation (7x7 of one map instead of four) and the whole image tower of
    RemoteCLIP.
    """

    def millions(name: str, parts: tuple[str, ...], more: int) -> float:
        own = counted(name, "vitb")
        return round((1 + sum(own[part] for part in parts) + more) / 1e6, 2)

    parts = ("clip", "fusion", "aggregator", "decoder")
    assert millions("catseg", parts, 0) == 154.29
    # printed as 154.32
    assert millions("ovrs", parts, 0) == 154.31
    # with ImageNet's 80 prompts a map has as many channels where it is embedded and where it is joined
    more = 79 * 49 * 128 + 79 * 4 * 32
    assert millions("sed", ("clip", "fusion", "decoder"), more) == 180.76
    less = -830_592 - 3 * 49 * 128 - RESIZED
    assert millions("rskt", (*parts, "project_prior", "dino"), less + REMOTE_IMAGE) == 334.62
