# SPDX-License-Identifier: Apache-2.0
"""The contract of ``edge_weight`` on the Triton backend; ``test_interpreter.py`` runs it, and ``--gpu`` on a device."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from contract import output_gradient, run
from drseg_kernels import edge_weight as kernels
from drseg_kernels._launch import Tile
from edges import DEVICE, KernelContract, check_sizes, crowded_index, on_device, on_kernels, within_padding
from subjects import EDGE_WEIGHT
from test_edge_weight import TestEdgeWeight as _Tests
from torch import Tensor

from drseg_core.ops.edge_weight import reference

SUBJECT = on_kernels(EDGE_WEIGHT)


class TestEdgeWeightKernels(KernelContract, _Tests):
    subject = SUBJECT
    test_equals_the_mlp_on_concatenated_features = None


def make(nodes: int, slots: int, width: int, dtype: torch.dtype, batch: int = 2) -> dict[str, Any]:
    random = torch.Generator().manual_seed(nodes * slots + width)
    half = (batch, nodes, width)
    return {
        "source": torch.randn(half, generator=random).to(dtype),
        "target": torch.randn(half, generator=random).to(dtype),
        "index": crowded_index(batch, nodes, slots),
        "vector": (torch.randn(width, generator=random) * width**-0.5).to(dtype),
        "bias": torch.randn(1, generator=random).to(dtype),
        "mask": torch.rand(batch, nodes, slots, generator=random) > 0.2,
    }


def on_triton(**inputs: Tensor) -> Tensor:
    return SUBJECT.function(**inputs, backend="triton")


@dataclasses.dataclass
class WithTile:
    """The op in given sizes, as an autograd function of its own."""

    tile: Tile

    def __call__(self, **inputs: Tensor) -> Tensor:
        tile = self.tile

        class Call(torch.autograd.Function):
            @staticmethod
            def forward(ctx, source, target, index, vector, bias, mask):
                weight = kernels.edge_weight((source, target, None, None), index, vector, bias, mask, tile=tile)
                ctx.save_for_backward(weight, source, target, index, vector, bias)
                return weight

            @staticmethod
            def backward(ctx, grad):
                weight, source, target, *edges = ctx.saved_tensors
                given = (grad, weight, (source, target, None, None), *edges, [True] * 5)
                to_source, to_target, *others = kernels.edge_weight_backward(*given, tile=tile)
                return to_source, to_target, None, *others[:2], None

        order = ("source", "target", "index", "vector", "bias", "mask")
        return on_device(Call.apply)(*(inputs[name] for name in order))


# tiles that cut the slots, the hidden units, both or nothing
TILES = [Tile(16, 16, 4), Tile(2, 64, 1), Tile(1, 16, 1), Tile(64, 1024, 8)]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_is_right(tile):
    check_sizes(SUBJECT, make(7, 5, 37, torch.float32), WithTile(tile))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "nodes,slots,width", [(9, 1, 1), (5, 3, 231), (3, 7, 538), (1, 1, 16), (4, 100, 2), (70, 2, 3)]
)
def test_sizes_that_fill_no_tile(nodes, slots, width, dtype):
    check_sizes(SUBJECT, make(nodes, slots, width, dtype), on_triton)


def test_more_rows_than_a_chunk(monkeypatch):
    monkeypatch.setattr(kernels, "_MOST_CHUNKS", 3)
    monkeypatch.setattr(kernels, "_SMALLEST_CHUNK", 2)
    check_sizes(SUBJECT, make(11, 3, 20, torch.float32), WithTile(Tile(2, 16, 1)))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, -torch.inf])
@pytest.mark.parametrize("where", ["source", "target"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_node_that_is_not_finite_stays_where_the_reference_has_it(masked, where, value):
    inputs = make(9, 4, 5, torch.float32, batch=1)
    inputs[where][0, 3, 2] = value
    # infinities of one sign, so that they do not end as NaN in any case
    inputs["vector"] = inputs["vector"].abs()
    if not masked:
        inputs["mask"] = None
    output = reference.edge_weight(**inputs)
    grad = output_gradient(output).abs()
    got = run(SUBJECT, inputs, on_triton, grad)
    torch.testing.assert_close(got["output"], output, rtol=1e-4, atol=1e-5, equal_nan=True)
    # the backward of the reference as it is written, not the one that autograd finds in its forward
    grads = reference.edge_weight_backward(grad, output, *list(inputs.values())[:5])
    for name, right in zip(SUBJECT.differentiable, grads, strict=True):
        torch.testing.assert_close(got[f"grad_{name}"], right, rtol=1e-4, atol=1e-5, equal_nan=True)


NEEDS = [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False) if a or b or c]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_what_is_not_needed_is_not_computed(needs, monkeypatch):
    inputs = {name: value.to(DEVICE) for name, value in make(6, 3, 5, torch.float32).items()}
    halves, edges = (inputs["source"], inputs["target"], None, None), [inputs[n] for n in ("index", "vector", "bias")]
    weight = kernels.edge_weight(halves, *edges, inputs["mask"])
    grad = output_gradient(weight)
    everything = kernels.edge_weight_backward(grad, weight, halves, *edges, [True] * 5)
    if not needs[1]:
        monkeypatch.setattr(kernels, "columns_of", None)
    if not needs[1] and not needs[2]:
        monkeypatch.setattr(kernels, "_edge_weight_bwd_kernel_target", None)
    got = kernels.edge_weight_backward(grad, weight, halves, *edges, [*needs, needs[2], False])
    for value, right, need in zip(got, everything, (*needs, needs[2], False), strict=True):
        assert torch.equal(value, right) if need else value.numel() == 0


def test_slopes_that_are_known_are_not_computed(monkeypatch):
    inputs = {name: value.to(DEVICE) for name, value in make(6, 3, 5, torch.float32).items()}
    halves, edges = (inputs["source"], inputs["target"], None, None), [inputs[n] for n in ("index", "vector", "bias")]
    weight = kernels.edge_weight(halves, *edges, inputs["mask"])
    grad = output_gradient(weight)
    everything = kernels.edge_weight_backward(grad, weight, halves, *edges, [True] * 5)
    slope = grad * -torch.expm1(-weight)
    got = kernels.edge_weight_backward(grad, weight, halves, *edges, [True] * 5, slope=slope)
    for value, right in zip(got, everything, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(kernels, "_edge_weight_bwd_kernel_source", None)
    mask = [False, True, False, False, False]
    alone = kernels.edge_weight_backward(grad, weight, halves, *edges, mask, slope=slope)[1]
    assert torch.equal(alone, got[1])


@pytest.mark.promise("C15")
def test_nothing_outside_the_operands_is_touched():
    inputs = make(7, 5, 9, torch.float32)
    expected = WithTile(TILES[0])(**inputs)
    for padding in (torch.nan, 1e30):
        laid = {n: within_padding(inputs[n], padding) for n in ("source", "target", "vector", "bias")}
        got = WithTile(TILES[0])(**{**inputs, **{n: inner for n, (_, inner) in laid.items()}})
        assert torch.equal(got, expected)
        for name, (wide, inner) in laid.items():
            assert torch.equal(inner.cpu(), inputs[name]), name
            edge = torch.cat([wide[:32], wide[32 + inner.numel() :]])
            assert (edge.isnan() if padding != padding else edge == padding).all()
