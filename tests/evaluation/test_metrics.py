# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from drseg_core.evaluation.metrics import CONVENTIONS, ConfusionMatrix

torchmetrics = pytest.importorskip("torchmetrics")


def random_pair(classes: int, used: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, used, (3, 40, 50), generator=generator)
    prediction = torch.where(
        torch.rand(3, 40, 50, generator=generator) < 0.6,
        target,
        torch.randint(0, classes, (3, 40, 50), generator=generator),
    )
    target[torch.rand(3, 40, 50, generator=generator) < 0.2] = 255
    return prediction.to(torch.uint8), target.to(torch.uint8)


def counted(classes: int, *pairs) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes)
    for prediction, target in pairs:
        matrix.update(prediction, target)
    return matrix


@pytest.mark.promise("C50")
@pytest.mark.parametrize(("classes", "used"), [(6, 6), (9, 5), (1, 1)])
def test_against_torchmetrics(classes, used):
    from torchmetrics.functional import classification as oracle

    prediction, target = random_pair(classes, used)
    ours = counted(classes, *zip(prediction, target, strict=True))
    if classes == 1:
        assert ours.mean_iou() == ours.pixel_accuracy() == 100
        return
    options = {"num_classes": classes, "ignore_index": 255}
    a, b = prediction.long(), target.long()
    matrix = oracle.multiclass_confusion_matrix(a, b, **options)
    assert np.array_equal(ours.matrix, matrix.numpy())
    iou = oracle.multiclass_jaccard_index(a, b, average="none", **options)
    assert np.allclose(np.nan_to_num(ours.iou()), 100 * iou.numpy(), atol=1e-4)
    union = oracle.multiclass_jaccard_index(a, b, average="macro", **options)
    assert math.isclose(ours.mean_iou("union"), 100 * float(union), abs_tol=1e-4)
    micro = oracle.multiclass_accuracy(a, b, average="micro", **options)
    assert math.isclose(ours.pixel_accuracy(), 100 * float(micro), abs_tol=1e-4)
    recall = oracle.multiclass_recall(a, b, average="none", **options)
    assert np.allclose(ours.accuracy()[:used], 100 * recall.numpy()[:used], atol=1e-4)
    assert math.isclose(ours.mean_accuracy(), float(ours.accuracy()[:used].mean()), abs_tol=1e-9)
    weighted = oracle.multiclass_jaccard_index(a, b, average="weighted", **options)
    assert math.isclose(ours.frequency_weighted_iou(), 100 * float(weighted), abs_tol=1e-4)


@pytest.mark.promise("C50")
def test_three_conventions_by_hand():
    # class 0 right, 1 half right, 2 only predicted, 3 nowhere
    target = torch.tensor([0, 0, 1, 1, 255])
    prediction = torch.tensor([0, 0, 1, 2, 3])
    matrix = counted(4, (prediction, target))
    assert np.array_equal(np.isnan(matrix.iou()), [False, False, False, True])
    assert matrix.mean_iou() == matrix.mean_iou("present") == (100 + 50) / 2
    assert matrix.mean_iou("union") == (100 + 50 + 0) / 3
    assert matrix.mean_iou("all") == (100 + 50 + 0 + 0) / 4
    assert matrix.mean_accuracy() == 75 and matrix.pixel_accuracy() == 75 and matrix.ignored == 1
    assert matrix.frequency_weighted_iou() == 75
    assert matrix.mean_iou(classes=[1, 2]) == 50 and matrix.mean_iou("union", classes=[1, 2]) == 25
    assert math.isnan(matrix.mean_iou(classes=[2, 3])) and matrix.mean_iou("all", classes=[3]) == 0
    assert matrix.mean_accuracy(classes=[0]) == 100
    # one pixel makes a class present
    matrix = counted(2, (torch.tensor([0, 0]), torch.tensor([0, 1])))
    assert matrix.mean_iou() == 25 and matrix.mean_accuracy() == 50


@pytest.mark.promise("C50")
def test_identity_of_the_published_log():
    # RSKT-Seg's log for Potsdam: the mean of these six is its mIoU, so the clutter class counts
    published = [44.963, 54.763, 35.656, 17.238, 52.852, 1.687]
    matrix = ConfusionMatrix(6)
    wrong = 10**8
    for c, iou in enumerate(published):
        matrix.matrix[c, c] = round(2 * wrong / (100 / iou - 1))
        matrix.matrix[c, (c + 1) % 6] = wrong
    assert np.allclose(matrix.iou(), published, atol=1e-4)
    for convention in CONVENTIONS:
        assert math.isclose(matrix.mean_iou(convention), 34.5264, abs_tol=5e-4)


def test_everything_ignored_or_nothing_counted():
    for matrix in (ConfusionMatrix(3), counted(3, (torch.zeros(4, dtype=torch.long), torch.full((4,), 255)))):
        values = (matrix.mean_iou(), matrix.mean_accuracy(), matrix.frequency_weighted_iou(), matrix.pixel_accuracy())
        assert all(math.isnan(v) for v in values) and np.isnan(matrix.iou()).all()
        assert all(math.isnan(matrix.mean_iou(convention)) for convention in CONVENTIONS)


@pytest.mark.promise("C50")
def test_parts_add_up():
    pairs = [random_pair(5, 5, seed) for seed in range(3)]
    whole, first, rest = counted(5, *pairs), counted(5, *pairs[:1]), counted(5, *pairs[1:])
    first.merge(rest)
    assert np.array_equal(whole.matrix, first.matrix) and whole.ignored == first.ignored
    assert whole.matrix.dtype == np.int64
    with pytest.raises(ValueError, match="class numbers differ"):
        first.merge(ConfusionMatrix(4))


def test_ignored_pixels_may_hold_any_prediction():
    matrix = counted(2, (torch.tensor([0, 99]), torch.tensor([0, 255])))
    assert matrix.pixel_accuracy() == 100


def test_refusals():
    matrix = ConfusionMatrix(3)
    zero = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"shapes differ.*\(2,\) and target \(3,\)"):
        matrix.update(zero, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="target is out of range; expected 0 to 2, got 0 to 3"):
        matrix.update(zero, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="prediction is out of range; expected 0 to 2, got -1 to 0"):
        matrix.update(torch.tensor([0, -1]), zero)
    with pytest.raises(TypeError, match="prediction is not integer"):
        matrix.update(zero.float(), zero)
    with pytest.raises(ValueError, match="num_classes is out of range"):
        ConfusionMatrix(256)
    with pytest.raises(ValueError, match="convention is unknown"):
        matrix.mean_iou("macro")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"classes are out of range.*\[3\]"):
        matrix.mean_iou(classes=[1, 3])
    assert not matrix.matrix.any()
    matrix.update(zero.numpy(), zero)
    assert matrix.mean_iou() == 100
