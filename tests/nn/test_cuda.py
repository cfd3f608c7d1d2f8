# SPDX-License-Identifier: Apache-2.0
"""What users of a GPU are promised: the kernels run unasked, agree with the CPU, and keep memory small (``--gpu``)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from drseg_core import ops
from drseg_core.config.load import load_config, override
from drseg_core.models.build import build_model
from drseg_core.nn import PDGR
from drseg_core.ops import _dispatch
from drseg_core.training.loss import training_loss

pytestmark = pytest.mark.gpu


def make(channels: int = 48, prior: int = 40, **options) -> PDGR:
    torch.manual_seed(0)
    return PDGR(channels, prior, **{"k": 20, "edge_hidden": 32, **options})


def maps(module: PDGR, side: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(batch, width, side, side, generator=random) for width in (module.channels, module.prior_dim)
    )


def step(module: PDGR, features: Tensor, prior: Tensor) -> dict[str, Tensor]:
    """Output and gradients on the CPU."""
    features = features.detach().clone().requires_grad_()
    output = module(features, prior)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.device)
    grads = torch.autograd.grad((output.float() * weight).sum(), [features, *module.parameters()])
    names = ("features", *(name.removeprefix("_orig_mod.") for name, _ in module.named_parameters()))
    found = {"output": output.detach(), **dict(zip(names, grads, strict=True))}
    return {name: value.double().cpu() for name, value in found.items()}


def differences(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor as a share of its norm; a sum that cancels is held to the terms next to it."""
    like = {"edge_bias": "edge_vector"}
    return {
        name: float((got[name] - right).norm() / max(right.norm(), expected[like.get(name, name)].norm()))
        for name, right in expected.items()
    }


@pytest.mark.promise("C1", "C25")
@pytest.mark.parametrize("side", [9, 24, 40])
@pytest.mark.parametrize("norm", ["sym_row", "sym_undirected"])
def test_the_kernels_run_unasked_and_agree_with_the_cpu_in_float64(side, norm):
    module = make(norm=norm)
    features, prior = maps(module, side)
    exact = step(copy.deepcopy(module).double(), features.double(), prior.double())
    _dispatch._last.clear()
    got = step(module.cuda(), features.cuda(), prior.cuda())
    assert set(_dispatch._last.of) >= {"knn_graph", "edge_coefficient", "graph_layer"}
    assert set(_dispatch._last.of.values()) == {"triton"}, _dispatch._last.of
    assert max(differences(got, exact).values()) < 1e-4, differences(got, exact)


def test_float64_is_computed_by_the_reference():
    module = make()
    features, prior = maps(module, 9)
    exact = step(copy.deepcopy(module).double(), features.double(), prior.double())
    got = step(module.double().cuda(), features.double().cuda(), prior.double().cuda())
    assert max(differences(got, exact).values()) < 1e-9
    assert ops.last_backend("graph_propagate") == "reference"


@pytest.mark.promise("C17")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    module = make()
    features, prior = maps(module, 24)
    exact = step(copy.deepcopy(module).double(), features.double(), prior.double())
    module.cuda()
    with torch.autocast("cuda", dtype):
        got = step(module, features.cuda(), prior.cuda())
    limit = 0.1 if dtype == torch.bfloat16 else 0.03
    assert all(value.isfinite().all() for value in got.values())
    assert max(differences(got, exact).values()) < limit, differences(got, exact)


@pytest.mark.promise("C24")
def test_the_same_bits_every_time():
    module = make().cuda()
    features, prior = (value.cuda() for value in maps(module, 40))
    first = step(module, features, prior)
    for _ in range(20):
        again = step(module, features, prior)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.promise("C21")
def test_compiled():
    module = make().cuda()
    features, prior = (value.cuda() for value in maps(module, 24))
    eager = step(module, features, prior)
    compiled = step(torch.compile(module, fullgraph=True), features, prior)
    assert max(differences(compiled, eager).values()) < 1e-4


@pytest.mark.promise("C20")
def test_compiled_into_cuda_graphs():
    # what is kept from call to call must not lie in their pool: a replay would overwrite it
    module = make(decay=1.7).cuda()
    compiled = torch.compile(module, mode="reduce-overhead")
    for side in (24, 17, 24):
        features, prior = (value.cuda() for value in maps(module, side))
        eager = step(module, features, prior)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert max(differences(step(compiled, features, prior), eager).values()) < 1e-4


@pytest.mark.promise("C20")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_into_cuda_graphs_under_autocast(dtype):
    module = make().cuda()
    compiled = torch.compile(module, mode="reduce-overhead")
    features, prior = (value.cuda() for value in maps(module, 24))
    with torch.autocast("cuda", dtype):
        eager = step(module, features, prior.to(dtype))
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert max(differences(step(compiled, features, prior.to(dtype)), eager).values()) < 0.05


@pytest.mark.promise("C46")
def test_memory_grows_with_the_edges_and_not_with_the_square_of_the_nodes():
    module = make(16, 16, edge_hidden=16).cuda()
    features, prior = (value.cuda() for value in maps(module, 128, batch=1))
    step(module, features, prior)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(module, features, prior)
    # 16384 x 16384 float32 scores would be 1 GiB
    assert torch.cuda.max_memory_allocated() - before < 300 * 2**20


@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step_of_the_whole_model(autocast):
    pytest.importorskip("open_clip")
    torch.manual_seed(0)
    config = override(load_config("tiny"), {})
    model = build_model(config.model).cuda()
    image = torch.rand(2, 3, 128, 128, device="cuda")
    mask = torch.randint(0, 5, (2, 128, 128), device="cuda")
    tokens = model.tokenize([f"class number {n}" for n in range(5)])
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = training_loss(model(image, tokens), mask, config.train)
        total = torch.stack([part.mean() for part in loss]).sum()
    total.backward()
    assert total.isfinite()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(grad is None or grad.isfinite().all() for grad in grads) and any(grad is not None for grad in grads)
    assert ops.last_backend("graph_layer") == "triton"
