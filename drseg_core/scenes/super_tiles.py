# SPDX-License-Identifier: Apache-2.0
"""A grid of cells in overlapping parts, each with its own graph, that together give the same as one graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from drseg_core.errors import ConfigError

__all__ = ["SuperTile", "super_tiles"]


class SuperTile(NamedTuple):
    """A part from ``top`` to ``bottom`` and from ``left`` to ``right``.

    It lies within a larger part (``outer_...``) that holds all cells that decide its own.

    Examples:
        >>> from drseg_core.scenes.super_tiles import super_tiles
        >>> super_tiles((40, 100), 5, 2000)[1]
        SuperTile(top=0, bottom=40, left=33, right=66, outer_top=0, outer_bottom=40, outer_left=28, outer_right=71)
    """

    top: int
    bottom: int
    left: int
    right: int
    outer_top: int
    outer_bottom: int
    outer_left: int
    outer_right: int

    @property
    def grid(self) -> tuple[int, int]:
        """Cells of the larger part, down and across."""
        return self.outer_bottom - self.outer_top, self.outer_right - self.outer_left

    def outer(self, value: Tensor, width: int) -> Tensor:
        """Rows (N', C) of the larger part, from rows (N, C) of a grid ``width`` cells wide."""
        part = value.unflatten(0, (-1, width))[self.outer_top : self.outer_bottom, self.outer_left : self.outer_right]
        return part.flatten(0, 1)

    def put(self, result: Tensor, found: Tensor, width: int) -> None:
        """Write the part's own rows of ``found`` (N', C) into ``result`` (N, C)."""
        own = found.unflatten(0, self.grid)[
            self.top - self.outer_top : self.bottom - self.outer_top,
            self.left - self.outer_left : self.right - self.outer_left,
        ]
        result.unflatten(0, (-1, width))[self.top : self.bottom, self.left : self.right] = own


def super_tiles(grid: tuple[int, int], halo: int | None, limit: int) -> list[SuperTile]:
    """Parts that cover a grid once, the larger ones of at most ``limit`` cells, with the least work in all.

    Args:
        grid: (h, w) cells.
        halo: cells by which a larger part reaches beyond its part, as far as the grid goes; None if only the whole
            grid will do.
        limit: most cells of a larger part.

    Raises:
        ConfigError: a single cell and its halo take more than the limit.

    Examples:
        >>> from drseg_core.scenes.super_tiles import super_tiles
        >>> [tile.grid for tile in super_tiles((40, 100), 5, 2000)]
        [(40, 38), (40, 43), (40, 39)]
    """
    h, w = grid
    if halo is None or h * w <= limit:
        return [SuperTile(0, h, 0, w, 0, h, 0, w)]
    # narrow parts are little else than halo, so they come only if no others are small enough
    for counts in (_ordinary, _any):
        rows, columns = ([_stretches(side, count, halo) for count in counts(side, halo)] for side in grid)
        fitting = [(down, across) for down in rows for across in columns if down.longest * across.longest <= limit]
        if fitting:
            break
    else:
        least = min(down.longest for down in rows) * min(across.longest for across in columns)
        raise ConfigError(
            f"zero_shot: super_tile is too small for radius and steps; expected at least {least} cells, one and the "
            f"{halo} on each side that decide what becomes of it, got {limit}"
        )
    down, across = min(fitting, key=lambda pair: pair[0].total * pair[1].total)
    return [SuperTile(*y[:2], *x[:2], *y[2:], *x[2:]) for y in down.parts for x in across.parts]


_NARROWEST = 16


class _Stretches(NamedTuple):
    """Begin and end of each part of a line, and of the larger ones; the longest of these, and all together."""

    parts: list[tuple[int, int, int, int]]
    longest: int
    total: int


def _ordinary(length: int, halo: int) -> Iterable[int]:
    """Numbers of parts that are no narrower than their halo."""
    return range(1, max(length // max(halo, _NARROWEST), 1) + 1)


def _any(length: int, halo: int) -> Iterable[int]:
    """The least number for every width of a part, down to a single cell."""
    return sorted({-(-length // width) for width in range(1, length + 1)})


def _stretches(length: int, count: int, halo: int) -> _Stretches:
    """Parts as alike as they can be."""
    borders = [length * part // count for part in range(count + 1)]
    parts = [
        (begin, end, max(begin - halo, 0), min(end + halo, length))
        for begin, end in zip(borders[:-1], borders[1:], strict=True)
    ]
    sizes = [end - begin for _, _, begin, end in parts]
    return _Stretches(parts, max(sizes), sum(sizes))
