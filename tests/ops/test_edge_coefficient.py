# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from contract import OpContract, leaves, run, with_one_variant
from fused import EDGE_COEFFICIENT
from halves import REFUSED, RawHalves
from torch import Tensor
from torch.library import opcheck

from drseg_core import ops
from drseg_core.testing import CASES


class TestEdgeCoefficient(RawHalves, OpContract):
    subject = EDGE_COEFFICIENT
    layer = staticmethod(ops.graph_layer)
    # whether the backend has kernels for a layer on weights and scales
    leaves_scales = False

    # its parts compute it on a CPU; the contract of degree_normalize has every norm at that size
    @pytest.mark.promise("C1")
    @with_one_variant
    def test_agrees_at_the_paper_size(self, variant, call):
        super().test_agrees_at_the_paper_size(variant, call)

    @pytest.mark.promise("C15")
    def test_editing_a_saved_input_is_refused(self, variant, call):
        inputs = {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in self.inputs(variant).items()}
        source = inputs["source"].requires_grad_() * 1
        output = call(**{**inputs, "source": source})
        source.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    @pytest.mark.promise("C1")
    def test_is_the_composition_of_its_parts(self, variant, call):
        for mask in (True, False):
            inputs = self.inputs({}, dtype=torch.float64)
            if not mask:
                del inputs["mask"]
            weight = ops.edge_weight(**inputs, backend="reference")
            expected = ops.degree_normalize(weight, inputs["index"], **variant, backend="reference")
            got = ops.edge_coefficient(**inputs, **variant, backend="reference")
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.promise("C9")
    def test_no_mask_is_one_of_all_slots(self, variant, call):
        inputs = self.inputs(variant)
        mask = torch.ones_like(inputs.pop("mask"))
        expected = run(self.subject, {**inputs, "mask": mask}, call)
        got = run(self.subject, inputs, call, expected["given"])
        for name, value in expected.items():
            assert torch.equal(got[name], value), name

    def test_scores_are_a_mask(self, variant, call):
        inputs = self.inputs(variant)
        mask = inputs.pop("mask")
        score = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        assert torch.equal(call(**inputs, score=score), call(**inputs, mask=mask))

    def test_what_is_left_to_a_layer_comes_back_from_it(self, variant, backend, call):
        """Output and gradients of a layer on weights and scales are those on coefficients."""
        inputs, names = self.inputs(variant), self.subject.differentiable
        random = torch.Generator().manual_seed(0)
        x = torch.randn(*inputs["index"].shape[:2], 5, generator=random)
        several = []
        for apart in (False, True):
            given = leaves(self.subject, inputs)
            features = x.clone().requires_grad_()
            found = call(**given, apart=apart)
            share, scale = found if apart else (found, None)
            assert (scale is not None) is (apart and self.leaves_scales and variant["norm"] == "sym_row")
            total = 0
            for activation in ("relu", "none"):
                options = {"activation": activation, "scale": scale, "hand_on": True, "backend": backend}
                y, share = self.layer(features, given["index"], share, **options)
                total = total + (y.square() * (1 + torch.arange(5.0))).sum()
            wanted = [features, *(given[name] for name in names)]
            several.append([total.detach(), *torch.autograd.grad(total, wanted)])
        for name, right, value in zip(("total", "features", *names), *several, strict=True):
            slack = 1e-5 * float(right.abs().max())
            torch.testing.assert_close(value, right, rtol=1e-4, atol=slack, msg=lambda m, n=name: f"{n}: {m}")

    @pytest.mark.promise("C5")
    def test_a_row_without_neighbours_is_finite(self, variant, call):
        inputs = self.inputs(variant)
        inputs["mask"] = torch.zeros_like(inputs["mask"])
        source = inputs["source"].requires_grad_()
        output = call(**inputs)
        (grad,) = torch.autograd.grad(output.sum(), source)
        assert not output.any() and not grad.any()


@pytest.mark.promise("C21")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [variant["norm"] for variant in EDGE_COEFFICIENT.variants])
def test_opcheck(dtype, norm):
    for case in CASES[:3]:
        source, *others = EDGE_COEFFICIENT.registered({**EDGE_COEFFICIENT.make_inputs(case, dtype), "norm": norm})
        for form in (source, source.mT.contiguous().mT)[: 2 if case is CASES[0] else 1]:
            opcheck(torch.ops.drseg.edge_coefficient.default, (form.detach().requires_grad_(), *others))


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"norm": "none"}, ValueError, "norm is unknown; expected one of sym_row, sym_count, sym_inout, row, sym_und"),
        ({"eps": 0.0}, ValueError, "eps is out of range; expected a finite number > 0, got 0.0"),
        (
            {"mask": torch.ones(2, 12, 3).bool(), "score": torch.ones(2, 12, 3)},
            ValueError,
            "score and mask say the same",
        ),
        (
            {"mask": None, "score": torch.ones(2, 12, 2)},
            ValueError,
            "score has the wrong shape; expected the shape of index",
        ),
        ({"eps": 1e-30}, ValueError, "eps is too small; expected eps >= 1e-20, got 1e-30"),
        ({"target": torch.zeros(2, 12, 3)}, ValueError, "target has the wrong shape; expected the shape of source"),
        ({"vector": torch.zeros(3)}, ValueError, r"vector has the wrong shape; expected \(E,\) = \(4,\), got \(3,\)"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias has the wrong shape; expected \(\) or \(1,\), got \(2,\)"),
        ({"mask": torch.zeros(2, 12, 3)}, TypeError, "mask has an unsupported dtype; expected one of bool"),
        ({"index": torch.zeros(2, 11, 3).int(), "mask": None}, ValueError, "index does not match source"),
        *REFUSED,
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_cannot_use_is_refused(changes, error, message):
    with pytest.raises(error, match=f"^edge_coefficient: {message}"):
        ops.edge_coefficient(**{**EDGE_COEFFICIENT.make_inputs(CASES[0]), **changes})
