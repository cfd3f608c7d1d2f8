# SPDX-License-Identifier: Apache-2.0
"""The tuner: what it tries, what it writes, and that the launchers read it; timing itself needs a card."""

from __future__ import annotations

import json

import pytest
from drseg_kernels import _knn_sizes, _launch
from drseg_kernels._launch import Configuration, Device, choose, folder_of, rule

from bench import tune
from bench.aot import TARGETS
from drseg_core.testing import CASES

DEVICES = [Device(target.name, target.l2_bytes, target.shared_bytes) for target in TARGETS]
CASE = next(case for case in CASES if case.name == "paper_vitl_24x24")
LARGE = next(case for case in CASES if case.name == "grid_128x128")
SIZES = Configuration(tile_bytes=1 << 20, columns=1024, rows_per_program=1, num_warps=2)


@pytest.fixture(autouse=True)
def forget_tables():
    yield
    _launch.read_table.cache_clear()


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("table", sorted(tune.KINDS))
def test_candidates_fit_the_device_and_begin_with_the_rule(table, device):
    for case in (CASE, LARGE):
        found = tune.candidates(table, device, case)
        assert len(found) == len(set(found)) and all(option.shared_bytes() <= device.shared_bytes for option in found)
        # one strategy is for few nodes, one for many, and there are few strategies
        assert len(found) > 4 or table in ("knn_graph_on_chip", "knn_graph_fused", "knn_graph_strategy")
    small = tune.candidates("knn_graph", device, CASE)
    assert small[0] == rule(device, CASE.nodes, CASE.neighbours)


def test_the_strategies_are_timed_last_and_only_where_they_fit():
    assert tune.TABLES["knn_graph"][-1] == "knn_graph_strategy"
    assert len(tune.candidates("knn_graph_fused", DEVICES[0], LARGE)) > 20
    assert not tune.candidates("knn_graph_fused", DEVICES[0], CASE)
    for case, ways in ((CASE, ["tiles", "on_chip", "fused"]), (LARGE, ["tiles", "fused"])):
        assert [way.strategy for way in tune.candidates("knn_graph_strategy", DEVICES[0], case)] == ways


def test_the_strategy_that_was_fastest_is_taken(tmp_path):
    device = DEVICES[1]
    path = tmp_path / folder_of(device.name) / "knn_graph_strategy.json"
    tune.write_entry(path, 16_384, 75, _knn_sizes.Way("fused"))
    tune.write_entry(path, 1024, 75, _knn_sizes.Way("on_chip"))
    _launch.read_table.cache_clear()
    sizes = ((576, 75), (4096, 75), (16_384, 9), (16_385, 75), (4096, 76), (576, 76))
    taken = [_knn_sizes.choose_strategy(device, nodes, k, tmp_path) for nodes, k in sizes]
    assert taken == ["on_chip", "fused", "fused", "tiles", "tiles", "tiles"]
    # an entry for more neighbours than the strategy takes is passed over
    tune.write_entry(path, 16_384, 2000, _knn_sizes.Way("fused"))
    _launch.read_table.cache_clear()
    assert _knn_sizes.choose_strategy(device, 4096, 2000, tmp_path) == "tiles"
    assert _knn_sizes.choose_strategy(device, 4096, 900, tmp_path) == "fused"


def test_a_device_with_less_shared_memory_gets_fewer():
    counts = [len(tune.candidates("graph_propagate", device, CASE)) for device in DEVICES]
    assert counts[2] <= counts[0] <= counts[1]
    tiny = Device("tiny", 1 << 20, 6 << 10)
    assert len(tune.candidates("knn_graph_on_chip", tiny, CASE)) == 0 < len(tune.candidates("knn_graph", tiny, CASE))


def test_the_fastest_that_is_right_wins():
    said = []

    def run(option):
        if option == "refused":
            raise RuntimeError("out of resources:\n shared memory")
        return option

    def sample(contenders):
        return [[{"slow": 3.0, "fast": 1.0, "rule": 2.0}[contender.run()]] * 3 for contender in contenders]

    options = ["rule", "wrong", "slow", "refused", "fast"]
    found = tune.fastest(run, lambda got: "off" if got == "wrong" else None, options, 3, sample, said.append)
    assert found == ("fast", 1.0)
    assert [line for line in said if "refused " in line] == [
        "  refused wrong: off",
        "  refused refused: RuntimeError: out of resources: shared memory",
    ]
    assert tune.fastest(run, lambda got: "off", options, 3, sample, said.append) is None


def test_what_is_written_is_what_a_launch_gets(tmp_path):
    device = DEVICES[2]
    path = tmp_path / folder_of(device.name) / "knn_graph.json"
    tune.write_entry(path, 4096, 75, SIZES, case="grid_64x64", seconds=1e-3)
    other = Configuration(tile_bytes=1 << 20, columns=512, rows_per_program=1, num_warps=4)
    tune.write_entry(path, 576, 75, other)
    tune.write_entry(path, 4096, 75, other)
    tune.write_entry(path, 4096, 75, SIZES)
    assert [row["nodes"] for row in json.loads(path.read_text())["configurations"]] == [576, 4096]
    assert choose("knn_graph", device, 576, 75, tmp_path) == other
    assert choose("knn_graph", device, 4096, 75, tmp_path) == SIZES
    assert choose("knn_graph", device, 4097, 75, tmp_path) == rule(device, 4097, 75)
    assert [file.name for file in path.parent.iterdir()] == ["knn_graph.json"]


def test_sizes_too_large_for_a_device_are_passed_over(tmp_path):
    smallest, largest = DEVICES[2], DEVICES[1]
    sizes = _knn_sizes.OnChip(rows=64, columns=128, depth=64, num_warps=8, num_stages=3)
    assert smallest.shared_bytes < sizes.shared_bytes() <= largest.shared_bytes
    for device in (smallest, largest):
        tune.write_entry(tmp_path / folder_of(device.name) / "knn_graph_on_chip.json", 576, 75, sizes)
    assert _knn_sizes.choose_on_chip(largest, 576, 75, tmp_path) == sizes
    assert _knn_sizes.choose_on_chip(smallest, 576, 75, tmp_path) == _knn_sizes.on_chip_rule(smallest, 576)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"configurations": [3]}', '{"configurations": [{"nodes": "x", "k": 1}]}', '{"a": 1}'],
)
def test_a_damaged_table_is_refused_by_name(text, tmp_path):
    folder = tmp_path / folder_of(DEVICES[0].name)
    folder.mkdir()
    path = folder / "knn_graph.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="^knn_graph.json: table is damaged; expected entries with nodes, k and"):
        choose("knn_graph", DEVICES[0], 576, 75, tmp_path)
    with pytest.raises(ValueError, match="table is damaged"):
        tune.write_entry(path, 576, 75, SIZES)
    assert path.read_text() == text


def test_without_a_device_it_lists_or_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tune.main(["--op", "knn_graph"]) == 5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tune: no CUDA device to time on; expected one, got")
    assert tune.main(["--dry-run", "--op", "edge_weight", "--case", "paper_vitl_24x24", "--target", "90"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4 and all(
        line.startswith("NVIDIA H100 80GB HBM3 edge_weight paper_vitl_24x24: Tile(") for line in lines
    )
