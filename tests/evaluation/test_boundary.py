# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from drseg_core.evaluation.boundary import BoundaryCounts, inner_band
from drseg_core.evaluation.metrics import ConfusionMatrix


@pytest.mark.promise("C50")
@pytest.mark.parametrize("distance", [1, 2, 3])
def test_band_pixel_by_pixel(distance: int) -> None:
    generator = torch.Generator().manual_seed(distance)
    mask = torch.rand(9, 14, generator=generator) < 0.9
    expected = torch.zeros_like(mask)
    for row in range(9):
        for column in range(14):
            around = [
                (row + y, column + x) for y in range(-distance, distance + 1) for x in range(-distance, distance + 1)
            ]
            # what is beyond the image is outside
            outside = any(not (0 <= y < 9 and 0 <= x < 14) or not mask[y, x] for y, x in around)
            expected[row, column] = mask[row, column] and outside
    assert torch.equal(inner_band(mask, distance), expected)


def test_by_hand() -> None:
    """A square of 6 x 6 and the same moved by one: rings of one pixel share 2 sides of 4 and no corner but two."""
    target, prediction = torch.zeros(2, 30, 40, dtype=torch.uint8)
    target[5:11, 5:11] = 1
    prediction[5:11, 6:12] = 1
    counts = BoundaryCounts(3, share=0.02)
    counts.update(prediction, target)
    # the diagonal is 50, so the band is one pixel; rings have 20 pixels, the upper and lower sides overlap in 5 each
    assert counts.counts[:, 1].tolist() == [10, 30]
    assert counts.truth_pixels.tolist() == [30 * 40 - 36, 36, 0]
    iou = counts.iou()
    assert iou[1] == pytest.approx(100 / 3) and math.isnan(iou[2])
    assert counts.mean_iou() == pytest.approx((iou[0] + iou[1]) / 2)


def test_a_wide_band_is_the_plain_iou() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randint(0, 4, (20, 20), generator=generator, dtype=torch.uint8) for _ in range(2))
    target[:3] = 255
    counts, plain = BoundaryCounts(4, share=0.9), ConfusionMatrix(4)
    counts.update(prediction, target)
    plain.update(prediction, target)
    assert counts.iou().tolist() == pytest.approx(plain.iou().tolist())
    assert counts.truth_pixels.tolist() == plain.truth_pixels().tolist()


def test_counts_add_up_and_unlabelled_pixels_are_of_no_class() -> None:
    target = torch.zeros(30, 40, dtype=torch.uint8)
    target[:, 20:] = 255
    counts = BoundaryCounts(2)
    for _ in range(2):
        counts.update(torch.where(target == 255, 1, 0), target)
    assert counts.counts[:, 0].tolist() == [2 * (2 * 20 + 2 * 28)] * 2
    assert counts.counts[:, 1].tolist() == [0, 0] and counts.mean_iou() == 100
    assert math.isnan(BoundaryCounts(2).mean_iou())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="expected between 0 and 1, got 1.5"):
        BoundaryCounts(2, share=1.5)
    with pytest.raises(ValueError, match=r"expected \(H, W\) twice, got \(3, 4\) and \(4, 3\)"):
        BoundaryCounts(2).update(torch.zeros(3, 4), torch.zeros(4, 3))
