# SPDX-License-Identifier: Apache-2.0
"""Boundary IoU (arXiv 2103.16562): the IoU of what lies within a few pixels of the outlines."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.data.dataset import IGNORE


class BoundaryCounts:
    """Per class, pixels of the inner boundary bands of truth and prediction: in both, and in either.

    The band of a class is what an erosion by a square of ``2 d + 1`` pixels takes from it, with
    ``d = max(1, round(share * diagonal))``; the image's border counts as an outline. Pixels whose truth is 255 are of
    no class on either side, so an unlabelled area is not counted, but its outline is one. Sums are over the whole set,
    as in :class:`drseg_core.evaluation.metrics.ConfusionMatrix`.

    Args:
        num_classes: T.
        share: width of the band as a share of the image's diagonal; 0.02 in the paper.

    Attributes:
        counts: (2, T) int64; pixels in both bands, and in either.
        truth_pixels: (T,) int64; pixels of each class in the truth.
    """

    def __init__(self, num_classes: int, share: float = 0.02) -> None:
        if not 0 < share < 1:
            raise ValueError(f"BoundaryCounts: share is out of range; expected between 0 and 1, got {share}")
        self.num_classes, self.share = num_classes, share
        self.counts = np.zeros((2, num_classes), np.int64)
        self.truth_pixels = np.zeros(num_classes, np.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one image: ids (H, W), in ``target`` also 255.

        Raises:
            ValueError: shapes differ, or are not (H, W).
        """
        if prediction.shape != target.shape or target.dim() != 2:
            raise ValueError(
                f"BoundaryCounts.update: shapes do not fit; expected (H, W) twice, "
                f"got {tuple(prediction.shape)} and {tuple(target.shape)}"
            )
        distance = max(1, round(self.share * math.hypot(*target.shape)))
        valid = target != IGNORE
        # one class at a time: all of them at full size need not fit in memory
        for label in range(self.num_classes):
            truth, guess = (target == label) & valid, (prediction == label) & valid
            if not truth.any() and not guess.any():
                continue
            self.truth_pixels[label] += int(truth.sum())
            truth, guess = inner_band(truth, distance), inner_band(guess, distance)
            self.counts[:, label] += [int((truth & guess).sum()), int((truth | guess).sum())]

    def iou(self) -> NDArray[np.float64]:
        """(T,) boundary IoU in percent; NaN for a class in neither truth nor prediction."""
        both, either = self.counts
        with np.errstate(invalid="ignore"):
            return np.where(either > 0, 100.0 * both / np.maximum(either, 1), np.nan)

    def mean_iou(self) -> float:
        """Mean in percent over the classes that occur in the truth; NaN where there is none."""
        present = self.truth_pixels > 0
        return float(self.iou()[present].mean()) if present.any() else float("nan")


def inner_band(mask: Tensor, distance: int) -> Tensor:
    """(H, W) bool: the pixels of ``mask`` at most ``distance`` (in rows and columns) from a pixel outside it."""
    # numpy combines shifted booleans a hundred times as fast as torch pools them (EPYC, November 2026)
    near = np.pad(~mask.cpu().numpy(), distance, constant_values=True)
    # a square is rows after columns, and a run of n is two shorter ones
    for axis in (0, 1):
        reach, whole = 1, 2 * distance + 1
        while reach < whole:
            step = min(reach, whole - reach)
            near = near[:-step] | near[step:] if axis == 0 else near[:, :-step] | near[:, step:]
            reach += step
    return mask & torch.from_numpy(near).to(mask.device)
