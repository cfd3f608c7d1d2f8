# SPDX-License-Identifier: Apache-2.0
"""Which sizes a launch gets: an argument, the device's table, a rule; never a timing."""

from __future__ import annotations

import dataclasses
import json

import pytest
from drseg_kernels import _knn_sizes, _launch
from drseg_kernels._knn_sizes import FUSED_NEIGHBOURS, Fused, OnChip, Way
from drseg_kernels._launch import Configuration, Device, choose, folder_of, rule
from drseg_kernels._tile import Tile

from bench.aot import TARGETS

DEVICES = [Device(target.name, target.l2_bytes, target.shared_bytes) for target in TARGETS]
SMALL = Device("a small one", 4 << 20, 48 << 10)


@pytest.mark.parametrize("device", [*DEVICES, SMALL], ids=lambda device: device.name)
@pytest.mark.parametrize("nodes", [1, 2, 31, 576, 4096, 65_536, 1_000_003])
@pytest.mark.parametrize("k", [1, 75, 128, 512, 5000])
def test_the_rule_fits_every_device(device, nodes, k):
    chosen = rule(device, nodes, k)
    assert chosen.shared_bytes() <= device.shared_bytes
    assert chosen.tile_bytes == _launch.TILE_BYTES and chosen.columns <= 1024
    assert chosen.num_warps <= 16 and chosen.columns >= min(nodes, 32)
    assert chosen == rule(device, nodes, k)


def test_the_rule_halves_the_columns_where_shared_memory_is_short(monkeypatch):
    monkeypatch.setattr(Configuration, "shared_bytes", lambda self: 64 * self.columns)
    assert rule(dataclasses.replace(SMALL, shared_bytes=64 * 512), 4096, 75).columns == 512


def entry(nodes: int, k: int, **changes: int) -> dict[str, object]:
    given = {"tile_bytes": 1 << 20, "columns": 1024, "rows_per_program": 1, "num_warps": 2, **changes}
    return {"nodes": nodes, "k": k, "configuration": given}


@pytest.fixture
def tuned(tmp_path):
    def write(*entries: dict[str, object]):
        folder = tmp_path / folder_of(SMALL.name)
        folder.mkdir(exist_ok=True)
        (folder / "knn_graph.json").write_text(json.dumps({"configurations": entries}), encoding="utf-8")
        _launch.read_table.cache_clear()
        return tmp_path

    yield write
    _launch.read_table.cache_clear()


def test_the_first_large_enough_entry_counts(tuned):
    folder = tuned(entry(576, 128, num_warps=1), entry(4096, 128, num_warps=8), entry(4096, 512, num_warps=4))
    warps = {
        (nodes, k): choose("knn_graph", SMALL, nodes, k, folder).num_warps
        for nodes, k in ((576, 75), (577, 75), (4096, 128), (100, 129))
    }
    assert warps == {(576, 75): 1, (577, 75): 8, (4096, 128): 8, (100, 129): 4}
    assert choose("knn_graph", SMALL, 4097, 75, folder) == rule(SMALL, 4097, 75)
    assert choose("knn_graph", DEVICES[0], 576, 75, folder) == rule(DEVICES[0], 576, 75)


def test_an_entry_that_does_not_fit_the_device_is_passed_over(tuned):
    folder = tuned(entry(4096, 128, rows_per_program=1024), entry(4096, 128, num_warps=8))
    assert choose("knn_graph", SMALL, 576, 75, folder).num_warps == 8


def test_a_table_with_unknown_fields_is_refused(tuned):
    folder = tuned(entry(4096, 128, stages=3))
    with pytest.raises(ValueError, match="configuration is wrong; expected .*'columns'.*, got .*'stages'"):
        choose("knn_graph", SMALL, 576, 75, folder)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"columns": 1000}, "columns is out of range; expected a power of two, got 1000"),
        ({"rows_per_program": 0}, "rows_per_program is out of range"),
        ({"num_warps": True + 2}, "num_warps is out of range"),
        ({"tile_bytes": 4095}, r"tile_bytes is too small; expected at least a row of 1024 columns \(4096 bytes\)"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^Configuration: {message}"):
        Configuration(**{"tile_bytes": 1 << 20, "columns": 1024, "rows_per_program": 1, "num_warps": 2, **changes})


@pytest.mark.parametrize("device", [*DEVICES, SMALL], ids=lambda device: device.name)
@pytest.mark.parametrize("nodes", [1025, 4096, 65_536, 1_000_003])
@pytest.mark.parametrize("k", [1, 75, 512, FUSED_NEIGHBOURS])
def test_candidates_of_the_fused_rule_have_room(device, nodes, k):
    chosen = _knn_sizes.choose_fused(device, nodes, k)
    assert chosen.shared_bytes() <= device.shared_bytes
    assert k + chosen.patch <= chosen.room(k) <= 1024
    for rows in (chosen.group(k), chosen.select_rows(k)):
        assert 1 <= rows <= chosen.patch and chosen.patch % rows == 0
    assert 1 <= chosen.select_warps(k) <= 16


def test_what_is_fused_is_named_and_never_taken_by_rule():
    for device in DEVICES:
        for nodes in (1, 1024, 1025, 65_536, 1_000_003):
            on_chip = device.name == "interpreter" and nodes <= 1024
            assert _knn_sizes.choose_strategy(device, nodes, 75) == ("on_chip" if on_chip else "tiles")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"patch": 8}, "patch is out of range; expected a power of two of at least 16, got 8"),
        ({"depth": 24}, "depth is out of range"),
        ({"window": 0}, "window is out of range; expected at least 1, got 0"),
        ({"splits": 2}, "splits is out of range; expected one less than a power of two, got 2"),
        ({"splits": 0}, "splits is out of range"),
        ({"num_stages": 0}, "num_stages is out of range"),
    ],
)
def test_impossible_sizes_of_patches_are_refused(changes, message):
    sizes = {"patch": 64, "depth": 32, "window": 3, "splits": 3, "num_warps": 8, "num_stages": 3}
    with pytest.raises(ValueError, match=f"^Fused: {message}"):
        Fused(**{**sizes, **changes})


def test_an_unknown_strategy_is_refused():
    with pytest.raises(
        ValueError, match="^Way: strategy is unknown; expected one of tiles, on_chip, fused, got 'fast'"
    ):
        Way("fast")


def test_shipped_tables_are_readable():
    for path in sorted(_launch.TUNED.glob("*/*.json")):
        assert folder_of(path.parent.name) == path.parent.name
        kinds = {"knn_graph": Configuration, "on_chip": OnChip, "fused": Fused, "strategy": Way}
        kind = kinds.get(path.stem.removeprefix("knn_graph_"), Tile)
        assert _launch.read_table(path, kind), path


def test_names_of_folders():
    assert folder_of("NVIDIA GeForce RTX 5090") == "nvidia_geforce_rtx_5090"
    assert folder_of("NVIDIA H200") == "nvidia_h200"
