# SPDX-License-Identifier: Apache-2.0
"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from drseg_core.config.schema import TrainConfig

EDGE_GROUP = "edge_decay"


def build_optimizer(groups: Iterable[dict[str, Any]], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.999) over the model's parameter groups; every group keeps its base rate as ``base_lr``."""
    # fused: a token embedding of millions of rows is otherwise a tenth of a small model's step on a CPU
    optimizer = torch.optim.AdamW(list(groups), lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def movement(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """How far each part of the model moved in the last step, by the first word of its groups' names.

    This is the root mean square of AdamW's step over its learning rate, without the decay. It is about one if gradients
    keep their sign, less if they change it, and near zero if they are as small as the group's epsilon.
    """
    squares: dict[str, list[torch.Tensor]] = {}
    counts: dict[str, int] = {}
    for group in optimizer.param_groups:
        part = group["name"].partition("_")[0]
        (decay, square_decay), eps = group["betas"], group["eps"]
        for parameter in group["params"]:
            # none before its first gradient
            if state := optimizer.state.get(parameter):
                steps = float(state["step"])
                scale = (state["exp_avg_sq"] / (1 - square_decay**steps)).sqrt_().add_(eps)
                step = state["exp_avg"] / (1 - decay**steps) / scale
                squares.setdefault(part, []).append(step.square().sum(dtype=torch.float64))
                counts[part] = counts.get(part, 0) + parameter.numel()
    return {part: math.sqrt(float(torch.stack(found).sum()) / counts[part]) for part, found in squares.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], order: Iterable[torch.Tensor]) -> None:
    """Take a saved state, also one from before the MLP of Eq. 8 had a group of its own.

    Args:
        optimizer: what takes it.
        state: of its ``state_dict``.
        order: the model's parameters.
    """
    names = [group["name"] for group in optimizer.param_groups]
    saved = [group["name"] for group in state["param_groups"]]
    if names != saved and EDGE_GROUP in names and EDGE_GROUP not in saved:
        place = {id(parameter): number for number, parameter in enumerate(order)}
        groups = {group["name"]: group["params"] for group in optimizer.param_groups}
        edge = groups.pop(EDGE_GROUP)
        groups["head_decay"] = sorted([*groups.get("head_decay", []), *edge], key=lambda each: place[id(each)])
        # the number that each parameter had
        former = {id(each): number for number, each in enumerate(each for name in saved for each in groups[name])}
        own = {group["name"]: group for group in state["param_groups"]}
        own[EDGE_GROUP] = own["head_decay"] | {"name": EDGE_GROUP}
        state = state | {
            "param_groups": [
                own[group["name"]] | {"params": [former[id(each)] for each in group["params"]]}
                for group in optimizer.param_groups
            ]
        }
    optimizer.load_state_dict(state)


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
