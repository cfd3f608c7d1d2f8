# SPDX-License-Identifier: Apache-2.0
"""Sizes on the ground, whatever the projection: each small part is measured in an equal-area one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

EQUAL_AREA = "EPSG:6933"
METHOD = f"equal-area projection {EQUAL_AREA}"

_POLAR = "EPSG:6931", "EPSG:6932"
"""As that projection, but around the north and the south pole, which are lines in the other."""

_BESIDE_A_POLE = "EPSG:5041", "EPSG:5042"
"""Polar stereographic: of one scale within 20 km, and exact to a nanometre, where the others are to a decimetre."""

_SCALE = 0.994
"""Of those, at the pole."""

_TURN = 2 * 17_367_530.445
"""Width of the whole Earth in that projection, in metres."""

_NEAR_A_POLE = 7_310_000.0
"""North of the equator in that projection, in metres: 85 degrees."""

_BESIDE = 7_342_185.4
"""The same of 89.8 degrees: 22 km from the pole."""

_LARGE = _TURN / 256
"""Sides up to this long are as good as straight in that projection: 136 km."""

_STEPS = 64
"""Points on each side of a box that is larger."""

_JUMP = _TURN / 10
"""A step along a side turns by less than this, unless a pole is beside it."""

_SPREAD = 5e-4
"""By how much the areas of the pixels of a box may differ and still count as one."""

_EQUATOR, _ECCENTRICITY_SQUARED = 6_378_137.0, 6.694_379_990_14e-3
"""Of the ellipsoid of WGS 84, in metres."""

Box = tuple[float, float, float, float]
"""Top, left, height and width in pixels."""


class PixelArea:
    """Area of the pixels of a grid in m2.

    Args:
        crs: of the grid; None has no area.
        transform: of the grid.
    """

    def __init__(self, crs: Any, transform: Any) -> None:
        self.crs, self.transform = crs, transform
        # a local system lies nowhere on Earth
        self.known = bool(crs) and not transform.is_identity and _has_a_place(crs)

    def of(self, boxes: Sequence[Box]) -> NDArray[np.float64]:
        """Mean area of a pixel in each box (top, left, height, width); NaN if a part of it is not on Earth."""
        return self._mean(np.array(boxes, np.float64))

    def _mean(self, box: NDArray[np.float64]) -> NDArray[np.float64]:
        top, left, height, width = box.T
        # the middle as well: by its corners alone a box around the whole Earth has no width
        column = np.stack([left, left + width, left + width, left, left + width / 2])
        row = np.stack([top, top, top + height, top + height, top + height / 2])
        east, north = self._on_ground(row, column, EQUAL_AREA)
        # a box over the date line is as wide as it is, not as the way around
        a = (east - east[:1] + _TURN / 2) % _TURN - _TURN / 2
        area = _inside(a[:4], north[:4]) / (height * width)
        large = np.maximum(np.ptp(a, axis=0), np.ptp(north, axis=0)) > _LARGE
        far = np.flatnonzero(large | (np.abs(north).max(0) > _NEAR_A_POLE))
        if len(far):
            area[far] = self._outlined(box[far])
        return area

    def pieces(self, boxes: Sequence[Box]) -> NDArray[np.int64]:
        """Into how many rows and columns to cut each box, so that the pixels of a piece have one area."""
        corner = np.array(boxes)[:, :2]
        top, left = corner.min(0)
        bottom, right = (corner + np.array(boxes)[:, 2:]).max(0)
        # most maps are small on Earth: they are even as a whole
        if (self._pieces([(top, left, bottom - top, right - left)]) == 1).all():
            return np.ones((len(boxes), 2), np.int64)
        return self._pieces(boxes)

    def field(self, box: Box, pieces: Sequence[int]) -> NDArray[np.float64]:
        """Area of each pixel of a box cut so; (1, W) or (H, 1) where all rows or all columns are alike."""
        starts, sizes = [], []
        for side, count in zip(box[2:], pieces, strict=True):
            start = np.arange(0, int(side), max(1, int(side) // int(count)) if count > 1 else int(side))
            starts.append(start)
            sizes.append(np.diff(start, append=int(side)))
        each = [
            (box[0] + row, box[1] + column, height, width)
            for row, height in zip(*(v.tolist() for v in (starts[0], sizes[0])), strict=True)
            for column, width in zip(*(v.tolist() for v in (starts[1], sizes[1])), strict=True)
        ]
        area = self.of(each).reshape(len(starts[0]), len(starts[1]))
        for axis, count in enumerate(pieces):
            area = np.repeat(area, sizes[axis], axis) if count > 1 else area
        return area

    def _pieces(self, boxes: Sequence[Box]) -> NDArray[np.int64]:
        box = np.array(boxes, np.float64)
        top, left, height, width = box.T[..., None, None]
        row, column = np.meshgrid(np.arange(5) / 4, np.arange(5) / 4, indexing="ij")
        row, column = top + row * height, left + column * width
        quarter = (np.broadcast_to(side / 4, (len(box), 4, 4)) for side in (height, width))
        # sixteen parts: the north and the south of the Earth are alike, and so would four be
        parts = np.stack([row[:, :4, :4], column[:, :4, :4], *quarter], axis=-1).reshape(-1, 4)
        area = self._mean(parts).reshape(-1, 4, 4)
        sides = box[:, 2:].astype(np.int64)
        spread = np.stack([(np.ptp(area, axis=axis) / area.max(axis)).max(1) for axis in (1, 2)], axis=1)
        known = np.nan_to_num(spread)
        # four times as many as if the area grew evenly, which it does not
        pieces = np.where(known > _SPREAD, np.minimum(np.ceil(4 * known / _SPREAD), sides), 1).astype(np.int64)
        lost = np.isnan(area).any((1, 2))
        if lost.any():
            # at the edge of the Earth each pixel counts; beyond it none does
            seen, _ = self._on_ground(row[lost].reshape(-1, 25), column[lost].reshape(-1, 25), EQUAL_AREA)
            pieces[lost] = np.where(np.isfinite(seen).any(1, keepdims=True), sides[lost], 1)
        return pieces

    def _outlined(self, box: NDArray[np.float64]) -> NDArray[np.float64]:
        """As ``of``, for boxes whose sides are not straight on the ground, or that may hold a pole."""
        top, left, height, width = box.T
        step = np.arange(_STEPS)[:, None] / _STEPS
        zero, one = np.zeros_like(step), np.ones_like(step)
        row = top + np.concatenate([zero, step, one, 1 - step]) * height
        column = left + np.concatenate([step, one, 1 - step, zero]) * width
        east, north = self._on_ground(row, column, EQUAL_AREA)
        turned = (np.roll(east, -1, 0) - east + _TURN / 2) % _TURN - _TURN / 2
        # followed step by step, a box around the whole Earth is as wide as that
        a = np.concatenate([np.zeros_like(turned[:1]), np.cumsum(turned, 0)[:-1]])
        area = _inside(a, north)
        # a way around a pole does not come back to where it began
        pole = (np.abs(turned).max(0) > _JUMP) | (np.abs(turned.sum(0)) > _TURN / 2)
        beside = np.abs(north).min(0) > _BESIDE
        for systems, meant, scale in ((_POLAR, pole & ~beside, 1.0), (_BESIDE_A_POLE, beside, _SCALE)):
            for system, here in zip(systems, (north[0] > 0, north[0] < 0), strict=True):
                if (near := np.flatnonzero(meant & here)).size:
                    area[near] = _inside(*self._on_ground(row[:, near], column[:, near], system)) / scale**2
        return np.asarray(area / (height * width))

    def _on_ground(
        self, row: NDArray[np.float64], column: NDArray[np.float64], target: str
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        t = self.transform
        x, y = t.a * column + t.b * row + t.c, t.d * column + t.e * row + t.f
        a, b = projected(self.crs, target, x.ravel().tolist(), y.ravel().tolist())
        return a.reshape(x.shape), b.reshape(x.shape)


def _inside(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Areas of polygons whose corners follow each other along the first axis."""
    # from the first corner on, as products of large numbers would drown a small pixel
    a, b = a - a[:1], b - b[:1]
    return np.asarray(np.abs((a * np.roll(b, -1, 0) - np.roll(a, -1, 0) * b).sum(0)) / 2)


def _has_a_place(crs: Any) -> bool:
    import rasterio
    from rasterio._err import CPLE_BaseError, CPLE_NotSupportedError
    from rasterio.warp import transform

    try:
        transform(crs, EQUAL_AREA, [0.0], [0.0])
    except (rasterio.errors.RasterioError, ValueError, CPLE_NotSupportedError):
        return False
    except CPLE_BaseError:
        # this one point may lie outside of the domain of the projection
        return True
    return True


def projected(
    crs: Any, target: str, x: Sequence[float], y: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points in another system; NaN for those outside of the domain of a projection."""
    import rasterio

    # rasterio lets errors of GDAL through, and has no public name for them
    from rasterio._err import CPLE_BaseError
    from rasterio.warp import transform

    if getattr(crs, "is_geographic", False):
        # grids whose outer pixels have their middle on a pole go beyond it by half a pixel
        pole = np.pi / 2 / crs.units_factor[1]
        y = np.clip(y, -pole, pole).tolist()
    try:
        found = np.array(transform(crs, target, x, y), np.float64)
    except (rasterio.errors.RasterioError, ValueError, CPLE_BaseError):
        # one such point is an error for all: halves find it
        if len(x) == 1:
            return np.array([np.nan]), np.array([np.nan])
        half = len(x) // 2
        halves = projected(crs, target, x[:half], y[:half]), projected(crs, target, x[half:], y[half:])
        found = np.concatenate(halves, axis=1)
    found[:, ~np.isfinite(found).all(0)] = np.nan
    return found[0], found[1]


def pixel_side(crs: Any, transform: Any, height: int, width: int) -> float | None:
    """Side in metres of a pixel in the middle of a grid, as of a square of its area; None where it has no place."""
    pixel = PixelArea(crs, transform)
    if not pixel.known:
        return None
    side = float(np.sqrt(pixel.of([(height // 2, width // 2, 1, 1)])[0]))
    return side if np.isfinite(side) else None


def pixel_sides(crs: Any, transform: Any, height: int, width: int) -> tuple[float, float] | None:
    """Sides in metres, across and down, of a pixel in the middle of a grid; None where it has no place.

    Along the ellipsoid of WGS 84, by its radii of curvature at that latitude.
    """
    if not PixelArea(crs, transform).known:
        return None
    column, row = width // 2, height // 2
    corners = [transform @ corner for corner in ((column, row), (column + 1, row), (column, row + 1))]
    degrees = projected(crs, "EPSG:4326", *(list(axis) for axis in zip(*corners, strict=True)))
    if not np.isfinite(degrees).all():
        return None
    east, north = (np.radians(value) for value in degrees)
    share = 1 - _ECCENTRICITY_SQUARED * np.sin(north[0]) ** 2
    parallel = _EQUATOR / np.sqrt(share) * np.cos(north[0])
    meridian = _EQUATOR * (1 - _ECCENTRICITY_SQUARED) / share**1.5
    # over the date line is as far as it is, not as the way around
    turned = (east[1:] - east[0] + np.pi) % (2 * np.pi) - np.pi
    across, down = np.hypot(parallel * turned, meridian * (north[1:] - north[0]))
    return float(across), float(down)
