# SPDX-License-Identifier: Apache-2.0
"""What ``edge_coefficient`` means, in plain PyTorch: forward (differentiable), and its gradients written out.

The edge MLP works through blocks of rows, so that no tensor of all edges times the hidden width exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of one block of hidden activations; about four such buffers live at a time.
_BLOCK_BYTES = 32 << 20


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(wide) for tensor in tensors)


def _row_block(target: Tensor, k: int) -> int:
    return max(1, _BLOCK_BYTES // max(1, k * target.shape[-1] * target.element_size()))


def _weights(
    source: Tensor, target: Tensor, neighbour: Tensor, vector: Tensor, bias: Tensor, mask: Tensor | None
) -> Tensor:
    batch, nodes, k = neighbour.shape
    block = _row_block(target, k)
    samples = []
    for b in range(batch):
        rows = []
        for first in range(0, nodes, block):
            near = target[b][neighbour[b, first : first + block]]
            logit = (source[b, first : first + block, None] + near).relu() @ vector + bias
            # accurate relative to its value at both ends, without a switch to a linear function
            rows.append(torch.logaddexp(logit, logit.new_zeros(())))
        samples.append(torch.cat(rows) if rows else source.new_empty(0, k))
    weight = torch.stack(samples) if samples else source.new_empty(0, nodes, k)
    # a product, not a choice: a row that is not finite must not look healthy because its slots are padding
    return weight if mask is None else weight * mask


def _column_sum(value: Tensor, neighbour: Tensor) -> Tensor:
    """Sum over the edges that end in each node: (B, N, K) -> (B, N)."""
    return value.new_zeros(value.shape[:2]).scatter_add(1, neighbour.flatten(1), value.flatten(1))


def _at_neighbour(value: Tensor, neighbour: Tensor) -> Tensor:
    """Value of each edge's end: (B, N) -> (B, N, K)."""
    return value.gather(1, neighbour.flatten(1)).view(neighbour.shape)


def edge_coefficient(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (B, N, K), weights (B, N, K) and inverse roots of the degrees, in float32 (float64 if an input is).

    The last is (1, B, N) where both ends of an edge have one degree, (2, B, N) for ``sym_inout``, whose ends have one
    each, and (0, B, N) for ``row`` and ``sym_count``.

    Args:
        source: (B, N, E). target: (B, N, E). index: (B, N, K). vector: (E,). bias: (). mask: (B, N, K) bool or None.
        norm, eps: as in ``degree_normalize``.
    """
    source, target, vector, bias = _wide(source, target, vector, bias)
    neighbour = index.long().clamp(0, max(index.shape[1] - 1, 0))
    weight = _weights(source, target, neighbour, vector, bias, mask)
    row = weight.sum(-1)
    if norm == "sym_count":
        return weight / max(index.shape[2], 1), weight, row.new_empty(0, *row.shape)
    if norm == "row":
        return weight / (row + eps).unsqueeze(-1), weight, row.new_empty(0, *row.shape)
    if norm == "sym_row":
        scale = (row + eps).rsqrt().unsqueeze(0)
    elif norm == "sym_inout":
        scale = (torch.stack([row, _column_sum(weight, neighbour)]) + eps).rsqrt()
    else:
        scale = ((row + _column_sum(weight, neighbour)) / 2 + eps).rsqrt().unsqueeze(0)
    coefficient = weight * scale[0].unsqueeze(-1) * _at_neighbour(scale[-1], neighbour)
    return coefficient / 2 if norm == "sym_undirected" else coefficient, weight, scale


def _to_weights(grad: Tensor, weight: Tensor, scale: Tensor, neighbour: Tensor, norm: str, eps: float) -> Tensor:
    """Gradient to the weights from that of the coefficients, through the degrees of both ends."""
    if norm == "sym_count":
        return grad / max(neighbour.shape[2], 1)
    if norm == "row":
        inverse = (weight.sum(-1, keepdim=True) + eps).reciprocal()
        return inverse * (grad - inverse * (grad * weight).sum(-1, keepdim=True))
    if norm == "sym_undirected":
        grad = grad / 2
    near, far = scale[0].unsqueeze(-1), _at_neighbour(scale[-1], neighbour)
    # d(degree ** -1/2) = -1/2 degree ** -3/2
    to_start = -0.5 * scale[0] ** 3 * (grad * weight * far).sum(-1)
    to_end = -0.5 * scale[-1] ** 3 * _column_sum(grad * weight * near, neighbour)
    direct = grad * near * far
    if norm == "sym_row":
        return direct + (to_start + to_end).unsqueeze(-1)
    if norm == "sym_undirected":
        to_start = to_end = (to_start + to_end) / 2
    return direct + to_start.unsqueeze(-1) + _at_neighbour(to_end, neighbour)


def edge_coefficient_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    norm: str,
    eps: float,
    need_source: bool,
    need_target: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to ``source``, ``target``, ``vector`` and ``bias``, each in its input's dtype; empty where not needed.

    The ReLU mask is computed again. The derivative of softplus comes from the saved weight: 1 - exp(-weight).
    """
    inputs = (source, target, vector, bias)
    grad, weight, scale, source, target, vector, _ = _wide(grad, weight, scale, *inputs)
    neighbour = index.long().clamp(0, max(index.shape[1] - 1, 0))
    # a masked slot has weight 0 and so derivative 0
    slope = _to_weights(grad, weight, scale, neighbour, norm, eps) * -torch.expm1(-weight)
    grad_source, grad_target = torch.zeros_like(source), torch.zeros_like(target)
    grad_vector = torch.zeros_like(vector)
    block = _row_block(target, index.shape[2])
    for b in range(index.shape[0]):
        for first in range(0, index.shape[1], block):
            rows = slice(first, first + block)
            near = neighbour[b, rows]
            hidden = (source[b, rows, None] + target[b][near]).relu()
            along = slope[b, rows].unsqueeze(-1)
            grad_vector += (along * hidden).sum((0, 1))
            grad_hidden = (along * vector).masked_fill(hidden <= 0, 0)
            grad_source[b, rows] = grad_hidden.sum(1)
            grad_target[b].index_add_(0, near.flatten(), grad_hidden.flatten(0, 1))
    results = (grad_source, grad_target, grad_vector, slope.sum())
    needed = (need_source, need_target, need_parameters, need_parameters)
    source, target, vector, bias = (
        result.to(given.dtype).reshape(given.shape) if need else given.new_empty(0)
        for result, given, need in zip(results, inputs, needed, strict=True)
    )
    return source, target, vector, bias
