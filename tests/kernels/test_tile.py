# SPDX-License-Identifier: Apache-2.0
"""Sizes of the ops on edges: what the rule gives, what a table overrides, what is refused."""

from __future__ import annotations

import json

import pytest
from drseg_kernels import _launch, _tile
from drseg_kernels._launch import SMALLEST_SHARED, Device, folder_of
from drseg_kernels._tile import Tile, choose, dense, rule, union

from bench.aot import TARGETS

DEVICES = [Device(target.name, target.l2_bytes, target.shared_bytes) for target in TARGETS]
INTERPRETER = Device("interpreter", 32 << 20, SMALLEST_SHARED)
OPS = ("edge_weight", "degree_normalize", "graph_propagate")


@pytest.mark.parametrize("device", [*DEVICES, INTERPRETER], ids=lambda device: device.name)
@pytest.mark.parametrize("op", OPS)
def test_the_rule_fits_every_device(op, device):
    for nodes in (1, 2, 31, 576, 1024, 1025, 65_536, 1_000_003):
        for k in (1, 4, 75, 512):
            for width in (0, 1, 3, 37, 231, 538, 4096):
                chosen = rule(op, device, nodes, k, width)
                assert chosen == rule(op, device, nodes, k, width)
                # the interpreter has no shared memory
                assert device is INTERPRETER or chosen.shared_bytes() <= SMALLEST_SHARED
                assert chosen.rows * chosen.columns <= 64 * 256 and 1 <= chosen.num_warps <= 8


def test_few_nodes_are_densified_under_the_interpreter_alone():
    for device in (*DEVICES, INTERPRETER):
        interpreted = device.name == "interpreter"
        for op in ("graph_propagate", "graph_propagate_dot", "graph_layer"):
            assert bool(rule(op, device, 576, 75, 384).sources) is interpreted
            assert not rule(op, device, 4096, 512, 384).sources
            # few neighbours of many nodes: a dense row would be nearly all zeros
            assert not rule(op, device, 576, 4, 384).sources
        assert not rule("edge_weight", device, 576, 75, 128).sources
        assert not rule("edge_coefficient", device, 576, 75, 128).sources


@pytest.mark.parametrize("op", ["graph_propagate", "graph_propagate_dot", "graph_layer"])
def test_sums_over_unions_fit_every_device(op):
    for width in (0, 1, 37, 231, 384, 538, 4096):
        assert dense(op, width).sources and dense(op, width).shared_bytes() <= SMALLEST_SHARED
        chosen = union(op, width)
        assert chosen.patch and chosen.shared_bytes() <= SMALLEST_SHARED and chosen.num_warps == 8
        assert op != "graph_layer" or chosen.columns >= min(width, 512)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"rows": 12}, "rows is out of range; expected a power of two of at least 1, got 12"),
        ({"columns": 0}, "columns is out of range"),
        ({"num_warps": 2.0}, "num_warps is out of range"),
        ({"sources": 8}, "rows is out of range; expected a power of two of at least 16, got 8"),
        ({"rows": 16, "sources": 8}, "sources is out of range; expected a power of two of at least 16, got 8"),
        ({"sources": None}, "sources is out of range"),
        ({"patch": 3}, "patch is out of range; expected a power of two of at least 1, got 3"),
        ({"patch": 4}, "patch does not fit; expected at most rows, 8, and sources with it, got 4 with sources 0"),
        ({"rows": 16, "sources": 16, "patch": 32}, "patch does not fit; expected at most rows, 16"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^Tile: {message}"):
        Tile(**{"rows": 8, "columns": 32, "num_warps": 4, **changes})


def test_a_table_comes_before_the_rule(tmp_path):
    device = DEVICES[0]
    folder = tmp_path / folder_of(device.name)
    folder.mkdir()
    fits = {"rows": 16, "columns": 64, "num_warps": 2, "sources": 0, "patch": 0}
    too_large = {"rows": 1024, "columns": 1024, "num_warps": 2, "sources": 0, "patch": 0}
    entries = [{"nodes": 576, "k": 75, "configuration": given} for given in (too_large, fits)]
    (folder / "graph_propagate.json").write_text(json.dumps({"configurations": entries}), encoding="utf-8")
    assert choose("graph_propagate", device, 576, 75, 384, tmp_path) == Tile(**fits)
    assert choose("graph_propagate", device, 577, 75, 384, tmp_path) == rule("graph_propagate", device, 577, 75, 384)
    assert choose("edge_weight", device, 576, 75, 384, tmp_path) == rule("edge_weight", device, 576, 75, 384)
    entries[0]["configuration"] = {**fits, "stages": 2}
    other = tmp_path / "other" / folder_of(device.name)
    other.mkdir(parents=True)
    (other / "graph_propagate.json").write_text(json.dumps({"configurations": entries}), encoding="utf-8")
    with pytest.raises(ValueError, match="configuration is wrong; expected .*'columns'.*, got .*'stages'"):
        _tile.table("graph_propagate", device, tmp_path / "other")
    _launch.read_table.cache_clear()
