# SPDX-License-Identifier: Apache-2.0
"""What ``tune.py`` tries: the rule's sizes first, then their neighbours that a device has the shared memory for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from drseg_kernels import _launch
from drseg_kernels._launch import Device, Live, Selection, Tile, power_of_two_from

from drseg_core.testing import Case

# tables of each op
TABLES = {
    "knn_graph": ("knn_graph", "knn_live"),
    "edge_weight": ("edge_weight",),
    "degree_normalize": ("degree_normalize",),
    "edge_coefficient": ("edge_coefficient",),
    "graph_propagate": ("graph_propagate", "graph_propagate_dot", "graph_gradients"),
    "graph_layer": ("graph_layer", "graph_layer_rows"),
}

# where the tuner tunes by default
DEFAULT_CASES = ("paper_vitl_24x24", "grid_64x64", "grid_128x128")


def _selections(device: Device, case: Case) -> Iterator[Selection]:
    # within the cache, or so large that the library's product has work for the whole device
    tiles = (device.l2_bytes // 8, min(_launch.TILE_BYTES, device.l2_bytes // 2), _launch.TILE_BYTES)
    # of fewer columns than nodes it would be a large image
    wide = [columns for columns in (512, 1024, 2048, 4096) if columns >= min(case.nodes, 1024)]
    for columns, tile, warps in itertools.product(wide, tiles, (1, 2, 4, 8)):
        yield Selection(tile, 1, columns, warps)


def _blocks(device: Device, case: Case) -> Iterator[Live]:
    for rows, channels, warps, stages in itertools.product((32, 64, 128), (32, 64), (4, 8), (3, 4, 5)):
        # a thread has at most 64 sums of a tile
        for columns in (64, 128):
            if 16 <= rows * columns // (32 * warps) <= 64:
                yield Live(rows, columns, channels, warps, stages)


def _edges(device: Device, case: Case) -> Iterator[Tile]:
    """Sizes for an op that goes edge by edge."""
    for rows, columns, warps in itertools.product((8, 16, 32), (32, 64, 128, 256), (1, 2, 4)):
        # a thread holds at least one value and so few that they stay in registers
        if 32 * warps <= rows * columns <= 64 * 32 * warps:
            yield Tile(rows, columns, warps)


def _slots(device: Device, case: Case) -> Iterator[Tile]:
    for columns, warps in itertools.product((32, 64, 128, 256), (1, 2, 4)):
        yield Tile(1, columns, warps)


def _rows(device: Device, case: Case) -> Iterator[Tile]:
    """Sizes of programs that hold whole rows."""
    whole = min(_launch.WIDEST_ROW, max(16, power_of_two_from(case.channels)))
    for rows, warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8)):
        if 32 * warps <= rows * whole <= 64 * 32 * warps:
            yield Tile(rows, whole, warps)


# of each table the width that its rule asks for, and what is tried beside the rule
_ASKED: dict[str, tuple[Callable[[Case], int], Callable[[Device, Case], Iterable[Any]]]] = {
    "knn_graph": (lambda case: case.prior, _selections),
    "knn_live": (lambda case: case.prior, _blocks),
    "edge_weight": (lambda case: case.hidden, _edges),
    "degree_normalize": (lambda case: case.neighbours, _slots),
    "edge_coefficient": (lambda case: case.hidden, _edges),
    "graph_propagate": (lambda case: case.channels, _edges),
    "graph_propagate_dot": (lambda case: case.channels, _edges),
    "graph_gradients": (lambda case: case.channels, _rows),
    "graph_layer": (lambda case: case.channels, _rows),
    "graph_layer_rows": (lambda case: case.channels, _rows),
}


def width_of(table: str, case: Case) -> int | None:
    """What an entry of a table is keyed by beside the dtype; None where the rule does not ask for a width."""
    return None if table in ("knn_graph", "knn_live") else _ASKED[table][0](case)


def decides(table: str, case: Case) -> bool:
    """Whether a table's sizes make a difference at a case: those of small graphs and of large ones are two tables."""
    large = case.nodes > 1024
    return {"knn_graph": not large, "knn_live": large}.get(table, True)


def candidates(table: str, device: Device, case: Case) -> list[Any]:
    """Launch sizes to time, each once, the rule's first.

    Args:
        table: a name in ``TABLES``. device: where they must fit. case: the size.
    """
    width, others = _ASKED[table]
    rule = _launch.rule(table, device, case.nodes, case.neighbours, width(case))
    options = dict.fromkeys([rule, *others(device, case)])
    return [option for option in options if option.shared_bytes() <= device.shared_bytes]
