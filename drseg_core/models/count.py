# SPDX-License-Identifier: Apache-2.0
"""How many parameters a model has, and how many of them are trained."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class ParameterCount(NamedTuple):
    """Trained and all parameters of one part."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> dict[str, ParameterCount]:
    """Counts per direct child of ``model`` in order, and of everything under ``total``."""
    counts = {name: _count(part) for name, part in model.named_children()}
    counts["total"] = _count(model)
    return counts


def _count(part: nn.Module) -> ParameterCount:
    parameters = list(part.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCount(trainable, sum(parameter.numel() for parameter in parameters))
