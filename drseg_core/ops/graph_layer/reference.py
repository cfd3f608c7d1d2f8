# SPDX-License-Identifier: Apache-2.0
"""What ``graph_layer`` means: ``graph_propagate``, bias, activation; so of any backend that has the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from drseg_core.ops.graph_propagate import reference as graph_propagate

Run = Callable[..., tuple[Tensor, ...]]


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(wide) for tensor in tensors)


def _to(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def at_both_ends(value: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """Values (B, N, K) of edges times the scales (B, N) of both of their ends, in the wider dtype of the two."""
    neighbour = index.long().clamp(0, torch.sym_max(index.shape[1] - 1, 0))
    return value * scale[:, :, None] * scale.gather(1, neighbour.flatten(1)).view(neighbour.shape)


def compose(propagate: tuple[Callable[..., Tensor], Run]) -> tuple[Run, Run]:
    """Forward and backward from those of ``graph_propagate``; what follows is that of the library."""
    run, run_backward = propagate

    def forward(
        x: Tensor,
        index: Tensor,
        coefficient: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        activation: str,
        eps: float,
        undirected: bool,
        keep: bool = True,
        csc: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Propagation, bias and activation, accumulated in float32 or wider; the output is in ``x``'s dtype.

        Args:
            x: (B, N, C). index: (B, N, K). coefficient: (B, N, K). bias, norm_weight, norm_bias: (C,) or None.
            activation: ``none``, ``relu`` or ``layer_norm``. eps: of LayerNorm.
            undirected: add the sums over the reversed edges.
            keep: return what the backward of LayerNorm needs.
            csc: ``indptr`` and ``perm`` of the graph's columns, if they are known.

        Returns:
            The output; for LayerNorm what it was given (B, N, C), and mean and rstd of its rows (B, N), else empty.
        """
        wide_x, share = _wide(x, coefficient)
        y = run(wide_x, index, share, False, csc)
        if undirected:
            y = y + run(wide_x, index, share, True, csc)
        if bias is not None:
            y = y + bias.to(y.dtype)
        given, mean, rstd = (y.new_empty(0) for _ in range(3))
        if activation == "relu":
            y = y.relu()
        elif activation == "layer_norm":
            weight, bias = _to(y.dtype, norm_weight, norm_bias)
            normed, *moments = torch.native_layer_norm(y, y.shape[-1:], weight, bias, eps)
            if keep:
                given, mean, rstd = y, *(value.view(y.shape[:2]) for value in moments)
            y = normed
        return y.to(x.dtype), given, mean, rstd

    def backward(
        grad: Tensor,
        x: Tensor,
        index: Tensor,
        coefficient: Tensor,
        y: Tensor,
        given: Tensor,
        mean: Tensor,
        rstd: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        activation: str,
        undirected: bool,
        output_mask: Sequence[bool],
        csc: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Gradients to ``x``, ``coefficient``, ``bias``, ``norm_weight`` and ``norm_bias`` in their dtypes.

        ReLU's mask comes from its output ``y``. One whose ``output_mask`` is False may be anything.
        """
        inputs = (x, coefficient, bias, norm_weight, norm_bias)
        # sums in one order, however the gradient lies in memory
        inner, wide_x, share = _wide(grad.contiguous(), x, coefficient)
        found: list[Tensor | None] = [None] * 5
        if activation == "relu":
            inner = torch.ops.aten.threshold_backward(inner, y.to(inner.dtype), 0)
        elif activation == "layer_norm":
            moments = [value.unsqueeze(-1) for value in (mean, rstd)]
            # the library's sums over the rows depend on the number of threads
            if output_mask[3]:
                found[3] = ((given - moments[0]) * moments[1] * inner).sum((0, 1))
            if output_mask[4]:
                found[4] = inner.sum((0, 1))
            if any(output_mask[:3]):
                parameters = _to(inner.dtype, norm_weight, norm_bias)
                inner = torch.ops.aten.native_layer_norm_backward(
                    inner, given, given.shape[-1:], *moments, *parameters, [True, False, False]
                )[0]
        if output_mask[2]:
            found[2] = inner.sum((0, 1))
        for transpose in (False, True) if undirected else (False,):
            grads = run_backward(inner, wide_x, index, share, transpose, output_mask[:2], csc)
            for place in (0, 1):
                before = found[place]
                found[place] = grads[place] if before is None else before + grads[place]
        return tuple(
            x.new_empty(0) if like is None or value is None else value.to(like.dtype)
            for value, like in zip(found, inputs, strict=True)
        )

    return forward, backward


graph_layer, graph_layer_backward = compose((graph_propagate.graph_propagate, graph_propagate.graph_propagate_backward))
