# SPDX-License-Identifier: Apache-2.0
"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from drseg_core.config.schema import TrainConfig


def build_optimizer(groups: Iterable[dict[str, Any]], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.999) over the model's parameter groups; every group keeps its base rate as ``base_lr``."""
    # fused: a token embedding of millions of rows is otherwise a tenth of a small model's step on a CPU
    optimizer = torch.optim.AdamW(list(groups), lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def training_progress(iteration: int, elapsed: float, train: TrainConfig) -> float:
    """Share of the training that is done, 0..1: the nearer of the two limits.

    With ``train.seconds`` the result depends on the clock, so two runs with a time limit are not bit for bit equal.

    Args:
        iteration: optimiser steps taken so far.
        elapsed: seconds trained so far, earlier parts of a resumed run included.
        train: limits.
    """
    done = iteration / train.iterations if train.iterations > 0 else 1.0
    if train.seconds is not None:
        done = max(done, elapsed / train.seconds if train.seconds > 0 else 1.0)
    return min(done, 1.0)


def learning_rate_factor(progress: float, iteration: int, train: TrainConfig) -> float:
    """Factor on every group's base rate: a pure function of the progress and, for the warm-up, the iteration.

    ``cosine``: ``(1 + cos(pi progress)) / 2``; ``constant``: 1. Either is multiplied by
    ``(iteration + 1) / warmup_iterations`` while that is below one.
    """
    factor = 0.5 * (1.0 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1.0
    if iteration < train.warmup_iterations:
        factor *= (iteration + 1) / train.warmup_iterations
    return factor


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its base rate times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
