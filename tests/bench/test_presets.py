# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the presets: its miniatures are read as the sets, and a command that fails gives no row."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from drseg_core.data import open_dataset
from drseg_core.data.benchmarks import BENCHMARKS
from drseg_core.data.protocols import get_protocol, open_protocol


@pytest.fixture
def presets() -> Any:
    return importlib.import_module("bench.presets")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_miniatures_are_read_as_the_set(presets: Any, tmp_path: Path, name: str) -> None:
    data = f"{name}:{presets.write_miniature(name, tmp_path)}"
    train, scored = open_dataset(data, "train"), open_protocol(get_protocol("rskt"), data)
    for dataset in (train, scored):
        assert len(dataset) == 1 and dataset.class_names == BENCHMARKS[name].class_names
        sample = dataset[0]
        assert sample.image.shape == (3, 32, 40) and int(sample.mask.max()) == len(dataset.class_names) - 1


def test_a_command_that_fails_says_why(presets: Any, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"drseg evaluate: failed; (drseg: INFO: .*\n)?drseg: error: .* is not a folder"
    ):
        presets.measured(
            ["evaluate", str(tmp_path / "absent"), "--data", "folder:x", "--out", "m.json"], tmp_path / "o"
        )


def test_rows_are_added_one_by_one_and_a_failure_is_told(
    presets: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def measure(preset: str, name: str) -> dict[str, float]:
        if name == "vdd":
            raise RuntimeError("drseg train: failed; no reason")
        times = {f"{command}_{key}": 1.0 for command in ("train", "evaluate") for key in ("s", "cpu_s", "process_mb")}
        return {**times, "parameters": 1, "images": 1, "mIoU": 2.0}

    monkeypatch.setattr(presets, "measure", measure)
    out = tmp_path / "rows.jsonl"
    words = ["--preset", "vitb", "--set", "dlrsd", "--set", "vdd", "--set", "loveda", "--out", str(out)]
    assert presets.main(words) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["case"], row["preset"]) for row in rows] == [("dlrsd", "vitb"), ("loveda", "vitb")]
    assert all(row["device"] and row["date"] and row["threads"] and "commit" in row for row in rows)
    captured = capsys.readouterr()
    assert "| LoveDA | vitb | 1 | 1 | 1 | 1 |" in captured.out and "vitb vdd: drseg train: failed" in captured.err
