# SPDX-License-Identifier: Apache-2.0
"""Overlapping tiles over an image of any size, and the weights that blend them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from drseg_core.errors import ConfigError


def check_tiles(tile_size: int, overlap: int) -> None:
    """Refuse tiles that cannot cover an image.

    Raises:
        ConfigError: (a ValueError) ``tile_size`` is not a positive multiple of 16, or not 0 <= overlap < tile_size.
    """
    if tile_size < 16 or tile_size % 16:
        raise ConfigError(f"tiles: tile_size is not usable; expected a positive multiple of 16, got {tile_size}")
    if not 0 <= overlap < tile_size:
        raise ConfigError(f"tiles: overlap is out of range; expected 0 <= overlap < {tile_size}, got {overlap}")


def tile_starts(length: int, tile_size: int, overlap: int) -> list[int]:
    """First pixel of every tile along one axis; the last tile is moved back so that it ends with the image."""
    if length <= tile_size:
        return [0]
    starts = list(range(0, length - tile_size, tile_size - overlap))
    return [*starts, length - tile_size]


def tiles_of_bands(starts: Sequence[int], tile_size: int, bands: Collection[int] | None = None) -> list[int]:
    """Numbers of the tiles along one axis that have a share in some bands; in all of them by default.

    Band n goes from the start of tile n to that of the next, so it is complete once tile n was added. Where a number is
    missing, no tile before it reaches a band after it.
    """
    if bands is None:
        return list(range(len(starts)))
    needed: set[int] = set()
    for band in bands:
        tile = band
        while tile >= 0 and starts[tile] + tile_size > starts[band]:
            needed.add(tile)
            tile -= 1
    return sorted(needed)


def blend_window(tile_size: int, overlap: int) -> NDArray[np.float32]:
    """Weights along one axis of a tile: 1 inside, falling as sin^2 over the overlap to a small positive value."""
    ramp = max(overlap, 1)
    distance = np.minimum(np.arange(tile_size), np.arange(tile_size)[::-1]) + 0.5
    weight = np.sin(np.pi / 2 * np.minimum(distance / ramp, 1)) ** 2
    return np.maximum(weight, 1e-3).astype(np.float32)
