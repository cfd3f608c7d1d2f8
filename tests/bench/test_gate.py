# SPDX-License-Identifier: Apache-2.0
"""The gate lets right results pass, near-ties among them, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import gate
from drseg_core.ops import knn_graph

GRID = (6, 7)


@pytest.fixture
def prior() -> Tensor:
    return torch.randn(2, 42, 16, generator=torch.Generator().manual_seed(3))


def test_output_and_gradients():
    right = torch.linspace(-2, 2, 12).view(1, 3, 2, 2)
    assert gate.output(right + 9e-4, right) is None
    assert "output:" in (gate.output(right + 2e-3, right) or "")
    assert "output:" in (gate.output(torch.where(right > 1.9, torch.nan, right), right) or "")
    assert gate.gradients(["x"], [right * 1.001], [right], {}) is None
    assert "gradient of x:" in (gate.gradients(["x"], [right * 1.003], [right], {}) or "")
    small = torch.tensor(1e-3)
    assert gate.gradients(["x", "b"], [right, small * 2], [right, small], {"b": "x"}) is None
    assert "gradient of b:" in (gate.gradients(["x", "b"], [right, small * 2], [right, small], {}) or "")


def test_most_cells_counts_cells():
    right = torch.zeros(1, 3, 10, 10)
    wrong = right.clone()
    wrong[0, 1, 0, :5] = 1
    assert gate.most_cells(wrong, right) is None
    wrong[0, 2, 1, :1] = 1
    assert gate.most_cells(wrong, right) is not None


def test_few_elements_of_a_gradient_may_differ_by_what_a_relu_at_zero_gives():
    right = torch.linspace(-1, 1, 10_000)
    flipped, far, many = (right.clone() for _ in range(3))
    flipped[:4] += 3e-3
    far[:4] += 5e-3
    many[:9] += 3e-3
    assert gate.gradients(["w"], [flipped], [right], {}) is None
    for wrong in (far, many, right * torch.nan):
        assert "gradient of w" in (gate.gradients(["w"], [wrong], [right], {}) or "")


def test_norms_of_gradients():
    right = torch.linspace(-1, 1, 100)
    assert gate.most_of_gradients(["w", "b"], [1.05 * right, torch.tensor(7.0)], [right, torch.tensor(0.0)]) is None
    for wrong in (1.2 * right, right * torch.nan):
        assert "gradient of w" in (gate.most_of_gradients(["w"], [wrong], [right]) or "")


def test_selection_takes_the_engine_s_in_any_order(prior: Tensor):
    index = knn_graph(prior, GRID, 5, decay=2.0)
    assert gate.selection(index.flip(-1), prior, GRID, 2.0) is None
    assert "clearly lower" in (gate.selection(index, prior, GRID, 0.5) or "")


def test_selection_refuses_what_is_no_selection(prior: Tensor):
    index = knn_graph(prior, GRID, 5)
    rows = torch.arange(42)
    for wrong, message in (
        (index.roll(1, dims=1), "clearly lower"),
        (index.index_fill(2, torch.tensor(4), 42), "out of range"),
        (index.index_fill(2, torch.tensor(4), -1), "out of range"),
        (index.clone().index_copy_(2, torch.tensor([4]), index[..., :1]), "chosen twice"),
    ):
        assert message in (gate.selection(wrong, prior, GRID, 1.0) or "")
    without = knn_graph(prior, GRID, 5, include_self=False)
    assert not bool((without == rows[:, None]).any())
    assert "clearly lower" in (gate.selection(without, prior, GRID, 1.0) or "")


def test_selection_takes_either_of_two_equal_nodes():
    prior = torch.eye(4).repeat(1, 2, 1)[:, [0, 1, 2, 4, 4, 5, 6, 7]]
    index = torch.tensor([[0, 3], [1, 5], [2, 6], [0, 3], [3, 4], [1, 5], [2, 6], [7, 0]])[None]
    assert gate.selection(index, prior, (1, 8), 0.0) is None
    index[0, 0] = torch.tensor([0, 4])
    assert gate.selection(index, prior, (1, 8), 0.0) is None


def test_selection_of_a_zero_feature_holds_the_node_itself():
    prior = torch.cat([torch.zeros(1, 4), torch.eye(4)])[None]
    index = torch.tensor([[1, 2], [1, 0], [2, 0], [3, 0], [4, 0]])[None]
    assert "clearly lower" in (gate.selection(index, prior, (1, 5), 0.0) or "")
    assert gate.selection(index, prior, (1, 5), 0.0, include_self=False) is None
    index[0, 0, 0] = 0
    assert gate.selection(index, prior, (1, 5), 0.0) is None


def test_given_selection_takes_the_place_of_topk():
    value = torch.tensor([[3.0, 1.0, 2.0]])
    with gate.GivenSelection(torch.tensor([[1, 2]], dtype=torch.int32)):
        values, indices = value.topk(2, dim=-1)
    assert values.tolist() == [[1.0, 2.0]] and indices.tolist() == [[1, 2]]
    assert value.topk(2, dim=-1).indices.tolist() == [[0, 2]]


def test_result_of_op():
    right = torch.linspace(0, 1, 50)
    assert gate.result_of_op("edge_weight", right + 9e-5, right) is None
    assert gate.result_of_op("edge_weight", right + 2e-4, right) is not None
    index = torch.arange(2000)
    assert gate.result_of_op("knn_graph", index, index) is None
    assert gate.result_of_op("knn_graph", index + 1, index) is not None
