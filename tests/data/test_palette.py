# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from drseg_core.data.palette import colorize, overlay, palette, with_legend


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
