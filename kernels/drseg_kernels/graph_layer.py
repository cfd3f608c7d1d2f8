# SPDX-License-Identifier: Apache-2.0
"""Propagation with what follows it in one launch: bias, then ReLU or LayerNorm (arXiv 2604.02010, Eq. 9).

Forward, one launch: the sums of ``graph_propagate`` by any of its strategies; a program that holds whole rows
normalises them before it writes. Rows that are wider than a program take a second launch. Backward: one launch leads
the gradient through LayerNorm or ReLU and adds up chunks of rows for bias, gain and shift, one adds the chunks in
ascending order, and the rest is the backward of ``graph_propagate``.

LayerNorm keeps its normalised rows for the backward in float32, whatever the dtype of the features.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._launch import on_device_of
from drseg_kernels._reverse import reverse_lists
from drseg_kernels._tile import Tile, options, tile_of
from drseg_kernels.graph_propagate import (
    dense_constants,
    dense_sum,
    edge_dot,
    gathered_sum,
    graph_propagate,
    group_of,
    groups_of,
)

# chunks of rows whose contributions to the gradients of the parameters are summed apart: enough to fill a device
_MOST_CHUNKS = 1024
_SMALLEST_CHUNK = 8

ACTIVATIONS = ("none", "relu", "layer_norm")


@triton.jit
def _finish(
    total,
    node,
    row,
    c,
    bias_ptr,
    gain_ptr,
    shift_ptr,
    y_ptr,
    normed_ptr,
    inverse_ptr,
    channels,
    eps,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Write channels ``c`` of y for nodes ``node`` (int64, where ``row``) from their sums ``total``.

    For ``layer_norm`` all channels of a row are there; KEEP writes the normalised rows and their inverse deviations.
    """
    channel = c < channels
    both = row[:, None] & channel[None, :]
    at = (node * channels)[:, None] + c[None, :]
    if BIAS:
        total += tl.load(bias_ptr + c, mask=channel, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        # written so that NaN passes
        total = tl.where(total < 0.0, 0.0, total)
    if ACTIVATION == "layer_norm":
        # a coefficient that is not finite makes NaN of the channels beyond the last
        total = tl.where(channel[None, :], total, 0.0)
        share = 1.0 / channels
        mean = tl.sum(total, axis=1) * share
        total = tl.where(channel[None, :], total - mean[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(total * total, axis=1) * share + eps)
        total = total * inverse[:, None]
        if KEEP:
            tl.store(normed_ptr + at, total, mask=both)
            tl.store(inverse_ptr + node, inverse, mask=row)
        gain = tl.load(gain_ptr + c, mask=channel, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + c, mask=channel, other=0.0).to(tl.float32)
        total = total * gain[None, :] + shift[None, :]
    tl.store(y_ptr + at, total, mask=both)


@triton.jit(do_not_specialize=["nodes", "slots"])
def _graph_layer_fwd_kernel_gathered(
    x_ptr,
    index_ptr,
    coefficient_ptr,
    begin_ptr,
    edge_ptr,
    bias_ptr,
    gain_ptr,
    shift_ptr,
    y_ptr,
    normed_ptr,
    inverse_ptr,
    nodes,
    slots,
    channels,
    eps,
    UNDIRECTED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some channels of one node of y (B * N, channels); UNDIRECTED follows its edges in both directions."""
    node = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = gathered_sum(
        x_ptr,
        index_ptr,
        coefficient_ptr,
        begin_ptr,
        edge_ptr,
        node,
        nodes,
        slots,
        channels,
        c,
        False,
        ROWS,
        COLUMNS,
    )
    if UNDIRECTED:
        total += gathered_sum(
            x_ptr,
            index_ptr,
            coefficient_ptr,
            begin_ptr,
            edge_ptr,
            node,
            nodes,
            slots,
            channels,
            c,
            True,
            ROWS,
            COLUMNS,
        )
    one = tl.arange(0, 1)
    _finish(
        total[None, :],
        node.to(tl.int64) + one,
        one == 0,
        c,
        bias_ptr,
        gain_ptr,
        shift_ptr,
        y_ptr,
        normed_ptr,
        inverse_ptr,
        channels,
        eps,
        BIAS,
        ACTIVATION,
        KEEP,
    )


@triton.jit(do_not_specialize=["nodes", "slots", "groups"])
def _graph_layer_fwd_kernel_densified(
    x_ptr,
    index_ptr,
    coefficient_ptr,
    member_ptr,
    begin_ptr,
    count_ptr,
    union_ptr,
    incoming_begin_ptr,
    incoming_count_ptr,
    incoming_ptr,
    bias_ptr,
    gain_ptr,
    shift_ptr,
    y_ptr,
    normed_ptr,
    inverse_ptr,
    nodes,
    slots,
    channels,
    groups,
    eps,
    UNDIRECTED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    UNION: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """Some channels of ROWS nodes of y (B * N, channels), in ``groups`` of a sample; UNDIRECTED follows their edges in
    both directions."""
    program = tl.program_id(0)
    sample, r = group_of(member_ptr, program, nodes, groups, UNION, ROWS)
    base = sample * nodes
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = dense_sum(
        x_ptr,
        index_ptr,
        coefficient_ptr,
        begin_ptr,
        count_ptr,
        union_ptr,
        program,
        base,
        r,
        c,
        nodes,
        slots,
        channels,
        False,
        UNION,
        PARTS,
        INTERPRETED,
        SLOTS,
        ROWS,
        COLUMNS,
        SOURCES,
    )
    if UNDIRECTED:
        total += dense_sum(
            x_ptr,
            index_ptr,
            coefficient_ptr,
            incoming_begin_ptr,
            incoming_count_ptr,
            incoming_ptr,
            program,
            base,
            r,
            c,
            nodes,
            slots,
            channels,
            True,
            UNION,
            PARTS,
            INTERPRETED,
            SLOTS,
            ROWS,
            COLUMNS,
            SOURCES,
        )
    _finish(
        total,
        base + r,
        (r >= 0) & (r < nodes),
        c,
        bias_ptr,
        gain_ptr,
        shift_ptr,
        y_ptr,
        normed_ptr,
        inverse_ptr,
        channels,
        eps,
        BIAS,
        ACTIVATION,
        KEEP,
    )


@triton.jit
def _graph_layer_fwd_kernel_norm(
    normed_ptr, inverse_ptr, gain_ptr, shift_ptr, y_ptr, channels, eps, COLUMNS: tl.constexpr
):
    """LayerNorm of one row that no program holds: ``normed`` holds its sums first, its normalised values after."""
    node = tl.program_id(0).to(tl.int64)
    at = node * channels
    # divided once: the compiler calls a function for it, and keeps few values across a call
    share = 1.0 / channels
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, channels, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        total += tl.load(normed_ptr + at + c, mask=c < channels, other=0.0)
    mean = tl.sum(total, axis=0) * share
    square = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, channels, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        delta = tl.where(c < channels, tl.load(normed_ptr + at + c, mask=c < channels, other=0.0) - mean, 0.0)
        square += delta * delta
    inverse = tl.rsqrt(tl.sum(square, axis=0) * share + eps)
    tl.store(inverse_ptr + node, inverse)
    for start in range(0, channels, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        channel = c < channels
        normed = (tl.load(normed_ptr + at + c, mask=channel, other=0.0) - mean) * inverse
        gain = tl.load(gain_ptr + c, mask=channel, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + c, mask=channel, other=0.0).to(tl.float32)
        tl.store(normed_ptr + at + c, normed, mask=channel)
        tl.store(y_ptr + at + c, normed * gain + shift, mask=channel)


@triton.jit
def _graph_layer_bwd_kernel_moments(grad_ptr, normed_ptr, gain_ptr, moment_ptr, channels, COLUMNS: tl.constexpr):
    """moment (B * N, 2) of a row that no program holds: means of its gradient, plain and times the normalised row."""
    node = tl.program_id(0).to(tl.int64)
    share = 1.0 / channels
    plain = tl.zeros((COLUMNS,), tl.float32)
    along = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, channels, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        channel = c < channels
        grad = tl.load(grad_ptr + node * channels + c, mask=channel, other=0.0).to(tl.float32)
        grad *= tl.load(gain_ptr + c, mask=channel, other=0.0).to(tl.float32)
        plain += grad
        along += grad * tl.load(normed_ptr + node * channels + c, mask=channel, other=0.0)
    tl.store(moment_ptr + node * 2, tl.sum(plain, axis=0) * share)
    tl.store(moment_ptr + node * 2 + 1, tl.sum(along, axis=0) * share)


@triton.jit(do_not_specialize=["rows", "chunk"])
def _graph_layer_bwd_kernel_activation(
    grad_ptr,
    y_ptr,
    normed_ptr,
    inverse_ptr,
    moment_ptr,
    gain_ptr,
    inner_ptr,
    part_ptr,
    rows,
    chunk,
    channels,
    ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr,
    NEED_INNER: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some channels of a chunk of rows: inner (rows, channels), the gradient before the activation; and in part
    (chunks, 3, channels) the chunk's contributions to the gradients of bias, gain and shift.

    WHOLE: a program holds whole rows; otherwise LayerNorm takes their ``moment``.
    """
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel = c < channels
    begin = tl.program_id(0).to(tl.int64) * chunk
    share = 1.0 / channels
    to_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    to_gain = tl.zeros((ROWS, COLUMNS), tl.float32)
    to_shift = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, chunk, ROWS):
        place = step + tl.arange(0, ROWS)
        node = begin + place
        row = (place < chunk) & (node < rows)
        both = row[:, None] & channel[None, :]
        at = (node * channels)[:, None] + c[None, :]
        grad = tl.load(grad_ptr + at, mask=both, other=0.0).to(tl.float32)
        if ACTIVATION == "relu":
            # NaN is not off
            grad = tl.where(tl.load(y_ptr + at, mask=both, other=0.0).to(tl.float32) <= 0.0, 0.0, grad)
        if ACTIVATION == "layer_norm":
            normed = tl.load(normed_ptr + at, mask=both, other=0.0)
            to_shift += grad
            to_gain += grad * normed
            grad *= tl.load(gain_ptr + c, mask=channel, other=0.0).to(tl.float32)[None, :]
            if WHOLE:
                plain = tl.sum(grad, axis=1) * share
                along = tl.sum(grad * normed, axis=1) * share
            else:
                plain = tl.load(moment_ptr + node * 2, mask=row, other=0.0)
                along = tl.load(moment_ptr + node * 2 + 1, mask=row, other=0.0)
            inverse = tl.load(inverse_ptr + node, mask=row, other=0.0)
            grad = (grad - plain[:, None] - normed * along[:, None]) * inverse[:, None]
            # a row's mean is no gradient of channels beyond the last
            grad = tl.where(both, grad, 0.0)
        if NEED_INNER:
            tl.store(inner_ptr + at, grad, mask=both)
        to_bias += grad
    if NEED_PARAMETERS:
        part = part_ptr + tl.program_id(0).to(tl.int64) * 3 * channels
        tl.store(part + c, tl.sum(to_bias, axis=0), mask=channel)
        if ACTIVATION == "layer_norm":
            tl.store(part + channels + c, tl.sum(to_gain, axis=0), mask=channel)
            tl.store(part + 2 * channels + c, tl.sum(to_shift, axis=0), mask=channel)


@triton.jit(do_not_specialize=["chunks"])
def _graph_layer_bwd_kernel_sum(
    part_ptr,
    bias_ptr,
    gain_ptr,
    shift_ptr,
    chunks,
    channels,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some channels of one of bias, gain and shift (channels,): the sum of part (chunks, 3, channels) over chunks."""
    which = tl.program_id(1)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    channel = c < channels
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, chunks, ROWS):
        r = (start + tl.arange(0, ROWS)).to(tl.int64)
        both = (r < chunks)[:, None] & channel[None, :]
        total += tl.load(part_ptr + ((r * 3 + which) * channels)[:, None] + c[None, :], mask=both, other=0.0)
    value = tl.sum(total, axis=0)
    if which == 0:
        if BIAS:
            tl.store(bias_ptr + c, value, mask=channel)
    elif which == 1:
        tl.store(gain_ptr + c, value, mask=channel)
    else:
        tl.store(shift_ptr + c, value, mask=channel)


def epilogue(bias: bool, activation: str, keep: bool, undirected: bool) -> dict[str, Any]:
    """Compile-time arguments of the forward kernels beside those of their tile."""
    return {"UNDIRECTED": undirected, "BIAS": bias, "ACTIVATION": activation, "KEEP": keep}


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
    keep: bool,
    *,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, N, C), and what LayerNorm's backward needs, in float32.

    Args:
        x: (B, N, C) float32, float16 or bfloat16. coefficient: (B, N, K), any of these.
        index: (B, N, K) int32 or int64, clamped into [0, N).
        bias: (C,) or None. gain, shift: (C,) for ``layer_norm``, None otherwise.
        activation: one of ``ACTIVATIONS``. eps: of LayerNorm.
        undirected: add the sums over the reversed edges.
        keep: return normalised rows (B, N, C) and inverse deviations (B, N); empty otherwise.
        dtype: of the output, by default that of ``x``.
        tile: strategy and sizes; by default those of the device's table, then a rule.
    """
    batch, nodes, slots = index.shape
    channels = x.shape[-1]
    norm = activation == "layer_norm"
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    chosen = tile or tile_of("graph_layer", x.device, nodes, slots, channels)
    wide = norm and channels > chosen.columns
    wanted = norm and (keep or wide)
    normed = torch.empty(x.shape if wanted else (0,), dtype=torch.float32, device=x.device)
    inverse = torch.empty(x.shape[:2] if wanted else (0,), dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y, normed, inverse.zero_()
    x, coefficient, near = x.contiguous(), coefficient.contiguous(), index.contiguous()
    # what a kernel does not ask for is never read or written
    given = [y if value is None else value.contiguous() for value in (bias, gain, shift)]
    constants = epilogue(bias is not None, "none" if wide else activation, keep and norm and not wide, undirected)
    blocks = triton.cdiv(channels, chosen.columns)
    with on_device_of(x):
        # sums that are not final stay in float32
        out = normed if wide else y
        if chosen.sources and slots:
            dense = dense_constants(x.dtype, False, slots, chosen, not x.is_cuda)
            del dense["TRANSPOSE"]
            groups = groups_of(index, chosen, False)
            incoming = groups_of(index, chosen, True) if undirected else groups
            _graph_layer_fwd_kernel_densified[(batch * groups.count, blocks)](
                x,
                near,
                coefficient,
                *groups.lists[:4],
                *incoming.lists[1:4],
                *given,
                out,
                normed,
                inverse,
                nodes,
                slots,
                channels,
                groups.count,
                eps,
                **constants,
                **dense,
                **options(chosen),
            )
        else:
            begin, edge = near, near
            if undirected:
                reverse = reverse_lists(index)
                begin, edge = reverse.begin, reverse.edge
            _graph_layer_fwd_kernel_gathered[(batch * nodes, blocks)](
                x,
                near,
                coefficient,
                begin,
                edge,
                *given,
                out,
                normed,
                inverse,
                nodes,
                slots,
                channels,
                eps,
                **constants,
                ROWS=chosen.rows,
                COLUMNS=chosen.columns,
                **options(chosen),
            )
        if wide:
            rows = tile_of("graph_layer_rows", x.device, nodes, slots, channels)
            _graph_layer_fwd_kernel_norm[(batch * nodes,)](
                normed,
                inverse,
                given[1],
                given[2],
                y,
                channels,
                eps,
                COLUMNS=rows.columns,
                **options(rows),
            )
    if wide and not keep:
        normed, inverse = normed.new_empty(0), inverse.new_empty(0)
    return y, normed, inverse


def _through_activation(
    grad: Tensor,
    y: Tensor,
    normed: Tensor,
    inverse: Tensor,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None],
    activation: str,
    need_inner: bool,
    need_parameters: bool,
    tile: Tile | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient before the activation, and those of bias, gain and shift in their dtypes; empty where not needed."""
    channels = grad.shape[-1]
    rows = grad.numel() // channels
    norm = activation == "layer_norm"
    # ReLU passes a gradient as it is or not at all; LayerNorm's is not rounded before it is summed
    inner = torch.empty(grad.shape, dtype=torch.float32 if norm else grad.dtype, device=grad.device)
    chosen = tile or tile_of("graph_layer_rows", grad.device, grad.shape[1], 1, channels)
    whole = channels <= chosen.columns
    chunk = max(_SMALLEST_CHUNK, triton.cdiv(rows, _MOST_CHUNKS))
    chunks, blocks = triton.cdiv(rows, chunk), triton.cdiv(channels, chosen.columns)
    part = torch.empty(chunks if need_parameters else 0, 3, channels, dtype=torch.float32, device=grad.device)
    grads = [
        grad.new_empty(0) if value is None or not need_parameters else torch.empty_like(value.contiguous())
        for value in parameters
    ]
    moment = inverse
    gain = grad if parameters[1] is None else parameters[1].contiguous()
    common = options(chosen)
    with on_device_of(grad):
        if norm and not whole:
            moment = torch.empty(rows, 2, dtype=torch.float32, device=grad.device)
            _graph_layer_bwd_kernel_moments[(rows,)](
                grad, normed, gain, moment, channels, COLUMNS=chosen.columns, **common
            )
        _graph_layer_bwd_kernel_activation[(chunks, blocks)](
            grad,
            y,
            normed,
            inverse,
            moment,
            gain,
            inner,
            part,
            rows,
            chunk,
            channels,
            ACTIVATION=activation,
            WHOLE=whole,
            NEED_INNER=need_inner,
            NEED_PARAMETERS=need_parameters,
            **chosen.constants(),
            **common,
        )
        if need_parameters:
            _graph_layer_bwd_kernel_sum[(blocks, 3 if norm else 1)](
                part,
                *grads,
                chunks,
                channels,
                BIAS=parameters[0] is not None,
                **chosen.constants(),
                **common,
            )
    return inner, *grads  # type: ignore[return-value]


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
    *,
    tile: Tile | None = None,
    rows: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to ``x``, ``coefficient``, ``bias``, ``gain`` and ``shift`` in their dtypes; empty where not needed.

    Args:
        grad: (B, N, C), of ``y``.
        y: the output for ``relu``, otherwise unused. normed, inverse: as returned for ``layer_norm``, otherwise unused.
        need_x, need_coefficient, need_parameters: which gradients to compute; bias, gain and shift go together.
        tile: sizes for the propagation. rows: sizes for what goes by rows. The other arguments as in the forward.
    """
    parameters = (bias, gain, shift)
    need_parameters = need_parameters and any(value is not None for value in parameters)
    need_inner = need_x or need_coefficient
    if grad.numel() == 0:
        grads = (x, coefficient, *parameters)
        needed = (need_x, need_coefficient, *(need_parameters,) * 3)
        return tuple(  # type: ignore[return-value]
            torch.zeros_like(value.contiguous()) if need and value is not None else grad.new_empty(0)
            for value, need in zip(grads, needed, strict=True)
        )
    inner = grad = grad.contiguous()
    found = [grad.new_empty(0) for _ in parameters]
    if need_parameters or need_inner and activation != "none":
        inner, *found = _through_activation(
            grad,
            y,
            normed,
            inverse,
            parameters,
            activation,
            need_inner and activation != "none",
            need_parameters,
            rows,
        )
    if activation == "none":
        inner = grad
    to_bias, to_gain, to_shift = found
    grad_x, grad_coefficient = x.new_empty(0), coefficient.new_empty(0)
    if need_x and undirected:
        # the operator is its own transpose
        grad_x = graph_layer(
            inner,
            index,
            coefficient,
            None,
            None,
            None,
            "none",
            eps=0.0,
            undirected=True,
            keep=False,
            dtype=x.dtype,
            tile=tile,
        )[0]
    elif need_x:
        grad_x = graph_propagate(inner, index, coefficient, True, dtype=x.dtype, tile=tile)
    if need_coefficient:
        grad_coefficient = edge_dot(inner, x, index, coefficient.dtype, undirected, tile=tile)
    return grad_x, grad_coefficient, to_bias, to_gain, to_shift
