# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs at tiny sizes, says in its rows what they belong to, and refuses a wrong engine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import contenders, jobs, memory, paired, run, selection, source, timing, whole_pdgr
from drseg_core import ops
from drseg_core.ops import _dispatch
from drseg_core.testing import Case

# what PDGR runs on a CPU
OPS = ("knn_graph", "edge_weight", "degree_normalize", "graph_propagate", "edge_coefficient", "graph_layer")
TINY = Case("bench_tiny", 2, 6, 7, prior=16, hidden=8, channels=12, neighbours=6, large=True)
# what whole PDGR and the selection are measured on
PRIORS = ("--data", "random", "--data", "dino")
COMMON = {
    "op": str, "case": str, "sizes": dict, "mode": str, "dtype": str, "data": str, "name": str, "p20_ms": float,
    "p50_ms": float, "p80_ms": float, "ratio_to_engine": float, "repeats": int, "device": str, "threads": int,
    "instruction_set": str, "torch": str, "date": str,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _tiny_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(jobs.CASES, TINY.name, TINY)
    monkeypatch.setitem(selection.DECAY, TINY.name, 2.0)


def _run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    out = tmp_path / "folder" / "rows.jsonl"
    code = run.main([*arguments, "--repeats", "2", "--slow-repeats", "1", "--no-memory", "--out", str(out)])
    return code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def _check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for key, kind in COMMON.items():
            assert isinstance(row[key], kind), key
        assert {"commit", "dirty", "forced_level"} <= row.keys()
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["threads"] == torch.get_num_threads()


def test_pdgr_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, rows = _run(tmp_path, "--op", "pdgr", "--case", TINY.name)
    assert code == 0
    names = ["engine", "literal", "factored", "compiled", "matmul_lower_bound"]
    runs = [(mode, data) for mode in whole_pdgr.MODES for data in whole_pdgr.DATA]
    # a peer has a row where it is installed
    rows = [row for row in rows if row["name"] != "pyg"]
    assert [(r["mode"], r["data"], r["name"]) for r in rows] == [(*pair, name) for pair in runs for name in names]
    _check(rows)
    for start in range(0, len(rows), len(names)):
        engine = rows[start]
        assert engine["ratio_to_engine"] == 1 and set(engine["backends"]) == set(OPS)
        assert engine["gate"]["against"] == "literal" and engine["gate"]["max_difference"] < 1e-4
        for row in rows[start : start + len(names)]:
            assert math.isclose(row["ratio_to_engine"], row["p50_ms"] / engine["p50_ms"])
            assert row["repeats"] == (1 if row["name"] == "literal" else 2)
            assert row["sizes"] | {"B": 2, "h": 6, "w": 7, "D": 16, "E": 8, "C": 12, "K": 6} == row["sizes"]
    table = capsys.readouterr().out
    assert all(name in table for name in names) and "fwd+bwd" in table and "{" not in table


def test_selection_rows(tmp_path: Path):
    code, rows = _run(tmp_path, "--op", "knn_graph", "--case", TINY.name, *PRIORS)
    names = [row["name"] for row in rows if row["name"] not in contenders.PEERS]
    assert code == 0 and names == ["engine", "naive", "matmul_lower_bound"] * 2
    _check(rows)
    assert all("no decay" in row["note"] for row in rows if row["name"] in contenders.PEERS)
    assert all(row["sizes"]["decay"] == 2.0 for row in rows)


def test_selection_without_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for package in ("faiss", "sklearn.neighbors", "pykeops.torch"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    code, rows = _run(tmp_path, "--op", "knn_graph", "--case", TINY.name, "--data", "random")
    assert code == 0 and [row["name"] for row in rows] == ["engine", "naive", "matmul_lower_bound"]
    assert "faiss is not installed" in capsys.readouterr().err


def test_large_cases_have_fewer_neighbours_in_the_race(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        whole_pdgr, "_MOST_NODES", {"literal": 10, "factored": 10, "compiled": 10, "pyg": 10, "matmul_lower_bound": 42}
    )
    monkeypatch.setattr(whole_pdgr, "_GATE_ROWS", 5)
    for mode in whole_pdgr.MODES:
        rows, refused = whole_pdgr.measure(TINY, "dino", mode, repeats=1, with_memory=False)
        assert [row["name"] for row in rows] == ["engine", "matmul_lower_bound"] and not refused
        assert rows[0]["gate"]["against"] == "factored"
    monkeypatch.setattr(selection, "_MOST_NODES", 10)
    rows, refused = selection.measure(TINY, "dino", repeats=2, slow=1)
    assert [(row["name"], row["repeats"]) for row in rows] == [("engine", 1)] and not refused


@pytest.mark.parametrize("op", OPS)
def test_rows_of_an_op(tmp_path: Path, op: str):
    code, rows = _run(tmp_path, "--op", op, "--case", "tiny_3x4")
    _check(rows)
    modes = ["fwd"] if op == "knn_graph" else list(whole_pdgr.MODES)
    assert code == 0 and [row["mode"] for row in rows if row["ratio_to_engine"] == 1] == modes
    assert {row["name"] for row in rows} >= {"reference"} and {row["op"] for row in rows} == {op}


Wrong = Callable[..., Any]


def _plant(monkeypatch: pytest.MonkeyPatch, op: str, **changes: Callable[[Wrong], Wrong]) -> None:
    """Change functions of the backend that runs by default; the reference stays right."""
    first, *others = _dispatch._tables[op]
    assert first.name != "reference"
    changed = {name: change(getattr(first, name)) for name, change in changes.items()}
    monkeypatch.setitem(_dispatch._tables, op, (dataclasses.replace(first, **changed), *others))
    # which remembers what it has looked up
    monkeypatch.setattr(_dispatch, "table", _dispatch.table.__wrapped__)


def _rolled(run: Wrong) -> Wrong:
    # the right neighbours of another node
    return lambda *given: tuple(value.roll(1, dims=1) for value in run(*given))


def _flipped(run: Wrong) -> Wrong:
    return lambda *given: tuple(value.flip(-1) for value in run(*given))


def _first_node_wrong(run: Wrong) -> Wrong:
    def wrong(*given: Any) -> Any:
        result = run(*given).clone()
        result[:, 0] *= torch.linspace(1, 1.1, result.shape[-1])
        return result

    return wrong


def _scaled(run: Wrong) -> Wrong:
    return lambda *given: tuple(None if value is None else 1.01 * value for value in run(*given))


needs_native = pytest.mark.skipif(
    not any(row["op"] == "knn_graph" and row["backend"] == "native" and row["available"]
            for row in _dispatch.backend_report()),
    reason="without a native library nothing runs but the reference, which is what is compared with",
)  # fmt: skip


@needs_native
@pytest.mark.parametrize(
    ("op", "changes", "modes", "message"),
    [
        ("knn_graph", {"run": _rolled}, {"fwd", "fwd+bwd"}, "clearly lower node"),
        ("graph_propagate", {"run": _first_node_wrong}, {"fwd", "fwd+bwd"}, "output:"),
        ("edge_weight", {"run_backward": _scaled}, {"fwd+bwd"}, "gradient of edge_"),
    ],
)
def test_a_wrong_engine_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    op: str,
    changes: dict[str, Callable[[Wrong], Wrong]],
    modes: set[str],
    message: str,
):
    _plant(monkeypatch, op, **changes)
    code, rows = _run(tmp_path, "--op", "pdgr", "--case", TINY.name, "--data", "random")
    assert code == 1
    assert {row["mode"] for row in rows} == set(whole_pdgr.MODES) - modes
    error = capsys.readouterr().err
    assert "refused: engine:" in error and message in error


@needs_native
@pytest.mark.parametrize("case", [TINY.name, "odd_37_nodes"])
@pytest.mark.parametrize("change", [_rolled, _flipped])
def test_a_wrong_backend_of_an_op_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
    change: Callable[[Wrong], Wrong],
):
    _plant(monkeypatch, "knn_graph", run=change)
    code, rows = _run(tmp_path, "--op", "knn_graph", "--case", case)
    assert code == 1 and not rows
    assert "refused:" in capsys.readouterr().err


def test_a_wrong_contender_is_refused_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "naive_selection", lambda prior, *_: torch.zeros(2, 42, 6, dtype=torch.long))
    rows, refused = selection.measure(TINY, "random", repeats=1)
    assert "naive" not in {row["name"] for row in rows} and {"engine", "matmul_lower_bound"} <= {
        row["name"] for row in rows
    }
    assert len(refused) == 1 and refused[0].startswith("naive:")


def test_a_contender_whose_gradients_are_wrong_is_refused(monkeypatch: pytest.MonkeyPatch):
    class Steeper(contenders.FactoredPDGR):
        def forward(self, *arguments: Any, **options: Any) -> torch.Tensor:
            output = super().forward(*arguments, **options)
            return output + 0.2 * (output - output.detach())

    monkeypatch.setattr(whole_pdgr, "FactoredPDGR", Steeper)
    for mode, names in (("fwd", {"engine", "factored"}), ("fwd+bwd", {"engine"})):
        rows, refused = whole_pdgr.measure(TINY, "random", mode, repeats=1, with_memory=False, beside=["factored"])
        assert {row["name"] for row in rows} == names
        assert len(refused) == (mode == "fwd+bwd") and all("factored: gradient of features" in one for one in refused)


def test_every_contender_is_explained():
    assert set(jobs.BESIDE) == {*whole_pdgr.BESIDE, *selection.BESIDE}


def test_what_stands_beside_is_chosen(tmp_path: Path):
    code, rows = _run(tmp_path, "--op", "pdgr", "--case", TINY.name, "--mode", "fwd", "--beside", "matmul_lower_bound")
    assert code == 0 and {row["name"] for row in rows} == {"engine", "matmul_lower_bound"}
    code, rows = _run(tmp_path, "--op", "knn_graph", "--case", TINY.name, *PRIORS, "--beside", "nothing")
    assert code == 0 and {row["name"] for row in rows if row["op"] == "knn_graph"} == {"engine"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--case", "nothing"],
        ["--op", "pdgr", "--case", "tiny_3x4"],
        ["--repeats", "0"],
        ["--op", "pdgr", "--dtype", "float16"],
        ["--out", "."],
    ],
)
def test_arguments_that_mean_nothing(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as error:
        run.main(arguments)
    assert error.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.promise("C43")
@pytest.mark.parametrize(("verdicts", "code"), [(["new", "new"], 2), (["new", "same"], 0), (["new", "slower"], 1)])
def test_a_gate_that_compared_nothing_does_not_pass(
    verdicts: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    left = iter(verdicts)
    tree = source.Source("base", Path(), None, "abc")
    monkeypatch.setattr(source, "working_tree", lambda: tree)
    monkeypatch.setattr(source, "commit_of", lambda ref: "abc")
    monkeypatch.setattr(source, "checkout", lambda ref: contextlib.nullcontext(tree))
    monkeypatch.setattr(paired, "judge", lambda *_, **__: paired.Verdict(next(left)))
    arguments = ["--base", "v0", "--gate", "--op", "edge_weight", "--case", "paper_vitl_24x24"]
    assert run.main(arguments) == code
    printed = capsys.readouterr()
    assert ("--base v0 has none of these jobs; expected one" in printed.err) == (code == 2)
    assert ("gate: passed" in printed.out) == (code == 0)


def test_an_op_that_lost_its_kernel_is_still_raced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(ops, "backend_report", lambda: [])
    assert run.main(["--base", "HEAD", "--gate", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(op in printed for op in OPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert run.main(["--device", "cuda", "--case", "tiny_3x4"]) == 5
    assert "--device cuda cannot be used; expected a CUDA device" in capsys.readouterr().err
    assert run.main(["--device", "cuda", "--dry-run"]) == 0
    assert "torch sees no CUDA device" in capsys.readouterr().out


def test_contenders_take_turns():
    calls: list[str] = []
    contenders = [
        timing.Contender(name, lambda name=name: calls.append(name), repeats, {})  # type: ignore[misc]
        for name, repeats in (("a", 4), ("b", 4), ("c", 2))
    ]
    seconds = timing.interleave(contenders)
    assert "".join(calls) == "ababcababc"
    assert [len(taken) for taken in seconds] == [4, 4, 2]


def test_peaks_are_of_one_step_in_a_process_of_its_own():
    case = dataclasses.asdict(dataclasses.replace(TINY, batch=1, height=16, width=16, prior=256, neighbours=60))
    literal, engine = (
        memory.in_child("bench.whole_pdgr", "peak", case, "dino", name, False) for name in ("literal", "engine")
    )
    pairs = 256 * 60 * 2 * 256 * 4 / 2**20
    assert literal["peak_mb"] > pairs > 2 * engine["peak_mb"]
    assert literal["process_mb"] > literal["peak_mb"] and engine["process_mb"] > engine["peak_mb"]


def test_a_child_that_fails_says_so():
    with pytest.raises(RuntimeError, match=r"json\.nothing: failed in its own process:\n(.|\n)*AttributeError"):
        memory.in_child("json", "nothing")


@pytest.mark.parametrize("dtype", ["autocast", "bfloat16"])
def test_pdgr_rows_in_reduced_precision(tmp_path: Path, dtype: str):
    code, rows = _run(tmp_path, "--op", "pdgr", "--case", TINY.name, "--dtype", dtype)
    assert code == 0 and {row["dtype"] for row in rows} == {dtype}
    _check(rows)
    rows = [row for row in rows if row["name"] != "pyg"]
    assert [row["name"] for row in rows] == ["engine", "literal", "factored", "compiled", "matmul_lower_bound"] * 4
    # bfloat16 was at work
    assert all(1e-3 < row["gate"]["max_difference"] < 0.05 for row in rows if row["name"] == "engine")
    assert all("bfloat16" in row["note"] for row in rows if row["name"] == "matmul_lower_bound")


def test_maps_come_in_the_dtype_that_is_asked_for():
    for dtype, kind in (("float32", torch.float32), ("autocast", torch.float32), ("bfloat16", torch.bfloat16)):
        problem = whole_pdgr.make(TINY, "random", dtype=dtype)
        assert problem.features.dtype == problem.prior.dtype == kind
        output, gradients = whole_pdgr.step(problem.engine, problem, True)
        assert output.dtype == problem.gradient.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
        assert [value.dtype for value in gradients] == [kind] + [torch.float32] * (len(gradients) - 1)


@needs_native
@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [("knn_graph", {"run": _rolled}, "clearly lower node"), ("graph_propagate", {"run": _first_node_wrong}, "output:")],
)
def test_a_wrong_engine_is_refused_in_reduced_precision_too(
    monkeypatch: pytest.MonkeyPatch, op: str, changes: dict[str, Callable[[Wrong], Wrong]], message: str
):
    _plant(monkeypatch, op, **changes)
    rows, refused = whole_pdgr.measure(TINY, "random", "fwd", repeats=1, with_memory=False, dtype="bfloat16")
    assert not rows and message in refused[0]


def test_on_a_gpu_calls_are_timed_cold_warm_and_launched_one_by_one(monkeypatch: pytest.MonkeyPatch):
    class Sampler:
        captured = True

        def __init__(self, run: Callable[[], object]) -> None:
            pass

        def __call__(self) -> float:
            return 3e-3

        def warm(self) -> float:
            return 2e-3

    monkeypatch.setattr(timing, "GraphSampler", Sampler)
    monkeypatch.setattr(timing, "settle_clocks", lambda run: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    contenders = [timing.Contender(name, lambda: None, repeats, {}) for name, repeats in (("a", 3), ("b", 1))]
    assert timing.interleave(contenders, "cuda") == [[3e-3] * 3, [3e-3]]
    for one in contenders:
        assert one.fields["warm_p50_ms"] == 2.0 and one.fields["cuda_graph"]
        assert 0 <= one.fields["host_p50_ms"] <= one.fields["eager_p50_ms"] < 1000
    plain = timing.Contender("c", lambda: None, 1, {})
    timing.interleave([plain], "cuda", beside=False)
    assert "warm_p50_ms" not in plain.fields


def test_a_relu_that_falls_the_other_way_in_another_module_is_no_fault_of_the_engine():
    """At this case a hidden unit is 8e-9, and what the factored module makes of it in float32 is not what it is."""
    _, wrong, _ = whole_pdgr.engine(jobs.CASES["image_24x24"], "random", "fwd+bwd", "cpu")
    assert wrong is None
