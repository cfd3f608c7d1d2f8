# SPDX-License-Identifier: Apache-2.0
"""How much each Triton kernel has to do at a size: its programs, the trips of its loops, and the bytes it gathers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.aot_variants import Variant
from bench.sass import Bound
from drseg_core.testing import Case

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

# Steps of the bisection, counted on the CPU with the keys of a DINO-like prior: 14 to 17 for the first tile of a row.
# Of the later tiles two in five hold nothing for a row; the mean over all of them is 3 to 5.4.
_BISECTION, _BISECTION_LATER = 15, 5

# scores of a row that are computed again after rounded products, counted in the same way at 576 nodes: 1.7 to 2.1
_AGAIN = 2

# Of all blocks of columns, those that a block of rows multiplies; of these, those that add to a list, and those after
# which lists are cut back. Counted on the CPU at 128 x 128 nodes of a DINO-like prior, decay 1 and K 75, blocks of 64
# and 128. With decay 4 the first is 0.27.
_VISITED, _CUT = 0.77, 0.06

# where instructions are counted for the baseline of ``aot.py``; of no use elsewhere, and not to be changed
NOMINAL = Case("nominal", 8, 24, 24, prior=1024, hidden=128, channels=384, neighbours=75)


@dataclass(frozen=True)
class Work:
    """What one launch of a kernel does.

    Args:
        programs: of the launch.
        loops: those of a program, in the order of the source.
        gathered: bytes that all programs read from rows or values chosen by an index.
    """

    programs: int
    loops: tuple[Bound, ...] = ()
    gathered: float = 0.0


def _cdiv(value: int, step: int) -> int:
    return -(-value // step)


@dataclass(frozen=True)
class _Sizes:
    """A case and a variant by the letters of the kernels."""

    case: Case
    constants: dict[str, Any]
    item: int

    @property
    def rows(self) -> int:
        return self.case.batch * self.case.nodes

    @property
    def m(self) -> int:
        return int(self.constants["BLOCK_M"])

    @property
    def n(self) -> int:
        return int(self.constants["BLOCK_N"])

    def over(self, bound: int, step: int, *inner: Bound) -> Bound:
        return Bound(_cdiv(bound, step), step, inner)

    def incoming(self, step: int) -> Bound:
        # lists of the mean length K that end anywhere within a step
        return Bound(self.case.neighbours / step + 0.5, step)

    def chunk(self) -> tuple[int, int]:
        """Rows of a chunk, and chunks, as the launchers have them."""
        rows = max(8, _cdiv(self.rows, 1024))
        return rows, _cdiv(self.rows, rows)

    def gathered(self, width: int) -> float:
        return float(self.rows * self.case.neighbours * width * self.item)


def _edge_weight(s: _Sizes) -> Work:
    e = s.case.hidden
    return Work(s.rows * _cdiv(s.case.neighbours, s.m), (s.over(e, s.n),), s.gathered(e))


def _edge_weight_source(s: _Sizes) -> Work:
    rows, chunks = s.chunk()
    loop = Bound(rows, 1, (s.over(s.case.neighbours, s.m),))
    return Work(chunks * _cdiv(s.case.hidden, s.n), (loop,), s.gathered(s.case.hidden))


# in a kernel whose first programs add up chunks: few do, and most take no step of that loop
_CHUNKS = Bound(0, 1)


def _edge_weight_target(s: _Sizes) -> Work:
    return Work(s.rows * _cdiv(s.case.hidden, s.n), (_CHUNKS, s.incoming(s.m)), s.gathered(s.case.hidden))


def _edge_coefficient(s: _Sizes) -> Work:
    loop = s.over(s.case.neighbours, s.m, s.over(s.case.hidden, s.n))
    return Work(s.rows, (loop,), s.gathered(s.case.hidden))


def _slots(count: int) -> Callable[[_Sizes], Work]:
    """A program per node that goes over its slots ``count`` times."""
    return lambda s: Work(s.rows, (s.over(s.case.neighbours, s.n),) * count)


def _scale(s: _Sizes) -> Work:
    ends = () if s.constants["NORM"] == "sym_row" else (s.incoming(s.n),)
    return Work(s.rows, (s.over(s.case.neighbours, s.n), *ends))


def _degree(s: _Sizes) -> Work:
    return Work(s.rows, (s.over(s.case.neighbours, s.n), s.incoming(s.n)))


def _propagate(s: _Sizes) -> Work:
    loops = (s.incoming(s.m),) if s.constants["TRANSPOSE"] else (s.over(s.case.neighbours, s.m),)
    return Work(s.rows * _cdiv(s.case.channels, s.n), loops, s.gathered(s.case.channels))


def _gradients(s: _Sizes) -> Work:
    along = s.constants.get("TRANSPOSE", False)
    return Work(s.rows, (s.over(s.case.neighbours, s.m) if along else s.incoming(s.m),), s.gathered(s.case.channels))


def _layer_edges(s: _Sizes) -> Work:
    return Work(s.rows, (_CHUNKS, s.incoming(s.m)), s.gathered(s.case.channels))


def _slope(s: _Sizes) -> Work:
    return Work(s.rows, (s.over(s.case.neighbours, s.n), s.incoming(s.n), s.over(s.case.neighbours, s.n)))


def _dot(s: _Sizes) -> Work:
    loops = (s.over(s.case.channels, s.n),)
    times = 2 if s.constants["BOTH"] else 1
    return Work(s.rows * _cdiv(s.case.neighbours, s.m), loops, times * s.gathered(s.case.channels))


def _layer(s: _Sizes) -> Work:
    both = s.constants["UNDIRECTED"]
    loops = (s.over(s.case.neighbours, s.m), *((s.incoming(s.m),) if both else ()))
    return Work(s.rows * _cdiv(s.case.channels, s.n), loops, len(loops) * s.gathered(s.case.channels))


def _activation(s: _Sizes) -> Work:
    rows, chunks = s.chunk()
    return Work(chunks * _cdiv(s.case.channels, s.n), (s.over(rows, s.m),))


def _layer_sum(s: _Sizes) -> Work:
    return Work(3 * _cdiv(s.case.channels, s.n), (s.over(s.chunk()[1], s.m),))


def _over_channels(count: int) -> Callable[[_Sizes], Work]:
    return lambda s: Work(s.rows, (s.over(s.case.channels, s.n),) * count)


def _prepare_prior(s: _Sizes) -> Work:
    return Work(s.rows, (s.over(s.case.prior, s.n),) * 2)


def _merge(s: _Sizes) -> Work:
    tiles = _cdiv(s.case.nodes, min(s.n, s.case.nodes))
    first = s.constants["FIRST"]
    steps = Bound(_BISECTION if first else _BISECTION_LATER, 0)
    # all tiles but the first have one kernel
    return Work(_cdiv(s.rows, s.m) * (1 if first else tiles - 1), (steps,))


def _rounded(s: _Sizes) -> Work:
    steps = Bound(_BISECTION, 0)
    again = Bound(_AGAIN, 0, (s.over(s.case.prior, int(s.constants["BLOCK_D"])),))
    gathered = float(s.rows * _AGAIN * s.case.prior * 4)
    return Work(_cdiv(s.rows, s.m), (steps, again, steps), gathered)


def _live(s: _Sizes) -> Work:
    rows = int(s.constants["ROWS_Y"]) * int(s.constants["ROWS_X"])
    columns = int(s.constants["COLUMNS_Y"]) * int(s.constants["COLUMNS_X"])
    channels = s.over(s.case.prior, int(s.constants["BLOCK_D"]))
    cut = Bound(_CUT * _cdiv(rows, int(s.constants["GROUP"])), 1, (Bound(_BISECTION, 0),))
    tiles = Bound(_VISITED * _cdiv(s.case.nodes, columns), 1, (channels, cut))
    return Work(s.case.batch * _cdiv(s.case.nodes, rows), (tiles,))


def _live_bounds(s: _Sizes) -> Work:
    steps = int(s.constants["STEP_Y"]), int(s.constants["STEP_X"])
    return Work((2 * _cdiv(s.case.height, steps[0]) - 1) * (2 * _cdiv(s.case.width, steps[1]) - 1))


def _whole_rows(s: _Sizes) -> Work:
    # none of the rows has to be computed
    return Work(s.rows, (Bound(0, 1, (Bound(0, 1), Bound(0, 1))),))


def _planes(s: _Sizes) -> Work:
    loop = s.over(s.case.prior, s.n)
    return Work(s.case.batch * _cdiv(s.case.nodes, s.m), (loop, loop))


def _split(s: _Sizes) -> Work:
    # of a layer's map; nearly all programs have rows of the features, and none of the weight's two loops
    loop, other = s.over(s.case.channels, int(s.constants["BLOCK_D"])), Bound(0, 1)
    return Work(_cdiv(s.rows, s.m) + _cdiv(s.case.channels, s.m), (loop, loop, other, other))


def _linear_product(s: _Sizes) -> Work:
    from drseg_kernels.linear_map import TERMS

    return Work(_cdiv(s.rows, s.m) * _cdiv(s.case.channels, s.n), (s.over(s.case.channels, TERMS),))


def _dense_fill(s: _Sizes) -> Work:
    # neighbours of knn_graph are distinct, so no edges are compared
    return Work(s.rows, (s.over(2 * s.case.nodes, s.n), Bound(0, s.m)))


def _dense_product(s: _Sizes) -> Work:
    tiles = s.case.batch * _cdiv(s.case.nodes, s.m) * _cdiv(s.case.channels, s.n)
    again = Bound(0, 1, (s.over(s.case.neighbours, int(s.constants["BLOCK_G"])),))
    return Work(tiles, (s.over(s.case.nodes, int(s.constants["BLOCK_K"])), again))


def _csc_chunks(s: _Sizes) -> Work:
    from drseg_kernels.csc import chunks_of

    chunks, chunk = chunks_of(s.case.batch, s.case.nodes, s.case.nodes * s.case.neighbours)
    return Work(s.case.batch * chunks, (s.over(s.case.nodes, s.n), s.over(chunk, s.m)))


def _csc_scan(s: _Sizes) -> Work:
    from drseg_kernels.csc import chunks_of

    chunks, _ = chunks_of(s.case.batch, s.case.nodes, s.case.nodes * s.case.neighbours)
    return Work(s.case.batch * _cdiv(s.case.nodes, s.n), (s.over(chunks, s.m),))


_WORK: dict[str, Callable[[_Sizes], Work]] = {
    "_prepare_prior_kernel": _prepare_prior,
    "_prepare_prior_kernel_planes": _planes,
    "_linear_map_kernel_split": _split,
    "_linear_map_kernel_product": _linear_product,
    "_csc_kernel_count": _csc_chunks,
    "_csc_kernel_scan": _csc_scan,
    "_csc_kernel_place": _csc_chunks,
    "_knn_graph_fwd_kernel_merge": _merge,
    "_knn_graph_fwd_kernel_rounded": _rounded,
    "_knn_graph_fwd_kernel_live": _live,
    "_knn_graph_fwd_kernel_bounds": _live_bounds,
    "_knn_graph_fwd_kernel_whole_rows": _whole_rows,
    "_edge_weight_fwd_kernel": _edge_weight,
    "_edge_weight_bwd_kernel_source": _edge_weight_source,
    "_edge_weight_bwd_kernel_target": _edge_weight_target,
    "_edge_coefficient_fwd_kernel": _edge_coefficient,
    "_edge_coefficient_bwd_kernel_slope": _slope,
    "_degree_normalize_fwd_kernel_row": _slots(2),
    "_degree_normalize_bwd_kernel_row": _slots(3),
    "_degree_normalize_fwd_kernel_scale": _scale,
    "_degree_normalize_fwd_kernel_edges": _slots(1),
    "_degree_normalize_bwd_kernel_degree": _degree,
    "_degree_normalize_bwd_kernel_edges": _slots(1),
    "_graph_propagate_fwd_kernel": _propagate,
    "_graph_propagate_bwd_kernel": _gradients,
    "_graph_propagate_bwd_kernel_dot": _dot,
    "_graph_layer_fwd_kernel": _layer,
    "_graph_layer_fwd_kernel_norm": _over_channels(3),
    "_graph_layer_dense_kernel_fill": _dense_fill,
    "_graph_layer_dense_kernel_product": _dense_product,
    "_graph_layer_bwd_kernel_moments": _over_channels(1),
    "_graph_layer_bwd_kernel_activation": _activation,
    "_graph_layer_bwd_kernel_edges": _layer_edges,
    "_graph_layer_bwd_kernel_sum": _layer_sum,
}


def work_of(variant: Variant, case: Case) -> Work | None:
    """What a launch of the variant does at a case; None for a kernel that is not described here."""
    describe = _WORK.get(variant.kernel.__name__)
    if describe is None:
        return None
    kinds = [variant.types[name] for name in ("inner_ptr", "x_ptr", "end_ptr", "target_ptr") if name in variant.types]
    return describe(_Sizes(case, variant.constants, _BYTES[kinds[0][1:]] if kinds else 4))
