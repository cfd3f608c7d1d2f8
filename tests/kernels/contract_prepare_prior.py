# SPDX-License-Identifier: Apache-2.0
"""The contract of ``prepare_prior`` on the Triton backend; ``test_interpreter.py`` runs it, and ``--gpu``."""

from __future__ import annotations

import os

import pytest
import torch
from drseg_kernels.prepare_prior import prepare_prior

from drseg_core import ops
from drseg_core.ops.prepare_prior import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def device(request) -> str:
    on_gpu = request.config.getoption("--gpu")
    assert on_gpu or os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1, or pass --gpu"
    return "cuda" if on_gpu else "cpu"


def check(prior: torch.Tensor, device: str) -> None:
    """The same bits of the features; norms as close as sums in another order are."""
    scaled, inverse = reference.prepare_prior(prior)
    by_planes = (prior if prior.dim() == 3 else prior[None]).mT.contiguous().mT.view(prior.shape)
    for form in (prior, by_planes):
        got, value, *nothing = prepare_prior(form.to(device))
        assert got.dtype == prior.dtype and value.dtype == torch.float32
        assert got.shape == prior.shape and value.shape == prior.shape[:-1] and got.is_contiguous()
        torch.testing.assert_close(got.cpu(), scaled, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(value.cpu(), inverse, rtol=4e-7, atol=0, equal_nan=True)
        assert not any(part.numel() for part in nothing)
        if prior.dtype == torch.float32:
            again, _, short, residual = prepare_prior(form.to(device), True)
            assert torch.equal(again.isnan(), got.isnan()) and short.dtype == torch.float16
            rounded, lost = reference.rounding(scaled, inverse)
            torch.testing.assert_close(short.cpu(), rounded, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(residual.cpu(), lost, rtol=1e-4, atol=1e-12)


@pytest.mark.promise("C1")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 32, 100, 1024, 1025, 2100])
def test_ordinary_rows(channels, dtype, device):
    random = torch.Generator().manual_seed(channels)
    check(torch.randn(2, 3, channels, generator=random).to(dtype), device)


@pytest.mark.promise("C5")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_size(dtype, device):
    """All exponents, subnormal ones as well, alone and beside zeros and smaller values."""
    info = torch.finfo(dtype)
    exponent = torch.arange(-149, 128, dtype=torch.float64)
    value = torch.ldexp(torch.tensor(1.0, dtype=torch.float64), exponent).to(dtype)
    value = torch.cat((value, -value, torch.tensor([info.max, info.min, info.tiny, 0.0], dtype=dtype)))
    value = value[value.isfinite()]
    # which the interpreter takes for zeros
    without_subnormal = device == "cpu" and dtype == torch.bfloat16
    if without_subnormal:
        value = value[(value == 0) | (value.abs() >= 4 * info.tiny)]
    check(value[:, None], device)
    check(torch.stack((torch.zeros_like(value), value, value * 0.375), -1), device)
    if not without_subnormal:
        check(torch.stack((value, torch.full_like(value, info.tiny)), -1), device)


@pytest.mark.promise("C11")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 40, 1030])
def test_a_value_that_is_not_finite_breaks_its_row_alone(place, dtype, device):
    for bad in (torch.inf, -torch.inf, torch.nan):
        prior = torch.randn(1, 3, 1031, generator=torch.Generator().manual_seed(0)).to(dtype)
        prior[0, 1, place] = bad
        check(prior, device)
        assert prepare_prior(prior.to(device))[1].isnan().tolist() == [[False, True, False]]


@pytest.mark.promise("C13")
def test_layouts(device):
    prior = torch.randn(3, 8, 10, generator=torch.Generator().manual_seed(0))
    check(prior.transpose(1, 2), device)
    check(prior[:, ::2, 1:7], device)
    check(prior[0], device)
    check(prior[:, :0], device)
    # planes of a larger map, of some images
    check(torch.randn(5, 40, 37)[1::2, 3:40].mT, device)


@pytest.mark.promise("C7")
def test_rows_do_not_depend_on_their_neighbours(device):
    prior = torch.randn(4, 7, 50, generator=torch.Generator().manual_seed(0)).to(device)
    scaled, inverse, *_ = prepare_prior(prior)
    for place in range(4):
        alone = prepare_prior(prior[place : place + 1])
        assert torch.equal(alone[0][0], scaled[place]) and torch.equal(alone[1][0], inverse[place])


def test_the_op_takes_it(device):
    prior = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0)).to(device)
    expected = prepare_prior(prior)
    found = ops.prepare_prior(prior, backend="triton")
    assert torch.equal(found.scaled, expected[0]) and torch.equal(found.inverse_norm, expected[1])
    # the result of an op may not be its argument
    half = prior.half()
    assert ops.prepare_prior(half, backend="triton").scaled.data_ptr() != half.data_ptr()
