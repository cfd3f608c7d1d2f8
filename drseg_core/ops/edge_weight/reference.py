# SPDX-License-Identifier: Apache-2.0
"""What ``edge_weight`` means, in plain PyTorch: forward (differentiable), and its gradients written out.

Both work through blocks of rows, so that no tensor of all edges times the hidden width exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Bytes of one block of hidden activations; about four such buffers live at a time.
_BLOCK_BYTES = 32 << 20


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(wide) for tensor in tensors)


def _row_block(target: Tensor, k: int, block: int | None) -> int:
    return block or max(1, _BLOCK_BYTES // max(1, k * target.shape[-1] * target.element_size()))


def softplus(value: Tensor) -> Tensor:
    """log(1 + exp(value)), accurate relative to its value at both ends (no linear switch)."""
    return torch.logaddexp(value, torch.zeros((), dtype=value.dtype, device=value.device))


def factor_of(exponent: Tensor, mask: Tensor | None) -> Tensor:
    """exp(exponent), and 0 where ``mask`` is False, whatever the exponent is there."""
    factor = exponent.exp()
    return factor if mask is None else factor.masked_fill(~mask, 0)


def at_neighbour(value: Tensor, index: Tensor) -> Tensor:
    """Rows of ``value`` (B, N, E) at the ends of the edges ``index`` (B, N, K), all at once: (B, N, K, E)."""
    end = index.long().clamp(0, torch.sym_max(index.shape[1] - 1, 0)).flatten(1)
    return value.gather(1, end.unsqueeze(-1).expand(-1, -1, value.shape[-1])).unflatten(1, index.shape[1:])


def edge_weight(
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    exponent: Tensor | None = None,
    *,
    block: int | None = None,
) -> Tensor:
    """Edge weights in float32 (float64 for float64 inputs).

    Args:
        source: (B, N, E). target: (B, N, E). index: (B, N, K). vector: (E,). bias: ().
        mask: (B, N, K) bool or None.
        exponent: (B, N, K) or None; the weight is multiplied by its exponential.
        block: rows computed at once; by default as many as take 32 MB.
    """
    if exponent is None:
        source, target, vector, bias = _wide(source, target, vector, bias)
        # a product, not a choice: a row that is not finite must not look healthy because its slots are padding
        factor = mask
    else:
        source, target, vector, bias, exponent = _wide(source, target, vector, bias, exponent)
        factor = factor_of(exponent, mask)
    batch, nodes, k = index.shape
    if isinstance(batch * nodes, torch.SymInt):
        # a program for every size has no loop over samples
        near = at_neighbour(target, index)
        weight = softplus(((source.unsqueeze(2) + near).relu() * vector).sum(-1) + bias)
        return weight if factor is None else weight * factor
    neighbour = index.long().clamp(0, max(nodes - 1, 0))
    block = _row_block(target, k, block)
    samples = []
    for b in range(batch):
        rows = []
        for first in range(0, nodes, block):
            near = target[b][neighbour[b, first : first + block]]
            hidden = (source[b, first : first + block, None] + near).relu()
            rows.append(softplus((hidden * vector).sum(-1) + bias))
        samples.append(torch.cat(rows) if rows else source.new_empty(0, k))
    weight = torch.stack(samples) if samples else source.new_empty(0, nodes, k)
    return weight if factor is None else weight * factor


def edge_weight_backward(
    grad: Tensor,
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    index: Tensor,
    vector: Tensor,
    bias: Tensor,
    output_mask: Sequence[bool] = (True,) * 4,
    csc: tuple[Tensor, Tensor] | None = None,
    exponent: Tensor | None = None,
    *,
    block: int | None = None,
) -> tuple[Tensor, ...]:
    """Gradients to ``source``, ``target``, ``vector`` and ``bias``, each in its input's dtype; a fifth to ``exponent``.

    One whose ``output_mask`` is False is an empty tensor. The ReLU mask is computed again. The derivative of softplus
    comes from the saved weight: 1 - exp(-weight). ``csc``, ``indptr`` and ``perm`` of the graph's columns, is needed by
    nobody here. Without an exponent there are four gradients, and four entries of ``output_mask``.
    """
    wants_source, wants_target, wants_vector, *_ = output_mask
    inputs = (source, target, vector, bias) if exponent is None else (source, target, vector, bias, exponent)
    grad, weight, source, target, vector, _, *rest = _wide(grad, weight, *inputs)
    batch, nodes, k = index.shape
    neighbour = index.long().clamp(0, max(nodes - 1, 0))
    block = _row_block(target, k, block)
    # a masked slot has weight 0 and so derivative 0
    if exponent is None:
        slope = -torch.expm1(-weight)
    else:
        factor = rest[0].exp()
        # whatever its exponent is
        slope = torch.where(weight == 0, 0, factor * -torch.expm1(-weight / factor))
    grad_logit = grad * slope
    grad_vector = vector.new_zeros(vector.shape)
    # put together, as in the forward: not every compiler follows a write into part of a tensor
    to_sources, to_targets = [], []
    for b in range(batch):
        of_rows, to_target = [], target.new_zeros(target.shape[1:])
        for first in range(0, nodes, block):
            rows = slice(first, first + block)
            near = neighbour[b, rows]
            hidden = (source[b, rows, None] + target[b][near]).relu()
            logit = grad_logit[b, rows]
            if wants_vector:
                grad_vector = grad_vector + (logit.unsqueeze(-1) * hidden).sum((0, 1))
            if not wants_source and not wants_target:
                continue
            grad_hidden = (logit.unsqueeze(-1) * vector).masked_fill(hidden <= 0, 0)
            if wants_source:
                of_rows.append(grad_hidden.sum(1))
            if wants_target:
                to_target = to_target.index_add(0, near.flatten(), grad_hidden.flatten(0, 1))
        to_sources.append(torch.cat(of_rows) if of_rows else torch.zeros_like(source[b]))
        to_targets.append(to_target)
    grad_source = torch.stack(to_sources) if to_sources else torch.zeros_like(source)
    grad_target = torch.stack(to_targets) if to_targets else torch.zeros_like(target)
    results = (grad_source, grad_target, grad_vector, grad_logit.sum(), grad * weight)[: len(inputs)]
    return tuple(
        result.to(given.dtype).reshape(given.shape) if need else given.new_empty(0)
        for result, given, need in zip(results, inputs, output_mask, strict=True)
    )
