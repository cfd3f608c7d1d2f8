# SPDX-License-Identifier: Apache-2.0
"""PDGR's layers: what works where a layer is called, how parts start, and half dtypes under autocast."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from drseg_core.nn import PDGR
from tests.nn.test_pdgr import C, make, maps

CALLED: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "pruned": ("edge_source", lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "spectral norm": ("edge_target", lambda layer: nn.utils.spectral_norm(layer.eval())),
    "forward of its own": ("edge_source", lambda layer: with_own_forward(layer)),
    "adapter": ("edge_target", lambda layer: Wrapped(layer)),
    "hook that changes the output": ("edge_source", lambda layer: hooked(layer, lambda _, x, y: y + x[0][..., :1])),
    "bias": ("edge_target", lambda layer: with_bias(layer)),
    "no norm": ("output_norm", lambda layer: nn.Identity()),
    "norm without parameters": ("output_norm", lambda layer: nn.LayerNorm(C, elementwise_affine=False)),
    "norm without bias": ("output_norm", lambda layer: nn.LayerNorm(C, bias=False)),
    "pruned norm": ("output_norm", lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
    "pruned weights": ("weights", lambda layer: prune.l1_unstructured(layer, "0", 0.5)),
    "pruned biases": ("biases", lambda layer: prune.l1_unstructured(layer, "0", 0.5)),
}


@pytest.mark.promise("C51")
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("case", CALLED)
def test_what_works_where_a_layer_is_called_works(case, normalized):
    """As in the literal module, which calls its layers."""
    where, change = CALLED[case]
    torch._dynamo.reset()
    module = make(dtype=torch.float32, normalize_prior=normalized)
    features, prior = maps(batch=1, dtype=torch.float32)
    plain = module(features, prior)
    setattr(module, where, change(getattr(module, where)) or getattr(module, where))
    found = module(features, prior)
    assert not torch.allclose(found, plain)
    torch.testing.assert_close(found, called(module, features, prior))
    torch.testing.assert_close(module(features, graph=module.graph(prior)), found)
    # what is compiled or exported is traced through the same choice
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(features, prior), found)
    torch.testing.assert_close(torch.export.export(module, (features, prior)).module()(features, prior), found)
    module(features, prior).square().sum().backward()
    named = dict(module.named_parameters())
    assert all(value.grad is not None and value.grad.isfinite().all() for value in named.values())


def called(m: PDGR, features: Tensor, prior: Tensor) -> Tensor:
    """Equations 8 and 9 by calls of the layers, on the module's own neighbours."""
    nodes = prior.flatten(2).mT[0]
    nodes = nn.functional.normalize(nodes, dim=1) if m.normalize_prior else nodes
    index = m.edges(prior)[0][0].long()
    hidden = (m.edge_source(nodes)[:, None] + m.edge_target(nodes)[index]).relu()
    weight = nn.functional.softplus(hidden @ m.edge_vector + m.edge_bias)
    operator = torch.zeros(len(nodes), len(nodes)).scatter_add(1, index, weight)
    degree = operator.sum(1)
    operator = operator / (degree[:, None] * degree).sqrt()
    x = features.flatten(2).mT[0]
    x = (operator @ (x @ m.weights[0].mT) + m.biases[0]).relu()
    return m.output_norm(operator @ (x @ m.weights[1].mT) + m.biases[1]).mT.unflatten(1, prior.shape[2:])[None]


def hooked(layer: nn.Module, hook: Any) -> None:
    layer.register_forward_hook(hook)


def with_bias(layer: nn.Module) -> nn.Module:
    other = nn.Linear(layer.in_features, layer.out_features)
    other.weight = layer.weight
    return other


def with_own_forward(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: 1 + F.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]
    return layer


class Wrapped(nn.Linear):
    """As libraries of adapters do: the weight of what it wraps, and more where it is called."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_a_graph_has_the_parameters_that_a_hook_makes():
    module = PDGR(4, 5, k=3)
    features, prior = torch.randn(1, 4, 3, 3), torch.randn(1, 5, 3, 3)
    prune.l1_unstructured(module, "edge_vector", 0.5)
    with torch.no_grad():
        module.edge_vector_orig.mul_(50)
    weight = module.edges(prior)[1]
    graph = module.graph(prior)
    expected = module(features, prior)
    assert torch.equal(module(features, graph=graph), expected)
    assert torch.equal(module.edges(prior)[1], weight)
    for _ in range(2):
        # each is a graph of autograd of its own
        module.graph(prior).coefficient.sum().backward()


def test_a_list_that_is_none_is_refused():
    module = PDGR(4, 5, k=3)
    module.weights = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(TypeError, match="^PDGR: weights is another module, .* expected ParameterList, got Sequential$"):
        module(torch.randn(1, 4, 3, 3), torch.randn(1, 5, 3, 3))


@pytest.mark.parametrize("residual", [True, False])
def test_a_start_module_by_module_is_the_start_of_the_whole(residual):
    """The usual way from the meta device: parents first, then their parts."""
    scale = 0.0 if residual else 0.25
    with torch.device("meta"):
        module = PDGR(4, 5, k=3, residual=residual, norm_scale=scale)
    module.to_empty(device="cpu")
    for value in module.parameters():
        nn.init.constant_(value, 7.0)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    features = torch.randn(1, 4, 3, 3)
    assert torch.equal(module.output_norm.weight, torch.full((4,), scale))
    assert not residual or torch.equal(module(features, torch.randn(1, 5, 3, 3)), features)
    for value in (module.edge_source.weight, module.edge_target.weight, module.edge_source.bias):
        assert 0.9 / math.sqrt(10) < value.abs().max() <= 1 / math.sqrt(10)
    assert all(0 < value.abs().max() <= 1 / math.sqrt(4) for value in module.weights)
    assert all(not value.any() for value in module.biases)
    # parts by themselves, as FSDP fills what it finds on the meta device
    owners = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
    assert all(hasattr(part, "reset_parameters") for part in owners)


@pytest.mark.promise("C51")
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16, torch.float32])
def test_every_half_dtype_under_every_autocast(own, cast, normalized):
    module = PDGR(4, 5, k=3, normalize_prior=normalized)
    features, prior = torch.randn(1, 4, 3, 3), torch.randn(1, 5, 3, 3)
    expected = module(features, prior)
    module.to(own)
    for given in (torch.float16, torch.bfloat16, torch.float32):
        with torch.autocast("cpu", cast):
            found = module(features.to(given), prior.to(given))
        torch.testing.assert_close(found.float(), expected, atol=0.2, rtol=0.2)
    for one, other in ((torch.float64, own), (own, torch.float64)):
        with torch.autocast("cpu", cast), pytest.raises(TypeError, match=f"^PDGR: .* expected {one}, got {other}$"):
            module.to(one)(features.to(other), prior)


def test_parametrizations_and_onlookers_are_taken():
    module = PDGR(4, 5, k=3)
    features, prior = torch.randn(1, 4, 3, 3), torch.randn(1, 5, 3, 3)
    expected = module(features, prior)
    nn.utils.parametrizations.weight_norm(module.edge_source)
    for layer in module.modules():
        layer.register_forward_hook(lambda *_: None)
        layer.register_forward_pre_hook(lambda *_: None)
    found = module(features, prior)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(p.grad is not None for p in module.edge_source.parameters())


ALL_MODULES = {
    "forward": nn.modules.module.register_module_forward_hook,
    "forward_pre": nn.modules.module.register_module_forward_pre_hook,
    "full_backward": nn.modules.module.register_module_full_backward_hook,
    "full_backward_pre": nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", ALL_MODULES)
def test_hooks_of_all_modules_see_every_layer(kind):
    module = PDGR(4, 5, k=3)
    features, prior = torch.randn(1, 4, 3, 3, requires_grad=True), torch.randn(1, 5, 3, 3)
    expected = module(features, prior)
    seen: list[nn.Module] = []
    handle = ALL_MODULES[kind](lambda layer, *_: seen.append(layer))
    try:
        found = module(features, prior)
        found.sum().backward()
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected)
    layers = {module, module.edge_source, module.edge_target, module.dropout, module.output_norm}
    assert set(seen) == layers and len(seen) == len(layers)
    seen.clear()
    module(features, prior).sum().backward()
    assert not seen


def test_what_a_hook_of_all_modules_changes_counts_in_compiled_code_too():
    torch.compiler.reset()
    module = PDGR(4, 5, k=3)
    features, prior = torch.randn(1, 4, 3, 3), torch.randn(1, 5, 3, 3)
    plain = module(features, prior)

    def call(*given: Tensor) -> Tensor:
        return module(*given)

    torch.testing.assert_close(torch.compile(call, backend="eager", fullgraph=True)(features, prior), plain)
    handle = nn.modules.module.register_module_forward_hook(
        lambda layer, given, output: output + 1 if isinstance(layer, nn.LayerNorm) else None
    )
    try:
        torch.testing.assert_close(module(features, prior), plain + 1)
        torch.compiler.reset()
        found = torch.compile(call, backend="eager", fullgraph=True)(features, prior)
    finally:
        handle.remove()
    torch.testing.assert_close(found, plain + 1)


def test_quantisers_by_exact_type_take_layers_that_are_made_plain_as_the_page_says():
    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")
    (code,) = (block.split("```")[0] for block in page.split("```python\n")[1:] if "quantize_dynamic" in block)
    said: dict[str, Any] = {}
    exec(code, said)
    module, quantized = said["pdgr"], said["quantized"]
    features, prior = torch.randn(1, 8, 5, 5), torch.randn(1, 16, 5, 5)
    expected = module(features, prior)
    kind = torch.ao.nn.quantized.dynamic.Linear
    assert type(quantized.edge_source) is kind and type(quantized.edge_target) is kind
    found = quantized(features, prior)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    module.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    trained = torch.ao.quantization.prepare_qat(module.train())
    trained(features, prior).square().sum().backward()
    for layer in (trained.edge_source, trained.edge_target):
        assert type(layer) is torch.ao.nn.qat.Linear and layer.weight.grad is not None
