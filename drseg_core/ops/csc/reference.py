# SPDX-License-Identifier: Apache-2.0
"""What ``csc`` means, in plain PyTorch: a stable sort of the edges by the node in which they end."""

from __future__ import annotations

import torch
from torch import Tensor


def csc(index: Tensor) -> tuple[Tensor, Tensor]:
    """``indptr`` (B * N + 1,) and ``perm`` (B * N * K,) of ``index`` (B, N, K), clamped into [0, N)."""
    batch, nodes, _ = index.shape
    narrow = torch.int32 if index.numel() < 2**31 else torch.int64
    first = torch.arange(batch, device=index.device)[:, None, None] * nodes
    end, perm = torch.sort((index.long().clamp(0, max(nodes - 1, 0)) + first).flatten(), stable=True)
    node = torch.arange(batch * nodes + 1, device=index.device)
    return torch.searchsorted(end, node).to(narrow), perm.to(narrow)
