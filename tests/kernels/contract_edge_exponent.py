# SPDX-License-Identifier: Apache-2.0
"""The contracts of the ops that weigh edges, with exponents, on Triton; for ``test_interpreter.py``, and ``--gpu``."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from contract import output_gradient
from drseg_kernels import edge_coefficient as coefficient_kernels
from drseg_kernels import edge_weight as weight_kernels
from edges import DEVICE, KernelContract, check_sizes, launches_of, on_device, on_kernels
from fused import EDGE_COEFFICIENT_EXPONENT
from subjects import EDGE_WEIGHT_EXPONENT, Inputs
from test_edge_exponent import TestEdgeCoefficientExponent as _OfCoefficient
from test_edge_exponent import TestEdgeWeightExponent as _OfWeight
from torch import Tensor

from drseg_core import ops
from drseg_core.testing import CASES

WEIGHT = on_kernels(EDGE_WEIGHT_EXPONENT)
COEFFICIENT = dataclasses.replace(on_kernels(EDGE_COEFFICIENT_EXPONENT), variants=_OfCoefficient.subject.variants)


class _WithExponent(KernelContract):
    """Without what the registration holds, which native kernels share, and the contracts without an exponent test."""

    test_agrees_at_the_paper_size = test_halves_as_they_leave_a_product = None
    test_autocast_keeps_full_precision = test_matmul_precision_setting_changes_nothing = None
    test_double_backward_is_refused = test_editing_a_saved_input_is_refused = None


class TestEdgeWeightExponentKernels(_WithExponent, _OfWeight):
    subject = WEIGHT
    test_equals_the_mlp_on_concatenated_features = None
    # the launcher of the fused op lays them out in the same way, and calls the same kernels
    test_layouts = test_storage_offsets = None


class TestEdgeCoefficientExponentKernels(_WithExponent, _OfCoefficient):
    subject = COEFFICIENT
    layer = staticmethod(on_device(ops.graph_layer))
    leaves_scales = True
    test_is_the_composition_of_its_parts = None


def make(nodes: int, slots: int, width: int, dtype: torch.dtype = torch.float32) -> Inputs:
    random = torch.Generator().manual_seed(nodes * slots + width)
    half = (2, nodes, width)
    return {
        "source": torch.randn(half, generator=random).to(dtype),
        "target": torch.randn(half, generator=random).to(dtype),
        # distinct neighbours: the oracle tells the edges of a row apart by where they end
        "index": torch.rand(2, nodes, nodes, generator=random).topk(slots).indices.sort(-1).values.int(),
        "vector": (torch.randn(width, generator=random) * width**-0.5).to(dtype),
        "bias": torch.randn(1, generator=random).to(dtype),
        "mask": torch.rand(2, nodes, slots, generator=random) > 0.2,
        "exponent": 2 * torch.randn(2, nodes, slots, generator=random),
    }


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(5, 3, 70), (1, 1, 16), (35, 34, 2), (7, 5, 231)], ids=str)
@pytest.mark.parametrize("subject", [WEIGHT, COEFFICIENT], ids=lambda subject: subject.name)
def test_sizes_that_fill_no_tile(subject, size, masked):
    inputs = make(*size)
    if not masked:
        inputs["mask"] = None
    check_sizes(subject, inputs, functools.partial(subject.function, backend="triton"))


NEEDS = [(source, parameters, exponent) for source in (0, 1) for parameters in (0, 1) for exponent in (0, 1)]


@pytest.mark.parametrize("needs", NEEDS[1:], ids=str)
@pytest.mark.parametrize("norm", [None, "sym_row", "sym_inout"])
def test_each_gradient_alone_is_that_of_all(norm, needs):
    inputs: dict[str, Any] = {n: value.to(DEVICE) for n, value in make(6, 3, 5).items()}
    halves, exponent = (inputs["source"], inputs["target"], None, None), inputs["exponent"]
    edges = [inputs[name] for name in ("index", "vector", "bias")]
    saved: tuple[Tensor, ...]
    if norm is None:
        output = weight_kernels.edge_weight(halves, *edges, inputs["mask"], exponent)
        backward, saved, options = weight_kernels.edge_weight_backward, (output,), ()
    else:
        options = (norm, 1e-6, False)
        output, *rest = coefficient_kernels.edge_coefficient(halves, *edges, inputs["mask"], *options, None, exponent)
        backward, saved = coefficient_kernels.edge_coefficient_backward, tuple(rest)
    grad = output_gradient(output)
    source, parameters, last = map(bool, needs)
    mask = [source, source, parameters, parameters, False, last]
    got = backward(grad, *saved, halves, *edges, *options, mask, None, exponent)
    everything = backward(grad, *saved, halves, *edges, *options, [True] * 6, None, exponent)
    assert len(got) == len(everything) == 6
    for value, right, need in zip(got, everything, mask, strict=True):
        assert not need or torch.equal(value, right)


def test_an_exponent_is_no_launch_more(monkeypatch):
    """The fused kernels take it: nothing else runs."""
    launched = launches_of(monkeypatch, coefficient_kernels, weight_kernels)
    counts = []
    for exponent in (None, "exponent"):
        inputs = COEFFICIENT.make_inputs(CASES[0])
        if exponent is None:
            del inputs["exponent"]
        for apart in (True, False):
            names = [name for name in COEFFICIENT.differentiable if name in inputs]
            given = {n: v.clone().requires_grad_() if n in names else v for n, v in inputs.items()}
            found = COEFFICIENT.function(**given, apart=apart, backend="triton")
            (found[0] if apart else found).sum().backward()
        counts.append(list(launched))
        launched.clear()
    assert counts[0] == counts[1] and "_edge_coefficient_bwd_kernel_slope" in counts[0]
