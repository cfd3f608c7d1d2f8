# SPDX-License-Identifier: Apache-2.0
"""The contract of ``prepare_prior``, for every backend that can run here."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from drseg_core import ops
from drseg_core.nn.label_propagation import propagation_graph
from drseg_core.ops import PreparedPrior
from drseg_core.ops.prepare_prior import reference
from drseg_core.ops.prepare_prior.cases import make_inputs
from drseg_core.testing import CASES

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = [
    row["backend"]
    for row in ops.backend_report()
    if row["op"] == "prepare_prior" and row["device"] == "cpu" and row["available"]
]


def check(prior: torch.Tensor, backend: str) -> None:
    """The same bits of the features; norms as close as sums in another order are."""
    scaled, inverse = reference.prepare_prior(prior)
    got = ops.prepare_prior(prior, backend=backend)
    assert ops.last_backend("prepare_prior") == backend
    assert got.scaled.dtype == prior.dtype and got.scaled.is_contiguous()
    assert got.inverse_norm.dtype == inverse.dtype and got.inverse_norm.shape == prior.shape[:-1]
    # the result of an op may not be its argument
    assert prior.numel() == 0 or got.scaled.data_ptr() != prior.data_ptr()
    torch.testing.assert_close(got.scaled, scaled, rtol=0, atol=0, equal_nan=True)
    slack = 4e-7 if inverse.dtype == torch.float32 else 1e-15
    torch.testing.assert_close(got.inverse_norm, inverse, rtol=slack, atol=0, equal_nan=True)


@pytest.mark.promise("C1")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if not case.large], ids=lambda case: case.name)
def test_every_case(case, dtype, backend):
    check(make_inputs(case, dtype)["prior"], backend)


@pytest.mark.promise("C5")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_size_and_what_is_not_finite(dtype, backend):
    info = torch.finfo(dtype)
    value = torch.tensor([info.max, info.min, info.tiny, 1.0, 0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    check(value[:, None], backend)
    check(torch.stack((value, torch.ones_like(value), value * 0.5), -1), backend)
    check(torch.stack((value, torch.full_like(value, info.tiny)), -1)[None], backend)


@pytest.mark.promise("C13")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    prior = torch.randn(3, 8, 10, generator=torch.Generator().manual_seed(0))
    for form in (prior.transpose(1, 2), prior[:, ::2, 1:7], prior[0], prior[:, :0], prior[:1].expand(prior.shape)):
        check(form, backend)


@pytest.mark.promise("C21")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    for case in CASES[:3]:
        prior = make_inputs(case, dtype)["prior"]
        for form in (prior, prior[0], prior.mT.contiguous().mT):
            for rounds in (False, dtype == torch.float32):
                opcheck(torch.ops.drseg.prepare_prior.default, (form, rounds, "auto"))


@pytest.mark.promise("C25")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_record_says_what_ran(dtype):
    prior = torch.randn(1, 6, 5).to(dtype)
    ops.knn_graph(prior, (2, 3), 3)
    assert ops.last_backend("prepare_prior") == ops.last_backend("knn_graph") == "native"


@pytest.mark.parametrize(
    "prior,error,message",
    [
        ([[1.0]], TypeError, "prior must be a tensor"),
        (torch.ones(2, 3).int(), TypeError, "prior has an unsupported dtype"),
        (torch.ones(3), ValueError, "prior has the wrong rank"),
        (torch.ones(2, 0), ValueError, "prior has no channels"),
    ],
    ids=["list", "integers", "rank", "no channels"],
)
def test_what_it_cannot_use_is_refused(prior, error, message):
    with pytest.raises(error, match=f"^prepare_prior: {message}"):
        ops.prepare_prior(prior)


def test_scales_are_exact_powers_of_two():
    exponent = torch.arange(-1022, 1024)
    prior = torch.tensor([2.0**e for e in exponent.tolist()], dtype=torch.float64)[:, None]
    scaled, inverse = reference.prepare_prior(prior)
    assert torch.equal(torch.frexp(scaled).mantissa, torch.full_like(prior, 0.5))
    assert (scaled[1:-4] == 0.5).all() and inverse.isfinite().all()


def _fields(dtype: torch.dtype = torch.float32, samples: int = 2) -> dict[str, torch.Tensor]:
    prior = torch.randn(samples, 6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = ops.prepare_prior(prior)
    return {
        "scaled": given.scaled,
        "inverse_norm": given.inverse_norm,
        "rounded": given.scaled.half(),
        "residual": torch.ones(samples, 6),
    }


TAKERS = {
    "knn_graph": lambda prior: ops.knn_graph(prior, (2, 3), 2, return_score=True),
    "score_parts": lambda prior: ops.score_parts(prior, (2, 3), torch.zeros(2, 6, 2, dtype=torch.int32)),
    "propagation_graph": lambda prior: propagation_graph(prior, (2, 3), 2),
    "project": lambda prior: prior.project(torch.ones(3, 4)),
}


@pytest.mark.promise("C44")
@pytest.mark.parametrize("op", TAKERS)
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("scaled", None, TypeError),
        ("scaled", torch.ones(6), ValueError),
        ("inverse_norm", None, TypeError),
        ("inverse_norm", torch.ones(2, 5), ValueError),
        ("inverse_norm", torch.ones(1, 6), ValueError),
        ("inverse_norm", torch.ones(6), ValueError),
        ("inverse_norm", torch.ones(2, 6).double(), TypeError),
        ("inverse_norm", torch.ones(2, 6).half(), TypeError),
        ("rounded", torch.ones(2, 6, 3).half(), ValueError),
        ("rounded", torch.ones(2, 6, 4), TypeError),
        ("residual", torch.ones(2, 7), ValueError),
        ("residual", [1.0], TypeError),
    ],
)
def test_fields_that_do_not_fit_are_refused(op, name, value, error):
    given = _fields()
    TAKERS[op](PreparedPrior(**given))
    with pytest.raises(error, match=f"^{op}: prior.{name} .*; expected .*, got .*$"):
        TAKERS[op](PreparedPrior(**{**given, name: value}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_prepared_fits(dtype):
    prior = ops.prepare_prior(torch.randn(2, 6, 4).to(dtype))
    for call in TAKERS.values():
        call(prior)
