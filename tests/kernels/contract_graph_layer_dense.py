# SPDX-License-Identifier: Apache-2.0
"""The contract of ``graph_layer`` by a dense matrix; ``test_interpreter.py`` runs it, and ``--gpu`` on a device.

Every graph is small enough here. Interpreted, in float16 alone: bfloat16 is multiplied wrongly there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from contract import (
    LAYOUTS,
    check_batch,
    check_lattice,
    check_layout,
    check_linear_backward,
    check_not_written,
    check_oracle,
    check_poisoned,
    check_repeats,
    run,
)
from drseg_kernels import csc, graph_layer_dense
from drseg_kernels import graph_layer as kernels
from drseg_kernels._launch import Device, last_sizes
from edges import DEVICE, INTERPRETED, check_sizes, launches_of, layer_inputs, on_device, within_padding
from fused import GRAPH_LAYER, GRAPH_LAYER_RELU
from subjects import Subject
from torch import Tensor

from drseg_core import ops
from drseg_core.nn import PDGR
from drseg_core.ops.graph_layer.reference import at_both_ends
from drseg_core.testing import CASES

SUBJECTS = {"layer_norm": GRAPH_LAYER, "relu": GRAPH_LAYER_RELU}
SMALL = [case for case in CASES if not case.large]
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
UNIT = 2.0**-24
PAYS = graph_layer_dense.pays


@pytest.fixture(autouse=True)
def dense(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whatever can go by a dense matrix does; the launches of a test in their order."""
    if not INTERPRETED and not request.config.getoption("--gpu"):
        pytest.fail("set TRITON_INTERPRET=1, or pass --gpu")

    def can(device: Device, x: Tensor, slots: int, undirected: bool) -> bool:
        return x.dtype in graph_layer_dense.DTYPES and slots > 0 and not undirected

    monkeypatch.setattr(graph_layer_dense, "pays", can)
    return launches_of(monkeypatch, kernels, graph_layer_dense, csc)


call = on_device(functools.partial(ops.graph_layer, backend="triton"))


def by_kernels(activation: str) -> Subject:
    return dataclasses.replace(SUBJECTS[activation], function=call)


make = functools.partial(layer_inputs, dtype=torch.float16)


def matrix_of(index: Tensor, coefficient: Tensor) -> Tensor:
    nodes = index.shape[1]
    empty = torch.zeros(*index.shape[:2], nodes, dtype=torch.float64)
    return empty.scatter_add(2, index.long(), coefficient.double())


def sums(inputs: dict[str, Any], dense: bool = True, scale: Tensor | None = None) -> Tensor:
    """What LayerNorm is given, in float32."""
    given = make("layer_norm", *inputs["index"].shape[1:], inputs["x"].shape[2])
    names = ("x", "index", "coefficient", "bias")
    arguments = [*(inputs.get(name) for name in names), given["norm_weight"], given["norm_bias"]]
    found = on_device(kernels.graph_layer)(*arguments, "layer_norm", 1e-5, False, True, None, scale, dense=dense)
    return found[1]


@pytest.mark.promise("C1", "C3")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", SUBJECTS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_agrees_with_the_oracle(case, activation, dtype, dense):
    # two parts of bfloat16 are for graphs of more edges
    slots = case.nodes if dtype == torch.bfloat16 else case.neighbours
    inputs = SUBJECTS[activation].make_inputs(dataclasses.replace(case, neighbours=slots), dtype)
    check_oracle(by_kernels(activation), inputs, call)
    assert dense[:2] == ["_graph_layer_dense_kernel_fill", "_graph_layer_dense_kernel_product"]


@pytest.mark.promise("C1")
@pytest.mark.parametrize(
    "size",
    [(9, 1, 1), (70, 3, 5), (5, 5, 140), (1, 1, 16), (4, 40, 2), (65, 20, 3)],
    ids=lambda size: "x".join(map(str, size)),
)
@pytest.mark.parametrize("activation", SUBJECTS)
def test_sizes_that_fill_no_tile(size, activation):
    """One neighbour, all, more than there are nodes; repeated ones; several tiles of rows, of channels and of terms."""
    check_sizes(by_kernels(activation), make(activation, *size, batch=1), call)


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter, and bfloat16")
@pytest.mark.promise("C1", "C3")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", SUBJECTS)
def test_agrees_with_the_oracle_at_the_paper_size(activation, dtype):
    case = next(case for case in CASES if case.name == "paper_vitl_24x24")
    check_oracle(by_kernels(activation), SUBJECTS[activation].make_inputs(case, dtype), call)


@pytest.mark.promise("C2")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(dtype):
    inputs = make("relu", 21, 6, 9, dtype=dtype)
    random = torch.Generator().manual_seed(0)
    inputs["x"] = torch.randint(0, 3, inputs["x"].shape, generator=random).to(dtype)
    inputs["coefficient"] = torch.randint(0, 3, inputs["coefficient"].shape, generator=random).float()
    inputs["bias"] = torch.randint(1, 3, inputs["bias"].shape, generator=random).float()
    check_lattice(by_kernels("relu"), inputs, call)


@pytest.mark.promise("C1", "C4")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-6, 1e30], ids=str)
def test_coefficients_keep_their_digits(size, dtype):
    """Of rows of any size, in which one coefficient may be a thousand times the others."""
    slots = 64
    inputs = make("layer_norm", 66, slots, 7, dtype=dtype, batch=1)
    inputs["coefficient"] *= size * torch.logspace(-3, 3, 66)[:, None]
    inputs["coefficient"][:, ::2, 5] *= 1e3
    inputs["bias"] = None
    matrix, x = matrix_of(inputs["index"], inputs["coefficient"]), inputs["x"].double()
    absolute = matrix_of(inputs["index"], inputs["coefficient"].abs()) @ x.abs()
    error = (sums(inputs).double() - matrix @ x).abs()
    # what two parts of bfloat16 leave out, if one edge is nearly all of a sum
    left_out = 2.0**-17 if dtype == torch.bfloat16 else 0.0
    assert (error <= ((slots + 16) * UNIT + left_out) * absolute).all()


@pytest.mark.promise("C1")
def test_zeros():
    """A coefficient, a row of them and features that are zero; a row of zeros is the bias."""
    inputs = make("relu", 12, 4, 5)
    inputs["coefficient"][:, 3], inputs["coefficient"][:, 5, 1], inputs["x"][:, 2] = 0, 0, 0
    expected = inputs["bias"].relu().half().expand(2, 5)
    assert torch.equal(call(**inputs)[:, 3], expected)
    assert torch.equal(call(**{**inputs, "x": torch.zeros_like(inputs["x"])})[:, 4], expected)
    check_oracle(by_kernels("relu"), inputs, call)


@pytest.mark.promise("C11")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["x", "coefficient"])
def test_a_number_that_is_not_finite_reaches_neighbours_only(where, dtype, value):
    inputs = make("layer_norm", 21, 3, 9, dtype=dtype)
    usual = sums(inputs)
    # beside a zero coefficient, too: zero times NaN is NaN where there is an edge
    inputs["coefficient"][1, 7, 0], inputs["index"][1, 7, 0] = 0, 4
    inputs[where][0, 5, 1] = value
    inputs["x"][1, 4, 2] = value
    got, expected = sums(inputs), sums(inputs, dense=False)
    reached = ~expected.isfinite()
    assert reached.any() and not reached.all() and reached[1, 7, 2]
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isposinf(), expected.isposinf())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    # channels that no such number reaches have the bits of before
    untouched = [c for c in range(9) if where == "x" and c not in (1, 2)]
    assert torch.equal(got[0][:, untouched], usual[0][:, untouched])


@pytest.mark.promise("C11")
def test_relu_lets_nan_through():
    inputs = make("relu", 9, 3, 5)
    inputs["x"][1, 4, 2] = torch.nan
    got = call(**inputs)
    assert got[1, :, 2].isnan().any() and int(got.isnan().sum()) == int(got[1, :, 2].isnan().sum())


@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel cannot be looked into")
@pytest.mark.promise("C15")
def test_finite_results_are_not_computed_again(monkeypatch):
    """It would hide what went wrong before: memory that nobody set, or zeros in the wrong place."""
    again = []

    def gathered_sum(*arguments: Any) -> Any:
        again.append(int(arguments[6].handle.data.item()))
        return sum_of(*arguments)

    sum_of = graph_layer_dense.gathered_sum
    monkeypatch.setattr(graph_layer_dense, "gathered_sum", gathered_sum)
    inputs = make("relu", 70, 3, 5)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        usual = call(**inputs)
        assert not again
        inputs["coefficient"][1, 68, 1] = torch.nan
        got = call(**inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    # the rows of that tile, which is cut off at the last node, and of them one counts
    assert again == list(range(70 + 64, 140)) and got[1, 68].isnan().all()
    got[1, 68] = usual[1, 68]
    assert torch.equal(got, usual)


@pytest.mark.promise("C1")
def test_scales_are_those_of_both_ends():
    inputs = make("layer_norm", 13, 4, 6)
    scale = 0.5 + torch.rand(2, 13, generator=torch.Generator().manual_seed(1))
    folded = {**inputs, "coefficient": at_both_ends(inputs["coefficient"], inputs["index"], scale)}
    torch.testing.assert_close(sums(inputs, scale=scale), sums(folded), rtol=1e-5, atol=1e-5)
    # and where a row is gathered
    inputs["x"][0, 2, 3] = folded["x"][0, 2, 3] = torch.inf
    got, expected = sums(inputs, scale=scale), sums(folded)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.promise("C7", "C24")
def test_bits_depend_on_nothing_else():
    inputs = make("layer_norm", 13, 4, 6)
    inputs["index"][:, ::3] = torch.tensor([0, 2, 5, 8], dtype=torch.int32)
    check_batch(by_kernels("layer_norm"), inputs, call)
    check_repeats(by_kernels("layer_norm"), inputs, call, times=2 if INTERPRETED else 250)
    # nor on whether LayerNorm's backward is to come
    names = ("x", "index", "coefficient", "bias", "norm_weight", "norm_bias")
    given = [inputs[name].to(DEVICE) for name in names]
    kept, free = (kernels.graph_layer(*given, "layer_norm", 1e-5, False, keep) for keep in (True, False))
    assert torch.equal(kept[0], free[0]) and not any(value.numel() for value in free[1:])
    wild = torch.where(inputs["index"] == 0, -5, inputs["index"])
    assert torch.equal(call(**{**inputs, "index": wild.long()}), call(**inputs))


@pytest.mark.promise("C13", "C15")
def test_layouts_and_what_is_written():
    inputs, subject = make("layer_norm", 8, 3, 6), by_kernels("layer_norm")
    for layout in LAYOUTS:
        check_layout(subject, inputs, call, layout, "contiguous")
    check_not_written(subject, inputs, call)
    check_poisoned(subject, inputs, call)
    check_linear_backward(subject, inputs, call)


@pytest.mark.promise("C15")
def test_nothing_outside_the_operands_is_touched():
    inputs = make("layer_norm", 11, 3, 20)
    expected = run(by_kernels("layer_norm"), inputs, call)
    for padding in (torch.nan, 6e4):
        laid = {name: within_padding(inputs[name], padding) for name in ("x", "coefficient", "bias")}
        got = run(by_kernels("layer_norm"), {**inputs, **{name: inner for name, (_, inner) in laid.items()}}, call)
        assert all(torch.equal(got[name].cpu(), value) for name, value in expected.items())


@pytest.mark.promise("C14")
@pytest.mark.parametrize("axis", range(4), ids="BNKC")
def test_empty(axis):
    size = [2, 6, 3, 5]
    size[axis] = 0
    batch, nodes, slots, channels = size
    inputs = make("relu", 6, 3, 5)
    inputs["x"] = torch.ones(batch, nodes, channels, dtype=torch.float16)
    inputs["index"] = torch.zeros(batch, nodes, slots, dtype=torch.int32)
    inputs["coefficient"], inputs["bias"] = torch.ones(batch, nodes, slots), torch.ones(channels)
    assert torch.equal(call(**inputs), torch.ones_like(inputs["x"]) * (1 + slots))


def test_launches(dense):
    """Two, a third for LayerNorm, and no list of columns before there is a gradient."""
    for activation, more in (("relu", []), ("layer_norm", ["_graph_layer_fwd_kernel_norm"])):
        dense.clear()
        call(**make(activation, 8, 3, 6))
        assert dense == ["_graph_layer_dense_kernel_fill", "_graph_layer_dense_kernel_product", *more]
    # what a benchmark's row says of it
    assert "graph_layer_dense" in last_sizes
    dense.clear()
    call(**make("relu", 8, 3, 6, dtype=torch.float32))
    call(**make("relu", 8, 3, 6), undirected=True)
    assert [name for name in dense if name.startswith("_graph_layer")] == ["_graph_layer_fwd_kernel"] * 2


@pytest.mark.promise("C17")
def test_pdgr_under_autocast(dense):
    torch.manual_seed(0)
    module = PDGR(6, 5, k=5, edge_hidden=4).to(DEVICE)
    features, prior = torch.randn(2, 6, 3, 4, device=DEVICE), torch.randn(2, 5, 3, 4, device=DEVICE)
    with ops.use_backend("reference"), torch.no_grad():
        exact = module(features, prior)
    with torch.autocast(DEVICE, dtype=torch.float16), ops.use_backend("triton"), torch.no_grad():
        got = module(features, prior)
    assert dense.count("_graph_layer_dense_kernel_product") == 2
    assert (got - exact).abs().max() <= 2e-2 * exact.abs().max()


H100 = Device("NVIDIA H100 80GB HBM3", 50 << 20, 232_448, "sm_90")


@pytest.mark.promise("C26")
def test_the_rule():
    """By architecture, dtype and size; the least that it takes, and one less."""

    def pays(
        batch: int = 8, nodes: int = 576, slots: int = 75, channels: int = 384, dtype: torch.dtype = torch.bfloat16
    ) -> bool:
        x = torch.empty(batch, nodes, channels, dtype=dtype, device="meta")
        return PAYS(H100, x, slots, False)

    assert pays() and pays(dtype=torch.float16) and not pays(dtype=torch.float32)
    x = torch.empty(8, 576, 384, dtype=torch.bfloat16, device="meta")
    assert not PAYS(H100, x, 75, True)
    for arch in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "interpreter"):
        assert not PAYS(dataclasses.replace(H100, arch=arch), x, 75, False)
    assert pays(slots=72) and not pays(slots=71) and pays(nodes=400, slots=64, batch=16)
    assert not pays(nodes=400, slots=63, batch=16) and pays(nodes=1024, slots=128) and not pays(nodes=1025, slots=129)
    assert pays(slots=600) and not pays(slots=1025)
    assert pays(channels=128, batch=16) and not pays(channels=127, batch=32)
    assert pays(batch=5) and not pays(batch=4)


@pytest.mark.skipif(INTERPRETED, reason="there are no graphs of launches without a GPU")
@pytest.mark.promise("C20")
def test_a_graph_records_it():
    inputs = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in make(
        "layer_norm", 70, 20, 30
    ).items()}  # fmt: skip
    with torch.no_grad():
        expected = ops.graph_layer(**inputs, backend="triton")
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            got = ops.graph_layer(**inputs, backend="triton")
        # what is not finite comes after the recording
        recorded.replay()
        assert torch.equal(got, expected)
        inputs["x"][0, 3, 4] = torch.nan
        expected = ops.graph_layer(**inputs, backend="triton")
        recorded.replay()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_shared_memory_fits():
    for bytes_, slots in itertools.product((101_376, 166_912, 232_448), (1, 75, 128, 129, 1024)):
        sizes = graph_layer_dense.product_sizes(dataclasses.replace(H100, shared_bytes=bytes_))
        assert graph_layer_dense.shared_bytes(sizes) <= bytes_
        fill = graph_layer_dense.fill_sizes(slots)
        assert fill["BLOCK_K"] >= slots and fill["BLOCK_M"] >= 1
