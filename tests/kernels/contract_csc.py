# SPDX-License-Identifier: Apache-2.0
"""The contract of ``csc`` on its Triton kernels, cut into more chunks and tiles than such sizes would be."""

from __future__ import annotations

import pytest
import torch
from drseg_kernels import csc as kernels
from edges import DEVICE, INTERPRETED, on_device
from test_csc import check, crowded

from drseg_core import ops
from drseg_core.ops.csc.cases import make_inputs
from drseg_core.testing import CASES


@pytest.fixture(autouse=True)
def leave_out(request):
    if not INTERPRETED and not request.config.getoption("--gpu"):
        pytest.fail("set TRITON_INTERPRET=1, or pass --gpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernels, "_TILE", 16)
    monkeypatch.setattr(kernels, "_NODES", 32)
    monkeypatch.setattr(kernels, "_SMALLEST_CHUNK", 32)
    monkeypatch.setattr(kernels, "SCAN", {"BLOCK_M": 4, "BLOCK_N": 16, "num_warps": 1})


SHAPES = [(3, 7, 5), (1, 1, 4), (2, 40, 1), (1, 97, 7), (2, 64, 16)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_small_pieces(shape, dtype, small):
    check(crowded(*shape).to(dtype), on_device(kernels.csc))


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_in_the_usual_pieces(shape):
    index = crowded(*shape)
    check(index, on_device(kernels.csc))
    check(index.mT.contiguous().mT, on_device(kernels.csc))


@pytest.mark.parametrize("case", [case for case in CASES if not case.large], ids=lambda case: case.name)
def test_every_case(case):
    check(make_inputs(case)["index"], on_device(lambda index: ops.csc(index, backend="triton")))
    assert ops.last_backend("csc") == "triton"


def test_few_counts_mean_long_chunks(monkeypatch, small):
    index = crowded(2, 50, 9)
    many = kernels.chunks_of(2, 50, 450)
    monkeypatch.setattr(kernels, "_MOST_COUNTS", 300)
    few = kernels.chunks_of(2, 50, 450)
    assert many[0] == 15 and few == (3, 160)
    check(index, on_device(kernels.csc))


@pytest.mark.promise("C14")
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 3, 0), (2, 0, 4)])
def test_nothing_to_list(shape):
    indptr, perm = on_device(kernels.csc)(torch.zeros(shape, dtype=torch.int32))
    assert len(perm) == 0 and indptr.tolist() == [0] * (shape[0] * shape[1] + 1)


@pytest.mark.promise("C15")
def test_nothing_is_read_before_it_is_written():
    index = crowded(2, 30, 9).to(DEVICE)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        check(index.cpu(), on_device(kernels.csc))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 576, 75), (1, 4096, 75), (1, 16384, 8)], ids=str)
def test_at_size(shape):
    index = crowded(*shape)
    for _ in range(20):
        got = [value.cpu() for value in kernels.csc(index.to(DEVICE))]
        right = [value.cpu() for value in ops.csc(index, backend="reference")]
        assert all(torch.equal(value, other) for value, other in zip(got, right, strict=True))
