# SPDX-License-Identifier: Apache-2.0
"""What ``prepare_prior`` means, in plain PyTorch: any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def _exponent_scale(prior: Tensor) -> Tensor:
    """Per row the power of two that brings its largest entry near one, (..., N, 1). Multiplying by it is exact."""
    largest = prior.abs().amax(-1, keepdim=True)
    wide = largest if prior.dtype == torch.float64 else largest.float()
    # the exponent of a subnormal is lower still (-148 in float32), and 2**148 would overflow
    limit = 1020 if prior.dtype == torch.float64 else 126
    exponent = torch.frexp(torch.where(wide.isfinite(), wide, 1)).exponent.clamp(-limit, limit)
    # written as the bits of a float64, because torch.ldexp takes its power in float32
    return ((1023 - exponent.long()) << 52).view(torch.float64).to(prior.dtype)


def prepare_prior(prior: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled by exact powers of two, and the inverse of their L2 norms.

    The features stay in their dtype: products of bf16 or fp16 values are exact in float32, so ranking by
    ``<d_i, d_j> * inverse_norm_i * inverse_norm_j`` rounds only in the sums. The scaling keeps float32 and bf16 rows
    of any finite norm from overflowing or underflowing; float16 products cannot.

    Args:
        prior: (..., N, D) features.

    Returns:
        ``prior`` scaled, and ``inverse_norm`` (..., N) in float32 (float64 for float64): 0 for a zero row, NaN for a
        row with a non-finite value.
    """
    if prior.dtype != torch.float16:
        prior = prior * _exponent_scale(prior)
    wide = prior if prior.dtype == torch.float64 else prior.float()
    norm = wide.square().sum(-1).sqrt()
    inverse = torch.where(norm > 0, norm.reciprocal(), 0)
    return prior, torch.where(prior.isfinite().all(-1), inverse, torch.nan)


def rounding(scaled: Tensor, inverse_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled rows in float16, and a bound (..., N) on the length of a row's rounding errors over the row's own."""
    rounded = scaled.half()
    lost = (scaled.double() - rounded.double()).norm(dim=-1) * inverse_norm.double()
    return rounded, torch.where(lost.isnan(), 0, lost * (1 + 2.0**-10)).float()
