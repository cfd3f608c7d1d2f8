# SPDX-License-Identifier: Apache-2.0
"""Which sizes a launch gets: an argument, the device's table, a rule; never a timing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from drseg_kernels import _launch
from drseg_kernels._launch import SMALLEST_SHARED, WIDEST_ROW, Device, Selection, Tile, choose, kind_of, rule

from bench.aot import REGISTERS_PER_BLOCK
from bench.aot_build import TARGETS

DEVICES = [target.device for target in TARGETS]
SMALL = Device("a small one", 4 << 20, 48 << 10, "sm_75")
INTERPRETER = Device("interpreter", 32 << 20, SMALLEST_SHARED, "interpreter")
EDGES = (
    "edge_weight",
    "degree_normalize",
    "edge_coefficient",
    "graph_propagate",
    "graph_propagate_dot",
    "graph_layer",
    "graph_gradients",
    "graph_layer_rows",
)


@pytest.mark.promise("C26")
@pytest.mark.parametrize("device", [*DEVICES, SMALL], ids=lambda device: device.name)
@pytest.mark.parametrize("nodes", [1, 2, 31, 576, 4096, 65_536, 1_000_003])
@pytest.mark.parametrize("k", [1, 75, 128, 512, 5000])
def test_the_rule_of_the_selection_fits_every_device(device, nodes, k):
    chosen = rule("knn_graph", device, nodes, k, 0)
    assert chosen.shared_bytes() <= device.shared_bytes
    assert chosen.tile_bytes == _launch.TILE_BYTES and chosen.block_n <= 1024
    assert chosen.num_warps <= 16 and chosen.block_n >= min(nodes, 32)
    assert chosen == rule("knn_graph", device, nodes, k, 0)


@pytest.mark.promise("C26")
@pytest.mark.parametrize("device", [*DEVICES, INTERPRETER], ids=lambda device: device.name)
@pytest.mark.parametrize("table", EDGES)
def test_the_rule_of_the_edges_fits_every_device(table, device):
    for nodes in (1, 2, 31, 576, 1024, 1025, 65_536, 1_000_003):
        for k in (1, 4, 75, 512):
            for width in (0, 1, 3, 37, 231, 538, 4096):
                chosen = rule(table, device, nodes, k, width)
                assert chosen == rule(table, device, nodes, k, width)
                # the interpreter has no shared memory, and no registers
                if device is INTERPRETER:
                    continue
                assert chosen.shared_bytes() <= SMALLEST_SHARED
                assert chosen.block_m * chosen.block_n <= 64 * 256 and 1 <= chosen.num_warps <= 8
                # a program gets the registers that it may take
                limit = chosen.options(limit_registers=True)["maxnreg"]
                assert limit * 32 * chosen.num_warps <= REGISTERS_PER_BLOCK


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_rows_are_whole_where_a_program_can_hold_them(device):
    for width in (1, 37, 256, 384, 512, 768, WIDEST_ROW):
        assert rule("graph_layer", device, 4096, 75, width).block_n >= width
        assert rule("graph_layer_rows", device, 576, 75, width).block_n >= width


def test_the_rule_halves_the_columns_where_shared_memory_is_short(monkeypatch):
    monkeypatch.setattr(Selection, "shared_bytes", lambda self: 64 * self.block_n)
    assert rule("knn_graph", dataclasses.replace(SMALL, shared_bytes=64 * 512), 4096, 75, 0).block_n == 512


SIZES = {
    "knn_graph": {"tile_bytes": 1 << 20, "block_m": 1, "block_n": 1024, "num_warps": 2},
    "graph_propagate": {"block_m": 16, "block_n": 64, "num_warps": 2},
}


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
WIDTH = 9


def entry(table: str, nodes: int, k: int, device: str | None = None, dtype: str = "float32", **changes: int):
    width = {} if table == "knn_graph" else {"channels": WIDTH}
    place = {} if device is None else {"device": device}
    sizes = {**SIZES[table], **changes}
    return {"dtype": dtype, **width, "nodes": nodes, "k": k, **place, "configuration": sizes}


@pytest.fixture
def tuned(tmp_path):
    def write(table: str, *entries: dict[str, object]):
        folder = tmp_path / SMALL.arch
        folder.mkdir(exist_ok=True)
        (folder / f"{table}.json").write_text(json.dumps({"configurations": entries}), encoding="utf-8")
        _launch.forget_tables()
        return tmp_path

    yield write
    _launch.forget_tables()


@pytest.mark.parametrize("table", SIZES)
def test_the_first_large_enough_entry_counts(table, tuned):
    given = ((576, 128, 1), (4096, 128, 8), (4096, 512, 4))
    folder = tuned(table, *(entry(table, nodes, k, num_warps=warps) for nodes, k, warps in given))
    warps = {
        (nodes, k): choose(table, SMALL, FLOAT32, nodes, k, WIDTH, folder).num_warps
        for nodes, k in ((576, 75), (577, 75), (4096, 128), (100, 129))
    }
    assert warps == {(576, 75): 1, (577, 75): 8, (4096, 128): 8, (100, 129): 4}
    assert choose(table, SMALL, FLOAT32, 4097, 75, WIDTH, folder) == rule(table, SMALL, 4097, 75, WIDTH)
    assert choose(table, INTERPRETER, FLOAT32, 576, 75, WIDTH, folder) == rule(table, INTERPRETER, 576, 75, WIDTH)
    assert choose("edge_weight", SMALL, FLOAT32, 576, 75, 384, folder) == rule("edge_weight", SMALL, 576, 75, 384)


@pytest.mark.parametrize("table", SIZES)
def test_an_entry_is_for_the_dtype_and_the_width_that_it_was_timed_for(table, tuned):
    folder = tuned(table, entry(table, 4096, 128, num_warps=16))
    ruled = [rule(table, SMALL, 576, 75, width) for width in (WIDTH, WIDTH + 1)]
    assert choose(table, SMALL, FLOAT32, 576, 75, WIDTH, folder).num_warps == 16
    assert choose(table, SMALL, BFLOAT16, 576, 75, WIDTH, folder) == ruled[0] != SIZES[table] | {"num_warps": 16}
    other = choose(table, SMALL, FLOAT32, 576, 75, WIDTH + 1, folder)
    # the selection's rule takes no notice of a width
    assert other.num_warps == 16 if table == "knn_graph" else other == ruled[1]


@pytest.mark.parametrize("table", SIZES)
def test_an_entry_of_the_very_device_comes_first_and_another_card_s_will_do(table, tuned):
    given = (("another", 1), (None, 2), (SMALL.name, 4))
    folder = tuned(table, *(entry(table, 4096, 128, device, num_warps=warps) for device, warps in given))
    twin = dataclasses.replace(SMALL, name="one more of the kind")
    found = [choose(table, device, FLOAT32, 576, 75, WIDTH, folder).num_warps for device in (SMALL, twin)]
    assert found == [4, 1]


def test_the_h100_s_tables_are_an_h200_s():
    h100 = DEVICES[1]
    h200 = dataclasses.replace(h100, name="NVIDIA H200")
    for device in (h100, h200):
        assert choose("degree_normalize", device, FLOAT32, 576, 75, 75) == Tile(1, 128, 2)
    assert choose("degree_normalize", h200, BFLOAT16, 576, 75, 75) == rule("degree_normalize", h200, 576, 75, 75)
    assert h100.arch == "sm_90" and not _launch.tuned_entries("degree_normalize", DEVICES[0])


@pytest.mark.parametrize("table", SIZES)
def test_an_entry_that_does_not_fit_the_device_is_passed_over(table, tuned):
    folder = tuned(table, entry(table, 4096, 128, block_m=1024), entry(table, 4096, 128, num_warps=8))
    assert choose(table, SMALL, FLOAT32, 576, 75, WIDTH, folder).num_warps == 8


@pytest.mark.parametrize("table", SIZES)
def test_a_table_with_unknown_fields_is_refused(table, tuned):
    folder = tuned(table, entry(table, 4096, 128, stages=3))
    with pytest.raises(ValueError, match="configuration is wrong; expected .*'block_n'.*, got .*'stages'"):
        choose(table, SMALL, FLOAT32, 576, 75, WIDTH, folder)


@pytest.mark.parametrize("table", SIZES)
@pytest.mark.parametrize(
    "changes,message",
    [
        ({"block_n": 1000}, "block_n is out of range; expected a power of two, got 1000"),
        ({"block_m": 0}, "block_m is out of range"),
        ({"num_warps": True + 2}, "num_warps is out of range"),
        ({"num_warps": 2.0}, "num_warps is out of range"),
    ],
)
def test_impossible_sizes_are_refused(changes, message, table):
    kind = kind_of(table)
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {message}"):
        kind(**{**SIZES[table], **changes})


def test_a_tile_that_holds_no_row_is_refused():
    with pytest.raises(ValueError, match=r"^Selection: tile_bytes is too small; expected at least a row of 1024 col"):
        Selection(**{**SIZES["knn_graph"], "tile_bytes": 4095})


@pytest.mark.promise("C26")
def test_shipped_tables_are_readable():
    for path in sorted(_launch.TUNED.glob("*/*.json")):
        assert path.parent.name.startswith("sm_")
        assert path.stem in ("knn_graph", *EDGES) and _launch.read_table(path, kind_of(path.stem)), path


def test_the_compiler_may_fuse():
    assert Tile(1, 1, 1).options() == {"num_warps": 1, "enable_fp_fusion": True}
