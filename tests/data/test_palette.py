# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from drseg_core.data.palette import _oklab, colorize, overlay, palette, palette_beside, with_legend


def test_palette_is_stable_and_distinct():
    colors = palette(255)
    assert colors.shape == (255, 3) and colors.dtype == np.uint8
    assert len({tuple(c) for c in colors}) == 255
    assert np.array_equal(palette(6), colors[:6])
    assert np.unique(colors).tolist() == [40, 62, 85, 107, 130, 152, 175, 197, 215, 237, 250]
    first = colors[:12].astype(int)
    distance = np.abs(first[:, None] - first[None]).sum(-1) + 999 * np.eye(12, dtype=int)
    assert distance.min() > 60
    for count in (-1, 256):
        with pytest.raises(ValueError, match="palette: count is out of range"):
            palette(count)


def nearest(one: np.ndarray, other: np.ndarray) -> float:
    """Oklab distance of the nearest two colours."""
    return float(np.linalg.norm(_oklab(one)[:, None] - _oklab(other), axis=-1).min())


def least_of(count: int) -> float:
    """How far automatic colours are from each other."""
    table = palette(count)
    return min(nearest(table[:number], table[[number]]) for number in range(1, count))


@pytest.mark.parametrize("color", ["ff0000", "00ff00", "0000ff", "ffff00", "00ffff", "ff00ff", "fa2828", "000000"])
def test_colours_keep_away_from_given_ones(color):
    """(250, 40, 40) stood beside a given (255, 0, 0)."""
    own = list(bytes.fromhex(color))
    for count in range(2, 16):
        for place in (0, count - 1):
            given = [own if number == place else None for number in range(count)]
            table = palette_beside(given)
            assert table[place].tolist() == own
            # where what stays leaves no such place, a little nearer
            least = least_of(count) * (1 if place == 0 else 0.95)
            assert nearest(np.delete(table, place, 0), table[[place]]) >= least


def test_colours_beside_many_given_ones():
    """All are told apart, and those that are far from what is given stay."""
    random = np.random.default_rng(0)
    for count in (2, 5, 12, 40, 255):
        given = [random.integers(0, 256, 3).tolist() if number % 3 == 1 else None for number in range(count)]
        table, least = palette_beside(given), least_of(count)
        free = np.array([color is None for color in given])
        assert table[~free].tolist() == [color for color in given if color is not None]
        # there may be no place that is farther
        assert nearest(table[free], table[~free]) >= 0.8 * least and len(np.unique(table, axis=0)) == count
        far = [n for n in np.flatnonzero(free) if nearest(palette(count)[[n]], table[~free]) >= least]
        assert np.array_equal(table[far], palette(count)[far])
    assert np.array_equal(palette_beside([None] * 9), palette(9))
    assert palette_beside([(1, 2, 3)]).tolist() == [[1, 2, 3]] and palette_beside([]).shape == (0, 3)
    assert palette_beside([(1, 2, 3)] * 3).tolist() == [[1, 2, 3]] * 3


def test_overlay_shows_the_image_where_nothing_is_known():
    image = np.full((3, 4, 5), 100, np.uint8)
    index = np.full((4, 5), 255, np.uint8)
    index[0] = 1
    mixed = overlay(image, index, 2)
    assert (mixed[1:] == 100).all() and (mixed[0] != 100).any()
    assert (colorize(index, 2)[1:] == 0).all() and (colorize(index, 2)[0] == palette(2)[1]).all()


def test_legend_grows_to_the_right():
    picture = np.full((30, 40, 3), 128, np.uint8)
    result = with_legend(picture, ["road", "Straße", "水"], [2, 0])
    assert np.array_equal(result[:30, :40], picture) and result.shape[1] > 80 and result.shape[0] >= 40
    many = with_legend(picture, [f"class {i}" for i in range(60)], range(60), limit=10)
    assert many.shape[0] < 300
    # every class has a square of its own
    several = with_legend(picture, [f"class {i}" for i in range(25)], range(25))
    assert [(several == color).all(-1).sum() for color in palette(25)] == [13 * 13] * 25
