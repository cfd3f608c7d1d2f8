# SPDX-License-Identifier: Apache-2.0
"""Properties of the module PDGR, for maps of any size and every reading of Eq. 7 to 9.

The same few cases at every commit; ``make test-deep`` draws 2000 new ones for each property. Each test names a fault
that it is for.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drseg_core.nn import PDGR
from drseg_core.ops import backend_report

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from properties import NORMS, SEEDS, few, near, same  # noqa: E402 - the ops' own

BACKENDS = [
    row["backend"]
    for row in backend_report()
    if row["op"] == "graph_layer" and row["device"] == "cpu" and row["available"]
]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


class Case(NamedTuple):
    """A module's options and the sizes of what it is given."""

    options: dict[str, Any]
    batch: int
    grid: tuple[int, int]
    channels: int
    seed: int

    @property
    def nodes(self) -> int:
        return math.prod(self.grid)

    def module(self, backend: str, dtype: torch.dtype = torch.float32, **others: Any) -> PDGR:
        """Every parameter of it matters."""
        torch.manual_seed(self.seed)
        module = PDGR(self.channels, 4, edge_hidden=4, backend=backend, **{**self.options, **others}).to(dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            # few edges whose weights vanish, of which a degree would be eps
            module.edge_bias.add_(1)
        module.output_norm.eps = 0.25
        return module

    def features(self, dtype: torch.dtype = torch.float32) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, self.channels, *self.grid, generator=random, dtype=torch.float64).to(dtype)

    def prior(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Features whose cosines differ from each other and from 0, at which two readings cut."""
        random = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(self.batch, 4, *self.grid, generator=random, dtype=torch.float64).add(0.01).to(dtype)

    def exact_prior(self) -> Tensor:
        """Ones and minus ones: cosines are exact, so every backend chooses the same."""
        random = torch.Generator().manual_seed(self.seed + 2)
        return 2.0 * torch.randint(0, 2, (self.batch, 4, *self.grid), generator=random) - 1


CASES = st.builds(
    Case,
    options=st.fixed_dictionaries(
        {
            "k": st.integers(1, 9),
            "affinity": st.sampled_from(["exp", "linear", "power", "product", "gauss"]),
            "self_loop": st.sampled_from(["in_topk", "exclude", "extra"]),
            "norm": st.sampled_from(NORMS),
            "layers": st.integers(1, 3),
            "residual": st.booleans(),
            "use_affinity_as_weight": st.booleans(),
        }
    ),
    batch=st.integers(1, 2),
    grid=st.tuples(st.integers(2, 5), st.integers(2, 6)),
    channels=st.integers(2, 9),
    seed=SEEDS,
)


def run(module: PDGR, features: Tensor, prior: Tensor | None, flip: int = 0, **options: Any) -> dict[str, Tensor]:
    """Output and gradients of the features and of every parameter; what comes in is mirrored along ``flip``."""
    features = features.detach().requires_grad_()
    output = module(features, prior, **options)
    random = torch.Generator().manual_seed(3)
    grad = torch.randint(-2, 3, output.shape, generator=random).to(output.dtype)
    grad = grad.flip(flip) if flip else grad
    found = torch.autograd.grad(output, [features, *module.parameters()], grad)
    names = ("features", *(name for name, _ in module.named_parameters()))
    return {"output": output.detach(), **dict(zip(names, found, strict=True))}


# the distance of two cells was taken of columns alone
@pytest.mark.promise("C6")
@few()
@given(case=CASES, seed=SEEDS)
def test_mirrored_maps(backend, case, seed):
    module = case.module(backend, torch.float64)
    features, prior = case.features(torch.float64), case.prior(torch.float64)
    right = run(module, features, prior)
    for axis in (2, 3):
        got = run(module, features.flip(axis), prior.flip(axis), axis)
        for name, value in right.items():
            near(got[name], value.flip(axis) if name in ("output", "features") else value, f"{name} of a mirrored map")
    # without a decay only the prior says who is a neighbour
    module = case.module(backend, torch.float64, decay=0.0)
    order = torch.randperm(case.nodes, generator=torch.Generator().manual_seed(seed))
    tokens, given = features.flatten(2).mT, prior.flatten(2).mT
    with torch.no_grad():
        whole = module(tokens, given, grid=case.grid)
        near(module(tokens[:, order], given[:, order], grid=case.grid), whole[:, order], "cells in another order")


# a prior that is not normalised reached the edge MLP
@pytest.mark.promise("C6")
@few()
@given(case=CASES, power=st.integers(-20, 20))
def test_the_scale_of_the_prior(backend, case, power):
    module, features, prior = case.module(backend), case.features(), case.prior()
    same(run(module, features, prior * 2.0**power), run(module, features, prior), "depends on the prior's scale")


# the graph of the first sample served all of them
@pytest.mark.promise("C7")
@few()
@given(case=CASES)
def test_samples_are_alone(backend, case):
    case = case._replace(batch=3)
    module, features, prior = case.module(backend), case.features(), case.exact_prior()
    whole = run(module, features, prior)
    for sample in range(3):
        pick = slice(sample, sample + 1)
        with torch.no_grad():
            near(module(features[pick], prior[pick]), whole["output"][pick], "a sample alone")


# more neighbours than cells changed the count that sym_count divides by
@pytest.mark.promise("C9")
@few()
@given(case=CASES, more=st.integers(0, 20))
def test_more_neighbours_than_cells(backend, case, more):
    features, prior = case.features(), case.prior()
    enough, plenty = case.module(backend, k=case.nodes), case.module(backend, k=case.nodes + more)
    same(run(plenty, features, prior), run(enough, features, prior), "depends on padding")


LAYOUTS = {
    "channels last": lambda value: value.contiguous(memory_format=torch.channels_last),
    "transposed": lambda value: value.mT.contiguous().mT,
    "a part": lambda value: torch.cat([value, value * torch.nan], 3)[..., : value.shape[3]],
    "one for all": lambda value: value[:1].expand(value.shape),
}


# features in channels-last order were read as if contiguous
@pytest.mark.promise("C13")
@few()
@given(case=CASES, one=st.sampled_from(list(LAYOUTS)), other=st.sampled_from(list(LAYOUTS)))
def test_layouts(backend, case, one, other):
    module, features, prior = case.module(backend), LAYOUTS[one](case.features()), LAYOUTS[other](case.exact_prior())
    right = run(module, *(value.clone(memory_format=torch.contiguous_format) for value in (features, prior)))
    for name, value in run(module, features, prior).items():
        near(value, right[name], f"{name} of features {one}, prior {other}")
    tokens = module(features.flatten(2).mT, prior.flatten(2).mT, grid=case.grid)
    near(tokens.detach().mT.unflatten(2, case.grid), right["output"], "tokens")


BAD = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([math.nan, math.inf, -math.inf])), min_size=1, max_size=3)


# a cell without data lent its neighbours an edge of weight NaN
@pytest.mark.promise("C11")
@few()
@given(case=CASES, bad=BAD)
def test_cells_that_are_not_finite_are_as_if_not_there(backend, case, bad):
    # sym_count divides by all slots, padded or not
    norm = "sym_row" if case.options["norm"] == "sym_count" else case.options["norm"]
    module = case.module(backend, torch.float64, decay=0.0, norm=norm)
    tokens, prior = case.features(torch.float64).flatten(2).mT, case.prior(torch.float64).flatten(2).mT.contiguous()
    for node, value in bad:
        prior[:, node % case.nodes, node % 4] = value
    healthy = prior[0].isfinite().all(-1)
    with torch.no_grad():
        got = module(tokens, prior, grid=case.grid)
        assert got[:, ~healthy].isnan().all() and got[:, healthy].isfinite().all()
        if healthy.sum() > 1:
            alone = module(tokens[:, healthy], prior[:, healthy], grid=(1, int(healthy.sum())))
            near(got[:, healthy], alone, "the healthy cells")


# the rows of norm="row" added up to one plus eps of a large size
@pytest.mark.promise("C6")
@few()
@given(case=CASES, value=st.floats(-3, 3))
def test_constant_features_stay_constant(backend, case, value):
    module = case.module(backend, torch.float64, norm="row")
    features = torch.full_like(case.features(torch.float64), value)
    with torch.no_grad():
        got = module(features, case.prior(torch.float64))
    # where weights are small, eps is a part of their sum
    assert (got - got[:, :, :1, :1]).abs().max() <= 1e-3 * (1 + abs(value))


# the choice of neighbours carried a gradient, the bias of a layer none
@pytest.mark.promise("C3")
@few()
@given(case=CASES)
def test_gradients_where_they_are_promised(backend, case):
    module, features, prior = case.module(backend), case.features().requires_grad_(), case.prior().requires_grad_()
    output = module(features, prior)
    found = torch.autograd.grad(output.sum() + output.square().sum(), [features, *module.parameters()])
    assert all(value.isfinite().all() for value in found)
    # a ReLU between two layers may let nothing through
    assert (found[0].any() or len(module.weights) > 1) and all(value.any() for value in found[-2:])
    (none,) = torch.autograd.grad(module(features, prior).sum(), [prior], allow_unused=True)
    assert none is None
    index, weight, real = module.edges(prior)
    assert not (index.requires_grad or weight.requires_grad or real.requires_grad) and (weight >= 0).all()


# two layers added up the gradient of their coefficients once
@pytest.mark.promise("C3")
@few()
@given(case=CASES, seed=SEEDS)
def test_gradients_are_slopes(backend, case, seed):
    # one layer has no kink on the way from its features, and is linear in the last parameters
    module, prior, step = case.module(backend, torch.float64, layers=1), case.prior(torch.float64), 1e-6
    features, random = case.features(torch.float64), torch.Generator().manual_seed(seed)
    along = torch.randn(features.shape, generator=random, dtype=torch.float64)
    grad = torch.randn(features.shape, generator=random, dtype=torch.float64)
    given = features.clone().requires_grad_()
    (found,) = torch.autograd.grad(module(given, prior), given, grad)
    with torch.no_grad():
        slope = (module(features + step * along, prior) - module(features - step * along, prior)) / (2 * step)
        assert abs(float((slope * grad).sum() - (along * found).sum())) <= 1e-6 * float((along * found).abs().sum() + 1)
    # in several layers the gradients still add up
    module = case.module(backend, torch.float64)
    parts = [
        torch.autograd.grad(module(given, prior), [given, *module.parameters()], share)
        for share in (grad, along, grad + 2 * along)
    ]
    for one, other, both in zip(*parts, strict=True):
        near(both, one + 2 * other, "the gradient of a sum")


# the last node of a block was weighed by another backend's rule
@pytest.mark.promise("C1", "C24", "C15")
@few()
@given(case=CASES)
def test_every_backend_says_the_same_and_again(backend, case):
    features, prior = case.features(), case.exact_prior()
    kept = features.clone(), prior.clone()
    module, threads = case.module(backend), torch.get_num_threads()
    got, right = run(module, features, prior), run(case.module("reference"), features, prior)
    for name, value in right.items():
        # gradients of the MLP are sums over all edges that cancel
        size = 10 * float(got[name].abs().max() + 1)
        assert float((got[name] - value).abs().max()) <= 3e-5 * size, f"{name} differs between backends"
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            same(run(module, features, prior), got, f"differs with {count} threads")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(features, kept[0]) and torch.equal(prior, kept[1])
    graph = module.graph(prior)
    for name, value in run(module, features, None, graph=graph).items():
        near(value, got[name], f"{name} by a graph that was made before")
