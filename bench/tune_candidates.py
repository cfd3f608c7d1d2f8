# SPDX-License-Identifier: Apache-2.0
"""What ``tune.py`` tries: the rule's sizes first, then their neighbours that a device has the shared memory for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from drseg_kernels import _knn_sizes, _launch, _tile
from drseg_kernels._knn_sizes import FUSED_NEIGHBOURS, ON_CHIP_NODES, STRATEGIES, Fused, OnChip, Way
from drseg_kernels._launch import Configuration, Device
from drseg_kernels._tile import Tile

from drseg_core.ops._cases import Case

# tables of each op, and what their entries are arguments of; that of the strategies is timed with the sizes before it
TABLES = {
    "knn_graph": ("knn_graph", "knn_graph_on_chip", "knn_graph_fused", "knn_graph_strategy"),
    "edge_weight": ("edge_weight",),
    "degree_normalize": ("degree_normalize",),
    "graph_propagate": ("graph_propagate",),
}
KINDS: dict[str, Any] = {
    "knn_graph": Configuration,
    "knn_graph_on_chip": OnChip,
    "knn_graph_fused": Fused,
    "knn_graph_strategy": Way,
    "edge_weight": Tile,
    "degree_normalize": Tile,
    "graph_propagate": Tile,
}


def _tiles(device: Device, case: Case) -> Iterator[dict[str, int]]:
    rule = _launch.rule(device, case.nodes, case.neighbours)
    yield dataclasses.asdict(rule)
    for columns, share, warps in itertools.product((512, 1024, 2048, 4096), (8, 4, 2), (1, 2, 4, 8)):
        tile = min(64 << 20, device.l2_bytes // share)
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
    rule = _knn_sizes.strategy_rule(case.nodes)
    for strategy in (rule, *STRATEGIES):
        if Way(strategy).fits(case.nodes, case.neighbours):
            yield {"strategy": strategy}


def _edges(op: str, widths: Callable[[Case], int], sources: tuple[int, ...] = ()) -> Callable[..., Iterator[Any]]:
    def found(device: Device, case: Case) -> Iterator[dict[str, int]]:
        yield dataclasses.asdict(_tile.rule(op, device, case.nodes, case.neighbours, widths(case)))
        rows = (1,) if op == "degree_normalize" else (8, 16, 32)
        for count, columns, warps in itertools.product(rows, (32, 64, 128, 256), (1, 2, 4)):
            # a thread holds at least one value and so few that they stay in registers
            if 32 * warps <= count * columns <= 64 * 32 * warps or op == "degree_normalize":
                yield {"rows": count, "columns": columns, "num_warps": warps, "sources": 0}
        for count, columns, width in itertools.product((16, 32, 64), (64, 128), sources):
            yield {"rows": count, "columns": columns, "num_warps": 4, "sources": width}

    return found


_ASKED: dict[str, Callable[[Device, Case], Iterable[dict[str, Any]]]] = {
    "knn_graph": _tiles,
    "knn_graph_on_chip": _on_chip,
    "knn_graph_fused": _fused,
    "knn_graph_strategy": _ways,
    "edge_weight": _edges("edge_weight", lambda case: case.hidden),
    "degree_normalize": _edges("degree_normalize", lambda case: case.neighbours),
    "graph_propagate": _edges("graph_propagate", lambda case: case.channels, (16, 32, 64)),
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
