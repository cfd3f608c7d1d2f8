# SPDX-License-Identifier: Apache-2.0
"""The tuner: what it tries, what it writes, and that the launchers read it; timing itself needs a card."""

from __future__ import annotations

import json

import pytest
import torch
from drseg_kernels import _launch
from drseg_kernels._launch import Device, Selection, Tile, choose, rule

from bench import tables, tune
from bench.aot_build import TARGETS
from drseg_core.testing import CASES

DEVICES = [target.device for target in TARGETS]
CASE = next(case for case in CASES if case.name == "paper_vitl_24x24")
LARGE = next(case for case in CASES if case.name == "grid_128x128")
SIZES = Selection(tile_bytes=1 << 20, block_m=1, block_n=1024, num_warps=2)
FLOAT32 = torch.float32


def key(nodes: int, **others: object) -> dict[str, object]:
    return {"dtype": "float32", "nodes": nodes, "k": 75, **others}


@pytest.fixture(autouse=True)
def forget_tables():
    yield
    _launch.forget_tables()


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("table", sorted(sum(tune.TABLES.values(), ())))
def test_candidates_fit_the_device_and_begin_with_the_rule(table, device):
    for case in (CASE, LARGE):
        found = tune.candidates(table, device, case)
        assert len(found) == len(set(found)) and all(option.shared_bytes() <= device.shared_bytes for option in found)
        assert len(found) > 4
    small = tune.candidates("knn_graph", device, CASE)
    assert small[0] == rule("knn_graph", device, CASE.nodes, CASE.neighbours, CASE.prior)


def test_a_device_with_less_shared_memory_gets_fewer():
    tiny = Device("tiny", 1 << 20, 6 << 10, "sm_75")
    assert (
        0
        < len(tune.candidates("graph_propagate", tiny, CASE))
        < len(tune.candidates("graph_propagate", DEVICES[0], CASE))
    )


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
    path = tmp_path / device.arch / "knn_graph.json"
    tables.write_entry(path, key(4096), SIZES, case="grid_64x64", seconds=1e-3)
    other = Selection(tile_bytes=1 << 20, block_m=1, block_n=512, num_warps=4)
    tables.write_entry(path, key(576), other)
    tables.write_entry(path, key(4096), other)
    tables.write_entry(path, key(4096), SIZES)
    assert [row["nodes"] for row in json.loads(path.read_text())["configurations"]] == [576, 4096]
    assert choose("knn_graph", device, FLOAT32, 576, 75, tuned=tmp_path) == other
    assert choose("knn_graph", device, FLOAT32, 4096, 75, tuned=tmp_path) == SIZES
    assert choose("knn_graph", device, FLOAT32, 4097, 75, tuned=tmp_path) == rule("knn_graph", device, 4097, 75, 0)
    assert [file.name for file in path.parent.iterdir()] == ["knn_graph.json"]


def test_entries_of_other_dtypes_widths_and_devices_stay(tmp_path):
    path = tmp_path / "sm_90" / "graph_layer.json"
    keys = [key(576, channels=384), key(576, channels=384, device="NVIDIA H200"), key(576, channels=256)]
    keys += [key(576, channels=384) | {"dtype": "bfloat16"}]
    for _ in range(2):
        for number, one in enumerate(keys):
            tables.write_entry(path, one, Tile(1, 512, 2**number))
    rows = json.loads(path.read_text())["configurations"]
    assert [row["dtype"] for row in rows] == ["bfloat16"] + ["float32"] * 3 and len(rows) == len(keys)
    h100, h200 = (Device(name, 50 << 20, 232_448, "sm_90") for name in ("NVIDIA H100 PCIe", "NVIDIA H200"))
    asked = [(h100, FLOAT32, 384), (h200, FLOAT32, 384), (h200, FLOAT32, 256), (h200, torch.bfloat16, 384)]
    found = [choose("graph_layer", device, dtype, 576, 75, width, tmp_path) for device, dtype, width in asked]
    assert [tile.num_warps for tile in found] == [1, 2, 4, 8]


def test_what_was_timed_takes_the_place_of_what_was_predicted(tmp_path):
    path = tmp_path / "sm_120" / "graph_layer.json"
    predicted, timed = Tile(1, 512, 1), Tile(1, 512, 4)
    tables.write_entry(path, key(576, channels=384), predicted, predicted_us=3.0)
    tables.write_entry(path, key(4096, channels=384), predicted, predicted_us=9.0)
    card = Device("NVIDIA RTX PRO 6000", 96 << 20, 101_376, "sm_120")
    assert not tables.is_timed(path, key(576, channels=384))
    assert choose("graph_layer", card, FLOAT32, 576, 75, 384, tmp_path) == predicted
    tables.write_entry(path, key(576, channels=384, device="NVIDIA GeForce RTX 5090"), timed, seconds=1e-3)
    assert choose("graph_layer", card, FLOAT32, 576, 75, 384, tmp_path) == timed
    assert choose("graph_layer", card, FLOAT32, 4096, 75, 384, tmp_path) == predicted
    # and so does what was timed at a larger size
    tables.write_entry(path, key(16384, channels=384, device="NVIDIA GeForce RTX 5090"), timed, seconds=1e-2)
    assert choose("graph_layer", card, FLOAT32, 4096, 75, 384, tmp_path) == timed
    assert tables.is_timed(path, key(576, channels=384)) and not tables.is_timed(path, key(4096, channels=384))


def test_a_table_is_keyed_by_the_width_that_its_rule_asks_for():
    found = {table: tune.width_of(table, CASE) for table in ("knn_graph", "edge_weight", "graph_layer")}
    assert found == {"knn_graph": None, "edge_weight": CASE.hidden, "graph_layer": CASE.channels}


def test_sizes_too_large_for_a_device_are_passed_over(tmp_path):
    smallest, largest = DEVICES[2], DEVICES[1]
    sizes = Selection(tile_bytes=1 << 20, block_m=256, block_n=64, num_warps=8)
    assert smallest.shared_bytes < sizes.shared_bytes() <= largest.shared_bytes
    for device in (smallest, largest):
        tables.write_entry(tmp_path / device.arch / "knn_graph.json", key(576), sizes)
    assert choose("knn_graph", largest, FLOAT32, 576, 75, tuned=tmp_path) == sizes
    assert choose("knn_graph", smallest, FLOAT32, 576, 75, tuned=tmp_path) == rule("knn_graph", smallest, 576, 75, 0)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"configurations": [3]}', '{"a": 1}'),
        '{"configurations": [{"dtype": "float3", "nodes": 1, "k": 1, "configuration": {}}]}',
        '{"configurations": [{"nodes": 1, "k": 1, "configuration": {}}]}',
    ],
)
def test_a_damaged_table_is_refused_by_name(text, tmp_path):
    folder = tmp_path / DEVICES[0].arch
    folder.mkdir()
    path = folder / "knn_graph.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="^knn_graph.json: table is damaged; expected entries with dtype, nodes"):
        choose("knn_graph", DEVICES[0], FLOAT32, 576, 75, tuned=tmp_path)
    with pytest.raises(ValueError, match="table is damaged"):
        tables.write_entry(path, key(576), SIZES)
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
