# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools

import pytest
import torch
from contract import OpContract
from subjects import DEGREE_NORMALIZE
from torch.library import opcheck

from drseg_core import ops
from drseg_core.testing import CASES


class TestDegreeNormalize(OpContract):
    subject = DEGREE_NORMALIZE

    @pytest.mark.promise("C6")
    def test_rows_sum_to_one(self, call):
        inputs = self.inputs({})
        total = call(**inputs, norm="row", eps=1e-12).sum(-1)
        assert (total - 1).abs().max() <= 4 * inputs["index"].shape[2] * 2**-24

    @pytest.mark.promise("C5")
    def test_zero_degree_is_finite(self, variant, call):
        inputs = self.inputs(variant)
        weight = torch.zeros_like(inputs["weight"]).requires_grad_()
        coefficient = call(**{**inputs, "weight": weight})
        coefficient.sum().backward()
        assert not coefficient.any() and weight.grad.isfinite().all()

    @pytest.mark.promise("C5")
    @pytest.mark.parametrize("size", [1e-3, 1e26, 1e30, 1e35], ids=str)
    def test_weights_of_any_size(self, variant, call, size):
        """Coefficients do not depend on the size of the weights, and gradients go with its inverse."""
        inputs = self.inputs(variant)
        index = inputs["index"]
        # a lesser share in one row of three, so that degrees differ
        weight = inputs["weight"] * (1 + torch.arange(index.shape[1])[:, None] % 3)
        found = []
        for dtype in (torch.float64, torch.float32):
            given = (weight * size).to(dtype).requires_grad_()
            function = call if dtype == torch.float32 else functools.partial(ops.degree_normalize, backend="reference")
            coefficient = function(**{**inputs, "weight": given})
            grad = torch.linspace(-1, 2, index.numel(), dtype=dtype).view(index.shape)
            (to_weight,) = torch.autograd.grad(coefficient, given, grad)
            found += [coefficient.detach().double(), to_weight.double() * size]
        for value, right in zip(found[2:], found[:2], strict=True):
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))

    @pytest.mark.promise("C5")
    @pytest.mark.parametrize("size", [1e37, 3e38], ids=str)
    def test_degrees_and_gradients_beyond_float32_are_finite(self, variant, call, size):
        """A degree that is too large makes its coefficients 0; of weight times gradient alone nothing follows."""
        inputs = self.inputs(variant)
        weight = torch.full_like(inputs["weight"], size, dtype=torch.float32).requires_grad_()
        coefficient = call(**{**inputs, "weight": weight})
        (grad,) = torch.autograd.grad(coefficient, weight, torch.linspace(-100, 200, weight.numel()).view_as(weight))
        assert coefficient.isfinite().all() and grad.isfinite().all()

    @pytest.mark.promise("C5")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_smallest_eps_is_finite(self, variant, call, dtype):
        inputs = self.inputs(variant)
        empty = torch.arange(inputs["index"].shape[1])[:, None] % 2 == 0
        for mask in (empty, torch.ones_like(empty)):
            weight = inputs["weight"].masked_fill(mask, 0).to(dtype).requires_grad_()
            coefficient = call(**{**inputs, "weight": weight}, eps=1e-20)
            (grad,) = torch.autograd.grad(coefficient.sum(), weight)
            # a gradient of order 1 / eps leaves the range of float16 only
            assert coefficient.isfinite().all() and (dtype == torch.float16 or grad.isfinite().all())

    def test_undirected_operator_is_the_symmetric_matrix(self, call):
        inputs = self.inputs({}, dtype=torch.float64)
        weight, index = inputs["weight"][:1], inputs["index"][:1]
        nodes = index.shape[1]
        matrix = torch.zeros(nodes, nodes, dtype=torch.float64).scatter_add_(1, index[0].long(), weight[0])
        matrix = (matrix + matrix.T) / 2
        scale = (matrix.sum(1) + 1e-6).rsqrt()
        expected = (scale[:, None] * matrix * scale) @ torch.eye(nodes, dtype=torch.float64)
        coefficient = call(weight=weight, index=index, norm="sym_undirected")
        unit = torch.eye(nodes, dtype=torch.float64)[None]
        got = ops.graph_propagate(unit, index, coefficient) + ops.graph_propagate(
            unit, index, coefficient, transpose=True
        )
        torch.testing.assert_close(got[0], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.promise("C21")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["sym_row", "sym_count", "sym_inout", "row", "sym_undirected"])
def test_opcheck(dtype, norm):
    for case in CASES[:3]:
        inputs = DEGREE_NORMALIZE.make_inputs(case, dtype)
        weight = inputs["weight"]
        for form in (weight, weight.mT.contiguous().mT)[: 2 if case is CASES[0] else 1]:
            args = (form.detach().requires_grad_(), inputs["index"], norm, 1e-6, None, None, "auto")
            opcheck(torch.ops.drseg.degree_normalize.default, args)
