# SPDX-License-Identifier: Apache-2.0
"""How ``knn_graph`` computes, and the sizes of the kernels that multiply by themselves; tables as in ``_launch.py``.

The sizes by rule are by arithmetic; an H100's table has what was fastest there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drseg_kernels._launch import TUNED, Device, folder_of, power_of_two_from, read_table

STRATEGIES = ("tiles", "on_chip", "fused")

# A row's scores are kept in registers up to this many nodes.
ON_CHIP_NODES = 1024

# So many neighbours and one more patch of 64 are 1024 candidates, which a program selects from in registers.
FUSED_NEIGHBOURS = 960


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


@dataclass(frozen=True)
class Fused:
    """Sizes of the programs that search patch by patch.

    Args:
        patch: nodes of a patch, rows and columns of a tile of scores; a power of two of at least 16.
        depth: channels that are multiplied at a time, a power of two of at least 16.
        window: patches down and across that are searched first, at least; for four nodes per neighbour more than that.
        splits: programs that share the patches a patch of rows has to look at, one less than a power of two.
        num_warps: warps of one program, a power of two.
        num_stages: loads that are under way at a time.
    """

    patch: int
    depth: int
    window: int
    splits: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("patch", "depth"):
            _check_power("Fused", name, getattr(self, name), 16)
        _check_power("Fused", "num_warps", self.num_warps, 1)
        if not isinstance(self.splits, int) or self.splits < 1 or self.splits & (self.splits + 1):
            raise ValueError(
                f"Fused: splits is out of range; expected one less than a power of two, got {self.splits!r}"
            )
        for name in ("window", "num_stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Fused: {name} is out of range; expected at least 1, got {value!r}")

    @property
    def segments(self) -> int:
        """Of a row's candidates: one of the patches around it, one of each program that goes on."""
        return self.splits + 1

    def room(self, k: int) -> int:
        """Candidates of a segment: the k best, and whatever one more patch may add; a few patches where k is small."""
        return max(4 * self.patch, power_of_two_from(k + self.patch))

    def group(self, k: int) -> int:
        """Rows that are cut back at a time: 4 candidates per thread."""
        return min(self.patch, max(1, 128 * self.num_warps // self.room(k)))

    def narrow_warps(self, k: int) -> int:
        """Warps of the program between the searches; a single row at a time is too little for all of them."""
        return self.num_warps if self.group(k) > 1 else max(1, self.num_warps // 2)

    def select_rows(self, k: int) -> int:
        """Rows that one program selects: more than one only where they have few candidates."""
        return min(self.patch, max(1, 128 * self.num_warps // (self.segments * self.room(k))))

    def select_warps(self, k: int) -> int:
        """Warps of such a program: 16 candidates per thread."""
        return min(16, max(1, self.select_rows(k) * self.segments * self.room(k) // 512))

    def options(self, channels: int) -> dict[str, Any]:
        """What the compiler is told; rows that are not aligned are read number by number, without a pipeline."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages if channels % 16 == 0 else 1}

    def shared_bytes(self) -> int:
        """Upper bound of a block's shared memory, which ``bench/aot.py`` compares with what the compiler asks for.

        The float32 operands of each stage, or a tile of scores that changes hands between threads.
        """
        operands = 8 * self.num_stages * self.patch * self.depth
        return max(operands, 4 * self.patch * self.patch) + 4096


def fused_rule(device: Device, nodes: int, k: int) -> Fused:
    """Sizes for a device without a table; more programs for a patch of rows where there are few patches."""
    if device.name == "interpreter":
        # its cost is per instruction, and it has no warps
        return Fused(min(64, max(16, power_of_two_from(nodes))), 64, 1, 1, 2048, 1)
    return Fused(64, 16, 3, 3 if nodes <= 32_768 and k <= 512 else 1, 8, 2)


def choose_fused(device: Device, nodes: int, k: int, tuned: Path = TUNED) -> Fused:
    """The device's table if an entry is large enough and fits the device's shared memory, else the rule."""
    for up_to_nodes, up_to_k, found in fused_table(device, tuned):
        if nodes <= up_to_nodes and k <= up_to_k and found.shared_bytes() <= device.shared_bytes:
            return found
    return fused_rule(device, nodes, k)


def fused_table(device: Device, tuned: Path = TUNED) -> tuple[tuple[int, int, Fused], ...]:
    """Rows (nodes, k, sizes) of a device's table, empty where there is none."""
    return read_table(tuned / folder_of(device.name) / "knn_graph_fused.json", Fused)


@dataclass(frozen=True)
class Way:
    """How to compute, as a device's table says it.

    Args:
        strategy: one of ``STRATEGIES``.
    """

    strategy: str

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"Way: strategy is unknown; expected one of {', '.join(STRATEGIES)}, got {self.strategy!r}"
            )

    def fits(self, nodes: int, k: int) -> bool:
        """Whether the strategy takes so many."""
        most = {"on_chip": nodes <= ON_CHIP_NODES, "fused": k <= FUSED_NEIGHBOURS}
        return most.get(self.strategy, True)

    def shared_bytes(self) -> int:
        """Every device has room for some sizes of every strategy."""
        return 0


def strategy_rule(device: Device, nodes: int) -> str:
    """How to compute where nobody says it.

    On an H100 (2026-11) the library multiplies float32 far faster than the kernels that multiply by themselves: from a
    prepared prior 8 x 576 nodes take 0.20 ms by tiles and 1.44 on chip, 16384 take 10 ms and 48 fused, although that
    leaves products out. Those two are for who names them, and for a device's table.
    """
    return "on_chip" if device.name == "interpreter" and nodes <= ON_CHIP_NODES else "tiles"


def choose_strategy(device: Device, nodes: int, k: int, tuned: Path = TUNED) -> str:
    """What the device's table says of the size, else the rule."""
    for up_to_nodes, up_to_k, found in read_table(tuned / folder_of(device.name) / "knn_graph_strategy.json", Way):
        if nodes <= up_to_nodes and k <= up_to_k and found.fits(nodes, k):
            return found.strategy
    return strategy_rule(device, nodes)
