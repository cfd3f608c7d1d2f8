# SPDX-License-Identifier: Apache-2.0
"""A map on another grid."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resample(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, D, h', w') to (B, D, h, w): average pooling where the sizes divide, otherwise bilinear."""
    height, width = features.shape[2:]
    if (height, width) == grid:
        return features
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(features, (height // grid[0], width // grid[1]))
    return F.interpolate(features, size=grid, mode="bilinear", align_corners=False)
