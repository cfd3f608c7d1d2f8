# SPDX-License-Identifier: Apache-2.0
"""What ``linear_map`` means: the library's product, which is differentiable, and obeys autocast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_map(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` (B, N, C) or (N, C) times ``weight`` (E, C); what lies in memory as (B, C, N) is read as it lies."""
    if x.dim() == 2 or x.is_contiguous() or x.stride(1) != 1:
        return F.linear(x, weight)
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
        # autocast, which leaves float64 alone, would make a copy for every image
        weight = weight.to(torch.get_autocast_dtype(x.device.type))
    return torch.bmm(x, weight.t().expand(x.shape[0], -1, -1))


def linear_map_backward(grad: Tensor, x: Tensor, weight: Tensor, output_mask: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Gradients to ``x`` (B, N, C) and ``weight``; one whose ``output_mask`` is False is an empty tensor."""
    to_x = torch.matmul(grad, weight) if output_mask[0] else x.new_empty(0)
    to_weight = weight.new_empty(0)
    if output_mask[1]:
        to_weight = torch.matmul(grad.flatten(0, 1).t(), x.flatten(0, 1))
    return to_x, to_weight
