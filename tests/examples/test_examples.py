# SPDX-License-Identifier: Apache-2.0
"""The scripts and the notebook in ``examples`` run as a reader finds them, and do what they say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files go where tests put theirs, and the state of the random numbers comes back."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["example"])


def run(name: str, *arguments: Any) -> Any:
    with torch.random.fork_rng():
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)


def test_a_network_with_pdgr_learns() -> None:
    losses = run("pdgr_in_a_model", 25)
    assert losses[-1] < 0.5 * losses[0]


def test_a_map_from_words(capsys: pytest.CaptureFixture[str]) -> None:
    made = run("map_from_words", [])
    assert made.is_file() and f"written: {made}" in capsys.readouterr().out


def test_many_scenes_of_which_one_is_broken() -> None:
    outcomes = run("many_scenes", [])
    assert sorted(outcome.state for outcome in outcomes) == ["failed", "mapped", "mapped"]
    assert all(Path(path).is_file() for outcome in outcomes for path in outcome.files)
    assert all(outcome.files for outcome in outcomes if outcome.state == "mapped")


def test_the_notebook() -> None:
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None
                exec("".join(cell["source"]), names)
    assert names["index"].shape == (1, 144, 8) and names["found"].class_index.shape == (80, 120)
    assert names["spread"][0, [0, 60, 143]].argmax(-1).tolist() == [0, 1, 2]


def test_propagation_gives_the_same_before_and_after() -> None:
    assert run("propagation_like_lposs", 16) < 1e-5


def test_a_graph_of_ones_own() -> None:
    out = run("own_graph")
    assert out.shape == (1, 192, 32) and out.isfinite().all()


def test_a_kernel_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("benchmark_a_kernel", "graph_propagate", "odd_37_nodes", 2)
    assert {"native", "reference"} <= set(found) and all(found.values())
    assert "wrong" not in capsys.readouterr().out
