# SPDX-License-Identifier: Apache-2.0
"""Sizes of the programs of the ops on edges, and how ``graph_propagate`` computes: gathered, densified or by unions.

Beside the tables of the ops there are ``graph_propagate_dot`` for the gradient to coefficients, and
``graph_layer_rows`` for what ``graph_layer`` does row by row.

The rules are what was fastest or nearly so on an H100 (2026-11), ``graph_layer``'s by arithmetic. Tables as in
``_launch.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drseg_kernels import _launch
from drseg_kernels._launch import TUNED, Device, known_device, power_of_two_from

# The fusion of multiply and add is pinned on: these kernels are sums of products, which it makes half as long, and no
# result of theirs is compared bit for bit with another backend's.
FUSED = {"enable_fp_fusion": True}

# Values of a tile per thread: enough loads in flight to hide the memory, few enough to stay in registers.
_VALUES_PER_THREAD = 32

# Under the interpreter dense products take the place of gathering up to this many nodes, and up to this many nodes per
# neighbour: its cost is per instruction. On an H100 they take 4.6 times as long (8 x 576 nodes, float32, 2026-11).
DENSE_NODES = 1024
DENSE_NODES_PER_NEIGHBOUR = 12

# Rows, columns and warps of the gathered ops. Small programs: what counts is how many loads are under way on the whole
# device. Twice to eight times as large ones took 1.25 to 2.4 times as long.
_GATHERED = {
    "edge_weight": (32, 32, 1),
    "edge_coefficient": (16, 32, 1),
    "graph_propagate": (16, 64, 2),
    "graph_propagate_dot": (32, 32, 2),
}

# a program that normalises rows holds them whole up to this many channels
WIDEST_ROW = 1024


@dataclass(frozen=True)
class Tile:
    """Sizes of a program.

    Args:
        rows: edges at a time, or with ``sources`` nodes that one program computes; a power of two.
        columns: hidden units or channels at a time, a power of two.
        num_warps: warps of one program, a power of two.
        sources: 0 gathers each neighbour; otherwise ``graph_propagate`` multiplies dense tiles of this many nodes.
        patch: 0 takes all nodes as sources; otherwise the nodes of a program are a patch so many grid rows high, and
            its sources the union of their neighbours; a power of two.
    """

    rows: int
    columns: int
    num_warps: int
    sources: int = 0
    patch: int = 0

    def __post_init__(self) -> None:
        # the matrix units take no side below 16
        least = 16 if self.sources else 1
        sizes = (("rows", least), ("columns", least), ("num_warps", 1), ("sources", least), ("patch", 1))
        for name, low in sizes:
            value = getattr(self, name)
            if name in ("sources", "patch") and value == 0 and isinstance(value, int):
                continue
            if not isinstance(value, int) or value < low or value & (value - 1):
                raise ValueError(
                    f"Tile: {name} is out of range; expected a power of two of at least {low}, got {value!r}"
                )
        if self.patch and (not self.sources or self.patch > self.rows):
            raise ValueError(
                f"Tile: patch does not fit; expected at most rows, {self.rows}, and sources with it, "
                f"got {self.patch!r} with sources {self.sources!r}"
            )

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels."""
        return {"ROWS": self.rows, "COLUMNS": self.columns} | ({"SOURCES": self.sources} if self.sources else {})

    def options(self) -> dict[str, Any]:
        """What the compiler is told; the dense products are too short to be worth a pipeline."""
        return {"num_warps": self.num_warps} | ({"num_stages": 1} if self.sources else {})

    def shared_bytes(self) -> int:
        """Upper bound of a block's shared memory, which ``bench/aot.py`` compares with what the compiler asks for.

        Gathered: the parts of a sum over the rows that the warps exchange. Densified: both operands, each as up to
        three parts of half the width.
        """
        if not self.sources:
            return 4 * self.rows * self.columns + 1024
        return 6 * self.sources * (self.rows + self.columns) + 4 * self.rows * self.columns + 1024


def options(tile: Tile) -> dict[str, Any]:
    """What the compiler is told of kernels that it would have spill a few registers, so that more programs run."""
    return {**tile.options(), **FUSED, "maxnreg": min(255, 65_536 // (32 * tile.num_warps))}


def union(op: str, width: int) -> Tile:
    """Sizes with which sums over unions begin; the rule does not take them, a table may.

    Of a DINO-like prior on 128 x 128 nodes with 75 neighbours each, 64 nodes of a square share 456 instead of 4800
    (878 without a decay), 16 share 250 instead of 1200 (CPU, 2026-11), so far less is loaded. But every graph has to be
    sorted for it first, and a patch compares each source with each of its edges: on an H100 4096 nodes take 0.84 ms
    both ways, and 0.20 gathered (2026-11), whose cache serves the gathered values well.

    Args:
        op: ``graph_propagate``, ``graph_propagate_dot`` or ``graph_layer``. width: C.
    """
    if op == "graph_propagate":
        return Tile(64, 128, 8, 16, 8)
    if op == "graph_propagate_dot":
        return Tile(64, 32, 8, 64, 8)
    # whole rows as far as they fit, so of fewer nodes
    whole = min(512, max(64, power_of_two_from(width)))
    return Tile(32 if whole <= 256 else 16, whole, 8, 16, 4)


def dense(op: str, width: int) -> Tile:
    """Sizes with which densified sums begin; the rule does not take them, a table may. Arguments as of ``union``."""
    if op == "graph_propagate":
        return Tile(32, 128, 4, 16)
    if op == "graph_propagate_dot":
        # with fewer warps the products and the places of the edges do not fit the registers
        return Tile(64, 32, 8, 64)
    # a whole row in one program, so that it can be normalised; it also builds the dense tile once
    columns = min(512, max(64, power_of_two_from(width)))
    return Tile(16, columns, 8 if columns > 256 else 4, 16)


def rule(op: str, device: Device, nodes: int, k: int, width: int) -> Tile:
    """Sizes for a device without a table.

    Args:
        op: name of the op. device: where it runs. nodes, k: N and K.
        width: E of ``edge_weight`` and ``edge_coefficient``, C of ``graph_propagate`` and ``graph_layer``, K of
            ``degree_normalize``.
    """
    interpreted = device.name == "interpreter"
    if op == "degree_normalize":
        # one row or one list per program: only its slots are worked on at a time
        columns = min(1024, max(32, power_of_two_from(width)))
        return Tile(1, columns, max(1, min(4, columns // 256)))
    whole = min(WIDEST_ROW, max(16, power_of_two_from(width)))
    if op == "graph_layer_rows":
        return Tile(max(1, 1024 // whole), whole, max(1, min(4, whole // 128)))
    few = nodes <= DENSE_NODES and nodes <= DENSE_NODES_PER_NEIGHBOUR * k
    if interpreted and few and op.startswith("graph_"):
        return Tile(64, min(256, max(64, whole)), 4, 64)
    if op == "graph_layer":
        rows = min(max(1, 4 * 32 * _VALUES_PER_THREAD // whole), max(4, power_of_two_from(k)))
        return Tile(rows, whole, max(1, min(4, rows * whole // (32 * _VALUES_PER_THREAD))))
    if interpreted:
        # its cost is per instruction
        return Tile(max(16, min(64, power_of_two_from(k))), min(256, max(16, power_of_two_from(width))), 4)
    rows, columns, warps = _GATHERED[op]
    return Tile(min(rows, max(4, power_of_two_from(k))), min(columns, max(16, power_of_two_from(width))), warps)


def table(op: str, device: Device, tuned: Path = TUNED) -> tuple[tuple[int, int, Tile], ...]:
    """Rows (nodes, k, tile) of a device's table, empty where there is none."""
    return _launch.read_table(tuned / _launch.folder_of(device.name) / f"{op}.json", Tile)


def choose(op: str, device: Device, nodes: int, k: int, width: int, tuned: Path = TUNED) -> Tile:
    """The device's table if an entry is large enough and fits the device's shared memory, else the rule."""
    for up_to_nodes, up_to_k, found in table(op, device, tuned):
        if nodes <= up_to_nodes and k <= up_to_k and found.shared_bytes() <= device.shared_bytes:
            return found
    return rule(op, device, nodes, k, width)


def tile_of(op: str, device: torch.device, nodes: int, k: int, width: int) -> Tile:
    """Sizes of a launch on ``device``; arguments as in ``rule``."""
    return choose(op, known_device(device), nodes, k, width)
