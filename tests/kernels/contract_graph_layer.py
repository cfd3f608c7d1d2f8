# SPDX-License-Identifier: Apache-2.0
"""The contract of ``graph_layer`` on the Triton backend; ``test_interpreter.py`` runs it, and ``--gpu`` on a device."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from contract import output_gradient, run
from drseg_kernels import graph_layer as kernels
from drseg_kernels._launch import Tile
from edges import DEVICE, KernelContract, check_sizes, layer_inputs, on_device, on_kernels, within_padding
from fused import GRAPH_LAYER, GRAPH_LAYER_RELU
from test_graph_layer import TestGraphLayer as _Tests
from test_graph_layer import TestGraphLayerRelu as _ReluTests
from torch import Tensor

from drseg_core.ops.graph_layer import reference

NORM, RELU = on_kernels(GRAPH_LAYER), on_kernels(GRAPH_LAYER_RELU)
SUBJECTS = {"layer_norm": NORM, "relu": RELU}


class TestGraphLayerKernels(KernelContract, _Tests):
    subject = NORM
    test_without_gradients_nothing_is_kept = None
    test_is_the_composition_of_its_parts = None


class TestGraphLayerReluKernels(KernelContract, _ReluTests):
    subject = RELU
    test_gradcheck = None
    test_without_gradients_nothing_is_kept = None


class _WithTile(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, coefficient, bias, norm_weight, norm_bias, activation, undirected, tile, rows):
        given = (x, index, coefficient, bias, norm_weight, norm_bias, activation, 1e-5, undirected, True)
        saved = kernels.graph_layer(*given, tile=tile)
        ctx.save_for_backward(x, index, coefficient, *saved, bias, norm_weight, norm_bias)
        ctx.given = activation, undirected, tile, rows
        return saved[0]

    @staticmethod
    def backward(ctx, grad):
        activation, undirected, tile, rows = ctx.given
        given = (grad, *ctx.saved_tensors, activation, undirected, [True] * 5)
        to_x, to_coefficient, *others = kernels.graph_layer_backward(*given, tile=tile, rows=rows)
        others = [value if value.numel() else None for value in others]
        return to_x, None, to_coefficient, *others, None, None, None, None


def with_tile(tile: Tile, rows: Tile, *, undirected: bool = False, **given: Any) -> Tensor:
    names = ("x", "index", "coefficient", "bias", "norm_weight", "norm_bias", "activation")
    return on_device(_WithTile.apply)(*(given.get(name) for name in names), undirected, tile, rows)


# whole rows, and channels that are cut
TILES = [Tile(4, 64, 1), Tile(8, 32, 1), Tile(1, 16, 4)]
ROWS = [Tile(4, 64, 1), Tile(1, 16, 1), Tile(8, 32, 1)]


# one parameter of all, so that the interpreter runs every combination
@pytest.mark.parametrize("how", itertools.product(zip(TILES, ROWS, strict=True), SUBJECTS, [False, True]), ids=str)
def test_every_tile_is_right(how):
    (tile, rows), activation, undirected = how
    inputs = {**layer_inputs(activation, 19, 4, 37), "undirected": undirected}
    check_sizes(SUBJECTS[activation], inputs, functools.partial(with_tile, tile, rows))


SIZED = [(TILES[0], ROWS[1]), (TILES[1], ROWS[2])]


@pytest.mark.parametrize("how", itertools.product(SIZED, SUBJECTS), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(9, 1, 1), (17, 3, 70), (1, 1, 16), (4, 40, 2)], ids=str)
def test_sizes_that_fill_no_tile(size, dtype, how):
    (tile, rows), activation = how
    check_sizes(SUBJECTS[activation], layer_inputs(activation, *size, dtype), functools.partial(with_tile, tile, rows))


def test_more_rows_than_a_chunk(monkeypatch):
    monkeypatch.setattr(kernels, "_MOST_CHUNKS", 3)
    monkeypatch.setattr(kernels, "_SMALLEST_CHUNK", 2)
    for activation, rows in itertools.product(SUBJECTS, ROWS[:2]):
        check_sizes(
            SUBJECTS[activation], layer_inputs(activation, 11, 3, 20), functools.partial(with_tile, TILES[0], rows)
        )


@pytest.mark.parametrize("tile", TILES[:2], ids=str)
@pytest.mark.parametrize("activation", SUBJECTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_reaches_neighbours_only(value, activation, tile):
    for where in ("x", "coefficient"):
        inputs = layer_inputs(activation, 21, 3, 9)
        inputs[where][0, 5, 1] = value
        expected = reference.graph_layer(
            *(inputs.get(name) for name in ("x", "index", "coefficient", "bias", "norm_weight", "norm_bias")),
            activation=activation,
            eps=1e-5,
            undirected=False,
        )[0]
        got = with_tile(tile, ROWS[0], **inputs)
        assert expected.isfinite().any() and not expected.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("activation", ["none", *SUBJECTS])
def test_what_is_not_needed_is_not_computed(activation, monkeypatch):
    names = ("x", "index", "coefficient", "bias", "norm_weight", "norm_bias")
    given = layer_inputs(activation, 6, 3, 5)
    x, index, coefficient, *parameters = (
        value.to(DEVICE) if isinstance(value := given.get(name), Tensor) else None for name in names
    )
    assert x is not None and index is not None and coefficient is not None
    saved = kernels.graph_layer(x, index, coefficient, *parameters, activation, 1e-5, False, True)
    grad = output_gradient(saved[0])
    arguments = (grad, x, index, coefficient, *saved, *parameters, activation, False)
    everything = kernels.graph_layer_backward(*arguments, [True] * 5)
    for needs in itertools.product([True, False], repeat=3):
        with monkeypatch.context() as patched:
            if not any(needs[:2]):
                patched.setattr(kernels, "_graph_layer_bwd_kernel_edges", None)
            if any(needs[:2]) or not needs[2]:
                patched.setattr(kernels, "_graph_layer_bwd_kernel_sum", None)
            if not needs[2] and activation == "none":
                patched.setattr(kernels, "_graph_layer_bwd_kernel_activation", None)
            got = kernels.graph_layer_backward(*arguments, [*needs[:2], *needs[2:] * 3])
        for value, right, need in zip(got, everything, (*needs, needs[2], needs[2]), strict=True):
            assert torch.equal(value, right) if need else value.numel() == 0


@pytest.mark.promise("C13")
@pytest.mark.parametrize("activation", SUBJECTS)
def test_a_gradient_that_lies_as_a_map_is_read_as_it_lies(activation):
    inputs = layer_inputs(activation, 12, 3, 10)
    names = ("x", "index", "coefficient", "bias", "norm_weight", "norm_bias")
    x, index, coefficient, *parameters = (inputs.get(name) for name in names)
    saved = on_device(kernels.graph_layer)(x, index, coefficient, *parameters, activation, 1e-5, False, True)
    arguments = (x, index, coefficient, *saved, *parameters, activation, False, [True] * 5)
    grad = output_gradient(saved[0])
    expected = on_device(kernels.graph_layer_backward)(grad, *arguments)
    wide = torch.full((2, 10, 20), torch.nan)
    wide[..., 4:16] = grad.mT
    for laid in (grad.mT.contiguous().mT, wide[..., 4:16].mT, grad[:1].mT.contiguous().mT.expand(grad.shape)):
        right = expected if laid.stride(0) else on_device(kernels.graph_layer_backward)(laid.contiguous(), *arguments)
        got = on_device(kernels.graph_layer_backward)(laid, *arguments)
        for value, wanted in zip(got, right, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_keeping_nothing_changes_no_bit():
    given = layer_inputs("layer_norm", 12, 3, 40)
    arguments = [given[name].to(DEVICE) for name in ("x", "index", "coefficient", "bias", "norm_weight", "norm_bias")]
    for tile in TILES:
        kept, free = (
            kernels.graph_layer(*arguments, "layer_norm", 1e-5, False, keep, tile=tile) for keep in (True, False)
        )
        assert torch.equal(kept[0], free[0]) and not any(value.numel() for value in free[1:])


@pytest.mark.promise("C15")
@pytest.mark.parametrize("tile", TILES[:2], ids=str)
def test_nothing_outside_the_operands_is_touched(tile):
    inputs = layer_inputs("layer_norm", 11, 3, 20)
    expected = run(NORM, inputs, functools.partial(with_tile, tile, ROWS[1]))
    for padding in (torch.nan, 1e30):
        laid = {n: within_padding(inputs[n], padding) for n in ("x", "coefficient", "bias", "norm_weight", "norm_bias")}
        given = {**inputs, **{name: inner for name, (_, inner) in laid.items()}}
        got = run(NORM, given, functools.partial(with_tile, tile, ROWS[1]))
        assert all(torch.equal(got[name].cpu(), value.cpu()) for name, value in expected.items())
        for name, (wide, inner) in laid.items():
            assert torch.equal(inner.cpu(), inputs[name]), name
            edge = torch.cat([wide[:32], wide[32 + inner.numel() :]])
            assert (edge.isnan() if padding != padding else edge == padding).all()
