# SPDX-License-Identifier: Apache-2.0
"""PDGR as the field trains it: bfloat16 and float16 under autocast, with a loss scale, and compiled.

What is held against float64 may be off by what linear maps in that precision cost anybody: twice the error of the
literal module under the same autocast, on the same neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gate import GivenSelection
from drseg_core import ops
from drseg_core.nn import PDGR, pdgr
from drseg_core.testing import LiteralPDGR

HALVES = [torch.bfloat16, torch.float16]


def make(seed: int = 0) -> tuple[PDGR, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 48, 16, 16, generator=random)
    torch.manual_seed(seed)
    # priors have a mean, so that scores lie close together
    return PDGR(48, 64, k=20, edge_hidden=64), features, torch.randn(2, 64, 16, 16, generator=random) + 0.5


def run(module: nn.Module, features: Tensor, prior: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    leaf = features.detach().clone().requires_grad_()
    output = module(leaf, prior)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    leaves = [leaf, *parameters.values()]
    grads = torch.autograd.grad((output * weight).sum(), leaves, materialize_grads=True)
    return dict(zip(["output", "features", *parameters], [output.detach(), *grads], strict=True))


def off(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def beyond(module: PDGR, features: Tensor, prior: Tensor, dtype: torch.dtype) -> list[str]:
    """What is farther off than twice what the literal module is, and by how much."""
    wide = copy.deepcopy(module).double()
    exact = run(wide, features.double(), prior.double(), dict(wide.named_parameters()))
    named = dict(module.named_parameters())
    index = wide.graph(prior.double()).index
    with torch.autocast("cpu", dtype):
        got = run(module, features, prior, named)
        with GivenSelection(index):
            literal = run(LiteralPDGR(module), features, prior.float(), named)
    # the degrees divide a common factor of the weights out: what is left for the last bias is noise; and outputs are
    # rounded to half precision here and not in the literal module
    rounding = torch.finfo(dtype).eps
    return [
        f"{name}: {off(got[name], exact[name]):.2g} where {off(literal[name], exact[name]):.2g} is usual"
        for name in exact
        if name != "edge_bias" and off(got[name], exact[name]) > 2 * off(literal[name], exact[name]) + rounding
    ]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("half_prior", [False, True], ids=["wide", "half"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_costs_what_linear_maps_cost(dtype, half_prior, backend):
    for seed in range(2):
        module, features, prior = make(seed)
        with ops.use_backend(backend):
            assert beyond(module, features, prior.to(dtype) if half_prior else prior, dtype) == []


def _coarse_scores(original: Callable[..., Any], prior: Any, *others: Any, **options: Any) -> Any:
    return original(prior.scaled.bfloat16().float() * 1, *others, **options)


def _unnormalised(original: Callable[..., Any], *others: Any, **options: Any) -> Any:
    return original(*others, **{**options, "inverse_norm": None})


def _without_a_bias(original: Callable[..., Any], *others: Any, **options: Any) -> Any:
    return original(*others, **{**options, "source_bias": options["source_bias"].detach() * 0})


def _short_sums(
    original: Callable[..., Any], x: Tensor, index: Tensor, share: Tensor, *others: Any, **opts: Any
) -> Any:
    return original(x, index, share.to(torch.bfloat16) * 1.02, *others, **opts)


def _too_small_a_gradient(original: Callable[..., Any], x: Tensor, *others: Any, **options: Any) -> Any:
    return original(0.9 * x + 0.1 * x.detach(), *others, **options)


SABOTAGE = [
    ("knn_graph", _coarse_scores),
    ("edge_coefficient", _unnormalised),
    ("edge_coefficient", _without_a_bias),
    ("graph_layer", _short_sums),
    ("graph_layer", _too_small_a_gradient),
]


@pytest.mark.parametrize("name,fault", SABOTAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_costs_more(name, fault, monkeypatch):
    original = getattr(pdgr, name)
    module, features, prior = make()
    exact = beyond(module, features, prior, torch.bfloat16)
    assert exact == []
    wide = copy.deepcopy(module).double()

    def faulty(first: Any, *others: Any, **options: Any) -> Any:
        tensor = first.scaled if isinstance(first, tuple) else first
        spoilt = not isinstance(tensor, Tensor) or tensor.dtype != torch.float64
        return fault(original, first, *others, **options) if spoilt else original(first, *others, **options)

    def of_edges(**options: Any) -> Any:
        return (original if options["source"].dtype == torch.float64 else lambda **o: fault(original, **o))(**options)

    monkeypatch.setattr(pdgr, name, of_edges if name == "edge_coefficient" else faulty)
    assert wide.graph(prior.double()).index.shape == (2, 256, 20)
    assert beyond(module, features, prior, torch.bfloat16) != []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.graph, self.head = (
            nn.Conv2d(3, 12, 3, padding=1),
            PDGR(12, 10, k=6, residual=True),
            nn.Conv2d(12, 4, 1),
        )

    def forward(self, image: Tensor, prior: Tensor) -> Tensor:
        return self.head(self.graph(self.first(image), prior))


def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    image, filters = torch.randn(4, 3, 8, 8, generator=random), torch.randn(10, 3, 3, 3, generator=random)
    label = (image[:, 0] > 0).long() + 2 * (image[:, 1] > 0)
    while True:
        yield image, F.conv2d(image, filters, padding=1), label


def test_float16_with_a_loss_scale_trains_and_outlives_an_overflow():
    torch.manual_seed(0)
    net, losses = Net(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    for step, (image, prior, label) in zip(range(40), batches(), strict=False):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(net(image, prior), label)
        optimizer.zero_grad()
        scaler.scale(loss * (1e30 if step == 5 else 1)).backward()
        before, scale = copy.deepcopy(net.state_dict()), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if step == 5:
            # seen, left out, and the scale is lower from here on
            assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
            assert scaler.get_scale() < scale
        losses.append(float(loss.detach()))
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert losses[-1] < 0.6 * losses[0], losses


def test_every_parameter_moves_in_bfloat16():
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = copy.deepcopy(net.state_dict())
    for _, (image, prior, label) in zip(range(3), batches(), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            # a prior in half precision stays as it is
            loss = F.cross_entropy(net(image, prior.bfloat16()), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    still = [name for name, value in net.state_dict().items() if torch.equal(value, before[name])]
    # whose gradient the degrees divide out, up to rounding
    assert set(still) <= {"graph.edge_bias"}


def test_compiled_with_reduced_overhead():
    torch.compiler.reset()
    module, features, prior = make()
    try:
        compiled = torch.compile(module, mode="reduce-overhead")
        named = dict(module.named_parameters())
        for dtype in (None, torch.bfloat16):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                eager, got = (run(one, features, prior, named) for one in (module, compiled))
            for name, value in eager.items():
                assert off(got[name], value.double()) < (2e-5 if dtype is None else 0.05) or name == "edge_bias", name
    finally:
        torch.compiler.reset()
