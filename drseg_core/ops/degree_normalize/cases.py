# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs of ``degree_normalize`` at the named sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from drseg_core.ops._cases import CASES, Case, generator, random_index

__all__ = ["CASES", "make_inputs"]


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``degree_normalize``. Saturated: weights from 0 to 1e4, with whole rows of 0."""
    random = generator(case, seed)
    shape = (case.batch, case.nodes, case.neighbours)
    weight = F.softplus(torch.randn(shape, generator=random))
    if case.saturated:
        weight = 10 ** torch.empty(shape).uniform_(-7, 4, generator=random)
        weight[:, ::5] = 0
    return {
        "weight": weight.to(device=device, dtype=dtype),
        "index": random_index(case, random).to(device),
    }
