# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs of ``linear_map`` at the named sizes."""

from __future__ import annotations

from typing import Any

import torch

from drseg_core.ops._cases import CASES, Case, generator, random_features

__all__ = ["CASES", "make_inputs"]


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``linear_map``: features, and the weight of a layer that keeps their width.

    Saturated: features of 100 (float16) or 1e15 beside ordinary ones.
    """
    random = generator(case, seed)
    x = random_features(case, dtype, random)
    weight = torch.randn(case.channels, case.channels, generator=random) * case.channels**-0.5
    return {"x": x.to(device=device, dtype=dtype), "weight": weight.to(device=device, dtype=dtype)}
