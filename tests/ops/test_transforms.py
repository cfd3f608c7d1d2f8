# SPDX-License-Identifier: Apache-2.0
"""``torch.func`` over every differentiable op and the module: ``grad``, ``jacrev``, ``vmap``, per-sample gradients."""

from __future__ import annotations

import pytest
import torch
from contract import leaves, output_gradient, run
from fused import FUSED, GRAPH_LAYER_RELU
from subjects import SUBJECTS, Inputs, Subject
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from drseg_core import ops
from drseg_core.nn import PDGR
from drseg_core.testing import CASES

TINY = next(case for case in CASES if case.name == "tiny_3x4")
ALL = {**SUBJECTS, **FUSED, "graph_layer relu": GRAPH_LAYER_RELU}


@pytest.fixture(params=ALL.values(), ids=ALL)
def subject(request) -> Subject:
    return request.param


def parts(subject: Subject, seed: int = 0) -> tuple[Inputs, list[Tensor]]:
    inputs = {**subject.make_inputs(TINY, torch.float32, seed=seed), **subject.variants[-1]}
    return inputs, [inputs[name] for name in subject.differentiable]


def with_differentiable(subject: Subject, inputs: Inputs):
    def call(*values: Tensor) -> Tensor:
        return subject.function(**{**inputs, **dict(zip(subject.differentiable, values, strict=True))})

    return call


def test_grad_is_what_backward_gives(subject):
    inputs, values = parts(subject)
    expected = run(subject, inputs, subject.function)
    call = with_differentiable(subject, inputs)
    every = tuple(range(len(values)))
    got = torch.func.grad(lambda *given: (call(*given) * expected["given"]).sum(), every)(*values)
    for name, value in zip(subject.differentiable, got, strict=True):
        assert torch.equal(value, expected[f"grad_{name}"]), name


class Held(torch.nn.Module):
    """A program as a module, which is what ``torch.export`` takes."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, *given):
        return self.run(*given)


def decomposed(run, given):
    program = torch.export.export(Held(run), given)
    plain = program.run_decompositions(torch.export.default_decompositions() | ops.decompositions())
    assert not any("drseg" in str(node.target) for node in plain.graph.nodes)
    return plain.module()(*given)


def test_a_step_of_one_size_is_decomposed_into_plain_operators(subject):
    """Forward and backward: no reference may write into part of a tensor, which not every compiler follows."""
    inputs, values = parts(subject)
    call = with_differentiable(subject, inputs)
    every = tuple(range(len(values)))
    gradient = torch.func.grad(lambda *given: call(*given).square().sum(), every)
    for run_once in (call, make_fx(gradient)(*values)):
        got, right = decomposed(run_once, tuple(values)), run_once(*values)
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_scores_of_one_size_are_decomposed_into_plain_operators():
    prior = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0))
    index = ops.knn_graph(prior, (3, 4), 4)

    def cosine(prior: Tensor) -> Tensor:
        return ops.score_parts(prior, (3, 4), index).cosine

    torch.testing.assert_close(decomposed(cosine, (prior,)), cosine(prior), rtol=0, atol=1e-6)


def test_jacrev_has_the_gradient_of_every_output(subject):
    inputs, values = parts(subject)
    call = with_differentiable(subject, inputs)
    jacobian = torch.func.jacrev(call)(*values)
    output = call(*values)
    random = torch.Generator().manual_seed(3)
    for place in torch.randint(0, output.numel(), (5,), generator=random).tolist():
        unit = torch.zeros(output.numel()).index_fill(0, torch.tensor(place), 1).view(output.shape)
        expected = run(subject, inputs, subject.function, unit)[f"grad_{subject.differentiable[0]}"]
        got = jacobian.reshape(output.numel(), *values[0].shape)[place]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_vmap_over_inputs_and_over_parameters(subject):
    inputs, values = parts(subject)
    _, others = parts(subject, seed=1)
    call = with_differentiable(subject, inputs)
    for place in range(len(values)):
        stacked = [
            torch.stack([a, b], 1 if a.dim() else 0) if n == place else a
            for n, (a, b) in enumerate(zip(values, others, strict=True))
        ]
        dims = tuple((1 if values[place].dim() else 0) if n == place else None for n in range(len(values)))
        got = torch.vmap(call, dims)(*stacked)
        for sample, given in enumerate((values, others)):
            alone = [given[n] if n == place else value for n, value in enumerate(values)]
            assert torch.equal(got[sample], call(*alone))


def test_per_sample_gradients_of_parameters(subject):
    inputs, values = parts(subject)
    call = with_differentiable(subject, inputs)
    grad = output_gradient(call(*values))
    scale = torch.tensor([1.0, -2.0, 0.5])

    def loss(factor: Tensor, *given: Tensor) -> Tensor:
        return (call(*given) * grad * factor).sum()

    every = tuple(range(1, len(values) + 1))
    got = torch.vmap(torch.func.grad(loss, every), (0, *(None,) * len(values)))(scale, *values)
    for n, factor in enumerate(scale):
        expected = torch.func.grad(loss, every)(factor, *values)
        assert all(torch.equal(value[n], right) for value, right in zip(got, expected, strict=True))


@pytest.mark.promise("C16")
def test_a_second_derivative_is_refused_in_one_line(subject):
    inputs, values = parts(subject)
    call = with_differentiable(subject, inputs)
    with pytest.raises(RuntimeError, match="backward is not twice differentiable; expected create_graph=False"):
        torch.func.jacrev(torch.func.grad(lambda value: call(value, *values[1:]).square().sum()))(values[0])
    # and leaves nothing behind
    run(subject, inputs, subject.function)


@pytest.mark.promise("C16")
def test_forward_mode_is_refused_in_one_line(subject):
    inputs, values = parts(subject)
    call = with_differentiable(subject, inputs)
    with pytest.raises(TypeError, match=r"has a forward-mode tangent; expected reverse-mode .*, got jvp$"):
        torch.func.jvp(lambda value: call(value, *values[1:]), (values[0],), (values[0],))
    assert leaves(subject, inputs)


@pytest.mark.parametrize("op", ["edge_weight", "edge_coefficient"])
def test_forward_mode_is_refused_of_what_has_no_gradient_too(op):
    given = SUBJECTS["edge_weight"].make_inputs(TINY, torch.float32)
    given.pop("mask", None)
    edges = given["index"].shape
    for name, value in (("inverse_norm", torch.ones(edges[:-1])), ("score", torch.ones(edges))):
        with pytest.raises(TypeError, match=f"^{op}: {name} has a forward-mode tangent; expected .*, got jvp$"):
            torch.func.jvp(lambda one, name=name: getattr(ops, op)(**{**given, name: one}), (value,), (value,))


@pytest.mark.parametrize(
    ("op", "name"), [("edge_weight", "index"), ("graph_propagate", "index"), ("degree_normalize", "weight")]
)
def test_vmap_over_what_is_validated_is_refused(op, name):
    given = {**SUBJECTS[op].make_inputs(TINY, torch.float32), "validate": True}
    words = (
        f"^{op}: {name} is mapped by torch.vmap, and its values are read; expected a batch dimension B instead, got "
    )
    with pytest.raises(TypeError, match=words):
        torch.vmap(lambda one: getattr(ops, op)(**{**given, name: one}))(given[name][None])


def test_vmap_over_priors_that_must_be_finite_is_refused():
    with pytest.raises(TypeError, match="^knn_graph: prior is mapped by torch.vmap"):
        torch.vmap(lambda one: ops.knn_graph(one, (2, 3), 3, check_finite=True))(torch.randn(2, 6, 4))


def test_no_samples_give_no_results(subject):
    inputs, values = parts(subject)
    call = with_differentiable(subject, inputs)
    none = torch.stack([values[0]] * 2)[:0]
    dims = (0, *(None,) * (len(values) - 1))
    got = torch.vmap(call, dims)(none, *values[1:])
    assert got.shape == (0, *call(*values).shape)
    grads = torch.vmap(torch.func.grad(lambda *given: call(*given).sum()), dims)(none, *values[1:])
    assert grads.shape == none.shape


@pytest.mark.promise("C16")
def test_forward_over_reverse_is_refused_in_one_line(subject):
    inputs, values = parts(subject)
    call = with_differentiable(subject, inputs)
    # by torch: a rule of ours that says so would keep torch.compile from tracing the op
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.hessian(lambda value: call(value, *values[1:]).square().sum())(values[0])


@pytest.mark.parametrize("options", [{}, {"norm": "sym_undirected", "self_loop": "extra"}], ids=str)
def test_per_sample_gradients_of_the_module(options):
    torch.manual_seed(0)
    # sums of squares of normalised rows hardly depend on anything: what is left is rounding, unless it is small
    module = PDGR(6, 5, k=4, edge_hidden=4, **options).double()
    parameters = dict(module.named_parameters())
    features, prior = torch.randn(3, 6, 3, 4).double(), torch.randn(3, 5, 3, 4).double()

    def loss(parameters: dict[str, Tensor], features: Tensor, prior: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (features[None], prior[None])).square().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, features, prior)
    for n in range(3):
        alone = torch.autograd.grad(module(features[n : n + 1], prior[n : n + 1]).square().sum(), module.parameters())
        for name, right in zip(parameters, alone, strict=True):
            torch.testing.assert_close(got[name][n], right, rtol=1e-9, atol=1e-12)


def test_batched_gradients_are_those_of_one_by_one(subject):
    inputs, values = parts(subject)
    leaf = [value.clone().requires_grad_() for value in values]
    output = with_differentiable(subject, inputs)(*leaf)
    several = torch.stack([output_gradient(output, seed) for seed in range(3)])
    batched = torch.autograd.grad(output, leaf, several, is_grads_batched=True, retain_graph=True)
    for n, grad in enumerate(several):
        for value, right in zip(batched, torch.autograd.grad(output, leaf, grad, retain_graph=True), strict=True):
            assert torch.equal(value[n], right)


def test_batched_gradients_of_the_module():
    module = PDGR(4, 6, k=3, edge_hidden=5)
    features, prior = torch.randn(1, 4, 3, 3, requires_grad=True), torch.randn(1, 6, 3, 3)
    output = module(features, prior)
    several = torch.randn(3, *output.shape)
    (batched,) = torch.autograd.grad(output, [features], several, is_grads_batched=True, retain_graph=True)
    for value, grad in zip(batched, several, strict=True):
        right = torch.autograd.grad(output, [features], grad, retain_graph=True)[0]
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)


@pytest.mark.promise("C13")
def test_a_lazy_negative_is_negative(subject):
    inputs, values = parts(subject)
    call = with_differentiable(subject, inputs)
    lazy = torch._neg_view(-values[0])
    assert lazy.is_neg() and torch.equal(call(lazy, *values[1:]), call(*values))
