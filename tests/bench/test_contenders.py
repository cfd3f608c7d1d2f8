# SPDX-License-Identifier: Apache-2.0
"""The others compute what the engine computes, and the lower bound has the products of the whole module."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import contenders, gate, whole_pdgr
from drseg_core.nn import PDGR
from drseg_core.ops import knn_graph
from drseg_core.testing import Case, LiteralPDGR

TINY = Case("bench_tiny", 2, 5, 7, prior=12, hidden=6, channels=8, neighbours=5)


def _double(data: str) -> tuple[whole_pdgr.Problem, Tensor]:
    made = whole_pdgr.make(TINY, data)
    problem = whole_pdgr.Problem(
        made.engine.double(),
        made.features.detach().double().requires_grad_(),
        made.prior.double(),
        made.gradient.double(),
    )
    return problem, problem.engine.graph(problem.prior).index


def _assert_same(one: tuple[Tensor, tuple[Tensor, ...]], other: tuple[Tensor, tuple[Tensor, ...]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=1e-9)
    for left, right in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("data", whole_pdgr.DATA)
@pytest.mark.parametrize("row_block", [None, 4])
def test_factored_is_the_engine(data: str, row_block: int | None):
    problem, index = _double(data)
    factored = contenders.FactoredPDGR(problem.engine, row_block)
    _assert_same(
        whole_pdgr.step(partial(factored, index=index), problem, True), whole_pdgr.step(problem.engine, problem, True)
    )


def test_factored_and_literal_choose_as_the_engine_does():
    problem, index = _double("random")
    unit = torch.nn.functional.normalize(problem.prior.flatten(2).transpose(1, 2), dim=-1)
    assert torch.equal(contenders.FactoredPDGR(problem.engine).select(unit, (5, 7)).sort(-1).values, index.long())
    expected = whole_pdgr.step(problem.engine, problem, True)
    for module in (contenders.FactoredPDGR(problem.engine), LiteralPDGR(problem.engine)):
        _assert_same(whole_pdgr.step(module, problem, True), expected)


def test_factored_knows_the_default_options_only():
    with pytest.raises(ValueError, match="FactoredPDGR: engine has other options"):
        contenders.FactoredPDGR(PDGR(8, 12, norm="row"))


@pytest.mark.parametrize("block", [3, 35, 64])
@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_naive_selection_is_the_engine_s(block: int, decay: float):
    prior = torch.randn(2, 35, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    distance = contenders.grid_distance((5, 7), prior.device).double()
    got = contenders.naive_selection(prior, distance, decay, 6, block)
    assert torch.equal(got.sort(-1).values, knn_graph(prior, (5, 7), 6, decay=decay).long())


def test_best_block_is_one_that_fits():
    prior = torch.randn(1, 130, 8)
    distance = contenders.grid_distance((10, 13), prior.device)
    assert contenders.best_block(prior, distance, 1.0, 5) in (64, 128, 130)
    assert contenders.best_block(prior, distance, 1.0, 5, part=70) in (64, 70)


def test_faiss_selection_is_the_engine_s_without_decay():
    pytest.importorskip("faiss", reason="in the bench extra only")
    prior = torch.randn(2, 35, 12, generator=torch.Generator().manual_seed(2))
    got = contenders.faiss_selection(prior, 6)()
    assert torch.equal(got.sort(-1).values, knn_graph(prior, (5, 7), 6, decay=0.0).long())
    assert gate.selection(got, prior, (5, 7), 0.0) is None


@pytest.mark.parametrize("backward", [False, True])
def test_lower_bound_has_the_products_of_the_factored_module_and_no_others(backward: bool):
    problem = whole_pdgr.make(TINY, "random")
    module = contenders.FactoredPDGR(problem.engine)
    with FlopCounterMode(display=False) as counted:
        output = module(problem.features, problem.prior)
        if backward:
            # the counter refuses torch.autograd.grad
            output.backward(problem.gradient)
    products = contenders.pdgr_products(TINY, backward)
    assert sum(product.flops for product in products) == counted.get_total_flops()


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_lower_bound_runs_its_products(monkeypatch: pytest.MonkeyPatch, block_bytes: int):
    monkeypatch.setattr(contenders, "_BLOCK_BYTES", block_bytes)
    products = contenders.pdgr_products(TINY, True)
    bound = contenders.MatmulLowerBound(products)
    with FlopCounterMode(display=False) as counted:
        bound()
    assert sum(product.flops for product in products) == counted.get_total_flops()
