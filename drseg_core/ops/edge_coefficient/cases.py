# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs of ``edge_coefficient`` at the named sizes."""

from __future__ import annotations

from typing import Any

import torch

from drseg_core.ops._cases import CASES, Case, generator, random_index

__all__ = ["CASES", "make_inputs"]


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``edge_coefficient``. Saturated: logits of both signs up to about 100."""
    random = generator(case, seed)
    scale = 10.0 if case.saturated else 1.0
    half = (case.batch, case.nodes, case.hidden)
    inputs = {
        "source": scale * torch.randn(half, generator=random),
        "target": scale * torch.randn(half, generator=random),
        "vector": torch.randn(case.hidden, generator=random) * (2.0 if case.saturated else case.hidden**-0.5),
        "bias": torch.randn((), generator=random),
    }
    result: dict[str, Any] = {name: value.to(device=device, dtype=dtype) for name, value in inputs.items()}
    result["index"] = random_index(case, random).to(device)
    return result
