# SPDX-License-Identifier: Apache-2.0
"""From cells to pixels: bilinear in the logits, with no share of cells that have none."""

from __future__ import annotations

import torch
from torch import Tensor


class Enlarged:
    """Logits of pixels, block by block; a pixel is the same in whatever block it lies.

    It is ``interpolate(mode="bilinear", align_corners=False)`` by a whole factor where all cells are valid; elsewhere
    the weights of the valid ones are divided by their sum.

    Args:
        logits: (N, T) of the cells, row by row.
        valid: (h, w) bool, with ``h * w = N``.
        cell: pixels along a cell.
    """

    def __init__(self, logits: Tensor, valid: Tensor, cell: int) -> None:
        self.logits, self.valid, self.cell = logits.view(*valid.shape, -1), valid, cell

    def block(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Logits (T, bottom - top, right - left) of pixels; 0 where no cell near is valid."""
        rows = _lines(top, bottom, self.cell, self.valid.shape[0])
        columns = _lines(left, right, self.cell, self.valid.shape[1])
        down = slice(int(rows[0][0]), int(rows[1][-1]) + 1)
        across = slice(int(columns[0][0]), int(columns[1][-1]) + 1)
        weight = self.valid[down, across, None].to(self.logits.dtype)
        part = torch.cat((self.logits[down, across] * weight, weight), dim=-1).permute(2, 0, 1)
        part = _between(part, rows, down.start, 1)
        part = _between(part, columns, across.start, 2)
        return part[:-1] / torch.where(part[-1] > 0, part[-1], 1)


def _lines(first: int, last: int, cell: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The cells before and after each pixel of a line, and the share of the second."""
    place = ((torch.arange(first, last, dtype=torch.float64) + 0.5) / cell - 0.5).clamp(0, count - 1)
    low = place.floor().long()
    return low, (low + 1).clamp(max=count - 1), (place - low).float()


def _between(value: Tensor, lines: tuple[Tensor, Tensor, Tensor], start: int, dim: int) -> Tensor:
    low, high, share = lines
    share = share.view([-1 if axis == dim else 1 for axis in range(3)])
    return value.index_select(dim, low - start) * (1 - share) + value.index_select(dim, high - start) * share
