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


def count_text(counts: dict[str, ParameterCount]) -> str:
    """One line: ``clip 19.86 of 149.62 M, dino 0.00 of 303.08 M, ...`` (trained of all, in millions)."""
    parts = [f"{name} {count.trainable / 1e6:.2f} of {count.total / 1e6:.2f} M" for name, count in counts.items()]
    return ", ".join(parts)


def _count(part: nn.Module) -> ParameterCount:
    parameters = list(part.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCount(trainable, sum(parameter.numel() for parameter in parameters))
