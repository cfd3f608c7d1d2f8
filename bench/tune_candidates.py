# SPDX-License-Identifier: Apache-2.0
"""What ``tune.py`` tries: the rule's sizes first, then their neighbours that a device has the shared memory for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from drseg_kernels import _knn_sizes, _launch, _tile
from drseg_kernels._knn_sizes import FUSED_NEIGHBOURS, ON_CHIP_NODES, STRATEGIES, Fused, OnChip, Way
from drseg_kernels._launch import Configuration, Device, power_of_two_from
from drseg_kernels._tile import Tile

from drseg_core.testing import Case

# tables of each op, and what their entries are arguments of; that of the strategies is timed with the sizes before it
TABLES = {
    "knn_graph": ("knn_graph", "knn_graph_on_chip", "knn_graph_fused", "knn_graph_strategy"),
    "edge_weight": ("edge_weight",),
    "degree_normalize": ("degree_normalize",),
    "edge_coefficient": ("edge_coefficient",),
    "graph_propagate": ("graph_propagate", "graph_propagate_dot"),
    "graph_layer": ("graph_layer", "graph_layer_rows"),
}
KINDS: dict[str, Any] = {
    "knn_graph": Configuration,
    "knn_graph_on_chip": OnChip,
    "knn_graph_fused": Fused,
    "knn_graph_strategy": Way,
    "edge_weight": Tile,
    "degree_normalize": Tile,
    "edge_coefficient": Tile,
    "graph_propagate": Tile,
    "graph_propagate_dot": Tile,
    "graph_layer": Tile,
    "graph_layer_rows": Tile,
}


def _tiles(device: Device, case: Case) -> Iterator[dict[str, int]]:
    rule = _launch.rule(device, case.nodes, case.neighbours)
    yield dataclasses.asdict(rule)
    # within the cache, or so large that the library's product has work for the whole device
    tiles = (device.l2_bytes // 8, min(_launch.TILE_BYTES, device.l2_bytes // 2), _launch.TILE_BYTES)
    for columns, tile, warps in itertools.product((512, 1024, 2048, 4096), tiles, (1, 2, 4, 8)):
        yield {"tile_bytes": tile, "columns": columns, "rows_per_program": 1, "num_warps": warps}


def _on_chip(device: Device, case: Case) -> Iterator[dict[str, int]]:
    if case.nodes > ON_CHIP_NODES:
        return
    yield dataclasses.asdict(_knn_sizes.on_chip_rule(device, case.nodes))
    for rows, columns, depth, warps, stages in itertools.product((16, 32), (64, 128), (32, 64), (8, 16), (1, 2)):
        yield {"rows": rows, "columns": columns, "depth": depth, "num_warps": warps, "num_stages": stages}


def _fused(device: Device, case: Case) -> Iterator[dict[str, int]]:
    # where a row's first window is the whole grid there is nothing to leave out
    if case.nodes <= ON_CHIP_NODES or case.neighbours > FUSED_NEIGHBOURS:
        return
    rule = _knn_sizes.fused_rule(device, case.nodes, case.neighbours)
    yield dataclasses.asdict(rule)
    for depth, window, splits, stages in itertools.product((16, 32, 64), (3, 5), (1, 3, 7), (2, 3, 4)):
        yield dataclasses.asdict(rule) | {"depth": depth, "window": window, "splits": splits, "num_stages": stages}


def _ways(device: Device, case: Case) -> Iterator[dict[str, str]]:
    rule = _knn_sizes.strategy_rule(device, case.nodes)
    for strategy in (rule, *STRATEGIES):
        if Way(strategy).fits(case.nodes, case.neighbours):
            yield {"strategy": strategy}


def _edges(op: str, width: Callable[[Case], int]) -> Callable[..., Iterator[Any]]:
    """Sizes for an op that goes edge by edge, or row by row."""

    def found(device: Device, case: Case) -> Iterator[dict[str, int]]:
        yield dataclasses.asdict(_tile.rule(op, device, case.nodes, case.neighbours, width(case)))
        rows = (1,) if op == "degree_normalize" else (8, 16, 32)
        for count, columns, warps in itertools.product(rows, (32, 64, 128, 256), (1, 2, 4)):
            # a thread holds at least one value and so few that they stay in registers
            if 32 * warps <= count * columns <= 64 * 32 * warps or op == "degree_normalize":
                yield dataclasses.asdict(Tile(count, columns, warps))

    return found


def _sums(op: str, width: Callable[[Case], int]) -> Callable[..., Iterator[Any]]:
    """Sizes for an op of which every strategy is tried: gathered, densified, by unions of patches."""

    def found(device: Device, case: Case) -> Iterator[dict[str, int]]:
        yield from _edges(op, width)(device, case)
        if case.nodes <= ON_CHIP_NODES:
            yield dataclasses.asdict(_tile.dense(op, width(case)))
        yield dataclasses.asdict(_tile.union(op, width(case)))
        # patches as square as they may be, for each number of rows; all nodes as sources where they are few
        patches = {16: 4, 32: 4, 64: 8, 128: 8}
        for rows, columns, sources in itertools.product(patches, (64, 128), (16, 32)):
            for patch in (*((0,) if case.nodes <= ON_CHIP_NODES else ()), patches[rows]):
                yield dataclasses.asdict(Tile(rows, columns, 4 if rows <= 32 else 8, sources, patch))

    return found


def _layers(device: Device, case: Case) -> Iterator[dict[str, int]]:
    """Sizes of ``graph_layer``: programs that hold whole rows, by every strategy."""
    rule = _tile.rule("graph_layer", device, case.nodes, case.neighbours, case.channels)
    yield dataclasses.asdict(rule)
    if case.nodes <= ON_CHIP_NODES:
        yield dataclasses.asdict(_tile.dense("graph_layer", case.channels))
    yield dataclasses.asdict(_tile.union("graph_layer", case.channels))
    whole = min(_tile.WIDEST_ROW, max(16, power_of_two_from(case.channels)))
    for rows, warps in itertools.product((2, 4, 8, 16), (1, 2, 4, 8)):
        if 32 * warps <= rows * whole <= 64 * 32 * warps:
            yield dataclasses.asdict(Tile(rows, whole, warps))
    for rows, sources, warps in itertools.product((16, 32), (16, 32), (4, 8, 16)):
        for patch in (*((0,) if case.nodes <= ON_CHIP_NODES else ()), 4):
            if rows * whole <= 64 * 32 * warps:
                yield dataclasses.asdict(Tile(rows, whole, warps, sources, patch))


def _layer_rows(device: Device, case: Case) -> Iterator[dict[str, int]]:
    """Sizes for what ``graph_layer`` does row by row; a program that holds whole rows needs no second look at them."""
    rule = _tile.rule("graph_layer_rows", device, case.nodes, case.neighbours, case.channels)
    yield dataclasses.asdict(rule)
    for rows, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        if 32 * warps <= rows * rule.columns <= 64 * 32 * warps:
            yield dataclasses.asdict(Tile(rows, rule.columns, warps))


_ASKED: dict[str, Callable[[Device, Case], Iterable[dict[str, Any]]]] = {
    "knn_graph": _tiles,
    "knn_graph_on_chip": _on_chip,
    "knn_graph_fused": _fused,
    "knn_graph_strategy": _ways,
    "edge_weight": _edges("edge_weight", lambda case: case.hidden),
    "degree_normalize": _edges("degree_normalize", lambda case: case.neighbours),
    "edge_coefficient": _edges("edge_coefficient", lambda case: case.hidden),
    "graph_propagate": _sums("graph_propagate", lambda case: case.channels),
    "graph_propagate_dot": _sums("graph_propagate_dot", lambda case: case.channels),
    "graph_layer": _layers,
    "graph_layer_rows": _layer_rows,
}


def candidates(table: str, device: Device, case: Case) -> list[Any]:
    """Launch configurations to time, each once, the rule's first; empty where the table is not for such a case.

    Args:
        table: a key of ``KINDS``. device: where they must fit. case: the size.
    """
    found: dict[Any, None] = {}
    for given in _ASKED[table](device, case):
        option = KINDS[table](**given)
        if option.shared_bytes() <= device.shared_bytes:
            found.setdefault(option)
    return list(found)
