# SPDX-License-Identifier: Apache-2.0
"""Kernels that are launched where the tuner times a table's sizes: what a prediction of its time adds up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.aot_variants import PLAIN, Variant, _large, _merge, _rounded, _variant
from drseg_core.testing import Case


def launched(table: str, device: Any, case: Case, sizes: Any, dtype: str = "fp32") -> list[Variant]:
    """Kernels that one call launches where the tuner times a table's sizes, each as often as it is launched.

    Args:
        table: a table of the tuner. device: a ``Device``, for kernels whose sizes come from another table. case: the
        size. sizes: of the table. dtype: of the features, as in a kernel's types.
    """
    return _LAUNCHED[table](device, case, sizes, dtype)


def _launched_knn_graph(device: Any, case: Case, sizes: Any, dtype: str) -> list[Variant]:
    from drseg_kernels import knn_graph as op
    from drseg_kernels import knn_rounded as rounded

    given = ("additive", True)
    if dtype == "fp32" and case.nodes <= sizes.block_n:
        return [_rounded(rounded.constants(case.nodes, case.neighbours, *given, False, sizes))]
    tiles = (True, False) if sizes.block_n < case.nodes else (True,)
    return [_merge(op.constants(case.nodes, case.neighbours, *given, first, sizes), sizes) for first in tiles]


def _launched_knn_live(device: Any, case: Case, sizes: Any, dtype: str) -> list[Variant]:
    return list(_large((case.height, case.width), case.neighbours, "additive", True, sizes, dtype))


def _launched_edge_weight(device: Any, case: Case, tile: Any, dtype: str) -> list[Variant]:
    from drseg_kernels import edge_weight as op

    everything = {**PLAIN, "SLOPES": False, "NEED_SOURCE": True, "NEED_PARAMETERS": True}
    rows: tuple[tuple[Any, Any, dict[str, Any]], ...] = (
        (op._edge_weight_fwd_kernel, tile, {**PLAIN, "MASK": "none"}),
        (op._edge_weight_bwd_kernel_source, op.two_sums(tile), everything),
        (op._edge_weight_bwd_kernel_target, tile, PLAIN),
    )
    return [_variant("edge_weight", *row[:2], dtype, row[2], even=case.hidden % 16 == 0) for row in rows]


def _launched_edge_coefficient(device: Any, case: Case, tile: Any, dtype: str) -> list[Variant]:
    from drseg_kernels import _launch
    from drseg_kernels import degree_normalize as degrees
    from drseg_kernels import edge_coefficient as op

    constants = {"NORM": "sym_row", **PLAIN, "MASK": "none"}
    even = case.hidden % 16 == 0
    other = _launch.choose("degree_normalize", device, torch.float32, case.nodes, case.neighbours, case.neighbours)
    edges = degrees._degree_normalize_fwd_kernel_edges
    return [
        _variant("edge_coefficient", op._edge_coefficient_fwd_kernel, tile, dtype, constants, even=even),
        _variant("degree_normalize", edges, other, "fp32", {"NORM": "sym_row"}),
    ]


def _launched_degree_normalize(device: Any, case: Case, tile: Any, dtype: str) -> list[Variant]:
    from drseg_kernels import degree_normalize as op

    scale, norm = op._degree_normalize_fwd_kernel_scale, {"NORM": "sym_row"}
    # the backward finds the scales again
    forward = (scale, op._degree_normalize_fwd_kernel_edges)
    backward = (scale, op._degree_normalize_bwd_kernel_degree, op._degree_normalize_bwd_kernel_edges)
    return [_variant("degree_normalize", kernel, tile, dtype, norm) for kernel in (*forward, *backward)]


def _launched_graph_propagate(device: Any, case: Case, tile: Any, dtype: str) -> list[Variant]:
    from drseg_kernels import graph_propagate as op

    kernel, even = op._graph_propagate_fwd_kernel, case.channels % 16 == 0
    return [
        _variant("graph_propagate", kernel, tile, dtype, {"TRANSPOSE": transpose}, even=even)
        for transpose in (False, True)
    ]


def _launched_graph_propagate_dot(device: Any, case: Case, tile: Any, dtype: str) -> list[Variant]:
    from drseg_kernels import graph_propagate as op

    kernel, even, options = op._graph_propagate_bwd_kernel_dot, case.channels % 16 == 0, tile.options(True)
    return [_variant("graph_propagate", kernel, tile, dtype, {"BOTH": False}, even=even, options=options)]


def _launched_graph_layer(device: Any, case: Case, tile: Any, dtype: str) -> list[Variant]:
    from drseg_kernels import _launch
    from drseg_kernels import graph_layer as op

    even, options = case.channels % 16 == 0, tile.options(limit_registers=True)
    wide = case.channels > tile.block_n
    activation = "none" if wide else "layer_norm"
    constants = {"UNDIRECTED": False, "SCALED": False, "BIAS": True, "ACTIVATION": activation, "KEEP": not wide}
    found = [_variant("graph_layer", op._graph_layer_fwd_kernel, tile, dtype, constants, even, options)]
    if wide:
        rows = _launch.choose("graph_layer_rows", device, torch.float32, case.nodes, case.neighbours, case.channels)
        options = rows.options(limit_registers=True)
        found.append(_variant("graph_layer", op._graph_layer_fwd_kernel_norm, rows, dtype, {}, even, options))
    return found


def _launched_graph_gradients(device: Any, case: Case, tile: Any, dtype: str) -> list[Variant]:
    from drseg_kernels import graph_propagate as op

    constants = {"TRANSPOSE": False, "NEED_X": True, "NEED_DOT": True}
    kernel, even, options = op._graph_propagate_bwd_kernel, case.channels % 16 == 0, tile.options(True)
    return [_variant("graph_propagate", kernel, tile, dtype, constants, even=even, options=options)]


def _launched_graph_layer_rows(device: Any, case: Case, tile: Any, dtype: str) -> list[Variant]:
    from drseg_kernels import graph_layer as op

    even, options = case.channels % 16 == 0, tile.options(limit_registers=True)
    whole = case.channels <= tile.block_n
    everything = {"ACTIVATION": "layer_norm", "PLANES": False, "WHOLE": whole}
    everything |= {"NEED_INNER": True, "NEED_PARAMETERS": True}
    rows: tuple[tuple[Any, dict[str, Any]], ...] = (
        *(() if whole else ((op._graph_layer_bwd_kernel_moments, {}),)),
        (op._graph_layer_bwd_kernel_activation, everything),
        (op._graph_layer_bwd_kernel_sum, {"BIAS": True}),
    )
    return [_variant("graph_layer", kernel, tile, dtype, constants, even, options) for kernel, constants in rows]


_LAUNCHED: dict[str, Callable[[Any, Case, Any, str], list[Variant]]] = {
    "knn_graph": _launched_knn_graph,
    "knn_live": _launched_knn_live,
    "edge_weight": _launched_edge_weight,
    "edge_coefficient": _launched_edge_coefficient,
    "degree_normalize": _launched_degree_normalize,
    "graph_propagate": _launched_graph_propagate,
    "graph_propagate_dot": _launched_graph_propagate_dot,
    "graph_gradients": _launched_graph_gradients,
    "graph_layer": _launched_graph_layer,
    "graph_layer_rows": _launched_graph_layer_rows,
}
