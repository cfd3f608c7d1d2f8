# SPDX-License-Identifier: Apache-2.0
"""What ``graph_layer`` means, in plain PyTorch: forward (differentiable), and its gradients written out."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of one block of gathered features; about two such buffers live at a time.
_BLOCK_BYTES = 32 << 20


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(wide) for tensor in tensors)


def _row_block(x: Tensor, k: int) -> int:
    return max(1, _BLOCK_BYTES // max(1, k * x.shape[-1] * x.element_size()))


def _propagate(x: Tensor, neighbour: Tensor, coefficient: Tensor, forward: bool, reverse: bool) -> Tensor:
    """Sums over the edges in the given directions: (B, N, C) to (B, N, C)."""
    batch, nodes, k = neighbour.shape
    block = _row_block(x, k)
    samples = []
    for b in range(batch):
        total = x.new_zeros(x.shape[1:])
        rows = []
        for first in range(0, nodes, block):
            near, share = neighbour[b, first : first + block], coefficient[b, first : first + block]
            if forward:
                rows.append((share.unsqueeze(1) @ x[b][near]).squeeze(1))
            if reverse:
                message = share.unsqueeze(-1) * x[b, first : first + block, None]
                total = total.index_add(0, near.reshape(-1), message.flatten(0, 1))
        samples.append(total + torch.cat(rows) if rows else total)
    return torch.stack(samples) if samples else x.new_zeros(x.shape)


def graph_layer(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    activation: str,
    eps: float,
    undirected: bool,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Propagation, bias and activation, accumulated in float32 or wider; the output is in ``x``'s dtype.

    Args:
        x: (B, N, C). index: (B, N, K). coefficient: (B, N, K). bias, gain, shift: (C,) or None.
        activation: ``none``, ``relu`` or ``layer_norm``. eps: of LayerNorm.
        undirected: add the sums over the reversed edges.
        keep: return what the backward of LayerNorm needs.

    Returns:
        The output; for LayerNorm the normalised rows (B, N, C) and their inverse deviations (B, N), otherwise empty.
    """
    dtype = x.dtype
    x, coefficient = _wide(x, coefficient)
    neighbour = index.long().clamp(0, max(index.shape[1] - 1, 0))
    y = _propagate(x, neighbour, coefficient, True, undirected)
    if bias is not None:
        y = y + bias.to(y.dtype)
    normed, inverse = y.new_empty(0), y.new_empty(0)
    if activation == "relu":
        y = y.relu()
    elif activation == "layer_norm":
        assert gain is not None and shift is not None
        y = y - y.sum(-1, keepdim=True) / max(y.shape[-1], 1)
        deviation = (y.square().sum(-1) / max(y.shape[-1], 1) + eps).rsqrt()
        y = y * deviation.unsqueeze(-1)
        if keep:
            normed, inverse = y, deviation
        y = y * gain.to(y.dtype) + shift.to(y.dtype)
    return y.to(dtype), normed, inverse


def graph_layer_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    y: Tensor,
    normed: Tensor,
    inverse: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    activation: str,
    undirected: bool,
    need_x: bool,
    need_coefficient: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to ``x``, ``coefficient``, ``bias``, ``gain`` and ``shift`` in their dtypes; empty where not needed.

    ReLU's mask comes from its output ``y``; LayerNorm's gradient from the normalised rows and inverse deviations.
    """
    wide_grad, wide_x, share = _wide(grad, x, coefficient)
    neighbour = index.long().clamp(0, max(index.shape[1] - 1, 0))
    inner = wide_grad
    to_gain = to_shift = None
    if activation == "relu":
        inner = inner.masked_fill(y <= 0, 0)
    elif activation == "layer_norm":
        assert gain is not None
        channels = max(grad.shape[-1], 1)
        to_gain, to_shift = (inner * normed).sum((0, 1)), inner.sum((0, 1))
        inner = inner * gain.to(inner.dtype)
        along = (inner * normed).sum(-1, keepdim=True) / channels
        inner = (inner - inner.sum(-1, keepdim=True) / channels - normed * along) * inverse.unsqueeze(-1)
    grad_x, grad_coefficient = x.new_empty(0), coefficient.new_empty(0)
    if need_x:
        grad_x = _propagate(inner, neighbour, share, undirected, True).to(x.dtype)
    if need_coefficient:
        batch, nodes, k = index.shape
        block = _row_block(wide_x, k)
        grad_coefficient = coefficient.new_zeros(coefficient.shape)
        for b in range(batch):
            for first in range(0, nodes, block):
                rows = slice(first, first + block)
                near = neighbour[b, rows]
                dot = (wide_x[b][near] @ inner[b, rows].unsqueeze(-1)).squeeze(-1)
                if undirected:
                    dot = dot + (inner[b][near] @ wide_x[b, rows].unsqueeze(-1)).squeeze(-1)
                grad_coefficient[b, rows] = dot.to(coefficient.dtype)
    parameters = (
        grad.new_empty(0) if like is None or value is None or not need_parameters else value.to(like.dtype)
        for like, value in ((bias, inner.sum((0, 1))), (gain, to_gain), (shift, to_shift))
    )
    grad_bias, grad_gain, grad_shift = parameters
    return grad_x, grad_coefficient, grad_bias, grad_gain, grad_shift
