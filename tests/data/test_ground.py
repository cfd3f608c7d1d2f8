# SPDX-License-Identifier: Apache-2.0
"""Sides of pixels on the ground, against lengths that are known."""

from __future__ import annotations

import pytest

from drseg_core.data.ground import pixel_side, pixel_sides

rasterio = pytest.importorskip("rasterio")


@pytest.mark.parametrize(
    ("latitude", "across", "down"),
    # lengths of a degree on WGS 84, in metres
    [(0, 111_319.49, 110_574.3), (45, 78_846.8, 111_131.7), (-60, 55_800.0, 111_412.2), (75, 28_901.6, 111_618.0)],
)
@pytest.mark.parametrize("longitude", [10, 180])
def test_a_degree(latitude: float, across: float, down: float, longitude: float) -> None:
    side = 1e-5
    # the middle pixel of two by two begins at the place
    grid = rasterio.Affine(side, 0, longitude - side, 0, -side, latitude + side)
    found = pixel_sides("EPSG:4326", grid, 2, 2)
    assert found == pytest.approx((across * side, down * side), rel=1e-4)
    assert pixel_side("EPSG:4326", grid, 2, 2) == pytest.approx((found[0] * found[1]) ** 0.5, rel=1e-3)


def test_sides_of_other_grids() -> None:
    # a metre in the middle of a zone of UTM is 1 / 0.9996 on the ground, turned or not
    for grid in (rasterio.Affine(2, 0, 5e5, 0, -0.5, 5.6e6), rasterio.Affine(0, 0.5, 5e5, 2, 0, 5.6e6)):
        assert pixel_sides("EPSG:32632", grid, 9, 9) == pytest.approx((2 / 0.9996, 0.5 / 0.9996), rel=1e-4)
    assert pixel_sides(None, rasterio.Affine(1, 0, 0, 0, -1, 9), 9, 9) is None
