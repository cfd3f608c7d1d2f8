# SPDX-License-Identifier: Apache-2.0
"""A second, frozen CLIP that only guides the decoder: RemoteCLIP in RSKT-Seg's decoder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.config.schema import ClipConfig, RemoteConfig
from drseg_core.errors import CheckpointError
from drseg_core.models.clip import VisionTower, open_clip_model


class RemoteGuidance(nn.Module):
    """Outputs of two inner blocks of a frozen image tower; only the part of the tower that they need is kept.

    Args:
        config: architecture, weights, input size and blocks.
        read_weights: False leaves the weights as memory is, for a checkpoint that holds all of them.

    Raises:
        ValueError: unknown or unsupported architecture, no such block, or an image size that is no multiple of a patch.
        CheckpointError: weights are not available or do not fit.
    """

    pixel_mean: Tensor
    pixel_deviation: Tensor

    def __init__(self, config: RemoteConfig, *, read_weights: bool = True) -> None:
        super().__init__()
        self.config = config
        if read_weights and config.weights is not None and not Path(config.weights).exists():
            raise CheckpointError(
                f"RemoteGuidance: weights {config.weights!r} not found; expected null or the path of a file"
            )
        # it has no option for others, so a description beside its file is a warning
        tower = ClipConfig(name=config.name, weights=config.weights, image_size=config.image_size, normalization="clip")
        model, statistics = open_clip_model(tower, read_weights)
        self.visual = VisionTower(model.visual)
        depth, patch = len(self.visual.blocks), self.visual.patch_size[0]
        if len(config.guidance_blocks) != 2 or not all(0 <= index < depth for index in config.guidance_blocks):
            raise ValueError(
                f"RemoteGuidance: guidance_blocks is out of range for {config.name}; "
                f"expected two of 0..{depth - 1}, got {tuple(config.guidance_blocks)}"
            )
        if config.image_size % patch:
            raise ValueError(
                f"RemoteGuidance: image_size does not fit {config.name}; expected a multiple of {patch}, "
                f"got {config.image_size}"
            )
        # what comes after the last of the two blocks is never computed
        self.visual.blocks = self.visual.blocks[: max(config.guidance_blocks) + 1]
        del self.visual.ln_post, self.visual.proj
        self.register_buffer("pixel_mean", torch.tensor(statistics.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_deviation", torch.tensor(statistics.deviation).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) RGB in [0, 1] to two maps (B, width, h, w) on the tower's own grid, without gradient."""
        side = (self.config.image_size, self.config.image_size)
        if image.shape[2:] != side:
            image = F.interpolate(image, size=side, mode="bilinear", align_corners=False)
        x, grid = self.visual.embed((image - self.pixel_mean) / self.pixel_deviation)
        found: dict[int, Tensor] = {}
        for index, block in enumerate(self.visual.blocks):
            x = block(x)
            if index in self.config.guidance_blocks:
                found[index] = x[:, 1:].transpose(1, 2).unflatten(2, grid)
        return tuple(found[index] for index in self.config.guidance_blocks)
