# SPDX-License-Identifier: Apache-2.0
"""The DINO-like prior has what the benchmark says of it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bench import jobs, selection, whole_pdgr
from drseg_core.testing import dino_like_prior


def _make(seed: int = 0, batch: int = 2, height: int = 24, width: int = 20, channels: int = 512) -> torch.Tensor:
    return dino_like_prior(batch, height, width, channels, torch.Generator().manual_seed(seed))


def test_the_seed_decides():
    assert torch.equal(_make(), _make())
    assert not torch.equal(_make(), _make(1))


def test_nodata_copies_and_outliers():
    prior = _make()
    zero = (prior == 0).all(-1)
    assert torch.equal(zero[0], zero[1]) and 0.02 < float(zero.float().mean()) < 0.045
    cell = zero[0].view(24, 20).nonzero()
    assert len(cell) == int((cell.amax(0) - cell.amin(0) + 1).prod())
    for one in prior:
        _, count = one[~zero[0]].unique(dim=0, return_counts=True)
        assert 0.01 < float((count > 1).sum()) / 480 <= 0.0209
    size = prior[0].abs().mean(0)
    assert int((size > 5 * size.median()).sum()) == 2


def test_neighbours_are_alike_and_share_a_mean():
    # nearby patches are more alike than far ones, and any two are more alike than random directions
    unit = F.normalize(_make(channels=1024), dim=-1).unflatten(1, (24, 20))
    near = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1).median()
    far = (unit[:, :12] * unit[:, 12:]).sum(-1).median()
    assert float(near) > float(far) + 0.1 and float(far) > 0.1


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 1, 11, 3), (0, 3, 4, 2), (2, 3, 4, 700)])
def test_any_size(size: tuple[int, int, int, int]):
    prior = _make(0, *size)
    assert prior.shape == (size[0], size[1] * size[2], size[3]) and bool(prior.isfinite().all())
    assert prior.dtype == torch.float32 and prior.is_contiguous()


def test_the_benchmark_s_inputs_are_these():
    case = jobs.CASES["image_24x24"]
    problem = whole_pdgr.make(case, "dino")
    assert problem.prior.shape == (1, 1024, 24, 24) and problem.prior.is_contiguous()
    assert problem.features.requires_grad and not problem.prior.requires_grad
    zero = (selection.make_prior(case, "dino") == 0).all(-1)
    assert torch.equal((problem.prior == 0).all(1).flatten(1), zero) and bool(zero.any())
    assert [type(whole_pdgr.make(case, data).engine).__name__ for data in whole_pdgr.DATA] == ["PDGR", "PDGR"]
