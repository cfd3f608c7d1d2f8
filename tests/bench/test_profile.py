# SPDX-License-Identifier: Apache-2.0
"""The profile of a step: operators on a CPU, and what the parts take at best."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bench import counts, jobs, profile
from bench.contenders import pdgr_products
from drseg_core.testing import Case

TINY = Case("bench_tiny", 2, 6, 7, prior=16, hidden=8, channels=12, neighbours=6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_profile_lists_operators_and_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str
):
    monkeypatch.setitem(jobs.CASES, TINY.name, TINY)
    out = tmp_path / "folder" / "profile.jsonl"
    given = ["--case", TINY.name, "--mode", "fwd+bwd", "--device", "cpu", "--steps", "2"]
    assert profile.main([*given, "--dtype", dtype, "--out", str(out)]) == 0
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    names = [kernel["name"] for kernel in row["kernels"]]
    assert any(name.startswith("drseg") for name in names) and "aten::mm" in names
    us = [kernel["us"] for kernel in row["kernels"]]
    assert us == sorted(us, reverse=True) and math.isclose(sum(us), row["kernels_us"])
    assert math.isclose(sum(kernel["share"] for kernel in row["kernels"]), 1)
    assert row["dtype"] == dtype and row["p50_ms"] > 0 and row["backends"] and "commit" in row
    printed = capsys.readouterr().out
    assert "aten::mm" in printed and "the whole step" in printed and f"{TINY.name} fwd+bwd {dtype} on " in printed


def test_calls_are_counted_for_one_step():
    left = torch.randn(8, 8)
    found = {one.name: one.calls for one in profile.kernels_of(lambda: (left @ left) @ left, "cpu", 5)}
    assert found["aten::mm"] == 2


def test_parts_are_the_products_the_ops_and_the_step():
    parts = profile.parts_of(TINY, "fwd", "float32", gemm=1e9, copy=1e9)
    assert [part.name for part in parts[:2]] == ["product: scores", "product: projections"]
    assert sum(part.flop for part in parts if "product" in part.name) == sum(
        product.flops for product in pdgr_products(TINY, False)
    )
    whole = counts.work("pdgr", TINY, "fwd")
    assert (parts[-1].flop, parts[-1].byte) == (whole.flop, whole.byte)
    assert math.isclose(parts[-1].least_us, 1e-3 * max(whole.flop, whole.byte))
    narrow = profile.parts_of(TINY, "fwd", "bfloat16", gemm=1e9, copy=1e9)
    assert 2 * narrow[0].byte == parts[0].byte and narrow[0].flop == parts[0].flop


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert profile.main(["--device", "cuda"]) == 5
    assert "expected a CUDA device" in capsys.readouterr().err
