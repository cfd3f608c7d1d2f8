# SPDX-License-Identifier: Apache-2.0
"""The contracts of the ops that weigh edges, with an exponent for every edge."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from contract import check_oracle, leaves, run
from fused import EDGE_COEFFICIENT_EXPONENT
from subjects import EDGE_WEIGHT_EXPONENT
from test_edge_coefficient import TestEdgeCoefficient as _OfCoefficient
from test_edge_weight import TestEdgeWeight as _OfWeight
from torch.library import opcheck

from drseg_core import ops
from drseg_core.errors import BackendUnavailableError
from drseg_core.ops.edge_weight import reference
from drseg_core.testing import CASES


class WithExponents:
    """What both ops do with exponents; inherit beside a contract."""

    @pytest.mark.promise("C1")
    def test_exponents_of_zero_change_nothing(self, variant, call):
        inputs = self.inputs(variant)
        plain = {name: value for name, value in inputs.items() if name != "exponent"}
        assert torch.equal(call(**{**inputs, "exponent": torch.zeros_like(inputs["exponent"])}), call(**plain))

    @pytest.mark.promise("C9")
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
    def test_the_exponent_of_padding_does_not_matter(self, value, variant, call):
        inputs = self.inputs(variant)
        expected = run(self.subject, inputs, call)
        inputs["exponent"] = inputs["exponent"].masked_fill(~inputs["mask"], value)
        got = run(self.subject, inputs, call, expected["given"])
        for name, right in expected.items():
            assert torch.equal(got[name], right), name
        assert not got["grad_exponent"][~inputs["mask"]].any()

    @pytest.mark.promise("C13")
    def test_one_graph_of_a_batch_has_its_exponents(self, variant, call):
        inputs = {**self.subject.make_inputs(CASES[0]), **variant}
        one = {n: v[1] if n in self.subject.node_inputs else v for n, v in inputs.items()}
        torch.testing.assert_close(call(**one), call(**inputs)[1], rtol=1e-6, atol=0)


class TestEdgeWeightExponent(WithExponents, _OfWeight):
    subject = EDGE_WEIGHT_EXPONENT
    # the size is nothing to an exponent
    test_agrees_at_the_paper_size = None

    @pytest.mark.promise("C5", "C11")
    def test_exponents_that_are_not_finite_or_overflow(self, call):
        exponent = torch.tensor([0.0, -200.0, -math.inf, 88.0, 89.0, 1e30, math.inf, math.nan]).view(1, 1, 8)
        nodes = {"source": torch.ones(1, 1, 3).requires_grad_(), "target": torch.ones(1, 1, 3)}
        edges = {"index": torch.zeros(1, 1, 8).int(), "vector": torch.ones(3), "bias": torch.zeros(())}
        found = []
        for k in range(8):
            alone = exponent[..., k : k + 1].clone().requires_grad_()
            weight = call(**nodes, **{**edges, "index": edges["index"][..., :1]}, exponent=alone)
            grads = torch.autograd.grad(weight.sum(), (nodes["source"], alone))
            found.append((weight.item(), grads[0][0, 0, 0].item(), grads[1].item()))
        # softplus(6) times the exponential; it would be finite at 88, at 86 so is the weight
        at_zero = math.log1p(math.exp(6))
        assert found[0] == pytest.approx((at_zero, 1 - math.exp(-at_zero), at_zero), rel=1e-6)
        assert found[1] == found[2] == (0, 0, 0)
        assert all(weight == to_exponent == math.inf for weight, _, to_exponent in found[3:7])
        assert all(map(math.isnan, found[7]))

    @pytest.mark.promise("C1")
    def test_exponents_over_the_whole_range(self, call):
        """Relative error of weights and slopes, small logits among them."""
        exponent = torch.linspace(-86, 84, 171).view(1, -1, 1)
        nodes = exponent.shape[1]
        source = torch.linspace(0, 30, nodes).view(1, -1, 1).requires_grad_()
        given = {"target": torch.zeros(1, nodes, 1), "index": torch.arange(nodes).view(1, nodes, 1)}
        given |= {"vector": -torch.ones(1), "bias": torch.full((), 2.0)}
        weight = call(source=source, **given, exponent=exponent)
        (slope,) = torch.autograd.grad(weight.sum(), source)
        factor, logit = exponent.double().exp(), 2 - source.detach().double()
        normal = factor * torch.sigmoid(logit) > 1e-30
        for got, right in ((weight, reference.softplus(logit) * factor), (-slope, torch.sigmoid(logit) * factor)):
            # a logit at zero is off
            kept = normal & (source.detach() > 0)
            torch.testing.assert_close(got.detach().double()[kept], right[kept], rtol=1e-5, atol=0)
        assert normal.sum() > 100


class TestEdgeCoefficientExponent(WithExponents, _OfCoefficient):
    subject = replace(EDGE_COEFFICIENT_EXPONENT, variants=tuple({"norm": norm} for norm in ("sym_row", "sym_inout")))
    test_agrees_at_the_paper_size = None

    @pytest.mark.promise("C1")
    @pytest.mark.parametrize("norm", ["row", "sym_count", "sym_undirected"])
    def test_other_norms_agree_with_the_oracle(self, norm, call):
        check_oracle(self.subject, self.inputs({"norm": norm}), call)


@pytest.mark.promise("C21")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    for subject in (EDGE_WEIGHT_EXPONENT, EDGE_COEFFICIENT_EXPONENT):
        inputs = leaves(subject, subject.make_inputs(CASES[0], dtype))
        for exponent in (inputs["exponent"], inputs["exponent"].detach().mT.contiguous().mT.requires_grad_()):
            given = subject.registered({**inputs, "exponent": exponent})
            opcheck(getattr(torch.ops.drseg, subject.name).default, given)


@pytest.mark.promise("C5")
@pytest.mark.parametrize("subject", [EDGE_WEIGHT_EXPONENT, EDGE_COEFFICIENT_EXPONENT], ids=lambda s: s.name)
@pytest.mark.parametrize(
    "exponent,error,message",
    [
        (torch.zeros(2, 12, 2), ValueError, r"the shape of index = \(2, 12, 3\), got \(2, 12, 2\)"),
        (
            torch.zeros(2, 12, 3).half(),
            TypeError,
            "exponent has an unsupported dtype; expected one of float32, float64",
        ),
        (torch.zeros(2, 12, 3).int(), TypeError, "exponent has an unsupported dtype"),
        (1.0, TypeError, "exponent must be a tensor"),
    ],
    ids=["shape", "half", "int", "number"],
)
def test_what_it_cannot_use_is_refused(subject, exponent, error, message):
    with pytest.raises(error, match=f"^{subject.name}: .*{message}"):
        subject.function(**{**subject.make_inputs(CASES[0]), "exponent": exponent})


def test_a_backend_that_knows_no_exponent_refuses_it(monkeypatch):
    from drseg_core.ops import _dispatch

    monkeypatch.setattr(_dispatch, "_tables", dict(_dispatch._tables))
    monkeypatch.setattr(_dispatch, "_names", _dispatch._names)

    def plain(source, target, index, vector, bias, mask):
        return reference.edge_weight(source, target, index, vector, bias, mask)

    ops.register_backend("edge_weight", "mine", plain, lambda device: None, preferred=True)
    try:
        for subject in (EDGE_WEIGHT_EXPONENT, EDGE_COEFFICIENT_EXPONENT):
            inputs = subject.make_inputs(CASES[0])
            subject.function(**inputs)
            assert ops.last_backend("edge_weight") != "mine"
            if subject is EDGE_WEIGHT_EXPONENT:
                with pytest.raises(BackendUnavailableError, match="backend mine cannot run on cpu: it takes no expo"):
                    subject.function(**inputs, backend="mine")
            exponent = inputs.pop("exponent")
            assert not torch.equal(subject.function(**inputs), subject.function(**inputs, exponent=exponent))
        assert ops.edge_weight(**EDGE_WEIGHT_EXPONENT.make_inputs(CASES[0], torch.float64)).dtype == torch.float64
    finally:
        _dispatch.table.cache_clear()


def test_the_cuda_kernels_refuse_it():
    from drseg_core.ops.edge_coefficient import registration

    case = {"norm": "sym_row", "nodes": 4, "slots": 2, "edges": 8}
    assert registration._refused_by_cuda(case) is None
    assert registration._refused_by_cuda({**case, "exponent": True}) == "its kernel takes no exponent"
