# SPDX-License-Identifier: Apache-2.0
"""Propagation, then bias, then ReLU or LayerNorm, in one launch (arXiv 2604.02010, Eq. 9).

Forward is one launch: the sums of ``graph_propagate``. A program that holds whole rows normalises them before it
writes. Rows wider than a program take a second launch. Small graphs in half precision may be multiplied by a dense
matrix instead (``graph_layer_dense.py``), in two launches, or three with LayerNorm.

Backward is two launches. The first leads the gradient through LayerNorm or ReLU, and adds up chunks of rows for the
parameters. The second is the backward of ``graph_propagate``, and some of its programs add the chunks in ascending
order. Wide rows and undirected graphs take more launches.

LayerNorm keeps its input in float32, whatever the dtype of the features, and each row's mean and rstd. A gradient that
comes in bfloat16 goes on in bfloat16, others in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels import graph_layer_dense
from drseg_kernels._launch import Tile, ceil_div, known_device, on_device_of, sizes_of
from drseg_kernels.csc import csc as columns_of
from drseg_kernels.degree_normalize import at_both_ends
from drseg_kernels.graph_propagate import edge_dot, empty_gradients, gathered_gradients, gathered_sum, graph_propagate

# chunks of rows whose contributions to the gradients of the parameters are summed apart: enough to fill a device
_MOST_CHUNKS = 1024
_SMALLEST_CHUNK = 8

ACTIVATIONS = ("none", "relu", "layer_norm")


@triton.jit(do_not_specialize=["nodes", "slots"])
def _graph_layer_fwd_kernel(
    x_ptr,
    index_ptr,
    coefficient_ptr,
    scale_ptr,
    indptr_ptr,
    perm_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    given_ptr,
    mean_ptr,
    rstd_ptr,
    nodes,
    slots,
    channels,
    eps,
    UNDIRECTED: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some channels of one node of y (B * N, channels); UNDIRECTED follows its edges in both directions; SCALED
    multiplies a coefficient by the scales (B * N,) of both ends of its edge.

    For ``layer_norm`` the program holds all channels; KEEP writes what it normalises, and the row's mean and rstd.
    """
    node = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = c < channels
    total = gathered_sum(
        x_ptr,
        index_ptr,
        coefficient_ptr,
        scale_ptr,
        indptr_ptr,
        perm_ptr,
        node,
        nodes,
        slots,
        channels,
        c,
        False,
        SCALED,
        BLOCK_M,
        BLOCK_N,
    )
    if UNDIRECTED:
        total += gathered_sum(
            x_ptr,
            index_ptr,
            coefficient_ptr,
            scale_ptr,
            indptr_ptr,
            perm_ptr,
            node,
            nodes,
            slots,
            channels,
            c,
            True,
            SCALED,
            BLOCK_M,
            BLOCK_N,
        )
    if SCALED:
        total *= tl.load(scale_ptr + node)
    at = node.to(tl.int64) * channels + c
    if BIAS:
        total += tl.load(bias_ptr + c, mask=channel, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        # written so that NaN passes
        total = tl.where(total < 0.0, 0.0, total)
    if ACTIVATION == "layer_norm":
        if KEEP:
            tl.store(given_ptr + at, total, mask=channel)
        # a coefficient that is not finite makes NaN of the channels beyond the last
        total = tl.where(channel, total, 0.0)
        share = 1.0 / channels
        mean = tl.sum(total, axis=0) * share
        total = tl.where(channel, total - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(total * total, axis=0) * share + eps)
        total = total * rstd
        if KEEP:
            tl.store(mean_ptr + node, mean)
            tl.store(rstd_ptr + node, rstd)
        weight = tl.load(norm_weight_ptr + c, mask=channel, other=0.0).to(tl.float32)
        total = total * weight + tl.load(norm_bias_ptr + c, mask=channel, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total, mask=channel)


@triton.jit
def _graph_layer_fwd_kernel_norm(
    given_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, channels, eps, BLOCK_N: tl.constexpr
):
    """LayerNorm of one row that no program holds."""
    node = tl.program_id(0).to(tl.int64)
    at = node * channels
    # divided once: the compiler calls a function for it, and keeps few values across a call
    share = 1.0 / channels
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, channels, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        total += tl.load(given_ptr + at + c, mask=c < channels, other=0.0)
    mean = tl.sum(total, axis=0) * share
    square = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, channels, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        delta = tl.where(c < channels, tl.load(given_ptr + at + c, mask=c < channels, other=0.0) - mean, 0.0)
        square += delta * delta
    rstd = tl.rsqrt(tl.sum(square, axis=0) * share + eps)
    tl.store(mean_ptr + node, mean)
    tl.store(rstd_ptr + node, rstd)
    for start in range(0, channels, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        channel = c < channels
        normed = (tl.load(given_ptr + at + c, mask=channel, other=0.0) - mean) * rstd
        weight = tl.load(norm_weight_ptr + c, mask=channel, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias_ptr + c, mask=channel, other=0.0).to(tl.float32)
        tl.store(y_ptr + at + c, normed * weight + bias, mask=channel)


@triton.jit
def _graph_layer_bwd_kernel_moments(
    grad_ptr, given_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, moment_ptr, channels, BLOCK_N: tl.constexpr
):
    """moment (B * N, 2) of a row that no program holds: means of its gradient, plain and times the normalised row."""
    node = tl.program_id(0).to(tl.int64)
    mean, rstd = tl.load(mean_ptr + node), tl.load(rstd_ptr + node)
    share = 1.0 / channels
    plain = tl.zeros((BLOCK_N,), tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, channels, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        channel = c < channels
        grad = tl.load(grad_ptr + node * channels + c, mask=channel, other=0.0).to(tl.float32)
        grad *= tl.load(norm_weight_ptr + c, mask=channel, other=0.0).to(tl.float32)
        plain += grad
        along += grad * ((tl.load(given_ptr + node * channels + c, mask=channel, other=0.0) - mean) * rstd)
    tl.store(moment_ptr + node * 2, tl.sum(plain, axis=0) * share)
    tl.store(moment_ptr + node * 2 + 1, tl.sum(along, axis=0) * share)


@triton.jit(do_not_specialize=["rows", "nodes", "chunk", "image_stride"])
def _graph_layer_bwd_kernel_activation(
    grad_ptr,
    y_ptr,
    given_ptr,
    mean_ptr,
    rstd_ptr,
    moment_ptr,
    norm_weight_ptr,
    inner_ptr,
    part_ptr,
    rows,
    nodes,
    chunk,
    channels,
    image_stride,
    plane_stride,
    ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr,
    WHOLE: tl.constexpr,
    NEED_INNER: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some channels of a chunk of rows: inner (rows, channels), the gradient before the activation; and in part
    (chunks, 3, channels) the chunk's contributions to the gradients of bias, norm_weight and norm_bias.

    WHOLE: a program holds whole rows; otherwise LayerNorm takes their ``moment``. PLANES: grad lies as the map (B,
    channels, N) of which it is the gradient.
    """
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = c < channels
    begin = tl.program_id(0).to(tl.int64) * chunk
    share = 1.0 / channels
    to_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    to_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    to_shift = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, chunk, BLOCK_M):
        place = step + tl.arange(0, BLOCK_M)
        node = begin + place
        row = (place < chunk) & (node < rows)
        both = row[:, None] & channel[None, :]
        at = (node * channels)[:, None] + c[None, :]
        if PLANES:
            image = node // nodes
            begins = image * image_stride + (node - image * nodes)
            from_map = begins[:, None] + (c.to(tl.int64) * plane_stride)[None, :]
            grad = tl.load(grad_ptr + from_map, mask=both, other=0.0).to(tl.float32)
        else:
            grad = tl.load(grad_ptr + at, mask=both, other=0.0).to(tl.float32)
        if ACTIVATION == "relu":
            # NaN is not off
            grad = tl.where(tl.load(y_ptr + at, mask=both, other=0.0).to(tl.float32) <= 0.0, 0.0, grad)
        if ACTIVATION == "layer_norm":
            mean = tl.load(mean_ptr + node, mask=row, other=0.0)
            rstd = tl.load(rstd_ptr + node, mask=row, other=0.0)
            normed = (tl.load(given_ptr + at, mask=both, other=0.0) - mean[:, None]) * rstd[:, None]
            to_shift += grad
            to_weight += grad * normed
            grad *= tl.load(norm_weight_ptr + c, mask=channel, other=0.0).to(tl.float32)[None, :]
            if WHOLE:
                plain = tl.sum(grad, axis=1) * share
                # what lies beyond the last channel is minus the mean, and has no gradient
                along = tl.sum(grad * normed, axis=1) * share
            else:
                plain = tl.load(moment_ptr + node * 2, mask=row, other=0.0)
                along = tl.load(moment_ptr + node * 2 + 1, mask=row, other=0.0)
            grad = (grad - plain[:, None] - normed * along[:, None]) * rstd[:, None]
            # a row's mean is no gradient of channels beyond the last
            grad = tl.where(both, grad, 0.0)
        if NEED_INNER:
            tl.store(inner_ptr + at, grad, mask=both)
        to_bias += grad
    if NEED_PARAMETERS:
        part = part_ptr + tl.program_id(0).to(tl.int64) * 3 * channels
        tl.store(part + c, tl.sum(to_bias, axis=0), mask=channel)
        if ACTIVATION == "layer_norm":
            tl.store(part + channels + c, tl.sum(to_weight, axis=0), mask=channel)
            tl.store(part + 2 * channels + c, tl.sum(to_shift, axis=0), mask=channel)


@triton.jit
def sum_of_chunks(
    part_ptr,
    grad_bias_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    program,
    chunks,
    channels,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some channels of one of the gradients (channels,) of the parameters: part (chunks, 3, channels) over chunks."""
    program = program.to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_N)
    which = program // blocks
    c = (program - which * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = c < channels
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, chunks, BLOCK_M):
        r = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        both = (r < chunks)[:, None] & channel[None, :]
        total += tl.load(part_ptr + ((r * 3 + which) * channels)[:, None] + c[None, :], mask=both, other=0.0)
    value = tl.sum(total, axis=0)
    if which == 0:
        if BIAS:
            tl.store(grad_bias_ptr + c, value, mask=channel)
    elif which == 1:
        tl.store(grad_norm_weight_ptr + c, value, mask=channel)
    else:
        tl.store(grad_norm_bias_ptr + c, value, mask=channel)


@triton.jit(do_not_specialize=["chunks"])
def _graph_layer_bwd_kernel_sum(
    part_ptr,
    grad_bias_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    chunks,
    channels,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``sum_of_chunks`` as a launch of its own."""
    sum_of_chunks(
        part_ptr,
        grad_bias_ptr,
        grad_norm_weight_ptr,
        grad_norm_bias_ptr,
        tl.program_id(0),
        chunks,
        channels,
        BIAS,
        BLOCK_M,
        BLOCK_N,
    )


@triton.jit(do_not_specialize=["nodes", "slots", "sums", "chunks"])
def _graph_layer_bwd_kernel_edges(
    inner_ptr,
    x_ptr,
    coefficient_ptr,
    scale_ptr,
    indptr_ptr,
    perm_ptr,
    grad_x_ptr,
    dot_ptr,
    added_ptr,
    part_ptr,
    grad_bias_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    nodes,
    slots,
    channels,
    sums,
    chunks,
    NEED_X: tl.constexpr,
    NEED_DOT: tl.constexpr,
    ADDED: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first ``sums`` programs: ``sum_of_chunks``. Every other: the gradients of ``graph_propagate`` at a node."""
    program = tl.program_id(0)
    if program < sums:
        sum_of_chunks(
            part_ptr,
            grad_bias_ptr,
            grad_norm_weight_ptr,
            grad_norm_bias_ptr,
            program,
            chunks,
            channels,
            BIAS,
            BLOCK_M,
            BLOCK_N,
        )
    else:
        # the columns of the graph say all about it
        gathered_gradients(
            inner_ptr,
            x_ptr,
            perm_ptr,
            coefficient_ptr,
            scale_ptr,
            indptr_ptr,
            perm_ptr,
            grad_x_ptr,
            dot_ptr,
            added_ptr,
            program - sums,
            nodes,
            slots,
            channels,
            False,
            NEED_X,
            NEED_DOT,
            ADDED,
            SCALED,
            BLOCK_M,
            BLOCK_N,
        )


def graph_layer(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    eps: float,
    undirected: bool,
    keep: bool,
    csc: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    dense: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B, N, C), and what LayerNorm's backward needs, in float32.

    Args:
        x: (B, N, C) float32, float16 or bfloat16. coefficient: (B, N, K), any of these.
        index: (B, N, K) int32 or int64, clamped into [0, N).
        bias: (C,) or None. norm_weight, norm_bias: (C,) for ``layer_norm``, None otherwise.
        activation: one of ``ACTIVATIONS``. eps: of LayerNorm.
        undirected: add the sums over the reversed edges.
        keep: return what LayerNorm was given (B, N, C), and the mean and rstd of its rows (B, N); empty otherwise.
        csc: columns of the graph; made here where they are needed and None.
        scale: (B, N) float32, of both ends of an edge, by which its coefficient is multiplied; None multiplies nothing.
        dtype: of the output, by default that of ``x``.
        tile: sizes of a program; by default those of the architecture's table, then a rule.
        dense: multiply by a dense matrix of coefficients, for half precision in one direction; None where it pays.
    """
    batch, nodes, slots = index.shape
    channels = x.shape[-1]
    norm = activation == "layer_norm"
    device = known_device(x.device)
    if dense is None:
        dense = tile is None and graph_layer_dense.pays(device, x, slots, undirected)
    if dense:
        chosen = graph_layer_dense.norm_sizes(channels)
    else:
        chosen = tile or sizes_of("graph_layer", x.device, x.dtype, nodes, slots, channels)
    # a second launch normalises rows that no program holds
    wide = norm and (dense or channels > chosen.block_n)
    keeps = norm and (keep or wide)
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    given = torch.empty(x.shape if keeps else (0,), dtype=torch.float32, device=x.device)
    mean, rstd = (given.new_empty(x.shape[:2] if keeps else (0,)) for _ in range(2))
    if y.numel() == 0:
        return y, given, mean.zero_(), rstd.zero_()
    near = index.contiguous()
    # what a kernel does not ask for is never read or written
    parameters = [y if value is None else value.contiguous() for value in (bias, norm_weight, norm_bias)]
    with on_device_of(x):
        features = x.contiguous()
        # those that are not final stay in float32
        sums = given if wide else y
        if dense:
            graph = (near, coefficient.contiguous(), scale, None if bias is None else parameters[0])
            graph_layer_dense.dense_sums(features, *graph, sums, activation == "relu", device)
        else:
            indptr, perm = (csc or columns_of(index)) if undirected else (near, near)
            _graph_layer_fwd_kernel[(batch * nodes, ceil_div(channels, chosen.block_n))](
                features,
                near,
                coefficient.contiguous(),
                near if scale is None else scale,
                indptr,
                perm,
                *parameters,
                sums,
                given,
                mean,
                rstd,
                nodes,
                slots,
                channels,
                eps,
                UNDIRECTED=undirected,
                SCALED=scale is not None,
                BIAS=bias is not None,
                ACTIVATION="none" if wide else activation,
                KEEP=keeps and not wide,
                **chosen.constants(),
                **chosen.options(limit_registers=True),
            )
        if wide:
            asked = ("graph_layer_rows", x.device, x.dtype, nodes, slots, channels)
            rows = chosen if dense else sizes_of(*asked)
            _graph_layer_fwd_kernel_norm[(batch * nodes,)](
                given,
                mean,
                rstd,
                *parameters[1:],
                y,
                channels,
                eps,
                BLOCK_N=rows.block_n,
                **rows.options(limit_registers=True),
            )
    if wide and not keep:
        given, mean, rstd = (value.new_empty(0) for value in (given, mean, rstd))
    return y, given, mean, rstd


def rows_of_planes(tile: Tile) -> Tile:
    """Sizes for a gradient that lies as a map: so many rows that a plane is read in pieces of 32 bytes."""
    rows = max(8, tile.block_m)
    return dataclasses.replace(tile, block_m=rows, num_warps=min(8, tile.num_warps * rows // tile.block_m))


def _through_activation(
    grad: Tensor,
    y: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    norm_weight: Tensor | None,
    activation: str,
    wants_inner: bool,
    wants_parameters: bool,
    tile: Tile | None,
) -> tuple[Tensor, Tensor]:
    """The gradient before the activation, and sums of its chunks of rows (chunks, 3, C); empty where not needed."""
    nodes, channels = grad.shape[1:]
    rows = grad.numel() // channels
    norm = activation == "layer_norm"
    # ReLU passes a gradient as it is or not at all; LayerNorm's could leave the range of float16
    wide = norm and grad.dtype != torch.bfloat16
    inner = torch.empty(grad.shape, dtype=torch.float32 if wide else grad.dtype, device=grad.device)
    chosen = tile or sizes_of("graph_layer_rows", grad.device, grad.dtype, nodes, 1, channels)
    whole = channels <= chosen.block_n
    planes = whole and grad.stride(1) == 1 and channels > 1 and not grad.is_contiguous()
    if planes:
        chosen = rows_of_planes(chosen)
    else:
        grad = grad.contiguous()
    chunk = max(_SMALLEST_CHUNK, ceil_div(rows, _MOST_CHUNKS))
    chunks, blocks = ceil_div(rows, chunk), ceil_div(channels, chosen.block_n)
    part = torch.empty(chunks if wants_parameters else 0, 3, channels, dtype=torch.float32, device=grad.device)
    moment = saved[1]
    weight = grad if norm_weight is None else norm_weight.contiguous()
    options = chosen.options(limit_registers=True)
    with on_device_of(grad):
        if norm and not whole:
            moment = torch.empty(rows, 2, dtype=torch.float32, device=grad.device)
            _graph_layer_bwd_kernel_moments[(rows,)](
                grad, *saved, weight, moment, channels, BLOCK_N=chosen.block_n, **options
            )
        _graph_layer_bwd_kernel_activation[(chunks, blocks)](
            grad,
            y,
            *saved,
            moment,
            weight,
            inner,
            part,
            rows,
            nodes,
            chunk,
            channels,
            grad.stride(0),
            grad.stride(2),
            ACTIVATION=activation,
            PLANES=planes,
            WHOLE=whole,
            NEED_INNER=wants_inner,
            NEED_PARAMETERS=wants_parameters,
            **chosen.constants(),
            **options,
        )
    return inner, part


Parameters = tuple[Tensor | None, Tensor | None, Tensor | None]


def _before_activation(
    grad: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    parameters: Parameters,
    activation: str,
    wants_inner: bool,
    wants_parameters: bool,
    rows: Tile | None,
) -> tuple[Tensor, Tensor]:
    """The gradient before the activation, contiguous, and contributions to those of the parameters (chunks, 3, C)."""
    through = wants_inner and activation != "none"
    inner, part = grad, grad.new_empty(0)
    if wants_parameters or through:
        given = (grad, saved[0], saved[1:], parameters[1])
        inner, part = _through_activation(*given, activation, through, wants_parameters, rows)
    return inner if through else grad.contiguous(), part


def _like_parameters(grad: Tensor, parameters: Parameters, wanted: bool) -> list[Tensor]:
    like: dict[str, Any] = {"memory_format": torch.contiguous_format}
    return [
        grad.new_empty(0) if value is None or not wanted else torch.empty_like(value, **like) for value in parameters
    ]


def _sums_of(part: Tensor, activation: str, sizes: Tile) -> int:
    """How many programs add up the chunks of the parameters' gradients; none where they are not asked for."""
    return 0 if len(part) == 0 else ceil_div(part.shape[-1], sizes.block_n) * (3 if activation == "layer_norm" else 1)


def _add_up(part: Tensor, found: list[Tensor], bias: bool, activation: str, grad: Tensor, rows: Tile | None) -> None:
    """The gradients of the parameters from the contributions of the chunks of ``grad``."""
    if len(part) == 0:
        return
    nodes, channels = grad.shape[1:]
    sizes = rows or sizes_of("graph_layer_rows", grad.device, grad.dtype, nodes, 1, channels)
    with on_device_of(part):
        _graph_layer_bwd_kernel_sum[(_sums_of(part, activation, sizes),)](
            part,
            *found,
            len(part),
            channels,
            BIAS=bias,
            **sizes.constants(),
            **sizes.options(limit_registers=True),
        )


def before_activation(
    grad: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    parameters: Parameters,
    activation: str,
    wants_inner: bool,
    wants_parameters: bool,
) -> tuple[Tensor, ...]:
    """The gradient to the sums over edges, contiguous, and those to ``bias``, ``norm_weight`` and ``norm_bias``.

    For a backend that has kernels for the edges alone. Arguments as in ``graph_layer_backward``, of which ``saved`` has
    ``y``, ``given``, ``mean`` and ``rstd``; what is not wanted is empty, or not what it is called.
    """
    inner, part = _before_activation(grad, saved, parameters, activation, wants_inner, wants_parameters, None)
    found = _like_parameters(grad, parameters, wants_parameters)
    _add_up(part, found, parameters[0] is not None, activation, grad, None)
    return inner, *found


def graph_layer_backward(
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
    added: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    tile: Tile | None = None,
    rows: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to ``x``, ``coefficient``, ``bias``, ``norm_weight`` and ``norm_bias`` in their dtypes.

    Args:
        grad: (B, N, C), of ``y``.
        y: the output, read for ``relu``. given, mean, rstd: as returned for ``layer_norm``, otherwise unused.
        output_mask: which gradients to compute; the others are empty, those of the parameters if none of them is asked.
        added: shape of ``coefficient``, what its gradient is added to; None adds nothing.
        scale: as in the forward; none of the gradients goes through it.
        tile: sizes for the propagation. rows: sizes for what goes by rows. The other arguments as in the forward.
    """
    parameters = (bias, norm_weight, norm_bias)
    wants_x, wants_coefficient = output_mask[:2]
    wants_inner = wants_x or wants_coefficient
    wants_parameters = any(output_mask[2:]) and any(value is not None for value in parameters)
    if grad.numel() == 0:
        needed = (wants_x, wants_coefficient, *(wants_parameters,) * 3)
        zeros = [
            torch.zeros_like(value.contiguous()) if need and value is not None else grad.new_empty(0)
            for value, need in zip((x, coefficient, *parameters), needed, strict=True)
        ]
        if added is not None and wants_coefficient:
            zeros[1] += added
        return tuple(zeros)  # type: ignore[return-value]
    nodes, slots = index.shape[1:]
    channels, count = grad.shape[-1], grad.numel() // grad.shape[-1]
    chosen = tile or sizes_of("graph_gradients", x.device, x.dtype, nodes, slots, channels)
    together = wants_inner and not undirected and channels <= chosen.block_n
    saved = (y, given, mean, rstd)
    inner, part = _before_activation(grad, saved, parameters, activation, wants_inner, wants_parameters, rows)
    found = _like_parameters(grad, parameters, wants_parameters)
    grad_x, grad_coefficient = empty_gradients(x, coefficient, output_mask)
    if together:
        sums = _sums_of(part, activation, chosen)
        with on_device_of(x):
            _graph_layer_bwd_kernel_edges[(sums + count,)](
                inner,
                x.contiguous(),
                coefficient.contiguous(),
                coefficient if scale is None else scale,
                *(csc or columns_of(index)),
                grad_x,
                grad_coefficient,
                grad_coefficient if added is None else added.contiguous(),
                part,
                *found,
                nodes,
                slots,
                channels,
                sums,
                len(part),
                NEED_X=wants_x,
                NEED_DOT=wants_coefficient,
                ADDED=added is not None,
                SCALED=scale is not None,
                BIAS=bias is not None,
                **chosen.constants(),
                **chosen.options(limit_registers=True),
            )
        return grad_x, grad_coefficient, *found  # type: ignore[return-value]
    _add_up(part, found, bias is not None, activation, grad, rows)
    complete = coefficient
    if scale is not None and wants_inner:
        complete = at_both_ends(coefficient, index, scale)
    if wants_x and undirected:
        # the operator is its own transpose
        options: dict[str, Any] = {"dtype": x.dtype, "tile": tile}
        grad_x = graph_layer(inner, index, complete, None, None, None, "none", 0.0, True, False, csc, **options)[0]
    elif wants_x:
        grad_x = graph_propagate(inner, index, complete, True, csc, dtype=x.dtype, tile=tile)
    if wants_coefficient:
        grad_coefficient = edge_dot(inner, x, index, complete.dtype, undirected, tile=tile)
        if scale is not None:
            grad_coefficient = at_both_ends(grad_coefficient, index, scale).to(coefficient.dtype)
        if added is not None:
            grad_coefficient += added
    return grad_x, grad_coefficient, *found  # type: ignore[return-value]
