# SPDX-License-Identifier: Apache-2.0
"""Candidates of large images: tiles of scores from rounded rows, of which only those are made that can matter.

Nodes lie in patches of the image, 8 x 8 of them a block of rows, 8 x 16 a block of columns. A program has one block of
rows. It goes through the blocks of columns by the least decay between the two, nearest first. Tensor cores multiply the
rounded rows, and what is certainly not among a row's k best is dropped at once (``knn_rounded.py`` has the bound). The
rest is appended to the row's list.

A list has room for all columns of a block beyond its limit. Where one is above its limit, all lists of the program are
cut back: the k-th score of each is found, and what is certainly below it goes. From then on that score, less the error
of two, is the least that a column must have. No cosine is above one. So if one less the decay is below the least of
every row, no block that is left can matter, and the program ends.

A row with more undecided candidates than its limit is left to a kernel that computes all of it in float32. Nothing is
cut short, no order of programs matters, and no host waits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from drseg_kernels._blocks import ordered_bits
from drseg_kernels._launch import LARGEST_GRID_Y, Live, ceil_div, on_device_of, power_of_two_from
from drseg_kernels._selection import FORCED, NONE, OPTIONS, kth_key
from drseg_kernels.knn_rounded import knn_from_lists, limit_of, margin_of, score_at, slack_of

# the most blocks of columns that a program keeps count of, and the most k that a list serves
MOST_BLOCKS, LARGEST_K = 4096, 240
# of all scores; blocks without a candidate are below it
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# bytes of lists that live at a time, unless those of one image take more
_LIST_BYTES = 256 << 20
# parts in which the columns of a block are looked at
_PARTS = 4


@triton.jit(do_not_specialize=["height", "width", "down", "across"])
def _knn_graph_fwd_kernel_bounds(
    table_ptr,
    bound_ptr,
    height,
    width,
    down,
    across,
    INCLUDE_SELF: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    ROWS_Y: tl.constexpr,
    ROWS_X: tl.constexpr,
    COLUMNS_Y: tl.constexpr,
    COLUMNS_X: tl.constexpr,
):
    """``bound`` (2 * down - 1, 2 * across - 1): the least decay between a patch of rows and one of columns whose first
    cells are that many steps apart. Infinite if no pair of theirs is a candidate, and lowest where patches share a node
    that is its own neighbour whatever the table says."""
    dy = tl.arange(0, 2 * max(ROWS_Y, COLUMNS_Y))
    dx = tl.arange(0, 2 * max(ROWS_X, COLUMNS_X))
    y = tl.abs((tl.program_id(0) - (down - 1)) * STEP_Y - (ROWS_Y - 1) + dy)
    x = tl.abs((tl.program_id(1) - (across - 1)) * STEP_X - (ROWS_X - 1) + dx)
    inside = ((y < height) & (dy < ROWS_Y + COLUMNS_Y - 1))[:, None] & ((x < width) & (dx < ROWS_X + COLUMNS_X - 1))
    decay = tl.load(table_ptr + (y * width)[:, None] + x[None, :], mask=inside, other=float("inf"))
    decay = tl.where(decay == decay, decay, float("inf"))
    if INCLUDE_SELF:
        decay = tl.where((y == 0)[:, None] & (x == 0)[None, :], _LOWEST, decay)
    least = tl.min(tl.min(decay, axis=1), axis=0)
    tl.store(bound_ptr + tl.program_id(0) * (2 * across - 1) + tl.program_id(1), least)


@triton.jit
def cells_of(block, c, blocks_across, height, width, PATCH_Y: tl.constexpr, PATCH_X: tl.constexpr):
    """Where nodes ``c`` of a patch lie in the image, and which of them it has."""
    y = block // blocks_across * PATCH_Y + c // PATCH_X
    x = block % blocks_across * PATCH_X + c % PATCH_X
    return y, x, (y < height) & (x < width)


@triton.jit
def halves(value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first half of the columns of (ROWS, COLUMNS), and the second; where products leave them, both of a thread."""
    return tl.split(tl.permute(tl.reshape(value, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def cut_back(
    list_ptr,
    score_ptr,
    count_ptr,
    least_ptr,
    inverse_norm_ptr,
    residual_ptr,
    i,
    row,
    loss,
    slack,
    k,
    INCLUDE_SELF: tl.constexpr,
    LIMIT: tl.constexpr,
    ROOM: tl.constexpr,
    HELD: tl.constexpr,
):
    """Lists of the rows ``i`` (R,), where ``row`` is true, without what is certainly not among the k best.

    ``least`` becomes the score below which that is so, and ``count`` what is left. If that is more than LIMIT they are
    infinite and -1, and nothing is added to such a list any more.
    """
    # all of it is written before it is read
    tl.debug_barrier()
    count = tl.load(count_ptr + i, mask=row, other=-1)
    s = tl.arange(0, HELD)
    held = s[None, :] < count[:, None]
    slot = (i * ROOM)[:, None] + s[None, :]
    j = tl.load(list_ptr + slot, mask=held, other=0)
    value = tl.load(score_ptr + slot, mask=held, other=0.0)
    key = tl.where(held, ordered_bits(value), NONE)
    if INCLUDE_SELF:
        key = tl.where(held & (j == i[:, None]), FORCED, key)
    threshold = kth_key(key, key, tl.full(i.shape, NONE, tl.int32), k, False)
    # the k-th itself: there may be a gap below it, in which the bisection ends
    border = score_at(tl.min(tl.where(key >= threshold[:, None], key, FORCED), axis=1))
    inverse_own = tl.load(inverse_norm_ptr + i, mask=row, other=0.0)
    own_loss = tl.load(residual_ptr + i, mask=row, other=0.0)
    lowest = border - margin_of(border, own_loss, loss, inverse_own, slack)
    # of k candidates or fewer none can go; and all that are forced have no score
    some = (threshold > NONE + 1) & (lowest == lowest)
    lowest = tl.where(some, tl.maximum(lowest, _LOWEST), tl.load(least_ptr + i, mask=row, other=0.0))
    stays = held & ((value >= lowest[:, None]) | (key == FORCED))
    left = tl.sum(stays.to(tl.int32), axis=1)
    to = (i * ROOM - 1)[:, None] + tl.cumsum(stays.to(tl.int32), axis=1)
    # and all is read before it is written again
    tl.debug_barrier()
    tl.store(list_ptr + to, j, mask=stays)
    tl.store(score_ptr + to, value, mask=stays)
    known = row & (count >= 0)
    tl.store(count_ptr + i, tl.where(left > LIMIT, -1, left), mask=known)
    tl.store(least_ptr + i, tl.where(left > LIMIT, float("inf"), lowest), mask=known)


@triton.jit(do_not_specialize=["nodes", "height", "width", "begin", "end", "k"])
def _knn_graph_fwd_kernel_live(
    rounded_ptr,
    inverse_norm_ptr,
    residual_ptr,
    loss_ptr,
    table_ptr,
    bound_ptr,
    list_ptr,
    score_ptr,
    count_ptr,
    least_ptr,
    visited_ptr,
    nodes,
    height,
    width,
    begin,
    end,
    k,
    channels,
    slack,
    INCLUDE_SELF: tl.constexpr,
    COUNT: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS_Y: tl.constexpr,
    ROWS_X: tl.constexpr,
    COLUMNS_Y: tl.constexpr,
    COLUMNS_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    HELD: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``list`` and ``score`` (B, n, LIMIT + columns of a block) of the nodes from ``begin`` to ``end``: candidates and
    their rounded scores, in no order. ``count`` (B, n): how many; -1 of a row that must be computed as a whole.

    ``least`` (B, n) is room to work in. COUNT: blocks of columns that each program multiplied, in ``visited``. WIDE:
    the interpreter multiplies in float32.
    """
    BLOCK_M: tl.constexpr = ROWS_Y * ROWS_X
    BLOCK_N: tl.constexpr = COLUMNS_Y * COLUMNS_X
    STEP_Y: tl.constexpr = min(ROWS_Y, COLUMNS_Y)
    STEP_X: tl.constexpr = min(ROWS_X, COLUMNS_X)
    ROOM: tl.constexpr = LIMIT + BLOCK_N
    block = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    rounded_ptr += image * nodes * channels
    inverse_norm_ptr += image * nodes
    residual_ptr += image * nodes
    wanted = image * (end - begin) - begin
    list_ptr += wanted * ROOM
    score_ptr += wanted * ROOM
    count_ptr += wanted
    least_ptr += wanted
    rows_across, columns_across = tl.cdiv(width, ROWS_X), tl.cdiv(width, COLUMNS_X)

    y_own, x_own, row = cells_of(block, tl.arange(0, BLOCK_M), rows_across, height, width, ROWS_Y, ROWS_X)
    i = y_own * width + x_own
    row = row & (i >= begin) & (i < end)
    inverse_own = tl.load(inverse_norm_ptr + i, mask=row, other=float("nan"))
    count = tl.zeros((BLOCK_M,), tl.int32)
    # a row that is not finite has no candidates
    least = tl.where(inverse_own == inverse_own, _LOWEST, float("inf"))
    # what no cosine is above; that of a row of zeros is zero
    most = tl.where(inverse_own == 0.0, 0.0, 1.0 + slack)
    loss = tl.load(loss_ptr + image)

    b = tl.arange(0, BLOCKS)
    down = (b // columns_across * COLUMNS_Y - block // rows_across * ROWS_Y) // STEP_Y + tl.cdiv(height, STEP_Y) - 1
    across = (b % columns_across * COLUMNS_X - block % rows_across * ROWS_X) // STEP_X + tl.cdiv(width, STEP_X) - 1
    has = b < columns_across * tl.cdiv(height, COLUMNS_Y)
    bound = tl.load(bound_ptr + down * (2 * tl.cdiv(width, STEP_X) - 1) + across, mask=has, other=float("inf"))
    nearest = tl.min(bound, axis=0)
    visited = 0
    while tl.max((most - nearest >= least).to(tl.int32), axis=0) > 0:
        at = tl.min(tl.where(bound == nearest, b, BLOCKS), axis=0)
        bound = tl.where(b == at, float("inf"), bound)
        nearest = tl.min(bound, axis=0)
        visited += 1
        y, x, column = cells_of(at, tl.arange(0, BLOCK_N), columns_across, height, width, COLUMNS_Y, COLUMNS_X)
        j = y * width + x
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, channels, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            channel = d < channels
            own = (i * channels)[:, None] + d[None, :]
            left = tl.load(rounded_ptr + own, mask=row[:, None] & channel[None, :], other=0.0)
            other = d[:, None] + (j * channels)[None, :]
            right = tl.load(rounded_ptr + other, mask=channel[:, None] & column[None, :], other=0.0)
            if WIDE:
                total += tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
            else:
                total = tl.dot(left, right, total)
        # some columns at a time, so that all of a thread's values fit into its registers
        first, third = halves(total, BLOCK_M, BLOCK_N)
        first, second = halves(first, BLOCK_M, BLOCK_N // 2)
        third, fourth = halves(third, BLOCK_M, BLOCK_N // 2)
        c = tl.arange(0, BLOCK_N // PARTS)
        for part in tl.static_range(PARTS):
            if part == 0:
                product = first
            elif part == 1:
                product = second
            elif part == 2:
                product = third
            else:
                product = fourth
            some = c + part * (BLOCK_N // PARTS)
            y, x, column = cells_of(at, some, columns_across, height, width, COLUMNS_Y, COLUMNS_X)
            # of a node that no other may choose it is NaN, and with it the score
            inverse = tl.load(inverse_norm_ptr + y * width + x, mask=column, other=float("nan"))
            cell = tl.abs(y_own[:, None] - y[None, :]) * width + tl.abs(x_own[:, None] - x[None, :])
            decay = tl.load(table_ptr + cell, mask=row[:, None] & column[None, :], other=0.0)
            value = product * inverse_own[:, None] * inverse[None, :] - decay
            if INCLUDE_SELF:
                new = (value >= least[:, None]) | (cell == 0)
            else:
                new = (value >= least[:, None]) & (cell != 0)
            new = new & (least < float("inf"))[:, None]
            more = tl.sum(new.to(tl.int32), axis=1)
            if tl.max(more, axis=0) > 0:
                to = ((i * ROOM + count) - 1)[:, None] + tl.cumsum(new.to(tl.int32), axis=1)
                tl.store(list_ptr + to, tl.broadcast_to((y * width + x)[None, :], new.shape), mask=new)
                tl.store(score_ptr + to, value, mask=new)
                count += more
        if tl.max(count, axis=0) > LIMIT:
            tl.store(count_ptr + i, count, mask=row)
            tl.store(least_ptr + i, least, mask=row)
            for some_row in range(0, BLOCK_M, GROUP):
                y_few, x_few, few = cells_of(
                    block, some_row + tl.arange(0, GROUP), rows_across, height, width, ROWS_Y, ROWS_X
                )
                g = y_few * width + x_few
                cut_back(
                    list_ptr,
                    score_ptr,
                    count_ptr,
                    least_ptr,
                    inverse_norm_ptr,
                    residual_ptr,
                    g,
                    few & (g >= begin) & (g < end),
                    loss,
                    slack,
                    k,
                    INCLUDE_SELF,
                    LIMIT,
                    ROOM,
                    HELD,
                )
            tl.debug_barrier()
            count = tl.load(count_ptr + i, mask=row, other=0)
            least = tl.load(least_ptr + i, mask=row, other=float("inf"))
    tl.store(count_ptr + i, count, mask=row)
    if COUNT:
        tl.store(visited_ptr + image * tl.num_programs(0) + block, visited)


def patch_of(size: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a patch of so many nodes: a square or one twice as wide, longer where the image is narrow.
    All are powers of two."""
    across = min(power_of_two_from(width), 1 << (size.bit_length() // 2))
    down = min(power_of_two_from(height), size // across)
    return down, size // down


def constants(
    grid: tuple[int, int], k: int, include_self: bool, counts: bool, wide: bool, chosen: Live
) -> dict[str, Any]:
    """Compile-time arguments and options: what is compiled ahead of time and what is launched are one thing."""
    height, width = grid
    rows, columns = patch_of(chosen.block_m, height, width), patch_of(chosen.block_n, height, width)
    blocks = ceil_div(height, columns[0]) * ceil_div(width, columns[1])
    held = power_of_two_from(limit_of(k) + chosen.block_n)
    return {
        "INCLUDE_SELF": include_self,
        "COUNT": counts,
        "LIMIT": limit_of(k),
        "BLOCKS": max(16, power_of_two_from(blocks)),
        "ROWS_Y": rows[0],
        "ROWS_X": rows[1],
        "COLUMNS_Y": columns[0],
        "COLUMNS_X": columns[1],
        "BLOCK_D": chosen.block_d,
        # eight entries of a thread
        "GROUP": min(chosen.block_m, max(1, 256 * chosen.num_warps // held)),
        "HELD": held,
        "PARTS": _PARTS,
        "WIDE": wide,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }


def steps_of(sizes: dict[str, Any]) -> dict[str, int]:
    """The patches among ``constants``, and the steps between their first cells."""
    patches = {name: sizes[name] for name in ("ROWS_Y", "ROWS_X", "COLUMNS_Y", "COLUMNS_X")}
    steps = {axis: min(sizes[f"ROWS_{axis}"], sizes[f"COLUMNS_{axis}"]) for axis in "YX"}
    return {"STEP_Y": steps["Y"], "STEP_X": steps["X"], **patches}


def serves(nodes: int, channels: int, k: int, grid: tuple[int, int], chosen: Live) -> bool:
    """Whether lists and blocks of such an image are within what the kernel counts."""
    down, across = patch_of(chosen.block_n, *grid)
    blocks = ceil_div(grid[0], down) * ceil_div(grid[1], across)
    # places within an image are int32, as is an index beside its place in a list
    places = nodes * max(channels, limit_of(k) + chosen.block_n, 256)
    return k <= LARGEST_K and blocks <= MOST_BLOCKS and places < 2**31


def knn_live(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    form: str,
    include_self: bool,
    rounded: Tensor,
    residual: Tensor,
    chosen: Live,
    begin: int,
    index: Tensor,
    score: Tensor,
    counts: Tensor | None = None,
    visited: Tensor | None = None,
) -> None:
    """Fills ``index`` and ``score`` (B, n, k) of the n nodes from ``begin`` on; other arguments as in ``knn_graph``.

    ``visited``: (B, blocks of rows) int32, where it is written how many blocks of columns each of them multiplied.
    """
    batch, nodes, channels = prior.shape
    _, wanted, k = index.shape
    height, width = table.shape
    sizes = constants((height, width), k, include_self, visited is not None, not prior.is_cuda, chosen)
    steps = steps_of(sizes)
    down, across = ceil_div(height, steps["STEP_Y"]), ceil_div(width, steps["STEP_X"])
    blocks = ceil_div(height, steps["ROWS_Y"]) * ceil_div(width, steps["ROWS_X"])
    bound = score.new_empty(2 * down - 1, 2 * across - 1)
    room = limit_of(k) + chosen.block_n
    images = max(1, min(batch, LARGEST_GRID_Y, _LIST_BYTES // (8 * wanted * room)))
    lists = (images, wanted, room)
    listed = (index.new_empty(lists), score.new_empty(lists), index.new_empty(images, wanted))
    least, loss = score.new_empty(images, wanted), residual.amax(1)
    with on_device_of(prior):
        _knn_graph_fwd_kernel_bounds[tuple(bound.shape)](
            table, bound, height, width, down, across, include_self, **steps, num_warps=1, **OPTIONS
        )
        for image in range(0, batch, images):
            part = slice(image, min(image + images, batch))
            given = (prior[part], inverse_norm[part], table, form, include_self, residual[part], loss[part])
            _knn_graph_fwd_kernel_live[(blocks, len(given[0]))](
                rounded[part],
                inverse_norm[part],
                residual[part],
                loss[part],
                table,
                bound,
                *listed,
                least,
                index if visited is None else visited[part],
                nodes,
                height,
                width,
                begin,
                begin + wanted,
                k,
                channels,
                slack_of(channels),
                **sizes,
                **OPTIONS,
            )
            knn_from_lists(*given, listed, begin, index[part], score[part], None if counts is None else counts[part])
