# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from drseg_core.nn import PDGR
from drseg_core.nn.halves import _adjacent, join, joined


def halves() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))


def of(module: PDGR) -> tuple[torch.Tensor, torch.Tensor]:
    return module.edge_source.weight, module.edge_target.weight


def test_joined_halves_are_one_view_with_their_values_and_gradients():
    first, second = halves()
    expected = torch.cat([first, second]).detach()
    apart = joined(first, second)
    join(first, second)
    both = joined(first, second)
    assert torch.equal(both, expected) and torch.equal(apart, expected)
    assert both.data_ptr() == first.data_ptr() and apart.data_ptr() != first.data_ptr()
    weight = torch.randn(6, 4)
    for got, right in zip(torch.autograd.grad((both * weight).sum(), [first, second]), weight.chunk(2), strict=True):
        assert torch.equal(got, right)


def test_a_step_between_forward_and_backward_changes_nothing():
    first, second = halves()
    join(first, second)
    rows = torch.randn(5, 4)
    loss = (rows @ joined(first, second).mT).sum()
    with torch.no_grad():
        first.add_(1)
    loss.backward()
    assert torch.allclose(first.grad, rows.sum(0).expand(3, 4)) and torch.equal(first.grad, second.grad)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.share_memory(),
        lambda module: module.to_empty(device="cpu"),
        lambda module: nn.Sequential(module).double()[0],
    ],
)
def test_they_stay_together_when_a_module_is_moved(change):
    module = PDGR(4, 6, edge_hidden=8)
    names = list(module.state_dict())
    assert _adjacent(*of(module))
    assert _adjacent(*of(change(module))) and list(module.state_dict()) == names


def test_what_takes_them_apart_only_costs_a_copy():
    module = PDGR(4, 6, k=3, edge_hidden=8)
    features, prior = torch.randn(1, 4, 3, 3), torch.randn(1, 6, 3, 3)
    expected = module(features, prior)
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    other = PDGR(4, 6, k=3, edge_hidden=8)
    saved.seek(0)
    other.load_state_dict(torch.load(saved, weights_only=True), assign=True)
    for same in (copy.deepcopy(module), other, PDGR(4, 6, k=3, edge_hidden=8).to("meta").to_empty(device="cpu")):
        same.load_state_dict(module.state_dict())
        assert torch.equal(same(features, prior), expected)
    tied = PDGR(4, 6, k=3, edge_hidden=8)
    tied.edge_target.weight = tied.edge_source.weight
    assert torch.isfinite(tied.double()(features.double(), prior)).all()


def test_one_half_may_be_frozen():
    module = PDGR(4, 6, k=3, edge_hidden=8)
    module.edge_target.weight.requires_grad_(False)
    module(torch.randn(1, 4, 3, 3), torch.randn(1, 6, 3, 3)).square().sum().backward()
    assert module.edge_target.weight.grad is None and module.edge_source.weight.grad.abs().sum() > 0
