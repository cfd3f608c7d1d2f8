# SPDX-License-Identifier: Apache-2.0
"""``nn.PDGR`` with every op on its Triton kernels; ``test_interpreter.py`` runs it, and ``--gpu`` on a CUDA device."""

from __future__ import annotations

import copy

import pytest
import torch
from drseg_kernels import csc, degree_normalize, edge_coefficient, edge_weight, graph_layer, graph_propagate
from drseg_kernels._launch import Tile
from edges import DEVICE, INTERPRETED, Noted, launches_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drseg_core import ops
from drseg_core.nn import PDGR
from drseg_core.ops import _dispatch

OPS = ("csc", "knn_graph", "edge_weight", "degree_normalize", "graph_propagate")
FUSED = ("prepare_prior", "linear_map", "csc", "knn_graph", "edge_coefficient", "graph_layer")


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
    _dispatch._last.clear()
    with ops.use_backend(backend):
        output = module(features, prior)
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(output.shape, generator=random, dtype=torch.float64).to(output)
    grads = torch.autograd.grad((output * weight).sum(), [features, *module.parameters()])
    assert set(_dispatch._last.of.values()) == {backend}
    assert set(_dispatch._last.of) <= {*OPS, *FUSED}
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


@pytest.mark.promise("C1")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "sym_undirected", "self_loop": "exclude", "hidden": 9},
        {"norm": "sym_inout", "self_loop": "extra", "use_affinity_as_weight": True},
        {"edge_temperature": 0.1, "edge_decay": 1.0},
        {"norm": "row", "affinity": "power", "normalize_prior": False, "k": 30},
        {"layers": 3, "hidden": 4, "bias": False, "residual": True},
    ],
    ids=str,
)
def test_agrees_with_the_reference_in_float64(options):
    module, features, prior = make(**options)
    exact = run(copy.deepcopy(module).double(), features.double(), prior.double(), "reference")
    check(run(module, features, prior, "triton"), exact, 2e-5)


@pytest.mark.promise("C17")
def test_autocast_in_half_precision():
    module, features, prior = make()
    exact = run(copy.deepcopy(module).double(), features.double(), prior.double(), "reference")
    with torch.autocast(DEVICE, dtype=torch.float16):
        got = run(module, features, prior, "triton")
    check(got, exact, 2e-2)
    assert all(value.dtype == torch.float32 for name, value in got.items() if name != "output")


@pytest.mark.promise("C25")
@pytest.mark.parametrize(
    "options,expected",
    [({}, FUSED), ({"self_loop": "extra"}, ("prepare_prior", "linear_map", *OPS[:4], "graph_layer"))],
)
def test_the_fused_ops_run_where_they_can(options, expected):
    module, features, prior = make(**options)
    run(module, features, prior, "triton")
    assert set(_dispatch._last.of) == set(expected)
    # where there is no kernel for all of it, its parts run
    run(module, features, prior, "reference")
    assert set(_dispatch._last.of) == {*OPS, *expected}


@pytest.mark.promise("C11")
@pytest.mark.parametrize("norm", ["sym_row", "sym_undirected"])
def test_a_cell_that_is_not_finite_keeps_to_itself(norm):
    module, features, prior = make(norm=norm)
    prior[0, 2, 1, 2] = torch.nan
    with torch.no_grad(), ops.use_backend("reference"):
        exact = copy.deepcopy(module).double()(features.double(), prior.double())
    with torch.no_grad(), ops.use_backend("triton"):
        got = module(features, prior)
    assert got[0, :, 1, 2].isnan().all() and int(got.isnan().sum()) == got.shape[1]
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "options,times", [({}, 1), ({"norm": "sym_undirected"}, 1), ({"self_loop": "extra"}, 2)], ids=str
)
def test_the_edges_of_a_graph_are_listed_once(options, times, monkeypatch):
    """With an extra edge to itself there are two graphs: the edges that the MLP weighs, and those of propagation."""
    module, features, prior = make(**options)
    seen: list[str] = []
    monkeypatch.setattr(csc, "_csc_kernel_place", Noted("place", csc._csc_kernel_place, seen))
    run(module, features, prior, "triton")
    assert len(seen) == times
    with torch.no_grad(), ops.use_backend("triton"):
        module(features, prior)
    # without a gradient only degrees of incoming edges go along columns
    assert len(seen) == times + (options.get("norm") == "sym_undirected")


@pytest.mark.promise("C24")
def test_same_bits_again():
    module, features, prior = make(norm="sym_undirected")
    first = run(module, features, prior, "triton")
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


class NoSynchronisation(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: values read from it, and shapes that depend on values.

    A copy from device to host is none where the device is the CPU, and so is not seen there.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        if name.startswith("_unique") or name in self.WAITING:
            raise RuntimeError(f"{name} synchronises the host")
        if name in ("index", "index_put", "index_put_"):
            chosen = [value for value in arguments[1] if value is not None]
            if any(value.dtype in (torch.bool, torch.uint8) for value in chosen):
                raise RuntimeError(f"{name} with a mask synchronises the host")
        return function(*arguments, **(options or {}))


@pytest.mark.promise("C19")
@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).all()),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
    ],
)
def test_what_synchronises_is_noticed(waits):
    with NoSynchronisation(), pytest.raises(RuntimeError, match="synchronises"):
        waits(torch.arange(-3.0, 3.0))


@pytest.mark.promise("C19")
@pytest.mark.parametrize("norm", ["sym_row", "sym_inout", "row"])
def test_no_launcher_synchronises(norm):
    """The launchers by themselves: inside a registered op a mode sees nothing."""
    random = torch.Generator().manual_seed(0)
    source, target, x = torch.randn(3, 1, 5, 7, generator=random).to(DEVICE)
    index = torch.randint(0, 5, (1, 5, 2), generator=random).to(DEVICE)
    vector, bias = torch.randn(7, generator=random).to(DEVICE), torch.zeros((), device=DEVICE)
    tile = Tile(4, 16, 1)
    with NoSynchronisation():
        edges, mask = ((source, target, None, None), index, vector, bias), [True] * 5
        weight = edge_weight.edge_weight(*edges, index > 1, tile=tile)
        edge_weight.edge_weight_backward(weight, weight, *edges, mask, tile=tile)
        degree_normalize.degree_normalize(weight, index, norm, 1e-6)
        degree_normalize.degree_normalize_backward(weight, weight, index, norm, 1e-6)
        coefficient, *saved = edge_coefficient.edge_coefficient(*edges, index > 1, norm, 1e-6, tile=tile)
        edge_coefficient.edge_coefficient_backward(coefficient, *saved, *edges, norm, 1e-6, False, mask, tile=tile)
        graph_propagate.graph_propagate(x, index, coefficient, True, tile=tile)
        graph_propagate.graph_propagate_backward(x, x, index, coefficient, True, mask[:2], tile=tile)
        for activation in ("relu", "layer_norm"):
            parameters = (vector, vector, vector) if activation == "layer_norm" else (vector, None, None)
            options = (*parameters, activation)
            saved = graph_layer.graph_layer(x, index, coefficient, *options, 1e-5, True, True, tile=tile)
            graph_layer.graph_layer_backward(x, x, index, coefficient, *saved, *options, True, mask, tile=tile)


@pytest.mark.promise("C19")
def test_the_module_does_not_synchronise():
    module, features, prior = make()
    # what is kept of a first call may be made with synchronisation
    run(module, features, prior, "triton")
    with NoSynchronisation(), ops.use_backend("triton"):
        module(features, prior).square().sum().backward()


def test_launches_of_the_layers(monkeypatch):
    """All launches beside the selection and the linear maps, forward and backward."""
    module, features, prior = make()
    kernels = (csc, degree_normalize, edge_coefficient, edge_weight, graph_layer, graph_propagate)
    seen = launches_of(monkeypatch, *kernels)
    run(module, features, prior, "triton")
    assert sorted(seen) == sorted(
        [
            "_csc_kernel_count",
            "_csc_kernel_scan",
            "_csc_kernel_place",
            "_edge_coefficient_fwd_kernel",
            *["_graph_layer_fwd_kernel"] * 2,
            *["_graph_layer_bwd_kernel_activation"] * 2,
            *["_graph_layer_bwd_kernel_edges"] * 2,
            "_edge_coefficient_bwd_kernel_slope",
            "_edge_weight_bwd_kernel_source",
            "_edge_weight_bwd_kernel_target",
        ]
    )


@pytest.mark.promise("C20")
@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"norm": "sym_undirected", "k": 3}], ids=str)
def test_replays_of_a_cuda_graph_are_what_eager_calls_are(options):
    module, features, prior = make(**options)
    features.requires_grad_()
    names = ("output", "features", *(name for name, _ in module.named_parameters()))
    leaves, weight = [features, *module.parameters()], torch.randn_like(features)

    def step() -> list[Tensor]:
        output = module(features, prior)
        return [output, *torch.autograd.grad((output * weight).sum(), leaves)]

    with ops.use_backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            results = step()
        for seed in range(3):
            random = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                features.copy_(torch.randn(features.shape, generator=random))
                prior.copy_(torch.randn(prior.shape, generator=random))
            recorded.replay()
            replayed = dict(zip(names, [value.clone() for value in results], strict=True))
            # the library may multiply in another order while it is recorded
            check(replayed, dict(zip(names, [value.double() for value in step()], strict=True)), 2e-5)
