# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys

import pytest

from bench import long


def test_a_leak_is_a_slope_and_what_a_start_takes_is_none():
    warm = [long.Sample(second, 500 + min(second, 100), 9, 4) for second in range(1000)]
    assert long.summary(warm)["mib_per_hour"] == pytest.approx(0, abs=0.01)
    leak = [long.Sample(second, 500 + second / 60, 9 + second // 500, second) for second in range(1000)]
    found = long.summary(leak)
    assert found["mib_per_hour"] == pytest.approx(60, rel=1e-3)
    assert found["files"] == [10, 10] and found["cached"] == [500, 999] and found["seconds"] == 999


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_graphs_are_looked_at(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert long.main(["--seconds", "2", "--only", "graphs", "--out", str(out)]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["kind"] == "graphs" and row["samples"] > 1 and min(row["memory_mib"]) > 100 and row["files"][0] > 2
    assert "MiB an hour" in capsys.readouterr().out
