# SPDX-License-Identifier: Apache-2.0
"""``linear_map`` where it is the library's product: on a CPU, in every dtype. The kernels have their own contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from drseg_core import ops
from drseg_core.errors import BackendUnavailableError
from drseg_core.ops import _triton
from drseg_core.ops.linear_map import reference, registration
from drseg_core.ops.linear_map.cases import make_inputs
from drseg_core.testing import CASES

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SMALL = [case for case in CASES if not case.large]


def library(x: Tensor, weight: Tensor, cast: torch.dtype | None = None) -> Tensor:
    """One product of the library, of rows as they lie, with the weight in the dtype of autocast."""
    if x.dim() == 2 or x.is_contiguous():
        return F.linear(x, weight)
    weight = weight if cast is None else weight.to(cast)
    return torch.bmm(x, weight.t().expand(len(x), -1, -1))


def maps(case, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Rows, the transposed view of a map, and one sample."""
    given = make_inputs(case, dtype)
    x = given["x"]
    return [given, {**given, "x": x.mT.contiguous().mT}, {**given, "x": x[0]}]


@pytest.mark.promise("C1")
@pytest.mark.parametrize("backend", [None, "native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_bits_are_the_library_s(case, dtype, backend):
    for given in maps(case, dtype):
        given = {name: value.detach().requires_grad_() for name, value in given.items()}
        got, expected = ops.linear_map(**given, backend=backend), library(**given)
        assert ops.last_backend("linear_map") == (backend or "native")
        assert got.dtype == dtype and torch.equal(got, expected)
        grad = torch.ones_like(got)
        for one, other in zip(
            torch.autograd.grad(got, given.values(), grad),
            torch.autograd.grad(expected, given.values(), grad),
            strict=True,
        ):
            assert torch.equal(one, other)


@pytest.mark.promise("C4")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_decides_the_dtype(dtype):
    with torch.autocast("cpu", torch.bfloat16):
        for given in maps(SMALL[2], dtype):
            cast = None if dtype == torch.float64 else torch.bfloat16
            got = ops.linear_map(**given)
            assert torch.equal(got, library(**given, cast=cast)) and got.dtype == (cast or dtype)


@pytest.mark.promise("C3")
def test_gradients_of_the_reference():
    for given in maps(SMALL[2], torch.float64)[:2]:
        x, weight = (value.detach().requires_grad_() for value in given.values())
        y = reference.linear_map(x, weight)
        grad = torch.randn_like(y)
        expected = torch.autograd.grad(y, (x, weight), grad)
        for mask in ([True, True], [True, False], [False, True]):
            found = reference.linear_map_backward(grad, x, weight, mask)
            for value, right, needed in zip(found, expected, mask, strict=True):
                assert not value.numel() if not needed else torch.allclose(value, right, rtol=1e-12, atol=1e-12)


@pytest.mark.promise("C21")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    for given in maps(SMALL[0], dtype)[:2]:
        opcheck(torch.ops.drseg.linear_map.default, (*given.values(), "reference"))
        grad = torch.randn_like(ops.linear_map(**given))
        for mask in ([True, True], [False, True]):
            opcheck(torch.ops.drseg.linear_map_backward.default, (grad, *given.values(), mask, "reference"))


@pytest.mark.promise("C21")
def test_compiles_into_the_library_s_product():
    given = make_inputs(SMALL[2])
    torch.compiler.reset()
    seen: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module

    compiled = torch.compile(lambda x, weight: ops.linear_map(x, weight), fullgraph=True, backend=look)
    assert torch.equal(compiled(**given), ops.linear_map(**given))
    assert not any("drseg" in name for name in seen)


@pytest.mark.promise("C14")
@pytest.mark.parametrize("x,weight", [((0, 3, 2), (4, 2)), ((2, 0, 2), (4, 2)), ((2, 3, 0), (4, 0)), ((3, 2), (0, 2))])
def test_empty(x, weight):
    y = ops.linear_map(torch.ones(x), torch.ones(weight))
    assert y.shape == (*x[:-1], weight[0]) and not y.any()


@pytest.mark.promise("C25")
def test_a_kernel_that_cannot_run_is_an_error():
    with pytest.raises(BackendUnavailableError, match="^linear_map: backend triton cannot run on cpu: Triton kernels"):
        ops.linear_map(torch.ones(2, 3), torch.ones(4, 3), backend="triton")


@pytest.mark.parametrize("capability,pays", [((8, 0), True), ((9, 0), True), ((8, 6), False), ((12, 0), False)])
def test_parts_are_for_tensor_cores_of_full_rate(capability, pays, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    _triton._why_not.cache_clear()
    try:
        with FakeTensorMode():
            x = torch.empty(2, 3, 4, device="cuda")
            assert registration.has_kernel(x, "auto") is pays and registration.has_kernel(x, "triton")
            # these are the library's everywhere, and so is what another backend has no kernel for
            assert not registration.has_kernel(x.double(), "auto") and not registration.has_kernel(x, "reference")
            assert not registration.has_kernel(x, "somebody_else_s")
    finally:
        _triton._why_not.cache_clear()


@pytest.mark.promise("C44")
@pytest.mark.parametrize(
    "x,weight,error,message",
    [
        ([[1.0]], torch.ones(1, 1), TypeError, "x must be a tensor"),
        (torch.ones(2, 3).int(), torch.ones(4, 3), TypeError, "x has an unsupported dtype"),
        (torch.ones(3), torch.ones(4, 3), ValueError, "x has the wrong rank"),
        (torch.ones(2, 3), None, TypeError, "weight must be a tensor"),
        (torch.ones(2, 3), torch.ones(3), ValueError, "weight has the wrong rank"),
        (torch.ones(2, 3), torch.ones(4, 2), ValueError, r"weight does not match x; expected \(E, 3\), got \(4, 2\)"),
        (torch.ones(2, 3), torch.ones(4, 3).half(), TypeError, "weight has another dtype than x"),
    ],
)
def test_what_it_cannot_use_is_refused(x, weight, error, message):
    with pytest.raises(error, match=f"^linear_map: {message}") as caught:
        ops.linear_map(x, weight)
    assert "; expected " in str(caught.value) and ", got " in str(caught.value)
