# SPDX-License-Identifier: Apache-2.0
"""``PDGR`` with every kernel of the CUDA library at once, emulated or on a device."""

from __future__ import annotations

import copy

import pytest
import torch
from edges import DEVICE
from torch import Tensor

from drseg_core.nn import PDGR, pdgr
from drseg_core.ops import _cuda, last_backend

if _cuda.why_not(DEVICE) is not None:
    pytest.skip(_cuda.why_not(DEVICE), allow_module_level=True)

OPS = ("prepare_prior", "knn_graph", "edge_coefficient", "graph_layer")


def step(module: PDGR, features: Tensor, prior: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients, in the module's dtype on its device."""
    own = module.edge_vector
    x = features.to(own).requires_grad_()
    y = module(x, prior.to(own))
    y.backward(grad.to(own))
    grads = {name: value.grad for name, value in module.named_parameters()}
    return {name: value.detach().cpu().double() for name, value in {"output": y, "features": x.grad, **grads}.items()}


@pytest.mark.promise("C1")
@pytest.mark.parametrize("norm", ["sym_row", "row", "sym_count"])
def test_forward_and_backward_are_those_of_the_reference(norm, monkeypatch):
    random = torch.Generator().manual_seed(4)
    features, prior, grad = (torch.randn(2, size, 5, 6, generator=random) for size in (16, 24, 16))
    torch.manual_seed(5)
    # what has no kernel here is Triton's
    module = PDGR(16, 24, k=7, edge_hidden=12, norm=norm, backend="triton").to(DEVICE)
    wide = copy.deepcopy(module).double()
    wide.backend = "reference"
    right = step(wide, features, prior, grad)
    for name in OPS:
        function = getattr(pdgr, name)
        # by name, for on a CPU nothing takes them by itself
        monkeypatch.setattr(pdgr, name, lambda *a, _op=function, **given: _op(*a, **{**given, "backend": "cuda"}))
    got = step(module, features, prior, grad)
    assert [last_backend(name) for name in OPS] == ["cuda"] * len(OPS)
    for name, value in right.items():
        slack = 2e-5 * float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=slack, msg=lambda m, n=name: f"{n}: {m}")
