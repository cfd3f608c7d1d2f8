# SPDX-License-Identifier: Apache-2.0
"""The contract of ``degree_normalize`` on the Triton backend; ``test_interpreter.py`` runs it, and ``--gpu``."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from contract import Call, output_gradient, run
from drseg_kernels import degree_normalize as kernels
from drseg_kernels._launch import Tile
from edges import DEVICE, KernelContract, crowded_index, on_device, on_kernels, within_padding
from subjects import DEGREE_NORMALIZE
from test_degree_normalize import TestDegreeNormalize as _Tests
from torch import Tensor

from drseg_core.ops.degree_normalize import reference
from drseg_core.testing import numerics

SUBJECT = on_kernels(DEGREE_NORMALIZE)
NORMS = ["sym_undirected", "sym_row", "sym_inout", "row", "sym_count"]


class TestDegreeNormalizeKernels(KernelContract, _Tests):
    subject = SUBJECT
    test_undirected_operator_is_the_symmetric_matrix = None


def make(nodes: int, slots: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(nodes * slots)
    weight = torch.rand(batch, nodes, slots, generator=random) + 0.05
    return {"weight": weight.to(dtype), "index": crowded_index(batch, nodes, slots)}


class _WithTile(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, index, norm, eps, tile):
        ctx.save_for_backward(weight, index)
        ctx.given = norm, eps, tile
        return kernels.degree_normalize(weight, index, norm, eps, tile=tile)

    @staticmethod
    def backward(ctx, grad):
        norm, eps, tile = ctx.given
        return kernels.degree_normalize_backward(grad, *ctx.saved_tensors, norm, eps, tile=tile), *[None] * 4


def with_tile(tile: Tile, weight: Tensor, index: Tensor, norm: str, eps: float = 1e-6) -> Tensor:
    return on_device(_WithTile.apply)(weight, index, norm, eps, tile)


def check(inputs: dict[str, Any], call: Call) -> None:
    """Agreement with the float64 reference, also where a row has the same neighbour twice; the same bits again.

    All weights are of one size, so the terms of a gradient are no larger than the incoming one times the largest
    coefficient per weight; they may cancel.
    """
    got, again = (run(SUBJECT, inputs, call) for _ in range(2))
    weight = inputs["weight"].double().requires_grad_()
    output = reference.degree_normalize(weight, inputs["index"], inputs["norm"], 1e-6)
    (grad,) = torch.autograd.grad(output, weight, got["given"].double())
    units = (max(inputs["index"].shape[1:]) + numerics.SPARE_UNITS) * numerics.UNIT[torch.float32]
    output = output.detach()
    term = got["given"].double().abs().amax() * (output / weight.detach()).amax()
    for name, right, size in (("output", output, output.amax()), ("grad_weight", grad, term)):
        limit = units * size + numerics.rounding_bound(right, got[name].dtype)
        assert numerics.compare_values(got[name], right, limit).problem is None
        assert torch.equal(got[name], again[name])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tile", [Tile(1, 4, 1), Tile(1, 32, 2), Tile(1, 1024, 4)], ids=str)
def test_every_tile_is_right(tile, norm):
    check({**make(9, 7), "norm": norm}, functools.partial(with_tile, tile))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("nodes,slots", [(5, 1), (1, 1), (3, 100), (40, 3)])
def test_sizes_that_fill_no_tile(nodes, slots, norm, dtype):
    call = functools.partial(SUBJECT.function, backend="triton")
    check({**make(nodes, slots, dtype), "norm": norm}, call)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_stays_where_the_reference_has_it(value, norm):
    inputs = make(9, 4, batch=1)
    inputs["weight"][0, 3, 1] = value
    expected = reference.degree_normalize(**inputs, norm=norm, eps=1e-6)
    got = with_tile(Tile(1, 32, 1), **inputs, norm=norm)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7, equal_nan=True)
    grad = output_gradient(expected)
    right = reference.degree_normalize_backward(grad, **inputs, norm=norm, eps=1e-6)
    back = on_device(kernels.degree_normalize_backward)(grad, **inputs, norm=norm, eps=1e-6)
    torch.testing.assert_close(back, right, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("norm", ["sym_row", "row", "sym_count"])
def test_sums_over_rows_alone_sort_nothing_forward(norm, monkeypatch):
    monkeypatch.setattr(kernels, "columns_of", None)
    inputs = {name: value.to(DEVICE) for name, value in make(5, 3).items()}
    kernels.degree_normalize(**inputs, norm=norm, eps=1e-6)


@pytest.mark.promise("C15")
@pytest.mark.parametrize("norm", ["sym_undirected", "row"])
def test_nothing_outside_the_operands_is_touched(norm):
    inputs = make(7, 5)
    expected = with_tile(Tile(1, 4, 1), **inputs, norm=norm)
    for padding in (torch.nan, 1e30):
        wide, inner = within_padding(inputs["weight"], padding)
        assert torch.equal(with_tile(Tile(1, 4, 1), inner, inputs["index"], norm), expected)
        assert torch.equal(inner.cpu(), inputs["weight"])
        edge = torch.cat([wide[:32], wide[32 + inner.numel() :]])
        assert (edge.isnan() if padding != padding else edge == padding).all()
