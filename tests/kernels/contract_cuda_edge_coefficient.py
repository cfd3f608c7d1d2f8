# SPDX-License-Identifier: Apache-2.0
"""The contract of ``edge_coefficient`` on the CUDA kernels, emulated or on a device.

In the backward the way through the degrees and the columns of the graph are Triton's.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from contract import output_gradient, run
from contract_edge_coefficient import make
from edges import DEVICE, INTERPRETED, KernelContract, check_sizes, crowded_index, on_device, on_kernels
from fused import EDGE_COEFFICIENT
from test_edge_coefficient import TestEdgeCoefficient as _Tests
from torch import Tensor

from drseg_core import ops
from drseg_core.errors import BackendUnavailableError
from drseg_core.ops import _cuda, _edges
from drseg_core.ops.edge_coefficient import reference, registration

if _cuda.why_not(DEVICE) is not None:
    pytest.skip(_cuda.why_not(DEVICE), allow_module_level=True)

NORMS = tuple(registration._CUDA_NORMS)
# the emulator meets the other norms in the tests below
VARIANTS = tuple({"norm": norm} for norm in (NORMS[:1] if INTERPRETED else NORMS))
SUBJECT = dataclasses.replace(on_kernels(EDGE_COEFFICIENT), variants=VARIANTS)


class TestEdgeCoefficientOnCuda(KernelContract, _Tests):
    subject = SUBJECT
    which = "cuda"
    dtypes = (torch.float32, torch.bfloat16)
    layer = staticmethod(on_device(ops.graph_layer))
    leaves_scales = True
    test_is_the_composition_of_its_parts = None
    # no layer of this backend takes it
    test_what_is_left_to_a_layer_comes_back_from_it = None
    # below, without the backward that is another's
    test_halves_as_they_leave_a_product = None


def call(**inputs: Any) -> Tensor:
    return SUBJECT.function(**inputs, backend="cuda")


def forward(halves: _edges.Halves, inputs: dict[str, Any], norm: str, apart: bool = False) -> tuple[Tensor, ...]:
    """Coefficients or weights, weights or nothing, and scales, of halves as they come."""
    halves = tuple(None if value is None else value.to(DEVICE) for value in halves)
    edges = [inputs[name].to(DEVICE) for name in ("index", "vector", "bias")]
    mask = inputs["mask"] if inputs["mask"] is None else inputs["mask"].to(DEVICE)
    return tuple(value.cpu() for value in registration._run_cuda(halves, *edges, mask, norm, 1e-6, apart))


# the two lanes-of-an-edge groups and the three sizes of a program, rows that fill none, widths of no whole piece
SIZES = [(9, 5, 37), (1, 1, 16), (35, 34, 2), (40, 76, 8), (37, 77, 20), (40, 128, 36), (650, 3, 12), (700, 80, 8)]


# the program of a size is that of every norm; the emulator takes a second for the two largest
SIZES_OF = [(size, norm) for size in SIZES for norm in NORMS if not INTERPRETED or size[0] < 100 or norm == NORMS[0]]


@pytest.mark.promise("C1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size,norm", SIZES_OF, ids=str)
def test_every_size_is_right(size, norm, dtype):
    nodes, slots, width = size
    inputs = {**make(nodes, min(slots, nodes), width, dtype), "norm": norm}
    if slots > nodes or nodes > 100 or (dtype == torch.bfloat16 and INTERPRETED):
        # the oracle and the interpreted kernels of the backward take long for these, or are wrong
        inputs["index"] = torch.randint(nodes, (2, nodes, slots), generator=torch.Generator().manual_seed(0)).int()
        inputs["mask"] = torch.rand(inputs["index"].shape, generator=torch.Generator().manual_seed(1)) > 0.2
        wide = {name: value.double() if value.is_floating_point() else value for name, value in make_plain(inputs)}
        right = reference.edge_coefficient(**wide, norm=norm, eps=1e-6)
        for got, value in zip(call(**inputs)[None], right[:1], strict=True):
            torch.testing.assert_close(got.double(), value, rtol=3e-6, atol=1e-9)
        return
    check_sizes(SUBJECT, inputs, call)


def make_plain(inputs: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in inputs.items() if name != "norm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_halves_as_a_product_leaves_them(shifted, normed, target, apart, dtype):
    inputs = make(20, 6, 40, dtype)
    random = torch.Generator().manual_seed(3)
    inputs["mask"] = torch.randn(2, 20, 6, generator=random)
    inputs["mask"][0, 2, 3:] = -torch.inf
    inputs["mask"][1, 1] = torch.nan
    source, other = inputs.pop("source"), inputs.pop("target")
    halves = (
        source if target else torch.cat([source, other], -1),
        other if target else None,
        torch.rand(2, 20, generator=random) + 0.5 if normed else None,
        # parameters may be wider than the rows
        torch.randn(40, generator=random) if shifted else None,
    )
    plain = [value.double() for value in _edges.plain_halves(halves)]
    edges = (inputs["index"], inputs["vector"].double(), inputs["bias"].double(), _edges.plain_mask(inputs["mask"]))
    weight = reference.edge_coefficient(*plain, *edges, "sym_row", 1e-6)[1]
    degree = weight.sum(-1)
    first, second, scale = forward(halves, inputs, "sym_row", apart)
    right = weight if apart else weight * degree_scale(degree)[..., None] * far(degree_scale(degree), inputs["index"])
    torch.testing.assert_close(first.double(), right, rtol=3e-6, atol=1e-9)
    torch.testing.assert_close(scale[0].double(), degree_scale(degree), rtol=3e-6, atol=0)
    assert second.numel() == 0 if apart else torch.allclose(second.double(), weight, rtol=3e-6)


# the same program takes every form; at the larger sizes the emulator meets that with all parts, and that with none
FORMS = list(itertools.product([True, False], repeat=3))
GRADIENTS_OF = [
    (size, form)
    for size in [(9, 5, 40), (40, 100, 72), (650, 3, 8)]
    for form in FORMS
    if not INTERPRETED or size[0] < 10 or form in (FORMS[0], FORMS[-1])
]


@pytest.mark.promise("C3")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size,form", GRADIENTS_OF, ids=str)
def test_gradients_of_logits(size, form, dtype):
    """Of the operator itself, with all of what a step asks for."""
    shifted, normed, target = form
    nodes, slots, width = size
    random = torch.Generator().manual_seed(6)
    source, other = torch.randn(2, 2, nodes, width, generator=random).to(dtype)
    index = crowded_index(2, nodes, slots)
    slope, vector = torch.randn(2, nodes, slots, generator=random), torch.randn(width, generator=random)
    inverse = torch.rand(2, nodes, generator=random) + 0.5 if normed else None
    shift = torch.randn(width, generator=random) if shifted else None
    rows = source if target else torch.cat([source, other], -1)
    indptr, perm = (value.int() for value in ops.csc(index))
    given = (slope, rows, other if target else None, inverse, shift, index, vector, indptr, perm)
    moved = [None if value is None else value.to(DEVICE) for value in given]
    to_source, to_target, sums = (v.cpu().double() for v in torch.ops.drseg_native_cuda.edge_gradients(*moved, True))
    if not target:
        to_source, to_target = to_source.split(width, -1)

    norm = torch.ones(2, nodes, 1).double() if inverse is None else inverse.double()[..., None]
    near, end = source.double() * norm + (0 if shift is None else shift.double()), other.double() * norm
    hidden = near[:, :, None] + torch.stack([end[b][index[b].long()] for b in range(2)])
    # what may be on in one and off in the other
    loose = (hidden.abs() < 1e-5) * (slope[..., None] * vector).double().abs()
    slopes = slope.double()[..., None]
    exact, size_of = (hidden > 0) * slopes * vector, (hidden > 0) * (slopes * vector).abs()

    def at_ends(value: Tensor) -> Tensor:
        flat = index.long().flatten(1)[..., None].expand(-1, -1, width)
        return torch.zeros(2, nodes, width).double().scatter_add_(1, flat, value.flatten(1, 2))

    def check(got: Tensor, right: Tensor, size: Tensor, loose: Tensor, unit: float = 3e-6) -> None:
        assert ((got - right).abs() <= unit * size + loose + 1e-7).all()

    unit = 3e-6 if dtype == torch.float32 else 2**-8
    check(to_source, exact.sum(2) * norm, size_of.sum(2) * norm, loose.sum(2) * norm, unit)
    check(to_target, at_ends(exact) * norm, at_ends(size_of) * norm, at_ends(loose) * norm, unit)
    unit_of = hidden.relu() * slopes
    check(sums[:width], unit_of.sum((0, 1, 2)), unit_of.abs().sum((0, 1, 2)), loose.sum((0, 1, 2)))
    check(sums[width : 2 * width], exact.sum((0, 1, 2)), size_of.sum((0, 1, 2)), loose.sum((0, 1, 2)))
    check(sums[-1], slope.double().sum(), slope.double().abs().sum(), torch.zeros(()))


def degree_scale(degree: Tensor) -> Tensor:
    return (degree + 1e-6).rsqrt()


def far(scale: Tensor, index: Tensor) -> Tensor:
    return scale.gather(1, index.flatten(1).long()).view(index.shape)


@pytest.mark.parametrize("norm", NORMS)
def test_repeated_neighbours_count_twice(norm):
    inputs = {**make(12, 5, 9), "index": crowded_index(2, 12, 5)}
    given = {name: value.requires_grad_() if value.is_floating_point() else value for name, value in inputs.items()}
    right = reference.edge_coefficient(**given, norm=norm, eps=1e-6)[0]
    got = run(SUBJECT, {**inputs, "norm": norm}, call, output_gradient(right))
    torch.testing.assert_close(got["output"], right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan, -torch.inf])
@pytest.mark.parametrize("where", ["source", "target", "vector"])
def test_what_is_not_finite_stays_where_the_reference_has_it(where, value, norm):
    inputs = make(9, 4, 5, batch=1)
    inputs[where][(0, 3, 2) if where != "vector" else 2] = value
    if where != "vector":
        # infinities of one sign, so that they do not end as NaN in any case
        inputs["vector"] = inputs["vector"].abs()
    right = reference.edge_coefficient(**inputs, norm=norm, eps=1e-6)[0]
    torch.testing.assert_close(call(**inputs, norm=norm), right, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_an_index_outside_the_image_is_its_border():
    inputs = make(9, 4, 8)
    inputs["index"][0, 2, 1], inputs["index"][1, 3, 0] = -5, 900
    clamped = {**inputs, "index": inputs["index"].clamp(0, 8)}
    for index in (inputs["index"], inputs["index"].long()):
        halves = (inputs["source"], inputs["target"], None, None)
        for got, right in zip(
            forward(halves, {**inputs, "index": index}, "sym_row"), forward(halves, clamped, "sym_row"), strict=True
        ):
            assert torch.equal(got, right)


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"norm": "sym_inout"}, "its kernel has no norm sym_inout"),
        ({"slots": 129}, "its kernel takes at most 1024 nodes and 128 slots, got 10 and 129"),
        ({"nodes": 1025}, "its kernel takes at most 1024 nodes and 128 slots, got 1025 and 4"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_by_name(changes, reason):
    nodes, slots = changes.get("nodes", 10), changes.get("slots", 4)
    inputs = make(nodes, 4, 3, batch=1)
    inputs["index"] = torch.zeros(1, nodes, slots, dtype=torch.int32)
    with pytest.raises(BackendUnavailableError, match=f"backend cuda cannot run on .*: {reason}; expected one of"):
        call(**{**inputs, "mask": None}, norm=changes.get("norm", "sym_row"))


@pytest.mark.promise("C24")
@pytest.mark.parametrize("seed", [2, 3, 4, 5, 6])
def test_in_any_order_of_threads(seed, monkeypatch):
    inputs = make(40, 7, 72)
    halves = (inputs["source"], inputs["target"], None, None)
    first = forward(halves, inputs, "sym_row")
    monkeypatch.setenv("DRSEG_EMULATOR_SEED", str(seed))
    for one, other in zip(first, forward(halves, inputs, "sym_row"), strict=True):
        assert torch.equal(one, other)
