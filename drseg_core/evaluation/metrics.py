# SPDX-License-Identifier: Apache-2.0
"""Segmentation metrics from one confusion matrix over the whole set.

Pixels whose truth is 255 do not count: not as truth, and predictions on them are no false positives.

The mean IoU has been averaged in three ways under one name. With TP, FP, FN per class, IoU = TP / (TP + FP + FN):

* ``present``: mean over classes that occur in the truth (detectron2 since July 2022; the benchmark protocol);
* ``union``: mean over classes that occur in the truth or in the prediction, where a class that is only predicted
  counts as 0 (detectron2 0.6 of PyPI, mmsegmentation, torchmetrics);
* ``all``: mean over every class of the vocabulary, where a class that occurs nowhere counts as 0 too.

So ``all <= union <= present``, and all are equal where the truth shows every class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.data.dataset import IGNORE

__all__ = ["ConfusionMatrix"]

Convention = Literal["present", "union", "all"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

Float = NDArray[np.float64]


class ConfusionMatrix:
    """Counts of (truth, prediction) pairs.

    Args:
        num_classes: T; ids are 0 to T - 1.

    Attributes:
        matrix: (T, T) int64; row = truth, column = prediction.
        ignored: pixels whose truth was 255.

    Examples:
        >>> import torch
        >>> from drseg_core.evaluation.metrics import ConfusionMatrix
        >>> confusion = ConfusionMatrix(2)
        >>> confusion.update(prediction=torch.tensor([0, 0, 1, 1]), target=torch.tensor([0, 1, 1, 255]))
        >>> confusion.mean_iou(), confusion.ignored
        (50.0, 1)
    """

    def __init__(self, num_classes: int) -> None:
        if not 1 <= num_classes <= IGNORE:
            raise ValueError(f"ConfusionMatrix: num_classes is out of range; expected 1 to {IGNORE}, got {num_classes}")
        self.num_classes = num_classes
        self.matrix = np.zeros((num_classes, num_classes), np.int64)
        self.ignored = 0

    def update(self, prediction: Tensor | NDArray[np.integer], target: Tensor | NDArray[np.integer]) -> None:
        """Count one or more images.

        Args:
            prediction: ids 0 to T - 1, any shape.
            target: ids 0 to T - 1 or 255, the same shape.

        Raises:
            ValueError: shapes differ, or an id is out of range where it counts.
            TypeError: not integers.
        """
        prediction, target = torch.as_tensor(prediction), torch.as_tensor(target)
        if prediction.shape != target.shape:
            raise ValueError(
                f"ConfusionMatrix.update: shapes differ; expected one shape, "
                f"got prediction {tuple(prediction.shape)} and target {tuple(target.shape)}"
            )
        for name, value in (("prediction", prediction), ("target", target)):
            if value.dtype.is_floating_point or value.dtype.is_complex:
                raise TypeError(f"ConfusionMatrix.update: {name} is not integer; expected class ids, got {value.dtype}")
        valid = target != IGNORE
        truth, guess = target[valid].long(), prediction[valid].long()
        for name, value in (("target", truth), ("prediction", guess)):
            if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < self.num_classes:
                raise ValueError(
                    f"ConfusionMatrix.update: {name} is out of range; expected 0 to {self.num_classes - 1}, "
                    f"got {int(value.min())} to {int(value.max())}"
                )
        count = torch.bincount(truth * self.num_classes + guess, minlength=self.num_classes**2)
        self.matrix += count.cpu().numpy().reshape(self.num_classes, self.num_classes)
        self.ignored += valid.numel() - truth.numel()

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another part of the set."""
        if other.num_classes != self.num_classes:
            raise ValueError(
                f"ConfusionMatrix.merge: class numbers differ; expected {self.num_classes}, got {other.num_classes}"
            )
        self.matrix += other.matrix
        self.ignored += other.ignored

    def truth_pixels(self) -> NDArray[np.int64]:
        """(T,) pixels of each class in the truth."""
        return self.matrix.sum(axis=1)

    def iou(self) -> Float:
        """(T,) IoU in percent; NaN for a class in neither truth nor prediction."""
        hit = self.matrix.diagonal()
        return _percent(hit, self.matrix.sum(axis=0) + self.matrix.sum(axis=1) - hit)

    def accuracy(self) -> Float:
        """(T,) recall in percent; NaN for a class that is not in the truth."""
        return _percent(self.matrix.diagonal(), self.truth_pixels())

    def mean_iou(self, convention: Convention = "present", classes: Sequence[int] | None = None) -> float:
        """Mean IoU in percent.

        Args:
            convention: over which classes (see the module).
            classes: only these ids; all by default. Their IoU still counts the false positives of every class.

        Returns:
            percent, or NaN where no class takes part or no pixel counts.
        """
        iou, truth = self.iou(), self.truth_pixels()
        if convention not in CONVENTIONS:
            raise ValueError(
                f"mean_iou: convention is unknown; expected one of {', '.join(CONVENTIONS)}, got {convention!r}"
            )
        if convention == "all":
            # where no pixel counts there is no score, which is not the worst one
            value, used = np.nan_to_num(iou), np.full(self.num_classes, truth.any())
        else:
            value, used = iou, truth > 0 if convention == "present" else ~np.isnan(iou)
        return _mean(value, used, classes)

    def mean_accuracy(self, classes: Sequence[int] | None = None) -> float:
        """Mean recall in percent over the classes in the truth, or over those of them in ``classes``."""
        return _mean(self.accuracy(), self.truth_pixels() > 0, classes)

    def frequency_weighted_iou(self) -> float:
        """IoU weighted by each class's share of the truth, in percent."""
        truth = self.truth_pixels()
        if not truth.sum():
            return float("nan")
        return float((truth / truth.sum() * np.nan_to_num(self.iou())).sum())

    def pixel_accuracy(self) -> float:
        """Share of correct pixels in percent."""
        return float(_percent(self.matrix.trace(), self.matrix.sum()))


def _percent(part: np.integer | NDArray[np.int64], whole: np.integer | NDArray[np.int64]) -> Float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(whole) > 0, 100.0 * np.asarray(part) / np.asarray(whole), np.nan)


def _mean(value: Float, used: NDArray[np.bool_], classes: Sequence[int] | None) -> float:
    if classes is not None:
        wrong = [c for c in classes if not 0 <= c < len(value)]
        if wrong:
            raise ValueError(f"ConfusionMatrix: classes are out of range; expected 0 to {len(value) - 1}, got {wrong}")
        chosen = np.zeros_like(used)
        chosen[list(classes)] = True
        used = used & chosen
    return float(value[used].mean()) if used.any() else float("nan")
