# SPDX-License-Identifier: Apache-2.0
"""Sizes on the ground, whatever the projection: each small part is measured in an equal-area one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

EQUAL_AREA = "EPSG:6933"
METHOD = f"equal-area projection {EQUAL_AREA}"

_TURN = 2 * 17_367_530.445
"""Width of the whole Earth in that projection, in metres."""

_EQUATOR, _ECCENTRICITY_SQUARED = 6_378_137.0, 6.694_379_990_14e-3
"""Of the ellipsoid of WGS 84, in metres."""


class PixelArea:
    """Area of the pixels of a grid in m2.

    Args:
        crs: of the grid; None has no area.
        transform: of the grid.
    """

    def __init__(self, crs: Any, transform: Any) -> None:
        self.crs, self.transform = crs, transform
        self.known = bool(crs) and not transform.is_identity and self._usable()

    def _usable(self) -> bool:
        import rasterio

        try:
            return bool(np.isfinite(self.of([(0, 0, 1, 1)])).all())
        except (rasterio.errors.RasterioError, ValueError):
            # such as a local system that lies nowhere on Earth
            return False

    def of(self, boxes: Sequence[tuple[int, int, int, int]]) -> NDArray[np.float64]:
        """Mean area of a pixel in each box (top, left, height, width)."""
        from rasterio.warp import transform

        box = np.array(boxes, np.float64)
        top, left, height, width = box.T
        column = np.stack([left, left + width, left + width, left])
        row = np.stack([top, top, top + height, top + height])
        t = self.transform
        x, y = t.a * column + t.b * row + t.c, t.d * column + t.e * row + t.f
        east, north = transform(self.crs, EQUAL_AREA, x.ravel().tolist(), y.ravel().tolist())
        a, b = np.reshape(east, x.shape), np.reshape(north, x.shape)
        # a box over the date line is as wide as it is, not as the way around
        a = (a - a[:1] + _TURN / 2) % _TURN - _TURN / 2
        # from the first corner on, as products of large numbers would drown a small pixel
        b = b - b[:1]
        twice = (a * np.roll(b, -1, 0) - np.roll(a, -1, 0) * b).sum(0)
        return np.abs(twice) / 2 / (height * width)


def pixel_side(crs: Any, transform: Any, height: int, width: int) -> float | None:
    """Side in metres of a pixel in the middle of a grid, as of a square of its area; None where it has no place."""
    pixel = PixelArea(crs, transform)
    if not pixel.known:
        return None
    return float(np.sqrt(pixel.of([(height // 2, width // 2, 1, 1)])[0]))


def pixel_sides(crs: Any, transform: Any, height: int, width: int) -> tuple[float, float] | None:
    """Sides in metres, across and down, of a pixel in the middle of a grid; None where it has no place.

    Along the ellipsoid of WGS 84, by its radii of curvature at that latitude.
    """
    from rasterio.warp import transform as project

    if not PixelArea(crs, transform).known:
        return None
    column, row = width // 2, height // 2
    corners = [transform @ corner for corner in ((column, row), (column + 1, row), (column, row + 1))]
    degrees = project(crs, "EPSG:4326", *zip(*corners, strict=True))
    east, north = (np.radians(value) for value in degrees)
    share = 1 - _ECCENTRICITY_SQUARED * np.sin(north[0]) ** 2
    parallel = _EQUATOR / np.sqrt(share) * np.cos(north[0])
    meridian = _EQUATOR * (1 - _ECCENTRICITY_SQUARED) / share**1.5
    # over the date line is as far as it is, not as the way around
    turned = (east[1:] - east[0] + np.pi) % (2 * np.pi) - np.pi
    across, down = np.hypot(parallel * turned, meridian * (north[1:] - north[0]))
    return float(across), float(down)
