# SPDX-License-Identifier: Apache-2.0
"""Every method learns four images by heart, by its own loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from drseg_core.config.load import load_config, override
from drseg_core.config.methods import METHODS, apply_method
from drseg_core.config.schema import ModelConfig
from drseg_core.models.build import build_model
from drseg_core.models.segmenter import Segmenter
from drseg_core.training.loss import training_loss

NAMES = ("red roof", "blue pond", "grass")
# masks begin worse, and how they go on is up to a processor's rounding
STEPS = {"san": 120, "scan": 120}
COLOUR = torch.tensor([[0.8, 0.2, 0.2], [0.2, 0.3, 0.8], [0.3, 0.7, 0.3]])


def scenes() -> tuple[torch.Tensor, torch.Tensor]:
    """Four images (4, 3, 64, 64) of a roof and a pond on grass, and their masks."""
    mask = torch.full((4, 64, 64), 2)
    for image, (top, left) in enumerate(((4, 4), (36, 8), (8, 36), (32, 32))):
        mask[image, top : top + 24, left : left + 24] = 0
        mask[image, -16:, : 64 - 16 * image] = 1
    return COLOUR[mask].movedim(-1, 1) + 0.05 * torch.randn(4, 3, 64, 64), mask


def share_right(model: Segmenter, image: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model.eval()(image, tokens).logits
    model.train()
    found = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear").argmax(dim=1)
    return (found == mask).double().mean().item()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in METHODS),
        # a grid of 6 x 6: its last stage is a 32nd as fine as the image
        ("sed", {"model.clip.name": "drseg-tiny-convnext", "model.clip.image_size": 192}),
    ],
)
def test_four_images(tiny_config: ModelConfig, name: str, options: dict[str, str]) -> None:
    config = override(apply_method(dataclasses.replace(load_config("tiny"), model=tiny_config), name), options)
    model, (image, mask) = build_model(config.model), scenes()
    optimizer = torch.optim.AdamW(model.parameter_groups(config.train))
    tokens = model.tokenize(NAMES)
    right = 0.0
    for done in range(1, STEPS.get(name, 60) + 1):
        optimizer.zero_grad()
        torch.stack([part.mean() for part in training_loss(model(image, tokens), mask, config.train)]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clip)
        optimizer.step()
        if done % 10 == 0:
            right = share_right(model, image, tokens, mask)
        if right > 0.95:
            return
    raise AssertionError(f"{right:.2f} of the pixels are right")
