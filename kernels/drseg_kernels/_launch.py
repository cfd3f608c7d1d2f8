# SPDX-License-Identifier: Apache-2.0
"""How large tiles and programs are: an argument, then a table of the architecture in ``tuned/``, then a rule.

Nothing is timed at run time: two processes on the same device always choose the same sizes.
A table is ``tuned/<architecture>/<table>.json``, e.g. ``tuned/sm_90/graph_layer.json``::

    {"configurations": [{"dtype": "float32", "channels": 384, "nodes": 576, "k": 128,
                         "device": "NVIDIA H100 80GB HBM3", "configuration": {"block_m": 16, ...}}, ...]}

An entry holds only for the dtype and the width (``channels``: E, C or K, see ``rule``) for which it was timed, and for
at most its ``nodes`` and ``k``. If several apply, the first one that was timed on this very device counts (``device``,
which may be missing), else the first of the architecture. ``knn_graph`` has a ``Selection`` and ``knn_live`` a
``Live``, without ``channels``. Every other table has a ``Tile``.

Four tables are not named after an op. ``knn_live`` is for large images in ``knn_graph``. ``graph_gradients`` is for
both gradients of a propagation in one, ``graph_propagate_dot`` for the gradient to coefficients alone,
``graph_layer_rows`` for the row-wise part of ``graph_layer``. The rules are what was fastest or nearly so on an H100
(2026-11). Those of ``graph_layer``, ``graph_gradients`` and ``knn_live`` were found by arithmetic.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TUNED = Path(__file__).parent / "tuned"

# Shared memory that one block may take on the smallest device in view (sm_86, sm_89, sm_120), bytes.
SMALLEST_SHARED = 101_376

# Bytes of scores that live at a time. Products of this size are nearly as fast as the library's largest: on an H100
# (2026-11) 16384 nodes take 10.3 ms, and the same with 128 MiB. How much of it the cache holds matters less.
TILE_BYTES = 64 << 20

# only the first axis of a CUDA grid is longer
LARGEST_GRID_Y = 65_535

# The fusion of multiply and add is pinned on in kernels that are sums of products. It halves their length, and none of
# their results is compared bit for bit with another backend's.
FMA = {"enable_fp_fusion": True}


# block_m, block_n and warps of the ops on edges. Small programs: what counts is how many loads are under way on the
# whole device. Twice to eight times as large ones took 1.25 to 2.4 times as long.
_EDGES = {
    "edge_weight": (32, 32, 1),
    "edge_coefficient": (16, 32, 1),
    "graph_propagate": (16, 64, 2),
    "graph_propagate_dot": (32, 32, 2),
}

# a program that normalises rows holds them whole up to this many channels
WIDEST_ROW = 1024


@dataclass(frozen=True)
class Device:
    """What a rule and a table need to know of a device.

    Args:
        name: as torch gives it. l2_bytes: second-level cache. shared_bytes: shared memory that a block may take.
        arch: ``sm_90`` and the like, or ``interpreter``.
    """

    name: str
    l2_bytes: int
    shared_bytes: int
    arch: str

    @property
    def interpreted(self) -> bool:
        """Programs run one after another, and what they cost is instructions."""
        return self.arch == "interpreter"


def _check_powers(sizes: Any, *names: str) -> None:
    for name in names:
        value = getattr(sizes, name)
        if not isinstance(value, int) or value < 1 or value & (value - 1):
            raise ValueError(f"{type(sizes).__name__}: {name} is out of range; expected a power of two, got {value!r}")


@dataclass(frozen=True)
class Tile:
    """Sizes of a program of the ops on edges.

    Args:
        block_m: edges at a time, a power of two.
        block_n: hidden units or channels at a time, a power of two.
        num_warps: warps of one program, a power of two.
    """

    block_m: int
    block_n: int
    num_warps: int

    def __post_init__(self) -> None:
        _check_powers(self, "block_m", "block_n", "num_warps")

    @functools.cache  # noqa: B019 - there are as many as sizes
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels; not to be changed."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    @functools.cache  # noqa: B019
    def options(self, limit_registers: bool = False) -> dict[str, Any]:
        """What the compiler is told, not to be changed.

        With ``limit_registers`` it spills a few so that more programs run at a time.
        """
        limit = {"maxnreg": min(255, 65_536 // (32 * self.num_warps))} if limit_registers else {}
        return {"num_warps": self.num_warps, **FMA, **limit}

    def shared_bytes(self) -> int:
        """Upper bound of a block's shared memory: the parts of a sum over the edges that the warps exchange.

        ``python -m bench aot`` compares it with what the compiler asks for.
        """
        return 4 * self.block_m * self.block_n + 1024


@dataclass(frozen=True)
class Selection:
    """Sizes of ``knn_graph``: tiles of scores, and the programs that merge them.

    Args:
        tile_bytes: float32 scores that live at a time, bytes.
        block_m: rows that one program merges, a power of two.
        block_n: columns of a tile, a power of two.
        num_warps: warps of one program, a power of two.
    """

    tile_bytes: int
    block_m: int
    block_n: int
    num_warps: int

    def __post_init__(self) -> None:
        _check_powers(self, "block_m", "block_n", "num_warps")
        if not isinstance(self.tile_bytes, int) or self.tile_bytes < 4 * self.block_n:
            raise ValueError(
                f"Selection: tile_bytes is too small; expected at least a row of {self.block_n} columns "
                f"({4 * self.block_n} bytes), got {self.tile_bytes!r}"
            )

    def shared_bytes(self) -> int:
        """Upper bound of a block's shared memory: the parts of sums over a row that its warps exchange."""
        return 64 * self.block_m * self.num_warps


@dataclass(frozen=True)
class Live:
    """Sizes of ``knn_live``: the blocks of rows and columns of a program.

    Args:
        block_m, block_n: nodes in a block of rows, and of columns; powers of two.
        block_d: channels that are multiplied at a time, a power of two.
        num_warps: warps of one program, a power of two.
        num_stages: steps of a product whose rows are on their way at a time.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        _check_powers(self, "block_m", "block_n", "block_d", "num_warps")
        # no tensor core multiplies less
        for name in ("block_m", "block_n", "block_d"):
            if getattr(self, name) < 16:
                raise ValueError(f"Live: {name} is out of range; expected at least 16, got {getattr(self, name)}")

    def shared_bytes(self) -> int:
        """Upper bound of a block's shared memory: halves of the steps that are on their way, and an exchange."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_d * 2 + 2048


Sizes = Tile | Selection | Live


def device_of(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device("interpreter", 32 << 20, SMALLEST_SHARED, "interpreter")
    found: Any = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", SMALLEST_SHARED)
    arch = f"sm_{found.major}{found.minor}"
    return Device(found.name, getattr(found, "L2_cache_size", 32 << 20), shared, arch)


# asking torch takes longer than a launch
known_device = functools.cache(device_of)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within the block kernels are launched on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def ceil_div(value: int, step: int) -> int:
    """Quotient, rounded up; Triton's own is wrapped for its kernels, and slow on the host."""
    return -(-value // step)


def power_of_two_from(value: int) -> int:
    """The smallest power of two that is at least ``value`` and 1."""
    return 1 << max(value - 1, 0).bit_length()


def _selection_rule(device: Device, nodes: int, k: int) -> Selection:
    if device.interpreted:
        columns = min(2048, max(16, power_of_two_from(nodes)))
        return Selection(device.l2_bytes, min(512, columns), columns, 4)
    # with 2048 columns the selection takes a tenth longer
    columns = min(1024, max(32, power_of_two_from(nodes)))
    while True:
        # about 16 keys per thread: enough to hide the loads, few enough to stay in registers
        warps = min(16, max(1, power_of_two_from((columns + power_of_two_from(k)) // 1024 * 2)))
        chosen = Selection(TILE_BYTES, 1, columns, warps)
        if chosen.shared_bytes() <= device.shared_bytes or columns == 32:
            return chosen
        columns //= 2


def _live_rule(device: Device, nodes: int) -> Live:
    if device.interpreted:
        return Live(64, 128, 64, 4, 1)
    # About two programs for each processor of an H100, since some have twice the work of others, and tiles as large as
    # that allows: the larger, the less is read for a product. Of 64 channels at a time the largest fill the registers.
    rows = min(128, max(32, power_of_two_from(nodes // 256)))
    for stages in (4, 3, 2, 1):
        chosen = Live(rows, 128, 32, 8 if rows == 128 else 4, stages)
        if chosen.shared_bytes() <= device.shared_bytes:
            break
    return chosen


def rule(table: str, device: Device, nodes: int, k: int, width: int) -> Any:
    """Sizes for a device without a table.

    Args:
        table: name of the table. device: where it runs. nodes, k: N and K.
        width: E of ``edge_weight`` and ``edge_coefficient``, C of ``graph_propagate`` and ``graph_layer``, K of
            ``degree_normalize``; ``knn_graph`` and ``knn_live`` take no notice of it.
    """
    if table == "knn_graph":
        return _selection_rule(device, nodes, k)
    if table == "knn_live":
        return _live_rule(device, nodes)
    whole = min(WIDEST_ROW, max(16, power_of_two_from(width)))
    if table == "degree_normalize":
        # one row or one list per program: only its slots are worked on at a time
        columns = min(1024, max(32, power_of_two_from(width)))
        return Tile(1, columns, max(1, min(4, columns // 256)))
    if table == "graph_layer_rows":
        return Tile(max(1, 1024 // whole), whole, max(1, min(4, whole // 128)))
    if device.interpreted:
        # whole rows, and all edges of a node where they are few
        return Tile(min(128, max(4, power_of_two_from(k))), whole, 4)
    if table in ("graph_layer", "graph_gradients"):
        # one warp, so that its sums over a row need no barrier; 32 values of a thread are on their way at a time
        return Tile(min(max(1, 1024 // whole), max(4, power_of_two_from(k))), whole, 1)
    rows, columns, warps = _EDGES[table]
    return Tile(min(rows, max(4, power_of_two_from(k))), min(columns, max(16, power_of_two_from(width))), warps)


@dataclass(frozen=True)
class Entry:
    """Sizes that were timed, and what they were timed for.

    Args:
        dtype: of the features. channels: the width, see ``rule``; None in a table whose rule does not ask for it.
        nodes, k: the largest N and K that it is taken for. device: name of the card; None where nobody says.
        sizes: the configuration.
    """

    dtype: torch.dtype
    channels: int | None
    nodes: int
    k: int
    device: str | None
    sizes: Any

    def serves(self, dtype: torch.dtype, nodes: int, k: int, width: int) -> bool:
        return self.dtype == dtype and self.channels in (None, width) and nodes <= self.nodes and k <= self.k


def _entry(found: dict[str, Any], kind: Any) -> Entry:
    """An entry of a file, its configuration still as it stands there."""
    dtype = getattr(torch, found["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{found['dtype']} is no dtype")
    channels = int(found["channels"]) if kind is Tile else None
    return Entry(
        dtype, channels, int(found["nodes"]), int(found["k"]), found.get("device"), dict(found["configuration"])
    )


@functools.cache
def read_table(path: Path, kind: Any) -> tuple[Entry, ...]:
    """Entries of a table whose configurations are arguments of ``kind``; empty where there is no such file.

    Raises:
        ValueError: the file is damaged, or a configuration is not what ``kind`` takes.
    """
    if not path.is_file():
        return ()
    fields = {field.name for field in dataclasses.fields(kind)}
    try:
        rows = [_entry(found, kind) for found in json.loads(path.read_text(encoding="utf-8"))["configurations"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        asked = "dtype, channels, nodes, k" if kind is Tile else "dtype, nodes, k"
        raise ValueError(
            f"{path.name}: table is damaged; expected entries with {asked} and configuration, got {error!r} in {path}"
        ) from error
    for row in rows:
        if set(row.sizes) != fields:
            raise ValueError(f"{path.name}: configuration is wrong; expected {sorted(fields)}, got {sorted(row.sizes)}")
    return tuple(dataclasses.replace(row, sizes=kind(**row.sizes)) for row in rows)


def kind_of(table: str) -> Any:
    """What the entries of a table are arguments of."""
    return {"knn_graph": Selection, "knn_live": Live}.get(table, Tile)


def tuned_entries(table: str, device: Device, tuned: Path = TUNED) -> tuple[Entry, ...]:
    """What the table of a device's architecture holds, empty where there is none."""
    return read_table(tuned / device.arch / f"{table}.json", kind_of(table))


# a launch asks every time, and looking through a table takes longer than much of what else a launch does
@functools.lru_cache(maxsize=4096)
def choose(
    table: str, device: Device, dtype: torch.dtype, nodes: int, k: int, width: int = 0, tuned: Path = TUNED
) -> Any:
    """The entry for this dtype and these sizes that fits the device's shared memory, its own first, else the rule."""
    other = None
    for entry in tuned_entries(table, device, tuned):
        if entry.serves(dtype, nodes, k, width) and entry.sizes.shared_bytes() <= device.shared_bytes:
            if entry.device == device.name:
                return entry.sizes
            other = other or entry.sizes
    return other or rule(table, device, nodes, k, width)


def forget_tables() -> None:
    """Read the files anew from here on."""
    read_table.cache_clear()
    choose.cache_clear()


# sizes that a launch was last given, by table: what a benchmark writes into its rows
last_sizes: dict[str, Sizes] = {}


def sizes_of(table: str, device: torch.device, dtype: torch.dtype, nodes: int, k: int, width: int = 0) -> Any:
    """Sizes of a launch on ``device``; ``dtype`` of the features, other arguments as in ``rule``."""
    found = choose(table, known_device(device), dtype, nodes, k, width)
    last_sizes[table] = found
    return found
