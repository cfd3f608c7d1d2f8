# SPDX-License-Identifier: Apache-2.0
"""A prior's rows scaled by exact powers of two, and the inverse of their L2 norms, in one pass over memory.

A program is one row. It reads the row twice, the second time from the cache, and writes it once. That is 38 MB for 8 x
576 nodes of 1024 channels. An H100 moves them in 0.015 ms, while the reference's dozen launches take 0.13 (2026-11). A
map (B, D, h, w) is read as it lies, some cells of all channels at a time, and needs no transposed copy. Neither kernel
has been timed yet.

On request it also writes float32 rows rounded to float16, and the length of each row's rounding error. With these a
selection can take products of the rounded rows (``knn_rounded.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._launch import FMA, ceil_div, on_device_of, power_of_two_from

# channels that a program works on at a time, at least and at most
_COLUMNS = (32, 1024)
# nodes of a program that reads planes, 64 bytes of a plane in float32, and channels at a time
PLANES = {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4}


@triton.jit
def power_below(top, broken):
    """The power of two that brings ``top`` near one, by the exponent that frexp gives: subnormal values scale like the
    smallest normal ones, zero not at all, and what is not finite by one half."""
    exponent = tl.minimum(((top.to(tl.int32, bitcast=True) >> 23) & 255) - 126, 126)
    exponent = tl.where(broken, 1, tl.where(top == 0, 0, exponent))
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


# bounds on the rounding of sums of up to 2**13 squares, and of what is made of them
SPARE = tl.constexpr(1.0 + 2.0**-10)


@triton.jit
def lost_share(lost, inverse, broken):
    """Length of what rounding took from a row over the row's own, from above; 0 for a row that counts nowhere."""
    return tl.where(broken, 0.0, tl.sqrt_rn(lost) * inverse * SPARE)


@triton.jit
def _prepare_prior_kernel(
    prior_ptr,
    scaled_ptr,
    inverse_ptr,
    rounded_ptr,
    residual_ptr,
    channels,
    SCALE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``scaled`` (B * N, D) in the prior's dtype and ``inverse`` (B * N,); without SCALE the row is copied. ROUND:
    ``rounded`` (B * N, D) in float16, and ``residual`` (B * N,)."""
    row = tl.program_id(0).to(tl.int64)
    prior_ptr += row * channels
    scaled_ptr += row * channels
    rounded_ptr += row * channels
    largest = tl.zeros((BLOCK_N,), tl.float32)
    broken = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, channels, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        size = tl.abs(tl.load(prior_ptr + column, mask=column < channels, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, size)
        # true of infinity, and of NaN, which compares with nothing
        broken = tl.where(size < float("inf"), broken, 1)
    any_broken = tl.max(broken, axis=0) > 0

    scale = power_below(tl.max(largest, axis=0), any_broken)

    total = tl.zeros((BLOCK_N,), tl.float32)
    lost = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, channels, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        value = tl.load(prior_ptr + column, mask=column < channels, other=0.0)
        if SCALE:
            value = (value.to(tl.float32) * scale).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + column, value, mask=column < channels)
        wide = value.to(tl.float32)
        total += wide * wide
        if ROUND:
            short = wide.to(tl.float16)
            tl.store(rounded_ptr + column, short, mask=column < channels)
            left = wide - short.to(tl.float32)
            lost += left * left
    norm = tl.sqrt_rn(tl.sum(total, axis=0))
    inverse = tl.where(norm > 0, tl.div_rn(1.0, norm), 0.0)
    tl.store(inverse_ptr + row, tl.where(any_broken, float("nan"), inverse))
    if ROUND:
        tl.store(residual_ptr + row, lost_share(tl.sum(lost, axis=0), inverse, any_broken))


@triton.jit(do_not_specialize=["nodes"])
def _prepare_prior_kernel_planes(
    prior_ptr,
    scaled_ptr,
    inverse_ptr,
    rounded_ptr,
    residual_ptr,
    nodes,
    channels,
    image_stride,
    plane_stride,
    SCALE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same of BLOCK_M nodes of a map whose channels are planes; what is written is by rows."""
    blocks = tl.cdiv(nodes, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    node = (tl.program_id(0).to(tl.int64) - image * blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = node < nodes
    prior_ptr += image * image_stride
    largest = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    broken = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for start in range(0, channels, BLOCK_N):
        channel = start + tl.arange(0, BLOCK_N)
        both = (channel < channels)[:, None] & inside[None, :]
        at = channel.to(tl.int64)[:, None] * plane_stride + node[None, :]
        size = tl.abs(tl.load(prior_ptr + at, mask=both, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, size)
        broken = tl.where(size < float("inf"), broken, 1)
    any_broken = tl.max(broken, axis=0) > 0
    scale = power_below(tl.max(largest, axis=0), any_broken)

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    lost = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, channels, BLOCK_N):
        channel = start + tl.arange(0, BLOCK_N)
        both = (channel < channels)[:, None] & inside[None, :]
        at = channel.to(tl.int64)[:, None] * plane_stride + node[None, :]
        value = tl.load(prior_ptr + at, mask=both, other=0.0)
        if SCALE:
            value = (value.to(tl.float32) * scale[None, :]).to(scaled_ptr.dtype.element_ty)
        to = (image * nodes + node)[:, None] * channels + channel[None, :]
        here = inside[:, None] & (channel < channels)[None, :]
        tl.store(scaled_ptr + to, tl.trans(value), mask=here)
        wide = value.to(tl.float32)
        total += wide * wide
        if ROUND:
            short = wide.to(tl.float16)
            tl.store(rounded_ptr + to, tl.trans(short), mask=here)
            left = wide - short.to(tl.float32)
            lost += left * left
    norm = tl.sqrt_rn(tl.sum(total, axis=0))
    inverse = tl.where(norm > 0, tl.div_rn(1.0, norm), 0.0)
    tl.store(inverse_ptr + image * nodes + node, tl.where(any_broken, float("nan"), inverse), mask=inside)
    if ROUND:
        share = lost_share(tl.sum(lost, axis=0), inverse, any_broken)
        tl.store(residual_ptr + image * nodes + node, share, mask=inside)


def columns_of(channels: int) -> int:
    return min(_COLUMNS[1], max(_COLUMNS[0], power_of_two_from(channels)))


def warps_of(columns: int) -> int:
    # eight channels per thread
    return max(1, columns // 256)


def prepare_prior(prior: Tensor, rounds: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``prior`` (..., N, D) float32, float16 or bfloat16, scaled, and ``inverse_norm`` (..., N) float32.

    ``rounds``, of float32 alone: also the scaled rows in float16, and of each row ``residual`` (..., N) float32, the
    length of its rounding errors over its own, from above. Otherwise both are empty.
    """
    nodes, channels = prior.shape[-2:]
    scaled = torch.empty(prior.shape, dtype=prior.dtype, device=prior.device)
    inverse = torch.empty(prior.shape[:-1], dtype=torch.float32, device=prior.device)
    rounded = torch.empty(prior.shape if rounds else (0,), dtype=torch.float16, device=prior.device)
    residual = torch.empty(inverse.shape if rounds else (0,), dtype=torch.float32, device=prior.device)
    found = (scaled, inverse, rounded, residual)
    # squares of float16 values are within the range of float32
    common = {"SCALE": prior.dtype != torch.float16, "ROUND": rounds, **FMA}
    if inverse.numel() > 0 and prior.dim() == 3 and prior.stride(1) == 1 and channels > 1:
        strides = (prior.stride(0), prior.stride(2))
        with on_device_of(prior):
            _prepare_prior_kernel_planes[(len(prior) * ceil_div(nodes, PLANES["BLOCK_M"]),)](
                prior, *found, nodes, channels, *strides, **common, **PLANES
            )
    elif inverse.numel() > 0:
        columns = columns_of(channels)
        prior = prior.contiguous()
        with on_device_of(prior):
            _prepare_prior_kernel[(inverse.numel(),)](
                prior, *found, channels, **common, BLOCK_N=columns, num_warps=warps_of(columns)
            )
    return found
