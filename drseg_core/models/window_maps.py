# SPDX-License-Identifier: Apache-2.0
"""Maps of an image of any size, blended from overlapping windows, row of windows by row of windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from drseg_core.models.tiling import blend_window, tile_starts, tiles_of_bands

Blend = Literal["smooth", "equal"]
ReadPixels = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor | None]"]
"""``read(rows, columns)`` gives the pixels (B, 3, n, m) at ascending and descending indices (n,) and (m,), and which of
them are valid (n, m), None for all."""


class Windows(NamedTuple):
    """Square windows of ``cells`` x ``cells`` cells of ``cell`` pixels; neighbours share ``overlap`` cells."""

    cells: int
    cell: int
    overlap: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Cells (h, w) of an image; those at its lower and right edge may be cut."""
        return math.ceil(height / self.cell), math.ceil(width / self.cell)

    def starts(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """First cells of the windows, down and across."""
        rows, columns = (tile_starts(n, self.cells, self.overlap) for n in self.grid(height, width))
        return rows, columns


class Band(NamedTuple):
    """Rows of cells from ``top`` on: ``parts`` (B, C, n, w) each, and which cells have a ``valid`` pixel (n, w)."""

    top: int
    parts: list[Tensor]
    valid: Tensor


def blended_bands(
    maps: Callable[[Tensor], Sequence[Tensor]],
    read: ReadPixels,
    height: int,
    width: int,
    windows: Windows,
    *,
    batch_size: int = 4,
    blend: Blend = "smooth",
    computed: Callable[[int], object] = lambda count: None,
    wanted: Collection[int] | None = None,
) -> Iterator[Band]:
    """The weighted mean of all windows that cover a cell, in bands from top to bottom that cover each row once.

    A window without a valid pixel is not computed. The cells of two windows lie on each other, and a cell's sum has the
    same order whatever the batch.

    Args:
        maps: windows (B', 3, side, side) to maps (B', C, cells, cells) each.
        read: gives pixels.
        height: H of the image in pixels; mirrored at its lower and right edge to whole cells, and to one window where
            it is smaller.
        width: W of the image.
        windows: their sizes.
        batch_size: windows for each call of ``maps``.
        blend: weights fall off smoothly over the overlap, or are all equal.
        computed: told the number of windows after each call of ``maps``.
        wanted: numbers of the bands to yield, one for each row of windows; all by default. A band has the same bits,
            whichever others are wanted.

    Yields:
        Bands in float32 or wider, where ``maps`` has its results; 0 where nothing was computed. Memory: one row of
        windows.
    """
    side, (rows, columns) = windows.cells * windows.cell, windows.grid(height, width)
    wide = max(columns, windows.cells)
    line = torch.from_numpy(blend_window(windows.cells, windows.overlap))
    weight = line[:, None] * line if blend == "smooth" else torch.ones(windows.cells, windows.cells)
    starts, across = windows.starts(height, width)
    pixel_columns = wide * windows.cell
    # row down to which cells were computed, sums of the parts, and of the weights
    sums: list[Tensor] = []
    total = torch.zeros(windows.cells, wide)
    valid = torch.zeros(windows.cells, wide, dtype=torch.bool)
    before = -1
    for number in tiles_of_bands(starts, windows.cells, wanted):
        top = starts[number]
        if number != before + 1:
            # no window above has a share in what follows
            for held in (total, valid, *sums):
                held.zero_()
        before = number
        place = torch.arange(top * windows.cell, top * windows.cell + side)
        image, known = read(*pixels_of_row(windows, height, width, top))
        inside = (place < height)[:, None] & (torch.arange(pixel_columns) < width)
        seen = inside if known is None else inside & known.cpu()
        fresh = seen.view(windows.cells, windows.cell, wide, windows.cell).any(3).any(1)
        valid |= fresh
        used = [x for x in across if fresh[:, x : x + windows.cells].any()]
        for first in range(0, len(used), batch_size):
            some = used[first : first + batch_size]
            pixels = [image[:, :, :, x * windows.cell : x * windows.cell + side] for x in some]
            found = maps(torch.cat(pixels))
            if not sums:
                kinds = [torch.promote_types(part.dtype, torch.float32) for part in found]
                sums = [
                    torch.zeros(len(image), part.shape[1], *total.shape, dtype=kind, device=part.device)
                    for part, kind in zip(found, kinds, strict=True)
                ]
            for spot, x in enumerate(some):
                inner = (..., slice(x, x + windows.cells))
                total[inner] += weight
                for target, part in zip(sums, found, strict=True):
                    target[inner] += part.chunk(len(some))[spot] * weight.to(part.device)
            computed(len(some))
        last = number + 1 == len(starts)
        done = rows - top if last else starts[number + 1] - top
        if wanted is None or number in wanted:
            share = total[:done, :columns].clamp_min(torch.finfo(total.dtype).tiny)
            parts = [target[:, :, :done, :columns] / share.to(target.device) for target in sums]
            yield Band(top, parts, valid[:done, :columns].clone())
        for held in (total, valid, *sums):
            kept = held[..., done:, :].clone()
            held.zero_()
            held[..., : windows.cells - done, :] = kept


def pixels_of_row(windows: Windows, height: int, width: int, top: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, as :data:`ReadPixels` takes them, of a row of windows that begins at cell ``top``."""
    begin = top * windows.cell
    end = begin + windows.cells * windows.cell
    wide = max(windows.grid(height, width)[1], windows.cells)
    return mirrored(height, end)[begin:], mirrored(width, wide * windows.cell)


def mirrored(length: int, wanted: int) -> Tensor:
    """Indices 0, 1, ... of ``wanted`` places, that turn back at the last of ``length``, as often as it takes."""
    period = max(2 * (length - 1), 1)
    place = torch.arange(wanted) % period
    return torch.minimum(place, period - place) if length > 1 else torch.zeros_like(place)
