# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from drseg_core.config.schema import TrainConfig
from drseg_core.training.optim import build_optimizer, learning_rate_factor, set_learning_rate, training_progress


def test_progress_is_that_of_the_nearer_limit():
    steps = TrainConfig(iterations=100)
    assert training_progress(25, 1e9, steps) == 0.25
    both = TrainConfig(iterations=100, seconds=10)
    assert training_progress(25, 1.0, both) == 0.25
    assert training_progress(25, 5.0, both) == 0.5
    assert training_progress(25, 50.0, both) == 1.0
    assert training_progress(0, 0.0, TrainConfig(iterations=0)) == 1.0
    assert training_progress(0, 0.0, TrainConfig(seconds=0.0)) == 1.0


def test_cosine_falls_from_one_to_zero():
    train = TrainConfig()
    assert learning_rate_factor(0.0, 0, train) == 1.0
    assert learning_rate_factor(0.5, 50, train) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 100, train) == pytest.approx(0.0)
    assert learning_rate_factor(0.7, 70, TrainConfig(schedule="constant")) == 1.0


def test_warm_up_rises_linearly():
    train = TrainConfig(schedule="constant", warmup_iterations=4)
    assert [learning_rate_factor(0.1, i, train) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_groups_keep_their_ratio():
    weight = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": weight[:1], "lr": 1e-2, "weight_decay": 0.0}, {"params": weight[1:], "lr": 1e-4}]
    optimizer = build_optimizer(groups, TrainConfig(weight_decay=0.3))
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-5]
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]
