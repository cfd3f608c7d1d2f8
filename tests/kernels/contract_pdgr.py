# SPDX-License-Identifier: Apache-2.0
"""``nn.PDGR`` with every op on its Triton kernels; ``test_interpreter.py`` runs it, and ``--gpu`` on a CUDA device."""

from __future__ import annotations

import copy

import pytest
import torch
from drseg_kernels import _reverse
from edges import DEVICE, INTERPRETED
from torch import Tensor

from drseg_core import ops
from drseg_core.nn import PDGR

OPS = ("knn_graph", "edge_weight", "degree_normalize", "graph_propagate")


@pytest.fixture(autouse=True)
def interpreted_or_gpu(request):
    if not INTERPRETED and not request.config.getoption("--gpu"):
        pytest.fail("set TRITON_INTERPRET=1, or pass --gpu")


def make(**options) -> tuple[PDGR, Tensor, Tensor]:
    """A module whose every parameter matters, features and a prior."""
    torch.manual_seed(0)
    module = PDGR(6, 5, **{"k": 5, "edge_hidden": 4, **options})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.to(DEVICE), torch.randn(2, 6, 3, 4, device=DEVICE), torch.randn(2, 5, 3, 4, device=DEVICE) + 0.4


def run(module: PDGR, features: Tensor, prior: Tensor, backend: str) -> dict[str, Tensor]:
    """Output, and the gradients of a fixed sum of it."""
    features = features.detach().clone().requires_grad_()
    with ops.use_backend(backend):
        output = module(features, prior)
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(output.shape, generator=random, dtype=torch.float64).to(output)
    grads = torch.autograd.grad((output * weight).sum(), [features, *module.parameters()])
    assert {ops.last_backend(op) for op in OPS} == {backend}
    names = ("features", *(name for name, _ in module.named_parameters()))
    return {"output": output.detach(), **dict(zip(names, grads, strict=True))}


def check(got: dict[str, Tensor], expected: dict[str, Tensor], slack: float) -> None:
    # the gradient of the bias is one sum over all edges and cancels; its error is that of its terms, which the vector's
    # gradient shows (the reference in float32 is off by 1e-5 of the sum, too)
    like = {"edge_bias": "edge_vector"}
    for name, right in expected.items():
        largest = torch.stack([right.abs().max(), expected[like.get(name, name)].abs().max()]).max().clamp_min(1e-3)
        error = (got[name].double() - right).abs().max() / largest
        assert error <= slack, f"{name}: {float(error)} of its largest element"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "sym_undirected", "self_loop": "exclude", "hidden": 9},
        {"norm": "sym_inout", "self_loop": "extra", "use_affinity_as_weight": True},
        {"norm": "row", "affinity": "power", "normalize_prior": False, "k": 30},
    ],
    ids=str,
)
def test_agrees_with_the_reference_in_float64(options):
    module, features, prior = make(**options)
    exact = run(copy.deepcopy(module).double(), features.double(), prior.double(), "reference")
    check(run(module, features, prior, "triton"), exact, 2e-5)


def test_autocast_in_half_precision():
    module, features, prior = make()
    exact = run(copy.deepcopy(module).double(), features.double(), prior.double(), "reference")
    with torch.autocast(DEVICE, dtype=torch.float16):
        got = run(module, features, prior, "triton")
    check(got, exact, 2e-2)
    assert all(value.dtype == torch.float32 for name, value in got.items() if name != "output")


def test_the_graph_is_sorted_once(monkeypatch):
    calls = []
    build = _reverse._build
    monkeypatch.setattr(_reverse, "_build", lambda index: calls.append(index) or build(index))
    module, features, prior = make()
    run(module, features, prior, "triton")
    assert len(calls) == 1


def test_same_bits_again():
    module, features, prior = make(norm="sym_undirected")
    first = run(module, features, prior, "triton")
    _reverse._kept.clear()
    again = run(module, features, prior, "triton")
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_frozen_features_cost_no_gradient():
    module, features, prior = make()
    with ops.use_backend("triton"):
        module(features, prior).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters()) and features.grad is None


def test_compiles_without_a_break():
    module, features, prior = make()
    torch.compiler.reset()
    with ops.use_backend("triton"):
        eager = module(features, prior)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(features, prior)
    assert torch.equal(eager, compiled)
