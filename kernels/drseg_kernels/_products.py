# SPDX-License-Identifier: Apache-2.0
"""Dot products of rows in float32: the library's if it adds in float32, ours if a setting allows it less.

Settings of the whole process are read and never changed: another thread would see it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._launch import FMA, LARGEST_GRID_Y, ceil_div


def products_are_wide() -> bool:
    """Whether the library adds products of float16 in float32; a setting may forbid it."""
    return not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)


def float32_is_whole() -> bool:
    """Whether the library multiplies float32 with all of its digits on a GPU; a setting may allow TF32."""
    newer = getattr(torch._C, "_get_fp32_precision_getter", None)
    if newer is not None:
        return newer("cuda", "matmul") in ("none", "ieee")
    return not torch.backends.cuda.matmul.allow_tf32


@triton.jit(do_not_specialize=["rows", "columns", "left_stride", "right_stride"])
def _product_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    rows,
    columns,
    channels,
    left_stride,
    right_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out (G, rows, columns), a block of one image, of left (G, rows, D) and right (G, columns, D)."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    image = tl.program_id(2).to(tl.int64)
    left_ptr += image * left_stride
    right_ptr += image * right_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, channels, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        channel = d < channels
        at = (r * channels)[:, None] + d[None, :]
        left = tl.load(left_ptr + at, mask=(r < rows)[:, None] & channel[None, :], other=0.0)
        at = d[:, None] + (c * channels)[None, :]
        right = tl.load(right_ptr + at, mask=channel[:, None] & (c < columns)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    at = (image * rows + r)[:, None] * columns + c[None, :]
    tl.store(out_ptr + at, total, mask=(r < rows)[:, None] & (c < columns)[None, :])


SIZES = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": 32, "num_warps": 4}


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``multiply`` of float32 by a kernel of ours: a third of the library's speed, or less."""
    images, rows, channels = left.shape
    columns = right.shape[1]
    blocks = (ceil_div(rows, SIZES["BLOCK_M"]), ceil_div(columns, SIZES["BLOCK_N"]))
    for image in range(0, images, LARGEST_GRID_Y):
        part = slice(image, image + LARGEST_GRID_Y)
        grid = (*blocks, min(images - image, LARGEST_GRID_Y))
        sizes = (rows, columns, channels, left.stride(0), right.stride(0))
        _product_kernel[grid](left[part], right[part], out[part], *sizes, **SIZES, **FMA)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Dot products of the rows of (G, R, D) and (G, T, D) in float32, into (G, R, T); rows lie one behind another."""
    if not left.is_cuda:
        # the interpreter's stand-in: the CPU has no product that widens, and may be set to one that rounds
        out.copy_(torch.bmm(left.double(), right.mT.double()))
    elif left.dtype != torch.float32:
        torch.bmm(left, right.mT, out_dtype=torch.float32, out=out)
    elif not float32_is_whole():
        product(left, right, out)
    elif len(left) == 1:
        # the library has faster kernels for one product than for a batch of one
        torch.mm(left[0], right[0].mT, out=out[0])
    else:
        torch.bmm(left, right.mT, out=out)
