# SPDX-License-Identifier: Apache-2.0
"""What PDGR's options make of its start: weights by cosine and distance, the input as output, a share of the grid."""

from __future__ import annotations

import copy
import io
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drseg_core import ops
from drseg_core.nn import PDGR
from drseg_core.testing import dense_pdgr

C, D, GRID = 6, 5, (4, 5)
BOTH: dict[str, Any] = {"edge_temperature": 0.1, "edge_decay": 2.0}
LEARNED = ("edge_log_temperature", "edge_log_decay")


def make(**options: Any) -> PDGR:
    torch.manual_seed(0)
    return PDGR(C, D, **{"k": 7, "edge_hidden": 9, **options})


def maps(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    features, prior = (torch.randn(2, channels, *GRID, generator=random).to(dtype) for channels in (C, D))
    return features, prior


@pytest.mark.promise("C1")
@pytest.mark.parametrize("affinity", ["exp", "linear", "power", "product", "gauss"])
def test_weights_start_by_cosine_and_distance(affinity):
    _, prior = maps()
    plain, module = make(affinity=affinity), make(affinity=affinity, **BOTH)
    index, weight, real = module.edges(prior)
    same, expected, _ = plain.edges(prior)
    assert torch.equal(index, same) and real.all()
    unit = torch.nn.functional.normalize(prior.double().flatten(2).mT, dim=2)
    near = torch.stack([unit[b][index[b].long()] for b in range(2)])
    cosine = (unit[:, :, None] * near).sum(-1)
    cell = torch.cartesian_prod(torch.arange(4.0), torch.arange(5.0)).double()
    distance = (cell[:, None] - cell[index.long()]).norm(dim=-1) / 5
    torch.testing.assert_close(
        weight.double(), expected * torch.exp((cosine - 1) / 0.1 - 2 * distance), rtol=1e-4, atol=0
    )


@pytest.mark.promise("C3")
def test_both_numbers_learn_and_the_prior_does_not():
    features, prior = maps(dtype=torch.float64)
    module = make(**BOTH).double()
    prior.requires_grad_()
    module(features, prior).square().sum().backward()
    assert prior.grad is None
    exact = torch.autograd.grad(
        dense_pdgr(module, features, prior).square().sum(), [getattr(module, n) for n in LEARNED]
    )
    for name, right in zip(LEARNED, exact, strict=True):
        got = getattr(module, name)
        assert got.shape == (1,) and got.grad.item() != 0
        torch.testing.assert_close(got.grad, right, rtol=1e-9, atol=1e-12)
    optimizer = torch.optim.SGD([getattr(module, name) for name in LEARNED], lr=50.0)
    optimizer.step()
    # whatever the steps are, both stay above zero
    assert all(getattr(module, name).exp() > 0 for name in LEARNED)


@pytest.mark.promise("C21")
@pytest.mark.parametrize("options", [{"edge_temperature": 0.1}, {"edge_decay": 2.0}, BOTH], ids=str)
def test_without_the_options_nothing_has_changed(options):
    plain, module = make(), make(**options)
    names = {name for name in module.state_dict() if name not in LEARNED}
    assert {*plain.state_dict()} == names and not any("log" in name for name in names)
    # the draws are the same
    assert all(torch.equal(plain.state_dict()[name], module.state_dict()[name]) for name in names)
    missing = module.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert len(missing) == len(options) and {*missing} <= {*LEARNED}
    assert "edge_" not in repr(plain).splitlines()[1] and all(f"{n}={v}" in repr(module) for n, v in options.items())


def test_both_numbers_are_saved_and_drawn_anew():
    module, buffer = make(**BOTH), io.BytesIO()
    with torch.no_grad():
        module.edge_log_temperature.add_(1)
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = make(edge_temperature=1.0, edge_decay=1.0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(*maps()), module(*maps()))
    module.reset_parameters()
    assert module.edge_log_temperature.item() == pytest.approx(math.log(0.1))
    assert module.edge_log_decay.item() == pytest.approx(math.log(2.0))


def test_a_graph_is_that_of_the_forward():
    features, prior = maps()
    module = make(**BOTH)
    graph = module.graph(prior)
    torch.testing.assert_close(module(features, graph=graph), module(features, prior), rtol=1e-5, atol=1e-6)
    assert graph.coefficient.requires_grad


@pytest.mark.promise("C1")
@pytest.mark.parametrize("norm", ["sym_row", "sym_undirected"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_every_backend_agrees(backend, norm):
    if not any(
        row["available"] for row in ops.backend_report() if (row["backend"], row["op"]) == (backend, "edge_weight")
    ):
        pytest.skip(f"{backend} cannot run here")
    features, prior = maps()
    module = make(backend=backend, norm=norm, **BOTH)
    expected = dense_pdgr(make(norm=norm, **BOTH).double(), features.double(), prior.double())
    torch.testing.assert_close(module(features, prior).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.promise("C21")
def test_compiled_and_in_half_precision():
    torch.compiler.reset()
    features, prior = maps()
    module = make(**{**BOTH, "k": 0.4})
    expected = module(features, prior)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, prior), expected, rtol=1e-6, atol=1e-6)
    wanted = [module.edge_log_temperature, module.edge_log_decay]
    right = torch.autograd.grad(expected.square().sum(), wanted)
    for got, value in zip(torch.autograd.grad(compiled(features, prior).square().sum(), wanted), right, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(features, prior)
        assert module.graph(prior).coefficient.dtype == torch.float32
    torch.testing.assert_close(rough.float(), expected, rtol=0.1, atol=0.1)
    half = make(**BOTH).bfloat16()
    assert half(features.bfloat16(), prior.bfloat16()).dtype == torch.bfloat16


@pytest.mark.promise("C9", "C11")
def test_a_bad_cell_and_padding_stay_by_themselves():
    features, prior = maps()
    prior[0, 2, 1, 1] = torch.nan
    module = make(k=20, **BOTH)
    output = module(features, prior)
    bad = output.isnan().any(1)
    assert bad[0, 1, 1] and bad.sum() == 1
    index, weight, real = module.edges(prior)
    assert (weight[~real & ~weight.isnan()] == 0).all() and not real.all()
    # one sample that is whole has gradients that are
    (grad,) = torch.autograd.grad(module(features[1:], prior[1:]).square().sum(), module.edge_log_temperature)
    assert grad.isfinite().all()


@pytest.mark.promise("C5")
def test_the_smallest_temperatures_stay_finite():
    features, prior = maps()
    for start in (1e-3, 1e-8, 1e-30):
        module = make(edge_temperature=start, edge_decay=1e8)
        output = module(features, prior)
        grads = torch.autograd.grad(output.square().sum(), [getattr(module, name) for name in LEARNED])
        assert output.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.promise("C5")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_beyond_the_range_of_a_half_module_are_those_of_a_wide_one(dtype):
    features, prior = maps(dtype=dtype)
    module = make(edge_temperature=1e-5, edge_decay=1e8).to(dtype)
    assert module(features, prior).isfinite().all()
    # logarithms in half precision are off by some percent of the number, the wide module takes the same ones
    _, weight, _ = module.edges(prior)
    _, expected, _ = copy.deepcopy(module).float().edges(prior)
    assert weight.isfinite().all() and weight.dtype == torch.float32
    torch.testing.assert_close(weight, expected, rtol=0.05, atol=1e-6)


@pytest.mark.promise("C5")
@pytest.mark.parametrize(
    ("affinity", "norm", "gamma"),
    [
        ("exp", "sym_row", 80.0),
        ("gauss", "sym_row", 80.0),
        *(("exp", norm, 80.0) for norm in ("sym_inout", "row", "sym_undirected")),
        # which does not divide by the weights
        ("exp", "sym_count", 20.0),
        ("gauss", "sym_count", 20.0),
        ("power", "sym_row", 1e10),
    ],
)
def test_affinities_as_weights_stay_finite_up_to_the_largest_gamma(affinity, norm, gamma):
    features, prior = maps()
    module = make(affinity=affinity, norm=norm, use_affinity_as_weight=True, gamma=gamma, k=20)
    # all cosines are one, and all weights as large as they can be
    output = module(features, torch.ones_like(prior))
    grads = torch.autograd.grad(output.square().sum(), [*module.parameters()])
    assert output.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.promise("C5")
def test_the_smallest_and_largest_starts_stay_finite():
    features, prior = maps()
    for starts in ({"edge_temperature": 1e-38}, {"edge_decay": 1e38}):
        assert make(**starts)(features, prior).isfinite().all()


def test_modules_that_were_pickled_before_k_was_checked():
    features, prior = maps()
    module = make(k=0.3)
    expected, state = module(features, prior), module.__getstate__()
    state["k"] = state.pop("_k")
    del state["_share"]
    older = PDGR.__new__(PDGR)
    older.__setstate__(state)
    assert older.k == 0.3 and torch.equal(older(features, prior), expected)


def test_a_residual_from_zero_is_the_input_and_training_leaves_it():
    features, prior = maps()
    module = make(residual=True, norm_scale=0.0)
    assert torch.equal(module(features, prior), features)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    first = {name: value.detach().clone() for name, value in module.named_parameters()}
    wanted = features.roll(1, 3)
    losses = []
    for step in range(30):
        loss = (module(features, prior) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            # nothing but the LayerNorm can move yet
            moving = {name for name, value in module.named_parameters() if value.grad is not None and value.grad.any()}
            assert moving == {"output_norm.weight", "output_norm.bias"}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0] and module.output_norm.weight.abs().min() > 0
    # weight decay alone would leave their direction
    for name in ("weights.0", "edge_vector"):
        now, before = module.get_parameter(name).detach(), first[name]
        assert torch.nn.functional.cosine_similarity(now.flatten(), before.flatten(), dim=0) < 1 - 1e-6


def test_a_share_is_rounded_as_the_number_that_was_written():
    for share in [
        *(n / 1000 for n in range(1, 1000)),
        1 / 3,
        1 / 6,
        2 / 7,
        math.pi / 4,
        0.1234567891234,
        1e-12,
        1e-300,
    ]:
        exact, module = Fraction(repr(share)).limit_denominator(10**9), PDGR(4, 5, k=share, edge_hidden=2)
        for nodes in (*range(0, 60), 144, 196, 200, 250, 500, 576, 1000, 1024, 4096, 250_000, 10**6):
            found, rest = module.neighbour_count(nodes), exact * nodes - math.floor(exact * nodes)
            if rest == Fraction(1, 2):
                # halves go up, also those that a float's product just misses
                assert found == math.floor(exact * nodes) + 1
            else:
                assert found == max(int(share * nodes + 0.5), 1), (share, nodes)
            assert type(found) is int


def test_neighbours_may_be_set_later():
    module = PDGR(4, 5, k=0.5)
    for k, count in ((0.25, 5), (7, 7), (0.5, 10)):
        module.k = k
        assert module.k == k and module.neighbour_count(20) == count
    with pytest.raises(ValueError, match="PDGR: k"):
        module.k = 1.5


SET_LATER: list[tuple[dict[str, Any], str, Any]] = [
    ({}, "affinity", "typo"),
    ({}, "self_loop", "Exclude"),
    ({}, "norm", "none"),
    ({}, "gamma", 0),
    ({}, "gamma", "1"),
    ({}, "decay", -1.0),
    ({}, "decay", math.inf),
    ({"decay": 1e30}, "gamma", 1e-30),
    ({"gamma": 1e-30}, "decay", 1e30),
    ({"decay": 1e30, "gamma": 1e-30, "affinity": "product"}, "affinity", "exp"),
    ({"use_affinity_as_weight": True}, "gamma", 100.0),
    ({"use_affinity_as_weight": True, "gamma": 50.0}, "norm", "sym_count"),
    ({"use_affinity_as_weight": True, "gamma": 100.0, "affinity": "linear"}, "affinity", "gauss"),
    ({"gamma": 100.0}, "use_affinity_as_weight", True),
    ({}, "norm_scale", -1.0),
    (BOTH, "edge_temperature", 1e-39),
    (BOTH, "edge_decay", 0.0),
    ({}, "backend", "odd"),
    *[({}, flag, 1) for flag in ("normalize_prior", "residual", "resample_prior", "keep_format")],
]


@pytest.mark.parametrize("options,name,value", SET_LATER, ids=lambda value: str(value))
def test_an_option_that_is_set_later_is_refused_as_at_the_construction(options, name, value):
    module = copy.deepcopy(make(**options))
    with pytest.raises((TypeError, ValueError), match="^PDGR: ") as made:
        make(**{**options, name: value})
    kept = getattr(module, name)
    with pytest.raises(made.type) as later:
        setattr(module, name, value)
    assert str(later.value) == str(made.value) and getattr(module, name) == kept


@pytest.mark.parametrize("compiled", [False, True])
def test_options_that_are_set_later_count(compiled):
    torch.compiler.reset()
    features, prior = maps()
    module = make()
    called = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    called(features, prior)
    options = {"affinity": "linear", "self_loop": "exclude", "norm": "row", "gamma": 2, "decay": 3.0, "residual": True}
    for name, value in options.items():
        setattr(module, name, value)
    assert type(module.gamma) is float
    expected = make(**options)
    expected.load_state_dict(module.state_dict())
    assert torch.equal(called(features, prior), expected(features, prior))


@pytest.mark.parametrize("start", [None, 2.0])
def test_starts_of_what_is_learned_are_no_options_of_a_module_that_has_it(start):
    """They would change what is printed, and nothing that is computed."""
    module = make(edge_temperature=start, edge_decay=start, norm_scale=0.5)
    for name, parameter in (("edge_temperature", "edge_log_temperature"), ("edge_decay", "edge_log_decay")):
        for other in {None, 2.0, 3.0} - {start}:
            with pytest.raises(ValueError, match=f"^PDGR: {name} is where a learned number starts; .*{parameter}"):
                setattr(module, name, other)
        setattr(module, name, start)
        assert getattr(module, name) == start
    with pytest.raises(ValueError, match=r"another value of output_norm\.weight, got 1\.0 for 0\.5"):
        module.norm_scale = 1.0
    assert module.norm_scale == 0.5


def test_strings_of_numpy_are_plain_ones():
    torch.compiler.reset()
    features, prior = maps()
    module = make()
    for name, value in (("affinity", "gauss"), ("self_loop", "extra"), ("norm", "row"), ("backend", "reference")):
        setattr(module, name, np.str_(value))
        assert type(getattr(module, name)) is str
    expected = module(features, prior)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(features, prior), expected)


def test_weights_and_biases_of_another_number_are_refused():
    module = make(layers=2)
    module.weights = torch.nn.ParameterList([*module.weights, torch.nn.Parameter(torch.eye(C))])
    with pytest.raises(ValueError, match="^PDGR: biases has another length; expected one for each of 3 weights, got 2"):
        module(*maps())


def test_options_are_plain_attributes_of_older_and_newer_pickles():
    features, prior = maps()
    module = make(gamma=2.0, keep_format=False)
    state = module.__getstate__()
    assert state["gamma"] == 2.0 and state["keep_format"] is False
    for name in ("resample_prior", "backend"):
        del state[name]
    older = PDGR.__new__(PDGR)
    older.__setstate__(state)
    assert older.resample_prior is False and older.backend is None and older.keep_format is False
    assert torch.equal(older(features, prior), module(features, prior))
    with pytest.raises(ValueError, match="^PDGR: gamma is out of range"):
        older.gamma = -2.0


@pytest.mark.promise("C21")
@pytest.mark.parametrize("dynamic", [True, None])
def test_modules_of_different_shares_are_compiled_with_gradients(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda module, *given: module(*given), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for share in (0.13, 0.2):
        module = make(k=share)
        for grid in ((3, 4), (6, 7)):
            features, prior = (torch.randn(2, width, *grid) for width in (C, D))
            leaf = features.to(module.edge_bias.dtype).requires_grad_()
            output, expected = compiled(module, leaf, prior), module(leaf, prior)
            assert torch.equal(output, expected)
            given = [leaf, *module.parameters()]
            pairs = zip(
                *(torch.autograd.grad(value.square().sum(), given) for value in (output, expected)), strict=True
            )
            assert all(torch.equal(*pair) for pair in pairs)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("share", "grid", "k"), [(0.13, (24, 24), 75), (0.13, (4, 5), 3), (0.01, (4, 5), 1), (0.99, (2, 2), 4)]
)
def test_a_share_of_the_grid(share, grid, k):
    module = make(k=share)
    assert module.neighbour_count(grid[0] * grid[1]) == k
    prior = torch.randn(1, D, *grid)
    assert module.graph(prior).index.shape[2] == k
    assert torch.equal(module.graph(prior).index, make(k=k).graph(prior).index)
