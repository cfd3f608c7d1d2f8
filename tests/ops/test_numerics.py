# SPDX-License-Identifier: Apache-2.0
"""The comparators must fail what is wrong and pass what is not: each planted fault, and the benign changes."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

from drseg_core import ops
from drseg_core.testing import Case, generator, numerics, vit_like_prior

NODES, K = 289, 16
CASE = Case("odd_17x17", 1, 17, 17, prior=256, hidden=8, channels=8, neighbours=K)
TOLERANCE = numerics.AFFINITY_TOLERANCE


@pytest.fixture(scope="module")
def selection() -> tuple[Tensor, Tensor, Tensor]:
    prior = vit_like_prior(CASE, generator(CASE))
    index, score = ops.knn_graph(prior, (17, 17), K, return_score=True, backend="reference")
    return index[0].long(), score[0], oracle.scores(prior, (17, 17), 1.0, "additive")[0]


def judge(index: Tensor, score: Tensor, truth: Tensor, **options) -> str | None:
    return numerics.compare_selection(index, score, truth, TOLERANCE, include_self=True, **options)


@pytest.mark.promise("C40")
def test_the_right_answer_passes(selection):
    assert judge(*selection, near_tie_share=numerics.NEAR_TIE_SHARE) is None


@pytest.mark.promise("C40")
def test_another_order_of_summation_passes(selection):
    index, score, truth = selection
    prior = vit_like_prior(CASE, generator(CASE))
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    again, again_score = ops.knn_graph(prior[..., order], (17, 17), K, return_score=True, backend="reference")
    assert judge(again[0].long(), again_score[0], truth) is None


def _next_best(index: Tensor, score: Tensor, truth: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The (K+1)-th in place of the K-th."""
    ranked = truth.clone().fill_diagonal_(torch.inf).sort(dim=1, descending=True).indices
    chosen = torch.cat([ranked[:, : K - 1], ranked[:, K : K + 1]], 1).sort(1).values
    index = index.clone()
    index[rows] = chosen[rows]
    return index, truth.gather(1, index).float()


def _without_best(index: Tensor, score: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    ranked = truth.clone().fill_diagonal_(torch.inf).sort(dim=1, descending=True).indices
    index = index.clone()
    index[3] = torch.cat([ranked[3, :1], ranked[3, 2 : K + 1]]).sort().values
    return index, truth.gather(1, index).float()


def _select(truth: Tensor) -> Tensor:
    return truth.clone().fill_diagonal_(torch.inf).topk(K, dim=1).indices.sort(1).values


def _tail_skipped(index: Tensor, score: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    cut = truth.clone()
    cut[:, NODES - NODES % 64 :] = -10
    index = _select(cut)
    return index, truth.gather(1, index).float()


def _without_self(index: Tensor, score: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    index = truth.clone().fill_diagonal_(-torch.inf).topk(K, dim=1).indices.sort(1).values
    return index, truth.gather(1, index).float()


def _off_by_one(index: Tensor, score: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    index = index.clone()
    row = int((index[:, -1] < NODES - 1).nonzero()[0])
    index[row, -1] += 1
    return index, score


def _duplicate(index: Tensor, score: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    index, score = index.clone(), score.clone()
    index[5, 1], score[5, 1] = index[5, 0], score[5, 0]
    return index, score


def _sentinel(index: Tensor, score: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    index = index.clone()
    index[7, 0] = -1
    return index, score


def _half(index: Tensor, score: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    rounded = truth.bfloat16().double()
    index = _select(rounded)
    return index, rounded.gather(1, index).float()


FAULTS = {
    "one row takes the next best": lambda i, s, t: _next_best(i, s, t, slice(11, 12)),
    "all rows take the next best": lambda i, s, t: _next_best(i, s, t, slice(None)),
    "one row drops its best": _without_best,
    "tail tile skipped": _tail_skipped,
    "self dropped": _without_self,
    "last id off by one": _off_by_one,
    "duplicate id": _duplicate,
    "sentinel id": _sentinel,
    "other row's values": lambda i, s, t: (i, s.roll(1, 0)),
    "affinities stored in bf16": _half,
    "ids reversed, values not": lambda i, s, t: (i.flip(1), s),
    "values not of their ids": lambda i, s, t: (i, s.flip(1)),
    "scores off by five tolerances": lambda i, s, t: (i, s + 1e-5),
    "score is NaN": lambda i, s, t: (i, torch.full_like(s, torch.nan)),
}


@pytest.mark.promise("C40")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_selection_faults_fail(fault, selection):
    index, score, truth = selection
    assert judge(*FAULTS[fault](index, score, truth), truth) is not None


@pytest.mark.promise("C40")
def test_ties_to_the_highest_index_fail():
    truth = torch.randint(0, 3, (40, 40), generator=torch.Generator().manual_seed(0)).double()
    key = truth.clone().fill_diagonal_(torch.inf)
    low = key.sort(dim=1, descending=True, stable=True).indices[:, :8].sort(1).values
    high = (39 - key.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :8]).sort(1).values
    options = {"tolerance": 0.0, "include_self": True}
    assert numerics.compare_selection(low, truth.gather(1, low), truth, **options) is None
    problem = numerics.compare_selection(high, truth.gather(1, high), truth, **options)
    assert problem == "a tie did not go to the lowest index"


def test_a_masked_node_that_is_chosen_fails(selection):
    index, score, truth = selection
    truth = truth.clone()
    truth[:, index[9, 4]] = -torch.inf
    assert judge(index, score, truth) is not None


@pytest.mark.promise("C43")
def test_data_with_near_ties_are_refused():
    truth = torch.zeros(20, 20).double()
    index = torch.arange(4).repeat(20, 1)
    index[4:, 3] = torch.arange(4, 20)
    assert numerics.compare_selection(index, torch.zeros(20, 4), truth, 1e-6, include_self=True) is None
    assert numerics.compare_selection(index, torch.zeros(20, 4), truth, 1e-6, include_self=True, near_tie_share=0.05)


@pytest.mark.promise("C40")
@pytest.mark.parametrize(
    "got,passes",
    [
        (torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]]), True),
        (torch.tensor([[1.0 + 9e-7, torch.nan], [torch.inf, 0.0]]), True),
        (torch.tensor([[1.0 + 3e-6, torch.nan], [torch.inf, 0.0]]), False),
        (torch.tensor([[1.0, 0.0], [torch.inf, 0.0]]), False),
        (torch.tensor([[torch.nan, torch.nan], [torch.inf, 0.0]]), False),
        (torch.tensor([[1.0, torch.nan], [-torch.inf, 0.0]]), False),
        (torch.tensor([[1.0, torch.nan], [1e30, 0.0]]), False),
        (torch.tensor([[1.0, torch.nan, 0.0], [torch.inf, 0.0, 0.0]]), False),
    ],
)
def test_values(got, passes):
    truth = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]], dtype=torch.float64)
    assert (numerics.compare_values(got, truth, 2e-6).problem is None) is passes


@pytest.mark.promise("C40")
def test_one_wrong_row_shows_in_the_worst_row_only():
    truth = torch.ones(1000, 8, dtype=torch.float64)
    got = truth.clone()
    got[500] = 0
    result = numerics.compare_values(got, truth, 1e-3)
    assert result.problem is not None and result.worst_row_ratio == 1 and result.rms_ratio < 0.04
