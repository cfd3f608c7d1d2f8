# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from contract import OpContract, check_lattice
from subjects import GRAPH_PROPAGATE
from torch.library import opcheck

from drseg_core import ops
from drseg_core.ops._cases import CASES


class TestGraphPropagate(OpContract):
    subject = GRAPH_PROPAGATE
    backends = ("reference", "native")

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

    def test_constant_features_stay_constant(self, call):
        inputs = self.inputs({})
        weight = ops.degree_normalize(inputs["coefficient"], inputs["index"], norm="row", eps=1e-12)
        y = call(x=torch.ones_like(inputs["x"]), index=inputs["index"], coefficient=weight)
        assert (y - 1).abs().max() <= 4 * inputs["index"].shape[2] * 2**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck(dtype, transpose):
    for case in CASES[:3]:
        inputs = {**GRAPH_PROPAGATE.make_inputs(case, dtype), "transpose": transpose}
        x = inputs["x"].requires_grad_()
        coefficient = inputs["coefficient"].requires_grad_()
        for form in (x, x.mT.contiguous().mT, x.repeat(1, 1, 2)[..., ::2], x[:1].expand(x.shape)):
            args = (form.detach().requires_grad_(), inputs["index"], coefficient, transpose, "auto")
            opcheck(torch.ops.drseg.graph_propagate.default, args)
