# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from drseg_core.evaluation.calibration import Calibration


def counted(score, right, uncertainty=None) -> Calibration:
    found, score = Calibration(), torch.tensor(score, dtype=torch.float32)[None]
    target = torch.tensor(right, dtype=torch.uint8)[None]
    other = 1 - score if uncertainty is None else torch.tensor(uncertainty, dtype=torch.float32)[None]
    found.update(torch.ones_like(target), score, other, target)
    return found


def test_a_score_that_is_right_as_often_as_it_says():
    assert counted([0.75] * 4, [1, 1, 1, 0]).error() == pytest.approx(0, abs=0.1)
    assert counted([0.95] * 4, [1, 1, 0, 0]).error() == pytest.approx(45, abs=0.1)
    assert counted([0.9, 0.9, 0.1, 0.1], [1, 0, 1, 0]).error() == pytest.approx(40, abs=0.1)


def test_ignored_pixels_count_nowhere():
    assert counted([0.5], [255]).as_dict() == {
        "error": None, "bins": 15, "error_auroc": {"score": None, "uncertainty": None},
    }  # fmt: skip


def test_the_sign_of_errors():
    found = counted([0.9, 0.8, 0.7, 0.2], [1, 1, 0, 0], [0.5, 0.1, 0.3, 0.3]).as_dict()["error_auroc"]
    assert found == {"score": 1.0, "uncertainty": 0.5}


def test_the_area_is_that_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    generator = np.random.default_rng(0)
    score, right = generator.integers(0, 1000, 500) / 1000 + 0.0005, generator.integers(0, 2, 500)
    found = counted(score.tolist(), right.tolist()).as_dict()
    wrong = torch.tensor(1 - right)
    assert found["error_auroc"]["score"] == pytest.approx(
        float(torchmetrics.binary_auroc(torch.tensor(1 - score), wrong)), abs=1e-6
    )
    error = torchmetrics.binary_calibration_error(torch.tensor(score), torch.tensor(right), n_bins=15)
    assert found["error"] == pytest.approx(100 * float(error), abs=1.0)
