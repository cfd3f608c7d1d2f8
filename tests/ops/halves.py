# SPDX-License-Identifier: Apache-2.0
"""What the ops that weigh edges must make of projections as they leave a product."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from contract import DTYPES
from torch import Tensor

from drseg_core import ops

# in one tensor; to be normalised; the bias of the first layer still to come
FORMS = list(itertools.product([True, False], repeat=3))
SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class RawHalves:
    """Inherit beside ``OpContract``: every form on every backend."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("form", FORMS, ids=lambda form: "".join("+" if part else "-" for part in form))
    def test_halves_as_they_leave_a_product(self, form, dtype, call):
        """Output and gradients are those of the plain halves in float64, each alone as all together."""
        stacked, normed, shifted = form
        inputs = self.inputs(self.subject.variants[0], dtype=dtype)
        random = torch.Generator().manual_seed(5)
        shape = inputs["source"].shape
        given = {name: inputs.pop(name) for name in self.subject.differentiable}
        if shifted:
            given["source_bias"] = torch.randn(shape[-1], generator=random).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        factor = torch.rand(shape[:-1], generator=random).to(wide) + 0.5 if normed else None

        def reference(source: Tensor, target: Tensor, source_bias: Any = 0, **rest: Tensor) -> Tensor:
            scale = 1 if factor is None else factor[..., None].double()
            halves = {"source": source * scale + source_bias, "target": target * scale}
            return getattr(ops, self.subject.name)(**halves, **rest, **inputs, backend="reference")

        def raw(source: Tensor, target: Tensor, **rest: Tensor) -> Tensor:
            halves = {"source": torch.cat([source, target], -1), "target": None} if stacked else {}
            return call(**({"source": source, "target": target} | halves), **rest, **inputs, inverse_norm=factor)

        def leaves(dtype: torch.dtype, of_edges: torch.dtype) -> dict[str, Tensor]:
            dtypes = {name: of_edges if name == "exponent" else dtype for name in given}
            return {n: value.detach().to(dtypes[n], copy=True).requires_grad_() for n, value in given.items()}

        exact, own = leaves(torch.float64, torch.float64), leaves(dtype, wide)
        right, output = reference(**exact), raw(**own)
        assert output.dtype == wide
        torch.testing.assert_close(output.double(), right, rtol=1e-4 if wide == torch.float32 else 1e-10, atol=1e-7)
        grad = torch.randn(right.shape, generator=random, dtype=torch.float64)
        expected = torch.autograd.grad(right, list(exact.values()), grad)

        def gradients(*names: str) -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, [own[name] for name in names], grad.to(wide), retain_graph=True)

        size = {name: value.abs().max() for name, value in zip(own, expected, strict=True)}
        # a sum that may cancel is as exact as its terms
        size["bias"] = torch.maximum(size["bias"], size["vector"])
        for name, value, wanted in zip(own, gradients(*own), expected, strict=True):
            assert value.dtype == own[name].dtype and value.shape == given[name].shape
            error = (value.double() - wanted).abs().max() / size[name]
            assert error < SLACK[dtype], f"{name} is off by {float(error):.1e} of the largest"
            assert torch.equal(gradients(name)[0], value), f"{name} depends on what else is asked for"

    def test_the_weight_of_a_linear_layer_is_a_vector(self, variant, call):
        inputs = self.inputs(variant)
        layer = torch.nn.Linear(inputs["vector"].shape[0], 1)
        output = call(**{**inputs, "vector": layer.weight, "bias": layer.bias})
        vector = layer.weight[0].detach().requires_grad_()
        assert torch.equal(output, call(**{**inputs, "vector": vector, "bias": layer.bias}))
        (to_layer,) = torch.autograd.grad(output.square().sum(), layer.weight)
        expected = call(**{**inputs, "vector": vector, "bias": layer.bias.detach()})
        assert to_layer.shape == layer.weight.shape
        assert torch.equal(to_layer[0], torch.autograd.grad(expected.square().sum(), vector)[0])
        with pytest.raises(ValueError, match="vector has the wrong rank"):
            call(**{**inputs, "vector": layer.weight.expand(2, -1)})


# changes to inputs of 2 x 12 nodes and 4 hidden units that are refused, and how
REFUSED = [
    ({"target": None, "source": torch.zeros(2, 12, 5)}, ValueError, r"source is no two halves; expected \(..., 2E\)"),
    ({"target": None}, ValueError, r"vector has the wrong shape; expected \(E,\) = \(2,\), got \(4,\)"),
    ({"inverse_norm": torch.zeros(2, 11)}, ValueError, "inverse_norm has the wrong shape; expected the shape of so"),
    ({"inverse_norm": torch.zeros(2, 12).half()}, TypeError, "inverse_norm has an unsupported dtype"),
    ({"source_bias": torch.zeros(3)}, ValueError, r"source_bias has the wrong shape; expected \(E,\) = \(4,\)"),
    ({"source_bias": 1.0}, TypeError, "source_bias must be a tensor"),
]
