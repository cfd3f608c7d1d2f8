# SPDX-License-Identifier: Apache-2.0
"""What ``tune.py`` tries: the rule's sizes first, then their neighbours that a device has the shared memory for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from drseg_kernels import _launch
from drseg_kernels._launch import Device, Selection, Tile, power_of_two_from

from drseg_core.testing import Case

# tables of each op
TABLES = {
    "knn_graph": ("knn_graph",),
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
    for columns, tile, warps in itertools.product((512, 1024, 2048, 4096), tiles, (1, 2, 4, 8)):
        yield Selection(tile, 1, columns, warps)


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
    return None if table == "knn_graph" else _ASKED[table][0](case)


def candidates(table: str, device: Device, case: Case) -> list[Any]:
    """Launch sizes to time, each once, the rule's first.

    Args:
        table: a name in ``TABLES``. device: where they must fit. case: the size.
    """
    width, others = _ASKED[table]
    rule = _launch.rule(table, device, case.nodes, case.neighbours, width(case))
    options = dict.fromkeys([rule, *others(device, case)])
    return [option for option in options if option.shared_bytes() <= device.shared_bytes]
