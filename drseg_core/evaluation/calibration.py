# SPDX-License-Identifier: Apache-2.0
"""Whether scores are calibrated, and which value of a pixel tells best that its class is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.data.dataset import IGNORE

BINS, STEPS = 15, 1000
"""Bins of the calibration error, and steps in which values from 0 to 1 are counted."""


class Calibration:
    """Counts of right and wrong pixels by their score, and by their uncertainty, each from 0 to 1.

    ``error`` is the expected calibration error in percent: the mean distance of score and accuracy over 15 bins of
    score, weighted by their pixels. ``error_auroc`` is the area under the ROC curve with which a low score, or a high
    uncertainty, tells wrong pixels from right ones: 0.5 says nothing, 1 everything.

    Attributes:
        counts: (2, 2, 1000) int64: score and uncertainty, wrong and right, steps.
    """

    def __init__(self) -> None:
        self.counts = np.zeros((2, 2, STEPS), np.int64)

    def update(self, prediction: Tensor, score: Tensor, uncertainty: Tensor, target: Tensor) -> None:
        """Count the pixels (H, W) of one image; those whose truth is 255 are left out."""
        counted = target != IGNORE
        right = (prediction == target)[counted].long()
        for place, value in enumerate((score, uncertainty)):
            step = (value[counted].clamp(0, 1) * STEPS).long().clamp_(max=STEPS - 1)
            self.counts[place] += torch.bincount(right * STEPS + step, minlength=2 * STEPS).view(2, STEPS).numpy()

    def error(self) -> float | None:
        """Expected calibration error in percent; None without a pixel."""
        wrong, right = self.counts[0]
        total = wrong + right
        if not total.sum():
            return None
        score = (np.arange(STEPS) + 0.5) / STEPS
        edges = np.arange(BINS) * STEPS // BINS
        sums = [np.add.reduceat(part, edges) for part in (right.astype(float), total * score)]
        return float(100 * np.abs(sums[0] - sums[1]).sum() / total.sum())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        low_score, uncertainty = self.counts[0][:, ::-1], self.counts[1]
        areas = {"score": _area(*low_score), "uncertainty": _area(*uncertainty)}
        return {"error": self.error(), "bins": BINS, "error_auroc": areas}


def _area(wrong: NDArray[np.int64], right: NDArray[np.int64]) -> float | None:
    """Share of pairs of a wrong and a right pixel of which the wrong one has the higher step; ties count half."""
    if not wrong.sum() or not right.sum():
        return None
    below = np.cumsum(right) - right
    return float((wrong * (below + right / 2.0)).sum() / (float(wrong.sum()) * float(right.sum())))
