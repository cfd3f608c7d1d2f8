# SPDX-License-Identifier: Apache-2.0
"""The contract of ``graph_layer`` on the CUDA kernels, emulated or on a device; activations and their gradients and the
columns of the graph are Triton's."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from contract import run
from edges import DEVICE, INTERPRETED, KernelContract, check_sizes, layer_inputs, on_device, on_kernels
from fused import GRAPH_LAYER, GRAPH_LAYER_RELU
from subjects import Subject
from test_graph_layer import TestGraphLayer as _Tests
from test_graph_layer import TestGraphLayerRelu as _ReluTests
from torch import Tensor

from drseg_core import ops
from drseg_core.errors import BackendUnavailableError
from drseg_core.ops import _cuda
from drseg_core.ops.graph_layer import reference, registration
from drseg_core.testing import Case

if _cuda.why_not(DEVICE) is not None:
    pytest.skip(_cuda.why_not(DEVICE), allow_module_level=True)

NAMES = ("x", "index", "coefficient", "bias", "norm_weight", "norm_bias")


def on_cuda(subject: Subject) -> Subject:
    """With rows that are multiples of 16 bytes, and edges of one direction."""

    def make_inputs(case: Case, *others: Any, **options: Any) -> dict[str, Any]:
        return subject.make_inputs(dataclasses.replace(case, channels=-(-case.channels // 8) * 8), *others, **options)

    variants = tuple(variant for variant in subject.variants if not variant.get("undirected"))
    return dataclasses.replace(on_kernels(subject), make_inputs=make_inputs, variants=variants)


NORM, RELU = on_cuda(GRAPH_LAYER), on_cuda(GRAPH_LAYER_RELU)


class OnCuda(KernelContract):
    which = "cuda"
    dtypes = (torch.float32, torch.bfloat16)
    # these ask for float16, or look at what the default keeps
    test_parameters_keep_their_dtype = None
    test_scales_are_those_of_both_ends = None
    test_without_gradients_nothing_is_kept = None
    test_is_the_composition_of_its_parts = None


class TestGraphLayerOnCuda(OnCuda, _Tests):
    subject = NORM


class TestGraphLayerReluOnCuda(OnCuda, _ReluTests):
    subject = RELU


SUBJECTS = {"layer_norm": NORM, "relu": RELU}


def call(**inputs: Any) -> Tensor:
    return NORM.function(**inputs, backend="cuda")


# rows that are cut, in parts of both widths, more edges than a warp has room for, blocks that are not full
SIZES = [(9, 5, 40), (1, 1, 8), (35, 34, 16), (40, 100, 72), (21, 128, 8), (690, 3, 8)]


@pytest.mark.promise("C1")
@pytest.mark.parametrize("activation", SUBJECTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_is_right(size, activation):
    check_sizes(SUBJECTS[activation], layer_inputs(activation, *size), call)


@pytest.mark.promise("C4")
@pytest.mark.parametrize("activation", SUBJECTS)
@pytest.mark.parametrize("size", [(9, 5, 40), (40, 100, 72), (690, 3, 8)], ids=str)
def test_bfloat16_is_rounded_once(size, activation):
    # the backward is in part interpreted, which is wrong for it
    inputs = layer_inputs(activation, *size, torch.bfloat16)
    wide = {name: value.double() if name != "index" else value for name, value in tensors(inputs).items()}
    right = reference.graph_layer(**every(wide), activation=activation, eps=1e-5, undirected=False)[0]
    got = call(**inputs).double()
    torch.testing.assert_close(got, right, rtol=2**-8, atol=1e-5)


# the same program takes every form; at the larger sizes the emulator meets that with all parts, and that with none
GRADIENTS_OF = [
    (size, added, scaled)
    for size in [(9, 5, 40), (40, 100, 72), (690, 3, 8)]
    for added, scaled in itertools.product([True, False], repeat=2)
    if not INTERPRETED or size[0] < 10 or added == scaled
]


@pytest.mark.promise("C3")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size,added,scaled", GRADIENTS_OF, ids=str)
def test_gradients_of_sums(size, added, scaled, dtype):
    """Of the operator itself, so that no other backend's kernel stands between."""
    inputs = layer_inputs("none", *size, dtype)
    random = torch.Generator().manual_seed(2)
    x, index, coefficient = (inputs[name] for name in NAMES[:3])
    scale = torch.rand(x.shape[:2], generator=random) + 0.5 if scaled else None
    more = torch.randn(index.shape, generator=random) if added else None
    grad = torch.randn(x.shape, generator=random).to(dtype)
    indptr, perm = ops.csc(index)
    given = (grad, x, index, coefficient, scale, indptr.int(), perm.int(), more)
    moved = (None if value is None else value.to(DEVICE) for value in given)
    to_x, to_coefficient = (v.cpu() for v in torch.ops.drseg_native_cuda.graph_layer_backward(*moved, True))
    wide = coefficient.double()
    ends = (
        torch.ones_like(wide) if scale is None else reference.at_both_ends(torch.ones_like(wide), index, scale.double())
    )
    matrix = torch.zeros(*index.shape[:2], index.shape[1]).double().scatter_add_(2, index.long(), wide * ends)
    right = matrix.mT @ grad.double()
    # a node may have hundreds of columns: their sum is as exact as its terms are large
    unit = 2e-6 if dtype == torch.float32 else 2**-8
    assert ((to_x - right).abs() <= unit * (matrix.abs().mT @ grad.double().abs())).all()
    products = (grad.double() @ x.double().mT).gather(2, index.long()) * ends
    torch.testing.assert_close(to_coefficient.double(), products + (0 if more is None else more), rtol=2e-6, atol=1e-5)


def tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def every(given: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: given.get(name) for name in NAMES}


@pytest.mark.parametrize("activation", SUBJECTS)
def test_scales_are_those_of_both_ends(activation):
    inputs = layer_inputs(activation, 30, 7, 24)
    scale = 0.5 + torch.rand(2, 30, generator=torch.Generator().manual_seed(1))
    folded = {**inputs, "coefficient": reference.at_both_ends(inputs["coefficient"], inputs["index"], scale)}
    grad = torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(2))
    right = run(SUBJECTS[activation], folded, call, grad)
    got = run(SUBJECTS[activation], inputs, lambda **given: call(**given, scale=scale), grad)
    right["grad_coefficient"] = reference.at_both_ends(right["grad_coefficient"], inputs["index"], scale)
    for name, value in right.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)


@pytest.mark.promise("C11")
@pytest.mark.parametrize("activation", ["none", *SUBJECTS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_reaches_neighbours_only(value, activation):
    for where in ("x", "coefficient"):
        inputs = layer_inputs(activation, 21, 3, 8)
        # node 0, which what is no edge must not take, is everybody's neighbour here
        inputs["index"] = torch.where(inputs["index"] == 0, 20, inputs["index"])
        inputs[where][0, 0, 1] = inputs[where][0, 5, 1] = value
        right = reference.graph_layer(**every(tensors(inputs)), activation=activation, eps=1e-5, undirected=False)[0]
        assert right.isfinite().any() and not right.isfinite().all()
        torch.testing.assert_close(call(**inputs), right, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_an_index_outside_the_image_is_its_border():
    inputs = layer_inputs("relu", 9, 4, 8)
    inputs["index"][0, 2, 1], inputs["index"][1, 3, 0] = -5, 900
    right = call(**{**inputs, "index": inputs["index"].clamp(0, 8)})
    for index in (inputs["index"], inputs["index"].long()):
        assert torch.equal(call(**{**inputs, "index": index}), right)


@pytest.mark.promise("C44")
@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"undirected": True}, "its kernel follows edges in one direction"),
        ({"channels": 6}, "its kernel takes rows that are multiples of 16 bytes, got 24 bytes"),
        ({"slots": 129}, "its kernel takes at most 1024 nodes, 128 slots and 8192 channels, got 10, 129 and 8"),
        ({"nodes": 1025}, "its kernel takes at most 1024 nodes, 128 slots and 8192 channels, got 1025, 3 and 8"),
        ({"channels": 8196}, "its kernel takes at most 1024 nodes, 128 slots and 8192 channels, got 10, 3 and 8196"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_by_name(changes, reason):
    inputs = layer_inputs(
        "relu", *(changes.get(name, size) for name, size in (("nodes", 10), ("slots", 3), ("channels", 8)))
    )
    with pytest.raises(BackendUnavailableError, match=f"backend cuda cannot run on .*: {reason}; expected one of"):
        call(**inputs, undirected=changes.get("undirected", False))


def test_what_is_not_asked_for_is_not_computed():
    inputs = layer_inputs("none", 9, 4, 8)
    given = [inputs[name].to(DEVICE) for name in NAMES[:3]]
    indptr, perm = (value.int().to(DEVICE) for value in ops.csc(inputs["index"]))
    for wants_x in (True, False):
        for wants_coefficient in (True, False):
            columns = (indptr, perm) if wants_x else (None, None)
            found = torch.ops.drseg_native_cuda.graph_layer_backward(
                given[0], *given, None, *columns, None, wants_coefficient
            )
            assert [value.numel() > 0 for value in found] == [wants_x, wants_coefficient]


@pytest.mark.promise("C24")
@pytest.mark.parametrize("seed", [2, 3, 4, 5, 6])
def test_in_any_order_of_threads(seed, monkeypatch):
    inputs = layer_inputs("layer_norm", 40, 7, 72)
    function = on_device(registration._run_cuda)
    given = (*(inputs[name] for name in NAMES), "layer_norm", 1e-5, False, True)
    first = function(*given)
    monkeypatch.setenv("DRSEG_EMULATOR_SEED", str(seed))
    for one, other in zip(first, function(*given), strict=True):
        assert torch.equal(one, other)
