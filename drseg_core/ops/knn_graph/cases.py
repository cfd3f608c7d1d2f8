# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs of ``knn_graph`` at the named sizes."""

from __future__ import annotations

from typing import Any

import torch

from drseg_core.ops._cases import CASES, Case, generator, vit_like_prior

__all__ = ["CASES", "make_inputs"]


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``knn_graph``. Saturated: norms from 1e-18 to 1e18 (4e-3 to 6e4 in float16)."""
    random = generator(case, seed)
    prior = vit_like_prior(case, random)
    if case.saturated:
        low, high = (-2.0, 3.0) if dtype == torch.float16 else (-18.0, 18.0)
        exponent = torch.empty(case.batch, case.nodes, 1).uniform_(low, high, generator=random)
        prior = prior * 10**exponent
    return {
        "prior": prior.to(device=device, dtype=dtype),
        "grid": (case.height, case.width),
        "k": case.neighbours,
        "decay": 1.0,
    }
