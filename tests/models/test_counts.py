# SPDX-License-Identifier: Apache-2.0
"""Parameter counts of the presets, against the makers' figures and sums by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from drseg_core.config.load import load_config
from drseg_core.models.build import build_model
from drseg_core.models.count import ParameterCount, count_parameters, count_text


def counted(preset: str) -> dict[str, ParameterCount]:
    config = load_config(preset).model
    clip, dino = (dataclasses.replace(part, weights=None) for part in (config.clip, config.dino))
    with torch.device("meta"):
        return count_parameters(build_model(dataclasses.replace(config, clip=clip, dino=dino)))


def query_and_value(layers: int, width: int, text_layers: int, text_width: int) -> int:
    """Two square projections in every block of both towers, but no query in the image tower's last block."""
    return (2 * layers - 1) * width**2 + 2 * text_layers * text_width**2


# OpenAI's CLIP has 149,620,737 and 427,944,193 parameters with the logit scale, which is not used here
@pytest.mark.parametrize(
    ("preset", "clip", "expected"),
    [
        (
            "vitb",
            ParameterCount(query_and_value(12, 768, 12, 512), 149_620_737 - 1),
            {"pdgr": 394_497, "fusion": 134_274, "aggregator": 2_316_800, "decoder": 2_652_385},
        ),
        (
            "vitl",
            ParameterCount(query_and_value(24, 1024, 12, 768), 427_944_193 - 1),
            {"pdgr": 558_849, "fusion": 134_274, "aggregator": 2_644_480, "decoder": 3_438_817},
        ),
    ],
)
def test_presets(preset: str, clip: ParameterCount, expected: dict[str, int]) -> None:
    counts = counted(preset)
    assert counts["clip"] == clip
    assert counts["dino"] == ParameterCount(0, 303_079_424)
    for name, total in expected.items():
        assert counts[name] == ParameterCount(total, total), name
    own = sum(expected.values())
    assert counts["total"] == ParameterCount(clip.trainable + own, clip.total + 303_079_424 + own)


def test_the_graph_by_hand() -> None:
    # two maps of C_t x C_t with bias, LayerNorm, both halves of the edge MLP with one bias, its vector and its bias
    structural, prior, hidden = 384, 1024, 128
    own = 2 * structural * (structural + 1) + 2 * structural + 2 * prior * hidden + hidden + hidden + 1
    assert counted("vitl")["pdgr"].total == own


def test_text() -> None:
    counts = {"clip": ParameterCount(1_500_000, 2_000_000), "total": ParameterCount(0, 30_000)}
    assert count_text(counts) == "clip 1.50 of 2.00 M, total 0.00 of 0.03 M"
