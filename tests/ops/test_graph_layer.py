# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from contract import OpContract, empty_inputs, leaves, with_one_variant
from fused import GRAPH_LAYER, GRAPH_LAYER_RELU
from torch.library import opcheck
from torch.nn import functional as F

from drseg_core import ops
from drseg_core.testing import CASES


class LayerContract(OpContract):
    # its parts compute it on a CPU; the contract of graph_propagate has both directions at that size
    @pytest.mark.promise("C1")
    @with_one_variant
    def test_agrees_at_the_paper_size(self, variant, call):
        super().test_agrees_at_the_paper_size(variant, call)

    @pytest.mark.promise("C14")
    @pytest.mark.parametrize("axis", ["B", "N", "K", "C"])
    def test_empty(self, axis, variant, call):
        inputs = {**empty_inputs(self.subject, axis), **variant}
        if axis == "C":
            inputs |= {name: inputs[name][:0] for name in ("bias", "norm_weight", "norm_bias") if name in inputs}
        given = leaves(self.subject, inputs)
        output = call(**given)
        assert output.shape == inputs["x"].shape
        grads = torch.autograd.grad(output.sum(), [given[name] for name in self.subject.differentiable])
        for name, grad in zip(self.subject.differentiable, grads, strict=True):
            assert grad.shape == inputs[name].shape and not grad.isnan().any()

    def test_bias_may_be_missing(self, variant, call):
        inputs = self.inputs(variant)
        assert torch.equal(
            call(**{**inputs, "bias": None}), call(**{**inputs, "bias": torch.zeros_like(inputs["bias"])})
        )

    @pytest.mark.promise("C17")
    def test_parameters_keep_their_dtype(self, variant, call):
        inputs = self.inputs(variant, dtype=torch.float16)
        inputs |= {name: inputs[name].float() for name in self.subject.differentiable[2:]}
        given = leaves(self.subject, inputs)
        output = call(**given)
        grads = torch.autograd.grad(output.float().sum(), [given[name] for name in self.subject.differentiable])
        assert output.dtype == grads[0].dtype == torch.float16
        assert all(grad.dtype == torch.float32 for grad in grads[1:])

    def test_without_gradients_nothing_is_kept(self, variant):
        inputs = self.inputs(variant)
        x, index, *options = self.subject.registered(inputs)
        for keep in (True, False):
            options[-4] = keep
            y, *saved = torch.ops.drseg.graph_layer(x, index, *options)
            assert all((value.numel() > 0) is (keep and "norm_weight" in inputs) for value in saved)
            assert torch.equal(y, ops.graph_layer(**inputs))

    def test_a_coefficient_that_is_handed_on_has_the_gradients_of_all_layers(self, variant, call):
        inputs = self.inputs(variant)
        several = []
        for hand_on in (False, True):
            given = leaves(self.subject, inputs)
            share, grads = given["coefficient"], []
            for _ in range(3):
                found = call(**{**given, "coefficient": share}, hand_on=hand_on)
                y, share = found if hand_on else (found, share)
                grads.append(y)
            total = sum((number + 1) * y.square().sum() for number, y in enumerate(grads))
            several.append(torch.autograd.grad(total, [given[name] for name in self.subject.differentiable]))
            assert torch.equal(share, inputs["coefficient"])
        for value, right in zip(*reversed(several), strict=True):
            torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))
        # one without a gradient has none afterwards
        given = {**leaves(self.subject, inputs), "coefficient": inputs["coefficient"]}
        assert not call(**given, hand_on=True)[1].requires_grad
        # a layer whose output nobody uses hands back what came
        given = leaves(self.subject, inputs)
        _, share = call(**given, hand_on=True)
        (grad,) = torch.autograd.grad(share.sum(), given["coefficient"])
        assert torch.equal(grad, torch.ones_like(grad))

    def test_scales_are_those_of_both_ends(self, variant, call):
        for case, dtype in ((CASES[0], torch.float32), (CASES[1], torch.float16)):
            inputs = self.inputs(variant, case, dtype)
            scale = 0.5 + torch.rand(inputs["x"].shape[:2], generator=torch.Generator().manual_seed(1))
            names, several = self.subject.differentiable, []
            for apart in (False, True):
                given = leaves(self.subject, inputs)
                if apart:
                    found = call(**given, scale=scale)
                else:
                    near = given["index"].long().clamp(0, scale.shape[1] - 1)
                    other = torch.stack([of[at] for of, at in zip(scale, near, strict=True)])
                    folded = given["coefficient"] * scale[:, :, None] * other
                    found = call(**{**given, "coefficient": folded})
                grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(found.dtype)
                several.append([found, *torch.autograd.grad(found, [given[name] for name in names], grad)])
            unit = 1e-5 if dtype == torch.float32 else 4e-3
            for name, right, value in zip(("output", *names), *several, strict=True):
                slack = unit * float(right.detach().abs().max())
                torch.testing.assert_close(value, right, rtol=unit, atol=slack, msg=lambda m, n=name: f"{n}: {m}")


class TestGraphLayer(LayerContract):
    subject = GRAPH_LAYER

    def test_a_row_without_deviation_is_the_shift(self, variant, call):
        inputs = self.inputs(variant)
        inputs["bias"] = torch.full_like(inputs["bias"], 0.75)
        output = call(**{**inputs, "x": torch.zeros_like(inputs["x"])})
        # on a GPU the mean of equal numbers may be off by their last bit, of which 1 / sqrt(eps) makes 316
        slack = 1e-6 if self.device == "cpu" else 2e-5
        torch.testing.assert_close(output, inputs["norm_bias"].expand_as(output), rtol=0, atol=slack)

    @pytest.mark.promise("C1")
    def test_is_the_composition_of_its_parts(self, variant, call):
        inputs = self.inputs(variant, dtype=torch.float64)
        parts = [inputs[name] for name in ("x", "index", "coefficient")]
        y = ops.graph_propagate(*parts, backend="reference") + inputs["bias"]
        if variant["undirected"]:
            y = y + ops.graph_propagate(*parts, transpose=True, backend="reference")
        y = F.layer_norm(y, y.shape[-1:], inputs["norm_weight"], inputs["norm_bias"], 1e-5)
        expected = ops.graph_layer(**inputs, backend="reference")
        torch.testing.assert_close(expected, y, rtol=1e-12, atol=1e-12)


class TestGraphLayerRelu(LayerContract):
    subject = GRAPH_LAYER_RELU

    @pytest.mark.promise("C3")
    def test_gradcheck(self, variant, backend):
        # away from the kink
        tiny = next(case for case in CASES if case.name == "tiny_3x4")
        inputs = {**self.subject.make_inputs(tiny, torch.float64), **variant}
        inputs["bias"] = torch.where(inputs["bias"] < 0, inputs["bias"] - 9, inputs["bias"] + 9)
        given = leaves(self.subject, inputs)

        def function(*tensors):
            return ops.graph_layer(**{**given, **dict(zip(self.subject.differentiable, tensors, strict=True))})

        assert torch.autograd.gradcheck(function, [given[n] for n in self.subject.differentiable])
        assert 0.1 < (ops.graph_layer(**given) == 0).double().mean() < 0.9


@pytest.mark.promise("C21")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("subject", [GRAPH_LAYER, GRAPH_LAYER_RELU], ids=["layer_norm", "relu"])
def test_opcheck(subject, dtype):
    for case, variant in zip(CASES[:3], (*subject.variants, {}), strict=True):
        inputs = {**subject.make_inputs(case, dtype), **variant}
        x, index, *others = subject.registered(inputs)
        for form in (x, x.mT.contiguous().mT, x[:1].expand(x.shape))[: 3 if case is CASES[0] else 1]:
            opcheck(torch.ops.drseg.graph_layer.default, (form.detach().requires_grad_(), index, *others))


@pytest.mark.parametrize(
    "changes,error,message",
    [
        (
            {"scale": torch.ones(2, 3)},
            ValueError,
            "scale has the wrong shape",
        ),
        (
            {"scale": torch.ones(2, 12, requires_grad=True)},
            ValueError,
            "scale has no gradient; expected a tensor that requires none, got one that does",
        ),
        (
            {"activation": "gelu"},
            ValueError,
            "activation is unknown; expected one of none, relu, layer_norm, got 'gelu'",
        ),
        (
            {"norm_weight": None},
            ValueError,
            "norm_weight does not fit the activation; expected a tensor for layer_norm, got None",
        ),
        (
            {"activation": "relu"},
            ValueError,
            "norm_weight does not fit the activation; expected None for relu, got a tensor",
        ),
        ({"bias": torch.zeros(3)}, ValueError, r"bias has the wrong shape; expected \(C,\) = \(5,\), got \(3,\)"),
        ({"norm_bias": [0.0]}, TypeError, "norm_bias must be a tensor; expected torch.Tensor, got list"),
        ({"eps": 0.0}, ValueError, "eps is out of range; expected a finite number > 0, got 0.0"),
        ({"undirected": 1}, TypeError, "undirected must be a flag; expected bool, got int"),
        ({"coefficient": torch.zeros(2, 12, 4)}, ValueError, "coefficient has the wrong shape; expected the shape of"),
        ({"index": torch.zeros(2, 12, 3)}, TypeError, "index has an unsupported dtype; expected one of int32, int64"),
        (
            {"x": torch.zeros(2, 11, 5)},
            ValueError,
            r"index does not match x; expected \(2, 11\) before K, got \(2, 12,",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_cannot_use_is_refused(changes, error, message):
    with pytest.raises(error, match=f"^graph_layer: {message}"):
        ops.graph_layer(**{**GRAPH_LAYER.make_inputs(CASES[0]), **changes})


def test_indices_out_of_range_are_found_on_request():
    inputs = GRAPH_LAYER.make_inputs(CASES[0])
    inputs["index"][1, 3, 2] = 12
    with pytest.raises(ValueError, match=r"index is out of range; expected .* got index\[1, 3, 2\] = 12"):
        ops.graph_layer(**inputs, validate=True)
