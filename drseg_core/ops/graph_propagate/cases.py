# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs of ``graph_propagate`` at the named sizes."""

from __future__ import annotations

from typing import Any

import torch

from drseg_core.ops._cases import CASES, Case, generator, random_features, random_index

__all__ = ["CASES", "make_inputs"]


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``graph_propagate``; the coefficients stay float32 for half-precision features.

    Saturated: features of 100 (float16) or 1e15 beside ordinary ones.
    """
    random = generator(case, seed)
    x = random_features(case, dtype, random)
    coefficient = torch.rand(case.batch, case.nodes, case.neighbours, generator=random) / case.neighbours
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": x.to(device=device, dtype=dtype),
        "index": random_index(case, random).to(device),
        "coefficient": coefficient.to(device=device, dtype=wide),
    }
