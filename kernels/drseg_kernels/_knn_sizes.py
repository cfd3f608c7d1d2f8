# SPDX-License-Identifier: Apache-2.0
"""How ``knn_graph`` computes, and the sizes of the kernels that multiply by themselves; tables as in ``_launch.py``.

No rule here has been measured on a GPU; what they aim at stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drseg_kernels._launch import TUNED, Device, folder_of, power_of_two_from, read_table

STRATEGIES = ("tiles", "on_chip")

# A row's scores are kept in registers up to this many nodes.
ON_CHIP_NODES = 1024


def _check_power(kind: str, name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least or value & (value - 1):
        raise ValueError(f"{kind}: {name} is out of range; expected a power of two of at least {least}, got {value!r}")


@dataclass(frozen=True)
class OnChip:
    """Sizes of a program that keeps all scores of its rows.

    Args:
        rows: nodes that one program computes, a power of two of at least 16 (the matrix units take no smaller side).
        columns: nodes that they are compared with at a time, a power of two of at least 16.
        depth: channels that are multiplied at a time, a power of two of at least 16.
        num_warps: warps of one program, a power of two.
        num_stages: loads that are under way at a time.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "depth"):
            _check_power("OnChip", name, getattr(self, name), 16)
        _check_power("OnChip", "num_warps", self.num_warps, 1)
        if not isinstance(self.num_stages, int) or self.num_stages < 1:
            raise ValueError(f"OnChip: num_stages is out of range; expected at least 1, got {self.num_stages!r}")

    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def shared_bytes(self) -> int:
        """Upper bound of a block's shared memory, which ``bench/aot.py`` compares with what the compiler asks for.

        The float32 operands of each stage, or a tile of scores that changes hands between threads.
        """
        operands = 4 * self.num_stages * (self.rows + self.columns) * self.depth
        return max(operands, 4 * self.rows * self.columns) + 4096


def on_chip_rule(device: Device, nodes: int) -> OnChip:
    """Sizes for a device without a table: 16 rows x 1024 keys are 64 registers of each of 256 threads."""
    columns = min(128, max(16, power_of_two_from(nodes)))
    if device.name == "interpreter":
        # its cost is per instruction
        return OnChip(min(64, columns), columns, 64, 4, 1)
    # a pipeline of loads would need more registers than the keys leave
    return OnChip(16, columns, 32, 8 if nodes > 128 else 4, 1)


def choose_on_chip(device: Device, nodes: int, k: int, tuned: Path = TUNED) -> OnChip:
    """The device's table if an entry is large enough and fits the device's shared memory, else the rule."""
    for up_to_nodes, up_to_k, found in on_chip_table(device, tuned):
        if nodes <= up_to_nodes and k <= up_to_k and found.shared_bytes() <= device.shared_bytes:
            return found
    return on_chip_rule(device, nodes)


def on_chip_table(device: Device, tuned: Path = TUNED) -> tuple[tuple[int, int, OnChip], ...]:
    """Rows (nodes, k, sizes) of a device's table, empty where there is none."""
    return read_table(tuned / folder_of(device.name) / "knn_graph_on_chip.json", OnChip)


def strategy_rule(nodes: int) -> str:
    """How to compute where nobody says it. By arithmetic, not by measurement: the border has not been seen on a GPU."""
    return "on_chip" if nodes <= ON_CHIP_NODES else "tiles"
