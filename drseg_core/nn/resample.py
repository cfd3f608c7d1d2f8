# SPDX-License-Identifier: Apache-2.0
"""A map on another grid."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resample(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, D, h', w') to (B, D, h, w): average pooling where the sizes divide, otherwise bilinear.

    A map without cells has nothing for a grid with some, which is refused.
    """
    height, width = features.shape[2:]
    if (height, width) == grid:
        return features
    if grid[0] * grid[1] == 0:
        return features.new_empty((*features.shape[:2], *grid))
    if height * width == 0:
        raise ValueError(f"resample: map is empty; expected h, w >= 1 for grid {grid}, got {(height, width)}")
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(features, (height // grid[0], width // grid[1]))
    return F.interpolate(features, size=grid, mode="bilinear", align_corners=False)
