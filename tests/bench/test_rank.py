# SPDX-License-Identifier: Apache-2.0
"""The predicted order agrees with what an H100 timed, the tuner follows it, and slower code fails ``make aot``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from drseg_kernels._launch import Device, Selection, Tile
from triton.runtime.errors import PTXASError

from bench import aot, rank, sass, tables, tune
from bench.work import NOMINAL, work_of
from drseg_core.testing import CASES

ROOT = Path(__file__).parents[2]
LOG = ROOT / "bench" / "results" / "nvidia_h100_80gb_hbm3" / "tune.log"
CASE = next(case for case in CASES if case.name == "paper_vitl_24x24")
HOPPER = next(target for target in aot.TARGETS if target.arch == 90)

# sizes of one table with as many rows as the rule takes, which compile in seconds; two sizes to print; and a shipped
# kernel beside one of four times the warps, which does the same with more instructions
SCRIPT = """
import dataclasses, json, sys
from bench import aot, rank
from drseg_core.testing import CASES

case = next(case for case in CASES if case.name == "paper_vitl_24x24")
log = rank.read_log(open(sys.argv[1], encoding="utf-8").read())
predictor = rank.Predictor(next(target for target in aot.TARGETS if target.arch == 90))
timed = {sizes: time for sizes, time in log["edge_coefficient", case.name, "float32"].items() if sizes.block_m == 16}
found = dataclasses.asdict(rank.compare(predictor, "edge_coefficient", case, timed, "float32"))

rank.candidates = lambda table, device, case: list(log[table, case.name, "float32"])[:2]
rank.TABLES = {"graph_propagate": ("graph_propagate_dot",)}
assert rank.main(["graph_propagate", "--case", case.name]) == 0

target = aot.TARGETS[1]
right = next(v for v in aot.variants(target) if v.name.startswith("degree_normalize fwd_edges dtype=fp32 norm=sym_row"))
slower = dataclasses.replace(right, options={**right.options, "num_warps": 4})
found["issue"] = [aot.build(variant, target)[1]["issue"] for variant in (right, slower)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What the script found, and what it printed before."""
    # whether kernels are compiled or interpreted is decided when Triton is imported
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", SCRIPT, str(LOG)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed, _, last = done.stdout.rstrip().rpartition("\n")
    return json.loads(last), printed


def test_the_order_agrees_with_what_was_timed(compiled):
    found = compiled[0]
    assert found["count"] == 11 and found["correlation"] > 0.8
    assert found["first"] <= 1.2 * found["fastest"] and found["five"] <= 1.05 * found["fastest"]


def test_sizes_are_printed_with_their_parts(compiled):
    lines = compiled[1].splitlines()
    assert lines[0] == "graph_propagate_dot paper_vitl_24x24 float32 NVIDIA H100 80GB HBM3: 2 candidates, us"
    assert len(lines) == 3 and all("(issue " in line and ", gathered 64.7) Tile(" in line for line in lines[1:])
    assert sum(line.endswith(" (the rule)") for line in lines) == 1


def test_the_first_of_a_ranking_becomes_an_entry_where_nobody_has_timed_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rank.Predictor, "rank", lambda *given: [rank.Prediction(Tile(1, 64, 2), 1.0, 2.0)])
    order = ["graph_propagate", "--case", "grid_64x64", "--target", "120", "--write", str(tmp_path)]
    assert rank.main(order) == 0
    path = tmp_path / "sm_120" / "graph_propagate.json"
    (row,) = json.loads(path.read_text())["configurations"]
    assert (row["dtype"], row["channels"], row["nodes"], row["predicted_us"]) == ("float32", 384, 4096, 3.0)
    timed = {name: row[name] for name in ("dtype", "channels", "nodes", "k")} | {"device": "NVIDIA GeForce RTX 5090"}
    tables.write_entry(path, timed, Tile(1, 32, 1), seconds=1e-3)
    assert rank.main(order) == 0 and rank.main(["knn_graph", *order[1:]]) == 0
    assert [row["configuration"]["block_n"] for row in json.loads(path.read_text())["configurations"]] == [32]
    assert capsys.readouterr().out.count("left as it is") == 2


def test_slower_code_fails_the_gate(compiled, tmp_path, monkeypatch, capsys):
    right, slower = compiled[0]["issue"]
    assert slower > 1.1 * right > 0
    variant = next(iter(aot.variants(HOPPER)))
    figures = {"shared": 0, "registers": 32, "stack": 0, "spill_stores": 0, "spill_loads": 0}
    built = {**figures, "issue": right}
    monkeypatch.setattr(aot, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(aot, "_variants", lambda arch: {variant.name: variant})
    monkeypatch.setattr(aot, "build", lambda variant, target: ("", dict(built)))
    again = ["--arch", "90", "--all"]
    assert aot.main(["--arch", "90", "--update"]) == 0 and aot.main(again) == 0
    capsys.readouterr()
    built["issue"] = slower
    assert aot.main(again) == 1
    assert f"  FAILED issue grew: expected at most 1.1 x {right}, got {slower}" in capsys.readouterr().out
    # a figure must not vanish with a change either, except where it cannot be had
    del built["issue"]
    monkeypatch.setattr(sass, "disassembler", lambda: "nvdisasm")
    assert aot.main(again) == 1 and "FAILED issue is not known" in capsys.readouterr().out
    monkeypatch.setattr(sass, "disassembler", lambda: None)
    assert aot.main(again) == 0 and "nvdisasm" in capsys.readouterr().out


def test_every_table_is_described_by_kernels_with_known_loops():
    device = HOPPER.device
    for table in sum(tune.TABLES.values(), ()):
        for sizes in tune.candidates(table, device, CASE):
            found = rank.launched(table, device, CASE, sizes)
            assert found and all(work_of(variant, CASE) is not None for variant in found)
    for variant in aot.variants(HOPPER):
        work = work_of(variant, NOMINAL)
        assert work is None or work.loops or "bounds" in variant.name


def test_a_log_is_read_whatever_its_fields_were_called():
    found = rank.read_log(
        "knn_graph grid_64x64 float32: 3 candidates\n"
        "  7.5 us Configuration(tile_bytes=67108864, columns=512, rows_per_program=1, num_warps=2)\n"
        "knn_graph grid_64x64: 7.5 us Configuration(tile_bytes=1, columns=512, rows_per_program=1, num_warps=2)\n"
        "knn_graph_fused grid_64x64 float32: 1 candidates\n"
        "  9.0 us Fused(patch=64)\n"
        "edge_weight paper_vitl_24x24 bfloat16: 6 candidates of 32\n"
        "  refused Tile(block_m=8, block_n=64, num_warps=1): off\n"
        "  3.0 us Tile(rows=32, columns=128, num_warps=4, sources=0, patch=0)\n"
        "  4.0 us Tile(rows=16, columns=128, num_warps=4, sources=16, patch=0)\n"
        "  5.0 us Tile(block_m=8, block_n=32, num_warps=1)\n"
    )
    assert found == {
        ("knn_graph", "grid_64x64", "float32"): {Selection(64 << 20, 1, 512, 2): 7.5},
        ("edge_weight", "paper_vitl_24x24", "bfloat16"): {Tile(32, 128, 4): 3.0, Tile(8, 32, 1): 5.0},
    }


def test_equal_values_share_their_rank():
    assert rank.rank_correlation([1, 2, 3], [10, 20, 25]) == pytest.approx(1)
    assert rank.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank.rank_correlation([1, 1, 2, 3], [5, 5, 6, 7]) == pytest.approx(1)
    assert rank.rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_few_warps_are_resident_where_registers_blocks_or_programs_are_few():
    kernel = rank.Binary(sass.Loop(1), 32, 0)
    many = 1 << 20
    assert rank.resident_warps(HOPPER, kernel, 4, many) == 64
    assert rank.resident_warps(HOPPER, kernel, 1, many) == HOPPER.blocks
    assert rank.resident_warps(HOPPER, rank.Binary(sass.Loop(1), 250, 0), 1, many) == 8
    assert rank.resident_warps(HOPPER, rank.Binary(sass.Loop(1), 32, HOPPER.shared_bytes), 4, many) == 4
    assert rank.resident_warps(HOPPER, kernel, 4, HOPPER.processors) == 4


def test_the_tuner_times_the_rule_and_those_predicted_to_be_fastest(monkeypatch, capsys, tmp_path):
    assert tune.selected(["rule", "a", "b", "c"], ["c", "rule", "b", "a"], 2) == ["rule", "c", "b"]
    assert tune.selected(["rule"], ["rule"], 5) == ["rule"]
    timed: list[Any] = []

    class Backwards(rank.Predictor):
        def rank(self, table, case, options, dtype="float32"):
            return [rank.Prediction(option, 1.0, 0.0) for option in reversed(list(options))]

    monkeypatch.setattr("bench.tune_runs.make", lambda *given: (None, None))
    monkeypatch.setattr(tune, "fastest", lambda run, wrong, options, repeats: timed.extend(options))
    device = HOPPER.device
    tune.tune("edge_weight", CASE, "float32", device, 3, tmp_path, Backwards(HOPPER), 5)
    every = tune.candidates("edge_weight", device, CASE)
    assert timed == [every[0], *every[:-6:-1]]
    assert capsys.readouterr().out.startswith(f"edge_weight {CASE.name} float32: 6 candidates of {len(every)}\n")
    timed.clear()
    tune.tune("edge_weight", CASE, "float32", device, 3, tmp_path)
    assert timed == every
    timed.clear()

    class Refused(rank.Predictor):
        def rank(self, table, case, options, dtype="float32"):
            raise PTXASError("no such instruction")

    tune.tune("edge_weight", CASE, "float32", device, 3, tmp_path, Refused(HOPPER), 5)
    assert timed == every
    assert "nothing is predicted, so all candidates are timed: PTXASError: PTXAS error" in capsys.readouterr().out


def test_a_triton_without_the_tool_is_told_apart(monkeypatch):
    class Tools:
        @property
        def nvdisasm(self):
            raise RuntimeError("Cannot find nvdisasm")

    monkeypatch.setattr("triton.knobs.nvidia", Tools())
    assert sass.disassembler() is None
    with pytest.raises(RuntimeError, match="^sass: nvdisasm is missing"):
        sass.disassemble(b"")


def test_without_a_disassembler_rank_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sass, "disassembler", lambda: None)
    assert rank.main(["edge_weight"]) == 1
    assert capsys.readouterr().out.startswith("rank: Triton has no nvdisasm here; expected it in its package, got none")


def test_a_device_that_is_not_in_view_is_predicted_as_its_nearest():
    device = Device("NVIDIA L40S", 96 << 20, 101_376, "sm_89")
    found = tune.target_of(device, 89, 142)
    assert (found.arch, found.processors, found.warps) == (89, 142, aot.TARGETS[0].warps)
    assert tune.target_of(device, 75, 40).warps == aot.TARGETS[0].warps
