# SPDX-License-Identifier: Apache-2.0
"""How large tiles and programs are: an argument, then the device's table in ``tuned/``, then a rule.

Nothing is timed at run time: two processes on the same device always choose the same sizes.
A table is ``tuned/<device>/<op>.json``, the device's name in lower case with ``_`` for what is no letter or digit::

    {"configurations": [{"nodes": 576, "k": 128, "configuration": {"tile_bytes": ..., ...}}, ...]}

The first entry with ``nodes`` and ``k`` at least those of the call counts. The sizes of ``knn_graph`` are here, those
of the ops on edges in ``_tile.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TUNED = Path(__file__).parent / "tuned"

# Shared memory that one block may take on the smallest device in view (sm_86, sm_89, sm_120), bytes.
SMALLEST_SHARED = 101_376

# Scores that live at a time, bytes. Products of so many are nearly as fast as the library's largest: on an H100
# (2026-11) 16384 nodes take 10.3 ms, with 128 MiB too; what the cache holds of them matters less.
TILE_BYTES = 64 << 20

# only the first axis of a CUDA grid is longer
LARGEST_GRID_Y = 65_535


@dataclass(frozen=True)
class Configuration:
    """Sizes of a launch.

    Args:
        tile_bytes: float32 scores that live at a time, bytes.
        columns: columns of a tile, a power of two.
        rows_per_program: rows that one program merges, a power of two.
        num_warps: warps of one program, a power of two.
    """

    tile_bytes: int
    columns: int
    rows_per_program: int
    num_warps: int

    def __post_init__(self) -> None:
        for name in ("columns", "rows_per_program", "num_warps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"Configuration: {name} is out of range; expected a power of two, got {value!r}")
        if not isinstance(self.tile_bytes, int) or self.tile_bytes < 4 * self.columns:
            raise ValueError(
                f"Configuration: tile_bytes is too small; expected at least a row of {self.columns} columns "
                f"({4 * self.columns} bytes), got {self.tile_bytes!r}"
            )

    def shared_bytes(self) -> int:
        """Upper bound of a block's shared memory: the parts of sums over a row that its warps exchange.

        ``bench/aot.py`` compares it with what the compiler asks for.
        """
        return 64 * self.rows_per_program * self.num_warps


@dataclass(frozen=True)
class Device:
    """What a rule needs to know of a device: name, L2 cache and shared memory per block, bytes."""

    name: str
    l2_bytes: int
    shared_bytes: int


def device_of(device: torch.device) -> Device:
    if device.type != "cuda":
        # the interpreter runs program by program, and its cost is per instruction
        return Device("interpreter", 32 << 20, SMALLEST_SHARED)
    found: Any = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", SMALLEST_SHARED)
    return Device(found.name, getattr(found, "L2_cache_size", 32 << 20), shared)


def rule(device: Device, nodes: int, k: int) -> Configuration:
    """Sizes for a device without a table."""
    slots = power_of_two_from(k)
    if device.name == "interpreter":
        columns = min(2048, max(16, power_of_two_from(nodes)))
        return Configuration(device.l2_bytes, columns, min(512, columns), 4)
    # with 2048 columns the selection takes a tenth longer
    columns = min(1024, max(32, power_of_two_from(nodes)))
    while True:
        # about 16 keys per thread: enough to hide the loads, few enough to stay in registers
        warps = min(16, max(1, power_of_two_from((columns + slots) // 1024 * 2)))
        chosen = Configuration(TILE_BYTES, columns, 1, warps)
        if chosen.shared_bytes() <= device.shared_bytes or columns == 32:
            return chosen
        columns //= 2


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within the block kernels are launched on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def power_of_two_from(value: int) -> int:
    """The smallest power of two that is at least ``value`` and 1."""
    return 1 << max(value - 1, 0).bit_length()


def folder_of(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@functools.cache
def read_table(path: Path, kind: Any = Configuration) -> tuple[tuple[int, int, Any], ...]:
    """Rows (nodes, k, sizes) of a table whose entries are arguments of ``kind``; empty where there is no such file.

    Raises:
        ValueError: the file is damaged, or an entry is not what ``kind`` takes.
    """
    if not path.is_file():
        return ()
    fields = {field.name for field in dataclasses.fields(kind)}
    rows = []
    try:
        for entry in json.loads(path.read_text(encoding="utf-8"))["configurations"]:
            rows.append((int(entry["nodes"]), int(entry["k"]), dict(entry["configuration"])))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name}: table is damaged; expected entries with nodes, k and configuration, got {error!r} in {path}"
        ) from error
    for _, _, given in rows:
        if set(given) != fields:
            raise ValueError(f"{path.name}: configuration is wrong; expected {sorted(fields)}, got {sorted(given)}")
    return tuple((nodes, k, kind(**given)) for nodes, k, given in rows)


def table(op: str, device: Device, tuned: Path = TUNED) -> tuple[tuple[int, int, Configuration], ...]:
    """Rows (nodes, k, configuration) of a device's table, empty where there is none."""
    return read_table(tuned / folder_of(device.name) / f"{op}.json")


def choose(op: str, device: Device, nodes: int, k: int, tuned: Path = TUNED) -> Configuration:
    """The device's table if an entry is large enough and fits the device's shared memory, else the rule."""
    for up_to_nodes, up_to_k, found in table(op, device, tuned):
        if nodes <= up_to_nodes and k <= up_to_k and found.shared_bytes() <= device.shared_bytes:
            return found
    return rule(device, nodes, k)


# asking torch takes longer than a launch
known_device = functools.cache(device_of)


def configuration_of(op: str, device: torch.device, nodes: int, k: int) -> Configuration:
    """Sizes of a launch on ``device`` for N nodes and k neighbours."""
    return choose(op, known_device(device), nodes, k)
