# SPDX-License-Identifier: Apache-2.0
"""Rasters as tiles at every scale, each half as fine as the one before."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE

TILE = 512
"""Side of a tile in pixels."""

MOST_PIXELS = 2**27
"""A level of more pixels is not made into tiles: no page could hold it."""

Read = Callable[[int, int, int, int], NDArray[np.uint8]]
"""``read(top, bottom, left, right)`` gives pixels (n, m, C) uint8."""


class Level(NamedTuple):
    """Tiles row by row, each as a data URI or None where nothing is; a pixel of them is ``scale`` pixels wide."""

    scale: int
    columns: int
    rows: int
    tiles: list[str | None]

    @property
    def size(self) -> int:
        """Bytes on a page, with what is around the tiles there."""
        return 64 + sum(5 if tile is None else len(tile) + 3 for tile in self.tiles)


class Format(NamedTuple):
    """How pixels become smaller, and how tiles are packed.

    ``reduce`` halves (n, m, C); ``pack`` gives a data URI, or None of a tile on which nothing is.
    """

    reduce: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
    pack: Callable[[NDArray[np.uint8]], str | None]


def pyramid(read: Read, height: int, width: int, format: Format, *, scale: int = 1) -> list[Level]:
    """All scales of a raster, the finest first, until one tile holds all of it.

    Each pixel is read once. In memory are the tiles as they are packed and four raw ones for each scale.

    Args:
        read: gives a part of the raster.
        height: rows.
        width: columns.
        format: of the tiles.
        scale: pixels of the scene along one of this raster.
    """
    sizes = [(height, width)]
    while max(sizes[-1]) > TILE:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    counts = [(-(-h // TILE), -(-w // TILE)) for h, w in sizes]
    levels = [Level(scale << i, columns, rows, [None] * (rows * columns)) for i, (rows, columns) in enumerate(counts)]

    def build(depth: int, row: int, column: int) -> NDArray[np.uint8]:
        if depth == 0:
            top, left = row * TILE, column * TILE
            pixels = read(top, min(top + TILE, height), left, min(left + TILE, width))
        else:
            rows, columns = counts[depth - 1]
            across = range(2 * column, min(2 * column + 2, columns))
            parts = [[build(depth - 1, r, c) for c in across] for r in range(2 * row, min(2 * row + 2, rows))]
            pixels = format.reduce(np.concatenate([np.concatenate(line, axis=1) for line in parts]))
        if sizes[depth][0] * sizes[depth][1] <= MOST_PIXELS:
            levels[depth].tiles[row * counts[depth][1] + column] = format.pack(pixels)
        return pixels

    build(len(sizes) - 1, 0, 0)
    return [level for level, (h, w) in zip(levels, sizes, strict=True) if h * w <= MOST_PIXELS]


def nearest(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Every second pixel: no class between two others."""
    return np.ascontiguousarray(pixels[::2, ::2])


def averaged(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Means of 2 x 2 pixels over those that are valid; the last channel is 255 where a pixel is, else 0."""
    rows, columns = pixels.shape[0] % 2, pixels.shape[1] % 2
    padded = np.pad(pixels, ((0, rows), (0, columns), (0, 0)))
    # at most 4 x 255
    value = np.where(padded[..., -1:] > 0, padded[..., :-1], 0).astype(np.uint16)
    known = (padded[..., -1:] > 0).astype(np.uint16)
    total, count = (part[::2, ::2] + part[1::2, ::2] + part[::2, 1::2] + part[1::2, 1::2] for part in (value, known))
    mean = (total + count // 2) // np.maximum(count, 1)
    return np.concatenate([mean, 255 * (count > 0)], axis=2).astype(np.uint8)


def pack_exact(pixels: NDArray[np.uint8]) -> str | None:
    """(n, m, 1) numbers as a grey PNG, bit for bit; 255 is nothing."""
    from PIL import Image

    if (pixels == IGNORE).all():
        return None
    return _uri(Image.fromarray(pixels[..., 0]), "png", compress_level=6)


def pack_cells(pixels: NDArray[np.uint8]) -> str | None:
    """(n, m, 2) values with their validity, as :func:`pack_exact` has them."""
    return pack_exact(np.where(pixels[..., 1:] > 0, pixels[..., :1], IGNORE))


def pack_picture(quality: int) -> Callable[[NDArray[np.uint8]], str | None]:
    """(n, m, 2) grey or (n, m, 4) colour with its validity as WebP with losses; what is valid stays so exactly."""

    def pack(pixels: NDArray[np.uint8]) -> str | None:
        from PIL import Image

        value, known = pixels[..., :-1], pixels[..., -1:]
        if not known.any():
            return None
        if value.shape[2] == 1:
            value = np.repeat(value, 3, axis=2)
        kept = value if known.all() else np.concatenate([value, known], axis=2)
        return _uri(Image.fromarray(np.ascontiguousarray(kept)), "webp", quality=quality, method=2)

    return pack


CLASSES = Format(nearest, pack_exact)
"""Numbers that stay what they are."""

PICTURE = Format(averaged, pack_picture(75))
VALUES = Format(averaged, pack_picture(85))
CELLS = Format(averaged, pack_cells)


def _uri(image: Any, kind: str, **options: Any) -> str:
    packed = io.BytesIO()
    image.save(packed, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(packed.getvalue()).decode()}"
