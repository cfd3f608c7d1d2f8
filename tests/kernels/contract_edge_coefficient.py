# SPDX-License-Identifier: Apache-2.0
"""The contract of ``edge_coefficient`` on the Triton backend; ``test_interpreter.py`` runs it, and ``--gpu``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from contract import output_gradient, run
from drseg_kernels import degree_normalize as degree_kernels
from drseg_kernels import edge_coefficient as kernels
from drseg_kernels import edge_weight as weight_kernels
from drseg_kernels._launch import Tile
from edges import (
    DEVICE,
    INTERPRETED,
    KernelContract,
    check_sizes,
    crowded_index,
    launches_of,
    on_device,
    on_kernels,
    within_padding,
)
from fused import EDGE_COEFFICIENT
from test_edge_coefficient import TestEdgeCoefficient as _Tests
from torch import Tensor

from drseg_core import ops
from drseg_core.ops.edge_coefficient import reference

NORMS = ["sym_row", "sym_inout", "sym_undirected", "row", "sym_count"]
# the interpreter meets the other norms in the tests below
VARIANTS = tuple({"norm": norm} for norm in (NORMS[:2] if INTERPRETED else NORMS))
SUBJECT = dataclasses.replace(on_kernels(EDGE_COEFFICIENT), variants=VARIANTS)


class TestEdgeCoefficientKernels(KernelContract, _Tests):
    subject = SUBJECT
    layer = staticmethod(on_device(ops.graph_layer))
    leaves_scales = True
    test_is_the_composition_of_its_parts = None


def make(nodes: int, slots: int, width: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Any]:
    random = torch.Generator().manual_seed(nodes * slots + width)
    half = (batch, nodes, width)
    # distinct neighbours: the oracle tells the edges of a row apart by where they end
    index = torch.rand(batch, nodes, nodes, generator=random).topk(slots).indices.sort(-1).values.int()
    return {
        "source": torch.randn(half, generator=random).to(dtype),
        "target": torch.randn(half, generator=random).to(dtype),
        "index": index,
        "vector": (torch.randn(width, generator=random) * width**-0.5).to(dtype),
        "bias": torch.randn(1, generator=random).to(dtype),
        "mask": torch.rand(batch, nodes, slots, generator=random) > 0.2,
    }


@pytest.mark.parametrize("apart", [False, True])
def test_nodes_without_edges_have_the_scale_of_no_degree(apart):
    inputs = {name: value.to(DEVICE) for name, value in make(5, 2, 3).items()}
    edges = (inputs["source"], inputs["target"], None, None), inputs["index"][..., :0]
    *empty, scale = kernels.edge_coefficient(*edges, inputs["vector"], inputs["bias"], None, "sym_row", 0.25, apart)
    assert all(value.numel() == 0 for value in empty)
    assert torch.equal(scale.cpu(), torch.full((1, 2, 5), 2.0))


class _WithTile(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, target, index, vector, bias, mask, norm, tile):
        given = ((source, target, None, None), index, vector, bias, mask, norm, 1e-6)
        coefficient, *saved = kernels.edge_coefficient(*given, tile=tile)
        ctx.save_for_backward(*saved, source, target, index, vector, bias)
        ctx.given = norm, tile
        return coefficient

    @staticmethod
    def backward(ctx, grad):
        norm, tile = ctx.given
        weight, scale, source, target, *edges = ctx.saved_tensors
        given = (grad, weight, scale, (source, target, None, None), *edges, norm, 1e-6, False, [True] * 5)
        to_source, to_target, *others = kernels.edge_coefficient_backward(*given, tile=tile)
        return to_source, to_target, None, *others[:2], None, None, None


def with_tile(tile: Tile, *, norm: str = "sym_row", **given: Any) -> Tensor:
    names = ("source", "target", "index", "vector", "bias", "mask")
    return on_device(_WithTile.apply)(*(given[name] for name in names), norm, tile)


# tiles that cut the slots, the hidden units, both or nothing
TILES = [Tile(16, 64, 4), Tile(2, 64, 1), Tile(2, 16, 1), Tile(64, 1024, 8)]


# one parameter of both, so that the interpreter runs every pair
@pytest.mark.parametrize("how", [*itertools.product(TILES, NORMS[:1]), *itertools.product(TILES[1:2], NORMS)], ids=str)
def test_every_tile_is_right(how):
    tile, norm = how
    inputs = {**make(9, 5, 37), "norm": norm}
    if tile == TILES[1]:
        # without a mask a slot that is none would have a weight, and 5 slots are no multiple of this tile's
        inputs["mask"] = None
    check_sizes(SUBJECT, inputs, functools.partial(with_tile, tile))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(5, 3, 70), (1, 1, 16), (35, 34, 2)], ids=str)
def test_sizes_that_fill_no_tile(size, norm, dtype):
    call = functools.partial(SUBJECT.function, backend="triton")
    check_sizes(SUBJECT, {**make(*size, dtype), "norm": norm}, call)


@pytest.mark.parametrize("norm", NORMS)
def test_repeated_neighbours_count_twice(norm):
    inputs = {**make(12, 5, 9), "index": crowded_index(2, 12, 5)}
    given = {name: value.requires_grad_() if value.is_floating_point() else value for name, value in inputs.items()}
    right = reference.edge_coefficient(**given, norm=norm, eps=1e-6)[0]
    grad = output_gradient(right)
    got = run(SUBJECT, {**inputs, "norm": norm}, functools.partial(with_tile, TILES[2]), grad)
    torch.testing.assert_close(got["output"], right, rtol=1e-5, atol=1e-6)
    leaves = [given[name] for name in SUBJECT.differentiable]
    for name, value in zip(SUBJECT.differentiable, torch.autograd.grad(right, leaves, grad), strict=True):
        torch.testing.assert_close(got[f"grad_{name}"], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan, -torch.inf])
@pytest.mark.parametrize("where", ["source", "target"])
def test_a_node_that_is_not_finite_stays_where_the_reference_has_it(where, value, norm):
    inputs = make(9, 4, 5, batch=1)
    inputs[where][0, 3, 2] = value
    # infinities of one sign, so that they do not end as NaN in any case
    inputs["vector"] = inputs["vector"].abs()
    output = reference.edge_coefficient(**inputs, norm=norm, eps=1e-6)
    got = run(SUBJECT, {**inputs, "norm": norm}, functools.partial(with_tile, TILES[1]))
    torch.testing.assert_close(got["output"], output[0], rtol=1e-4, atol=1e-6, equal_nan=True)
    saved = [inputs[name] for name in ("source", "target", "index", "vector", "bias")]
    grads = reference.edge_coefficient_backward(got["given"], *output[1:], *saved, norm, 1e-6, [True] * 4)
    for name, right in zip(SUBJECT.differentiable, grads, strict=True):
        torch.testing.assert_close(got[f"grad_{name}"], right, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_launches(monkeypatch):
    """The launches of one forward and one backward: a degree elsewhere is the only barrier."""
    seen = launches_of(monkeypatch, kernels, degree_kernels, weight_kernels)
    inputs = {name: value.to(DEVICE) for name, value in make(6, 3, 4).items()}
    halves = (inputs.pop("source"), inputs.pop("target"), None, None)
    forward = {"sym_row": 2, "row": 2, "sym_count": 1, "sym_inout": 3, "sym_undirected": 3}
    backward = {"sym_row": 3, "row": 3, "sym_count": 2, "sym_inout": 4, "sym_undirected": 4}
    for norm in NORMS:
        coefficient, *saved = kernels.edge_coefficient(halves, **inputs, norm=norm, eps=1e-6)
        assert len(seen) == forward[norm], seen
        seen.clear()
        given = (*saved, halves, *(inputs[name] for name in ("index", "vector", "bias")))
        kernels.edge_coefficient_backward(coefficient, *given, norm, 1e-6, False, [True] * 5)
        assert len(seen) == backward[norm], seen
        seen.clear()


@pytest.mark.promise("C15")
def test_nothing_outside_the_operands_is_touched():
    inputs = make(7, 5, 9)
    for norm in NORMS[:2]:
        call = functools.partial(with_tile, TILES[2], norm=norm)
        expected = run(SUBJECT, inputs, call)
        for padding in (torch.nan, 1e30):
            laid = {n: within_padding(inputs[n], padding) for n in SUBJECT.differentiable}
            got = run(SUBJECT, {**inputs, **{n: inner for n, (_, inner) in laid.items()}}, call)
            assert all(torch.equal(got[name].cpu(), value.cpu()) for name, value in expected.items())
            for name, (wide, inner) in laid.items():
                assert torch.equal(inner.cpu(), inputs[name]), name
                edge = torch.cat([wide[:32], wide[32 + inner.numel() :]])
                assert (edge.isnan() if padding != padding else edge == padding).all()
