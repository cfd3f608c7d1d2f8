# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from contract import OpContract, check_lattice
from subjects import GRAPH_PROPAGATE
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from drseg_core import ops
from drseg_core.ops.graph_propagate.reference import graph_propagate_backward
from drseg_core.testing import CASES


class TestGraphPropagate(OpContract):
    subject = GRAPH_PROPAGATE

    @pytest.mark.promise("C2")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_integers_are_exact(self, dtype, variant, call):
        for case in (case for case in CASES if not case.large):
            inputs = {**self.subject.make_inputs(case, dtype), **variant}
            random = torch.Generator().manual_seed(3)
            # at most 37 * 3 * 3 < 2**9: exact in bfloat16 too as long as the sums fit 8 bits, so entries are 0 or 1
            high = 2 if dtype == torch.bfloat16 else 4
            inputs["x"] = torch.randint(0, high, inputs["x"].shape, generator=random).to(dtype)
            share = torch.randint(0, high, inputs["coefficient"].shape, generator=random)
            inputs["coefficient"] = share.to(inputs["coefficient"].dtype)
            check_lattice(self.subject, inputs, call)

    @pytest.mark.promise("C6")
    def test_constant_features_stay_constant(self, call):
        inputs = self.inputs({})
        weight = ops.degree_normalize(inputs["coefficient"], inputs["index"], norm="row", eps=1e-12)
        y = call(x=torch.ones_like(inputs["x"]), index=inputs["index"], coefficient=weight)
        assert (y - 1).abs().max() <= 4 * inputs["index"].shape[2] * 2**-24


@pytest.mark.promise("C21")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck(dtype, transpose):
    for case in CASES[:3]:
        inputs = {**GRAPH_PROPAGATE.make_inputs(case, dtype), "transpose": transpose}
        x = inputs["x"].requires_grad_()
        coefficient = inputs["coefficient"].requires_grad_()
        forms = (x, x.mT.contiguous().mT, x.repeat(1, 1, 2)[..., ::2], x[:1].expand(x.shape))
        for form in forms[: 4 if case is CASES[0] else 1]:
            args = (form.detach().requires_grad_(), inputs["index"], coefficient, transpose, None, None, "auto")
            opcheck(torch.ops.drseg.graph_propagate.default, args)


@pytest.mark.promise("C21")
@pytest.mark.parametrize("transpose", [False, True])
def test_a_gradient_traced_for_any_size_is_the_gradient(transpose):
    def backward(grad, x, index, coefficient):
        return graph_propagate_backward(grad, x, index, coefficient, transpose, [True, True])

    traced = None
    for case in CASES[:3]:
        inputs = GRAPH_PROPAGATE.make_inputs(case)
        x, index, coefficient = (inputs[name] for name in ("x", "index", "coefficient"))
        given = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), x, index, coefficient
        traced = traced or make_fx(backward, tracing_mode="symbolic")(*given)
        for found, right in zip(traced(*given), backward(*given), strict=True):
            torch.testing.assert_close(found, right)


@pytest.mark.promise("C23")
@pytest.mark.parametrize("far", [2**31, 2**32, 2**32 + 1, 2**40, -(2**31) - 1, -(2**32), -(2**33), 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("transpose", [False, True])
def test_an_index_beyond_int32_is_clamped_like_any_other(far, transpose):
    inputs = GRAPH_PROPAGATE.make_inputs(CASES[2])
    index = inputs["index"].long()
    nodes = index.shape[1]
    index[:, ::2, 0] = far
    clamped = index.clamp(0, nodes - 1)
    results = {}
    for name, backend, given in (
        ("native", "native", index),
        ("reference", "reference", index),
        ("good", "native", clamped),
    ):
        x, coefficient = (inputs[key].detach().clone().requires_grad_() for key in ("x", "coefficient"))
        y = ops.graph_propagate(x, given, coefficient, transpose=transpose, backend=backend)
        results[name] = (y, *torch.autograd.grad(y.square().sum(), (x, coefficient)))
    for native, expected, good in zip(results["native"], results["reference"], results["good"], strict=True):
        assert torch.equal(native, good)
        torch.testing.assert_close(native, expected, rtol=1e-5, atol=1e-5)
