# SPDX-License-Identifier: Apache-2.0
"""What ``graph_propagate`` means, in plain PyTorch: forward (differentiable), and its gradients written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Bytes of one block of gathered features; about two such buffers live at a time.
_BLOCK_BYTES = 32 << 20


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(wide) for tensor in tensors)


def _row_block(x: Tensor, k: int, block: int | None) -> int:
    return block or max(1, _BLOCK_BYTES // max(1, k * x.shape[-1] * x.element_size()))


def _at_once(x: Tensor, index: Tensor, coefficient: Tensor, transpose: bool) -> Tensor:
    """:func:`graph_propagate` with a message (C,) for every edge, (B, N, K, C) of them."""
    end = index.long().clamp(0, torch.sym_max(index.shape[1] - 1, 0)).flatten(1)
    end = end.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    if transpose:
        message = coefficient.unsqueeze(-1) * x.unsqueeze(2)
        return torch.zeros_like(x).scatter_add(1, end, message.flatten(1, 2))
    return (coefficient.unsqueeze(-1) * x.gather(1, end).unflatten(1, index.shape[1:])).sum(2)


def graph_propagate(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool = False,
    csc: tuple[Tensor, Tensor] | None = None,
    *,
    block: int | None = None,
) -> Tensor:
    """Weighted sums of neighbour features, accumulated in float32 or wider, in ``x``'s dtype.

    Args:
        x: (B, N, C). index: (B, N, K). coefficient: (B, N, K).
        transpose: send along the edges in the other direction.
        csc: ``indptr`` and ``perm`` of the graph's columns, which nobody needs here.
        block: rows computed at once; by default as many as take 32 MB.
    """
    dtype = x.dtype
    x, coefficient = _wide(x, coefficient)
    batch, nodes, k = index.shape
    if isinstance(batch * nodes, torch.SymInt):
        # a program for every size has no loop over samples
        return _at_once(x, index, coefficient, transpose).to(dtype)
    neighbour = index.long().clamp(0, max(nodes - 1, 0))
    block = _row_block(x, k, block)
    samples = []
    for b in range(batch):
        total = x.new_zeros(x.shape[1:])
        rows = []
        for first in range(0, nodes, block):
            near, share = neighbour[b, first : first + block], coefficient[b, first : first + block]
            if transpose:
                message = share.unsqueeze(-1) * x[b, first : first + block, None]
                total = total.index_add(0, near.reshape(-1), message.flatten(0, 1))
            else:
                rows.append((share.unsqueeze(-1) * x[b][near]).sum(-2))
        samples.append(total if transpose or not rows else torch.cat(rows))
    return (torch.stack(samples) if samples else x.new_zeros(x.shape)).to(dtype)


def graph_propagate_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    transpose: bool,
    output_mask: Sequence[bool],
    csc: tuple[Tensor, Tensor] | None = None,
    *,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients to ``x`` and ``coefficient``; one whose ``output_mask`` is False is an empty tensor.

    To ``x``: the same propagation in the other direction. To ``coefficient``: the dot product of the gradient at the
    node that receives with the features of the node that sends.
    """
    grad_x, grad_coefficient = x.new_empty(0), coefficient.new_empty(0)
    if output_mask[0]:
        grad_x = graph_propagate(grad, index, coefficient, not transpose, block=block).to(x.dtype)
    if output_mask[1]:
        wide_grad, wide_x = _wide(grad, x)
        start, end = (wide_x, wide_grad) if transpose else (wide_grad, wide_x)
        batch, nodes, k = index.shape
        if isinstance(batch * nodes, torch.SymInt):
            # as in the forward
            near = index.long().clamp(0, torch.sym_max(nodes - 1, 0)).flatten(1)
            near = end.gather(1, near.unsqueeze(-1).expand(-1, -1, end.shape[-1])).unflatten(1, index.shape[1:])
            return grad_x, (near * start.unsqueeze(2)).sum(-1).to(coefficient.dtype)
        neighbour = index.long().clamp(0, max(nodes - 1, 0))
        block = _row_block(end, k, block)
        # put together, as in the forward: not every compiler follows a write into part of a tensor
        samples = []
        for b in range(batch):
            dots = [
                (end[b][neighbour[b, rows]] * start[b, rows].unsqueeze(1)).sum(-1)
                for rows in (slice(first, first + block) for first in range(0, nodes, block))
            ]
            samples.append(torch.cat(dots) if dots else wide_x.new_zeros(nodes, k))
        grad_coefficient = torch.stack(samples).to(coefficient.dtype) if samples else torch.zeros_like(coefficient)
    return grad_x, grad_coefficient
