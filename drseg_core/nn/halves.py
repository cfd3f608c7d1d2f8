# SPDX-License-Identifier: Apache-2.0
"""Two matrices that are parameters of their own, and in memory the halves of one, so that one product serves both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Joined(torch.autograd.Function):
    """The matrix of which two are the halves: a view, no copy."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        return _view(first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        first, second = grad.chunk(2)
        return first, second


def _view(first: Tensor) -> Tensor:
    # no view to autograd, which would refuse a step of the optimiser before the backward; nothing keeps it till then
    both = torch.empty(0, dtype=first.dtype, device=first.device)
    shape = (2 * first.shape[0], first.shape[1])
    return both.set_(first.untyped_storage(), int(first.storage_offset()), shape, first.stride())


def _adjacent(first: Tensor, second: Tensor) -> bool:
    """Whether two plain tensors are the halves of one matrix."""
    if first.is_meta or first.dtype != second.dtype or first.shape != second.shape:
        return False
    if not first.is_contiguous() or not second.is_contiguous():
        return False
    behind = int(second.storage_offset()) == int(first.storage_offset()) + first.numel()
    return behind and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def _watched(*tensors: Tensor) -> bool:
    """Whether a compiler, a transform or another kind of tensor stands between a call and memory."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)
    )


def join(first: Tensor, second: Tensor) -> None:
    """Put two parameters behind each other in memory; what is no plain parameter, or has no memory, stays."""
    plain = all(type(half) is nn.Parameter and not half.is_meta for half in (first, second))
    if plain and not _adjacent(first, second):
        with torch.no_grad():
            both = torch.cat([first, second])
        first.data, second.data = both.chunk(2)


def joined(first: Tensor, second: Tensor) -> Tensor:
    """The rows of two matrices in one, without a copy where ``join`` has put them together."""
    if _watched(first, second) or not _adjacent(first, second):
        return torch.cat([first, second])
    if not torch.is_grad_enabled():
        return _view(first)
    both: Tensor = _Joined.apply(first, second)
    return both
