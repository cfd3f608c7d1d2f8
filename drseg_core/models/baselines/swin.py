# SPDX-License-Identifier: Apache-2.0
"""The aggregation blocks of CAT-Seg (arXiv 2303.11797; cvlab-kaist/CAT-Seg, cat_seg/modeling/transformer/model.py).

Space: two Swin blocks (arXiv 2103.14030), windows of whole places and then windows shifted by half. Classes: a
transformer whose attention is linear in the number of classes (arXiv 2006.16236). Guidance enters queries and keys as
in :mod:`drseg_core.models.aggregator`: the linear map of a concatenation is computed as a sum of two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WindowBlock(nn.Module):
    """Attention inside windows of each class map, then an MLP.

    If the smaller side of the grid is at most ``window``, windows have that side and are not shifted. Grids are padded
    to whole windows, and no cell attends to the padding.

    Args:
        width: channels.
        heads: attention heads.
        hidden: width inside the MLP.
        window: side of the windows in cells.
        shifted: the windows begin half a window later, and wrap around.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, window: int, shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.query_key_guidance = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, guidance: Tensor, grid: tuple[int, int]) -> Tensor:
        """``x`` (B, T, hw, width) and ``guidance`` (B, hw, width) to (B, T, hw, width)."""
        query, key, value = self.query_key_value(self.norm_attention(x)).chunk(3, dim=-1)
        query_guidance, key_guidance = self.query_key_guidance(guidance)[:, None].chunk(2, dim=-1)
        joined = torch.cat((query + query_guidance, key + key_guidance, value), dim=-1)
        x = x + self.out(self._attend(joined.flatten(0, 1).unflatten(1, grid), grid).view_as(x))
        return x + self.mlp(self.norm_mlp(x))

    def _attend(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """(X, h, w, 3 width) of queries, keys and values to (X, hw, width)."""
        whole = min(grid) <= self.window
        window = min(grid) if whole else self.window
        shift = window // 2 if self.shifted and not whole else 0
        label = _labels(grid, window, shift, maps.device)
        windows, rows, columns = _partition(maps, window, shift)
        query, key, value = windows.unflatten(-1, (3 * self.heads, -1)).transpose(2, 3).chunk(3, dim=2)
        mask = None if label is None else label[:, None, :, None] == label[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(2, 3).flatten(3)
        # the windows back in their places: (X, rows, columns, side, side, width)
        mixed = mixed.unflatten(2, (window, window)).unflatten(1, (rows, columns)).transpose(2, 3)
        mixed = mixed.flatten(3, 4).flatten(1, 2).roll((shift, shift), (1, 2))
        return mixed[:, : grid[0], : grid[1]].flatten(1, 2)


def _partition(maps: Tensor, window: int, shift: int) -> tuple[Tensor, int, int]:
    """(X, h, w, C) to (X, windows, window^2, C), and how many rows and columns of windows there are."""
    height, width = maps.shape[1:3]
    maps = F.pad(maps, (0, 0, 0, -width % window, 0, -height % window)).roll((-shift, -shift), (1, 2))
    maps = maps.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
    return maps.flatten(3, 4).flatten(1, 2), maps.shape[1], maps.shape[2]


def _labels(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor | None:
    """(windows, window^2): cells of one label may attend to each other; None if all of a window may.

    Cells that wrapped around are no neighbours of the cells now beside them. Padding is no neighbour of any cell.
    """
    if not shift and not grid[0] % window and not grid[1] % window:
        return None
    row, column = (torch.arange(size, device=device) < shift for size in grid)
    label = 1.0 + row[:, None].float() + 2.0 * column
    # filling up gives label 0
    return _partition(label[None, :, :, None], window, shift)[0][0, :, :, 0]


class WindowPair(nn.Module):
    """A block of plain windows and one of shifted windows, with normalised visual guidance.

    Args: see :class:`WindowBlock`.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, window: int) -> None:
        super().__init__()
        self.norm_guidance = nn.LayerNorm(width)
        self.plain = WindowBlock(width, heads, hidden, window=window, shifted=False)
        self.shifted = WindowBlock(width, heads, hidden, window=window, shifted=True)

    def forward(self, x: Tensor, guidance: Tensor, grid: tuple[int, int]) -> Tensor:
        """``x`` (B, T, hw, width) and ``guidance`` (B, width, h, w) to (B, T, hw, width)."""
        guidance = self.norm_guidance(guidance.flatten(2).transpose(1, 2))
        return self.shifted(self.plain(x, guidance, grid), guidance, grid)


class LinearClassBlock(nn.Module):
    """Linear attention among the classes at each place of pooled maps, resized back and added.

    The classes are filled up to ``slots`` with one learned token, so that a vocabulary of another size at test time
    changes little. All of them are the same in keys and values, so one counts ``slots - T`` times. More classes than
    slots are all kept (CAT-Seg keeps the 256 best of each image; a vocabulary has at most 255 names here).

    Args:
        width: channels.
        heads: attention heads.
        hidden: width inside the MLP.
        pooling: sides of the average pooling in training and in evaluation.
        slots: length of the class axis; 0 fills nothing up.
        guided: whether words enter queries and keys; without them there are no slots.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, pooling: tuple[int, int], slots: int, guided: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.pooling, self.slots = heads, pooling, slots
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.query_key_guidance = nn.Linear(width, 2 * width, bias=False) if guided else None
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.filler = nn.Parameter(torch.zeros(width)) if slots else None
        self.filler_guidance = nn.Parameter(torch.zeros(width)) if slots else None

    def forward(self, x: Tensor, guidance: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """``x`` (B, T, hw, width) and ``guidance`` (T, width), None where not guided, to (B, T, hw, width)."""
        batch, classes = x.shape[:2]
        maps = x.flatten(0, 1).transpose(1, 2).unflatten(2, grid)
        pooled = F.avg_pool2d(maps, self.pooling[0 if self.training else 1], ceil_mode=True)
        # classes become the sequence: (B, h'w', T, width)
        z = pooled.flatten(2).unflatten(0, (batch, classes)).permute(0, 3, 1, 2)
        z = z + self._attend(z, guidance)
        z = z + self.mlp(self.norm_mlp(z))
        # as the maps came: channels innermost
        z = z.transpose(1, 2).flatten(0, 1).unflatten(1, pooled.shape[2:]).permute(0, 3, 1, 2)
        z = F.interpolate(z, size=grid, mode="bilinear", align_corners=True)
        return x + z.flatten(2).transpose(1, 2).unflatten(0, (batch, classes))

    def _attend(self, z: Tensor, guidance: Tensor | None) -> Tensor:
        query, key, value = self._project(z, guidance)
        filler = None if self.filler is None else self._project(self.filler[None], self.filler_guidance)
        # sums over up to 256 classes, so in float32 whatever autocast says
        with torch.autocast(z.device.type, enabled=False):
            query, key = F.elu(query) + 1, F.elu(key) + 1
            product, total = key.transpose(-2, -1) @ value, key.sum(dim=-2)
            if filler is not None:
                key, value = F.elu(filler[1]) + 1, filler[2]
                missing = max(self.slots - z.shape[-2], 0)
                product = product + missing * (key.transpose(-2, -1) @ value)
                total = total + missing * key.sum(dim=-2)
            mixed = (query @ product) / (query @ total[..., None] + 1e-6)
        return mixed.transpose(-3, -2).flatten(-2).to(z.dtype)

    def _project(self, z: Tensor, guidance: Tensor | None) -> list[Tensor]:
        """(..., T, width) to queries, keys and values (..., heads, T, width / heads), in float32 or wider."""
        query, key, value = self.query_key_value(self.norm_attention(z)).chunk(3, dim=-1)
        if self.query_key_guidance is not None:
            query_guidance, key_guidance = self.query_key_guidance(guidance).chunk(2, dim=-1)
            query, key = query + query_guidance, key + key_guidance
        parts = (query, key, value)
        kind = torch.promote_types(query.dtype, torch.float32)
        return [part.to(kind).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in parts]
