# SPDX-License-Identifier: Apache-2.0
"""The contract of ``graph_propagate`` on the Triton backend; ``test_interpreter.py`` runs it, ``--gpu`` on a device."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from contract import run
from drseg_kernels import graph_propagate as kernels
from drseg_kernels._launch import Tile
from edges import DEVICE, KernelContract, check_sizes, crowded_index, on_device, on_kernels, within_padding
from subjects import GRAPH_PROPAGATE
from test_graph_propagate import TestGraphPropagate as _Tests
from torch import Tensor

from drseg_core.ops.graph_propagate import reference

SUBJECT = on_kernels(GRAPH_PROPAGATE)


class TestGraphPropagateKernels(KernelContract, _Tests):
    subject = SUBJECT


def make(
    nodes: int, slots: int, channels: int, dtype: torch.dtype = torch.float32, batch: int = 2
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(nodes * slots + channels)
    return {
        "x": torch.randn(batch, nodes, channels, generator=random).to(dtype),
        "index": crowded_index(batch, nodes, slots),
        # of both signs: sums that cancel show what is lost on the way
        "coefficient": torch.randn(batch, nodes, slots, generator=random),
    }


class _WithTile(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, coefficient, transpose, tile):
        ctx.save_for_backward(x, index, coefficient)
        ctx.given = transpose, tile
        return kernels.graph_propagate(x, index, coefficient, transpose, tile=tile)

    @staticmethod
    def backward(ctx, grad):
        transpose, tile = ctx.given
        given = (grad, *ctx.saved_tensors, transpose, [ctx.needs_input_grad[n] for n in (0, 2)])
        grad_x, grad_coefficient = kernels.graph_propagate_backward(*given, tile=tile)
        return grad_x, None, grad_coefficient, None, None


def with_tile(tile: Tile, x: Tensor, index: Tensor, coefficient: Tensor, transpose: bool = False) -> Tensor:
    return on_device(_WithTile.apply)(x, index, coefficient, transpose, tile)


# tiles that cut the edges, the channels, both or nothing
TILES = [Tile(4, 128, 1), Tile(2, 16, 1), Tile(8, 32, 1), Tile(64, 64, 4)]


# one parameter of both, so that the interpreter runs every pair
@pytest.mark.parametrize("how", itertools.product(TILES, [False, True]), ids=str)
def test_every_tile_is_right(how):
    tile, transpose = how
    check_sizes(SUBJECT, {**make(35, 5, 37), "transpose": transpose}, functools.partial(with_tile, tile))


@pytest.mark.parametrize("how", itertools.product(TILES[:2], [False, True]), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(17, 7, 231), (9, 1, 1), (16, 3, 538), (1, 1, 16), (4, 100, 2)], ids=str)
def test_sizes_that_fill_no_tile(size, dtype, how):
    tile, transpose = how
    inputs = {**make(*size, dtype), "transpose": transpose}
    check_sizes(SUBJECT, inputs, functools.partial(with_tile, tile))


@pytest.mark.promise("C11")
@pytest.mark.parametrize("how", itertools.product(TILES[:1], [False, True]), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_reaches_neighbours_only(value, dtype, how):
    tile, transpose = how
    for where in ("x", "coefficient"):
        # several patches
        inputs = make(25, 3, 9, dtype)
        inputs[where][0, 5, 1] = value
        inputs[where][1, 20, 0] = -value
        expected = reference.graph_propagate(**inputs, transpose=transpose)
        got = with_tile(tile, **inputs, transpose=transpose)
        assert expected.isfinite().any() and not expected.isfinite().all()
        slack = 2**-7 if dtype == torch.bfloat16 else 1e-5 if dtype == torch.float32 else 2**-9
        torch.testing.assert_close(got.float(), expected.float(), rtol=slack, atol=slack, equal_nan=True)


@pytest.mark.parametrize("transpose", [False, True])
def test_what_is_not_needed_is_not_computed(transpose, monkeypatch):
    tile = TILES[1]
    inputs = {**make(6, 3, 5), "transpose": transpose}
    everything = run(SUBJECT, inputs, functools.partial(with_tile, tile))
    given = [everything["given"], inputs["x"], inputs["index"], inputs["coefficient"]]
    given = [value.to(DEVICE) for value in given]
    grad_x, none = kernels.graph_propagate_backward(*given, transpose, [True, False], tile=tile)
    assert torch.equal(grad_x.cpu(), everything["grad_x"]) and none.numel() == 0
    # of the columns there is no need either
    monkeypatch.setattr(kernels, "columns_of", None)
    none, grad_coefficient = kernels.graph_propagate_backward(*given, transpose, [False, True], tile=tile)
    assert torch.equal(grad_coefficient.cpu(), everything["grad_coefficient"]) and none.numel() == 0


@pytest.mark.promise("C15")
@pytest.mark.parametrize("transpose", [False, True])
def test_nothing_outside_the_operands_is_touched(transpose):
    tile = TILES[1]
    inputs = make(19, 3, 9)
    expected = with_tile(tile, **inputs, transpose=transpose)
    for padding in (torch.nan, 1e30):
        laid = {name: within_padding(inputs[name], padding) for name in ("x", "coefficient")}
        given = {**inputs, **{name: inner for name, (_, inner) in laid.items()}}
        assert torch.equal(with_tile(tile, **given, transpose=transpose), expected)
        for name, (wide, inner) in laid.items():
            assert torch.equal(inner.cpu(), inputs[name]), name
            edge = torch.cat([wide[:32], wide[32 + inner.numel() :]])
            assert (edge.isnan() if padding != padding else edge == padding).all()


@pytest.mark.promise("C23")
def test_offsets_beyond_32_bits():
    if DEVICE == "cpu":
        pytest.skip("18 GB of features need a device")
    nodes, channels = 4_200_000, 512
    x = torch.ones(1, nodes, channels, dtype=torch.float16, device=DEVICE)
    x[0, -1] = 3
    index = torch.full((1, nodes, 1), nodes - 1, dtype=torch.int32, device=DEVICE)
    y = kernels.graph_propagate(x, index, torch.ones(1, nodes, 1, device=DEVICE))
    assert x.numel() > 2**31 and bool((y[0, :: nodes // 7] == 3).all())
