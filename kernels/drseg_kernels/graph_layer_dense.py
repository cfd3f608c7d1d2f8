# SPDX-License-Identifier: Apache-2.0
"""The sums of ``graph_layer`` for small graphs in half precision: products with a dense matrix, on tensor cores.

Two launches. The first writes the matrix (B, N, N) of coefficients, zeros included. The second multiplies it by the
features, and adds the bias. Features are what they are. A coefficient is two parts of their dtype: ``high`` is the
nearest number, and ``low`` the nearest to what is left. A row is first multiplied by a power of two, which is exact, so
that its largest coefficient lies in ``[2**12, 2**13)``. So the low parts of float16 keep their digits. The power is
taken back at the end.

Two parts of float16 have 22 bits, of coefficients that are not below ``2**-15`` of the largest of their row; smaller
ones are off by ``2**-37`` of that. Two of bfloat16 have 16: a coefficient is off by at most ``2**-17`` of itself. Of 64
edges the contract lets a sum be off by ``80 * 2**-24`` of its absolute terms, which is 0.6 of that. It takes more than
half of the worst case of all edges at once, all of one sign. One part would be off by ``2**-8``. Then 28 of 100 results
are outside of the contract (8 x 576 nodes, 75 edges, normal features). Graphs of few edges are gathered.

A zero times NaN is NaN, so what is not finite reaches all rows of an image. A result that is not finite is therefore
computed again by ``gathered_sum``, which meets neighbours only. One that is finite has met no such number, and is
right. The decision falls on the device. Edges to the same node are added up before they are written, in the order of
the slots. There are no atomics: a result has the same bits every time.

When it pays, by arithmetic for an H100 (2026-11): gathered sums take ``2 B N K C`` bytes at 8.2 TB/s. This takes the
``4 B N N`` bytes of the matrix at 3.35 TB/s, ``4 B N N C`` additions and multiplications at 300 TF/s, a launch more,
and one more for LayerNorm, because no program holds a row. At 576 nodes of 384 channels both are equal at 43 to 53
edges.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import within
from drseg_kernels._launch import FMA, Device, Tile, ceil_div, last_sizes, on_device_of, power_of_two_from
from drseg_kernels.graph_propagate import gathered_sum
from drseg_kernels.linear_map import power_of_two
from drseg_kernels.prepare_prior import power_below

# where it pays; on sm_120 it is predicted to take 37 us, and gathering 21
ARCHITECTURES = ("sm_90",)
DTYPES = (torch.float16, torch.bfloat16)
MOST_NODES = 1024
# below, the parts of bfloat16 have too few digits for the contract
LEAST_SLOTS = 64
# and an edge to one node in so many, at least
_LEAST_SHARE = 8
_LEAST_CHANNELS = 128
# of the rows that gathered sums read, about 16 us of an H100 (2026-11): below, launches count
LEAST_BYTES = 1 << 27

# rows near one are multiplied by this before they are parted
_LIFT = tl.constexpr(2.0**13)
_DROP = tl.constexpr(2.0**-13)

# of a program zeros at a time, of a warp pairs of edges that are compared at a time
_ZEROS, _PAIRS = 1024, 512


@triton.jit
def _coefficients(index_ptr, coefficient_ptr, scale_ptr, edge, used, node, sample, nodes, SCALED: tl.constexpr):
    """Neighbours in the image, and coefficients, of some edges of a node."""
    near = within(tl.load(index_ptr + edge, mask=used, other=0), nodes)
    value = tl.load(coefficient_ptr + edge, mask=used, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(scale_ptr + sample + near, mask=used, other=0.0)
        value *= tl.load(scale_ptr + node)
    return near, value


@triton.jit(do_not_specialize=["nodes", "slots"])
def _graph_layer_dense_kernel_fill(
    index_ptr,
    coefficient_ptr,
    scale_ptr,
    parts_ptr,
    exponent_ptr,
    nodes,
    slots,
    stride,
    SCALED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """parts (B * N, 2, stride), the high and the low ones of a row of the matrix, and exponent (B * N,) of the power of
    two that its sums are to be multiplied by. BLOCK_K holds all slots."""
    node = tl.program_id(0).to(tl.int64)
    sample = (tl.program_id(0) // nodes).to(tl.int64) * nodes
    row_ptr = parts_ptr + node * stride * 2
    for start in range(0, stride * 2, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        tl.store(row_ptr + at, tl.zeros((BLOCK_N,), parts_ptr.dtype.element_ty), mask=at < stride * 2)

    k = tl.arange(0, BLOCK_K)
    used = k < slots
    edge = node * slots + k
    near, value = _coefficients(index_ptr, coefficient_ptr, scale_ptr, edge, used, node, sample, nodes, SCALED)
    before = within(tl.load(index_ptr + edge - 1, mask=used & (k > 0), other=0), nodes)
    # ascending neighbours, as knn_graph lists them, are distinct
    repeated = tl.max((used & (k > 0) & (near <= before)).to(tl.int32), axis=0)
    if repeated > 0:
        value = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, slots, BLOCK_M):
            other = start + tl.arange(0, BLOCK_M)
            has = other < slots
            end, share = _coefficients(
                index_ptr, coefficient_ptr, scale_ptr, node * slots + other, has, node, sample, nodes, SCALED
            )
            same = (near[:, None] == end[None, :]) & has[None, :]
            value += tl.sum(tl.where(same, share[None, :], 0.0), axis=1)

    size = tl.abs(value)
    # neither infinity nor NaN, which compares with nothing
    top = tl.max(tl.where(used & (size < float("inf")), size, 0.0), axis=0)
    power = power_below(top, top < 0.0)
    tl.store(exponent_ptr + node, 127 - (power.to(tl.int32, bitcast=True) >> 23))
    value = value * power * _LIFT
    high = value.to(parts_ptr.dtype.element_ty)
    low = (value - high.to(tl.float32)).to(parts_ptr.dtype.element_ty)
    # no part is written before all are zero
    tl.debug_barrier()
    tl.store(row_ptr + near, high, mask=used)
    tl.store(row_ptr + stride + near, low, mask=used)


@triton.jit(do_not_specialize=["nodes", "slots"])
def _graph_layer_dense_kernel_product(
    x_ptr,
    parts_ptr,
    exponent_ptr,
    index_ptr,
    coefficient_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    nodes,
    slots,
    channels,
    stride,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Some channels of some rows of an image of y (B * N, channels), BLOCK_K nodes at a time. What is not finite is
    gathered, BLOCK_G edges at a time."""
    columns, blocks = tl.cdiv(channels, BLOCK_N), tl.cdiv(nodes, BLOCK_M)
    # wide, for what becomes an address
    tile = (tl.program_id(0) // columns).to(tl.int64)
    image = (tl.program_id(0) // columns // blocks).to(tl.int64)
    sample, begin = image * nodes, (tile - image * blocks) * BLOCK_M
    r = begin + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) - tile * columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, channel = r < nodes, c < channels
    left_ptr = parts_ptr + ((sample + r) * stride * 2)[:, None]
    right_ptr = x_ptr + sample * channels + c[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, nodes, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        both = (j < nodes)[:, None] & channel[None, :]
        x = tl.load(right_ptr + (j.to(tl.int64) * channels)[:, None], mask=both, other=0.0)
        # a row of parts is filled up with zeros
        high = tl.load(left_ptr + j[None, :], mask=row[:, None], other=0.0)
        low = tl.load(left_ptr + stride + j[None, :], mask=row[:, None], other=0.0)
        total = tl.dot(low, x, total)
        total = tl.dot(high, x, total)

    exponent = tl.load(exponent_ptr + sample + r, mask=row, other=0)
    # two halves of one sign: what is between them is between the sum and the result
    half = exponent >> 1
    total = total * _DROP * power_of_two(half)[:, None] * power_of_two(exponent - half)[:, None]
    finite = tl.abs(total) < float("inf")
    lost = tl.where(row[:, None] & channel[None, :] & ~finite, 1, 0)
    if tl.max(tl.max(lost, axis=1), axis=0) > 0:
        for m in range(0, tl.minimum(BLOCK_M, nodes - begin).to(tl.int32)):
            node = sample + begin + m
            again = gathered_sum(
                x_ptr,
                index_ptr,
                coefficient_ptr,
                scale_ptr,
                index_ptr,
                index_ptr,
                node,
                nodes,
                slots,
                channels,
                c,
                False,
                SCALED,
                BLOCK_G,
                BLOCK_N,
            )
            if SCALED:
                again *= tl.load(scale_ptr + node)
            total = tl.where((lost > 0) & (r == begin + m)[:, None], again[None, :], total)
    if BIAS:
        total += tl.load(bias_ptr + c, mask=channel, other=0.0).to(tl.float32)[None, :]
    if RELU:
        # written so that NaN passes
        total = tl.where(total < 0.0, 0.0, total)
    at = ((sample + r) * channels)[:, None] + c[None, :]
    tl.store(y_ptr + at, total, mask=row[:, None] & channel[None, :])


def product_sizes(device: Device) -> dict[str, int]:
    """Compile-time arguments and options of the product: what its stages hold fits into the shared memory."""
    columns, stages = (128, 3) if device.shared_bytes >= 200_000 else (64, 2)
    return {"BLOCK_M": 64, "BLOCK_N": columns, "BLOCK_K": 64, "BLOCK_G": 16, "num_warps": 4, "num_stages": stages}


def shared_bytes(sizes: dict[str, int]) -> int:
    """Upper bound of a block's shared memory: both parts and the features in every stage."""
    stage = 2 * sizes["BLOCK_K"] * (2 * sizes["BLOCK_M"] + sizes["BLOCK_N"])
    return sizes["num_stages"] * stage + 1024


def fill_sizes(slots: int) -> dict[str, int]:
    """Compile-time arguments and options of the matrix: a program holds all slots of a node."""
    held = power_of_two_from(max(slots, 16))
    warps = max(1, min(4, held // 128))
    # as many pairs of edges at a time as its threads have registers for
    return {"BLOCK_K": held, "BLOCK_M": _PAIRS * warps // max(held, 128), "BLOCK_N": _ZEROS, "num_warps": warps}


def norm_sizes(channels: int) -> Tile:
    """Sizes of LayerNorm behind the product: a warp for a row needs no barrier, and holds 512 channels at a time."""
    return Tile(1, min(512, max(16, power_of_two_from(channels))), 1)


def pays(device: Device, x: Tensor, slots: int, undirected: bool) -> bool:
    """Whether the sums over ``slots`` edges of every node of ``x`` (B, N, C) go by a dense matrix."""
    batch, nodes, channels = x.shape
    return (
        device.arch in ARCHITECTURES
        and x.dtype in DTYPES
        and not undirected
        and nodes <= MOST_NODES
        and max(LEAST_SLOTS, ceil_div(nodes, _LEAST_SHARE)) <= slots <= MOST_NODES
        and channels >= _LEAST_CHANNELS
        and 2 * batch * nodes * slots * channels >= LEAST_BYTES
    )


def dense_sums(
    x: Tensor,
    near: Tensor,
    coefficient: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    relu: bool,
    device: Device,
) -> None:
    """Sums over the edges of (B, N, C) float16 or bfloat16, with ``bias`` and ReLU, into ``y`` of any dtype.

    Everything is contiguous, and no size is zero.
    """
    batch, nodes, slots = near.shape
    channels = x.shape[-1]
    sizes = product_sizes(device)
    # so that a benchmark's row tells which way it was
    last_sizes["graph_layer_dense"] = Tile(sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["num_warps"])
    stride = ceil_div(nodes, sizes["BLOCK_K"]) * sizes["BLOCK_K"]
    parts = torch.empty(batch * nodes, 2, stride, dtype=x.dtype, device=x.device)
    exponent = torch.empty(batch * nodes, dtype=torch.int32, device=x.device)
    # what a kernel does not ask for is never read
    given = (near, coefficient, coefficient if scale is None else scale)
    tiles = ceil_div(nodes, sizes["BLOCK_M"]) * ceil_div(channels, sizes["BLOCK_N"])
    with on_device_of(x):
        _graph_layer_dense_kernel_fill[(batch * nodes,)](
            *given, parts, exponent, nodes, slots, stride, SCALED=scale is not None, **fill_sizes(slots), **FMA
        )
        _graph_layer_dense_kernel_product[(batch * tiles,)](
            x,
            parts,
            exponent,
            *given,
            y if bias is None else bias,
            y,
            nodes,
            slots,
            channels,
            stride,
            SCALED=scale is not None,
            BIAS=bias is not None,
            RELU=relu,
            **sizes,
            **FMA,
        )
