# SPDX-License-Identifier: Apache-2.0
"""The selection contract on the CUDA kernels: on a device with ``--gpu``, else emulated (``test_interpreter.py``)."""

from __future__ import annotations

import oracle
import pytest
import test_knn_graph
import torch
from contract_knn_graph import on_device, on_small_graphs, prepared
from contract_knn_rounded import against_each_other, copies, truncating
from edges import INTERPRETED
from test_knn_graph import *  # noqa: F403
from torch import Tensor

from drseg_core import ops
from drseg_core.errors import BackendDtypeError, BackendUnavailableError
from drseg_core.ops import _cuda, _dispatch
from drseg_core.ops.knn_graph import reference, registration
from drseg_core.ops.knn_graph.api import knn_graph
from drseg_core.ops.prepare_prior import reference as prepare_reference
from drseg_core.testing import dino_like_prior

MOST_NODES = registration._MOST_NODES

# they ask for float64, which the kernels leave to other backends, or for another backend by name
for _name in (
    "test_permuting_nodes_permutes_neighbours",
    "test_scaling_float64_features_changes_nothing",
    "test_float64_features_of_any_size_have_the_same_neighbours",
    "test_decay_stays_in_the_range_of_the_scores",
    "test_reference_gives_the_same_for_any_block",
    "test_opcheck",
):
    del globals()[_name]


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    where = "cuda" if request.config.getoption("--gpu") else "cpu"
    if _cuda.why_not(where) is not None:
        pytest.skip(_cuda.why_not(where))
    for module, name in ((ops, "knn_graph"), (test_knn_graph, "select")):
        function = on_small_graphs(getattr(module, name), MOST_NODES, "the kernels")
        monkeypatch.setattr(module, name, on_device(function, "cuda") if where == "cuda" else function)
    return where


@pytest.fixture
def backend(request):
    if getattr(getattr(request.node, "callspec", None), "params", {}).get("dtype") == torch.float64:
        pytest.skip("the kernels leave float64 to other backends")
    _dispatch._last.of.pop("knn_graph", None)
    with ops.use_backend("cuda"):
        yield "cuda"
    assert ops.last_backend("knn_graph") in ("cuda", None)


def test_what_the_kernels_do_not_take_is_refused_by_name_and_left_to_others(device):
    double = torch.ones(1, 6, 3, dtype=torch.float64)
    with pytest.raises(BackendDtypeError, match="expected one of torch.float32, torch.float16, torch.bfloat16, got"):
        ops.knn_graph(double, (2, 3), 2, backend="cuda")
    large = torch.randn(1, MOST_NODES + 1, 2, device=device)
    grid = (1, MOST_NODES + 1)
    with pytest.raises(
        BackendUnavailableError, match=f"its kernel takes at most {MOST_NODES} nodes, got 1025; expected"
    ):
        knn_graph(large, grid, 2, backend="cuda")
    table = reference.decay_table(grid, 1.0, "additive", torch.float32, large.device)
    given = (large, large.norm(dim=-1).reciprocal(), None, None, *grid, 2, 1.0, "additive", True, "auto")
    index, _ = registration.knn_graph(*given)
    assert ops.last_backend("knn_graph") != "cuda"
    assert torch.equal(index, reference.knn_graph(large, given[1], table, 2, "additive", True)[0])


# ---------------------------------------------------------------- rounded rows


def choose(prior: Tensor, grid: tuple[int, int], k: int, decay: float, device: str, **options):
    """The choice by rounded rows and by the reference, and how many scores of a row were computed again."""
    given = torch.ops.drseg_native_cuda.prepare_prior(prior.to(device), True)
    scaled, inverse, short, residual = given
    table = reference.decay_table(grid, decay, "additive", torch.float32, scaled.device)
    counts = torch.full(prior.shape[:2], -1, dtype=torch.int32, device=device)
    include_self = options.pop("include_self", True)
    shrunk = residual * options.pop("bound", 1.0)
    found, _ = registration._run_cuda(scaled, inverse, table, k, "additive", include_self, short, shrunk, counts)
    right, _ = reference.knn_graph(scaled, inverse, table, k, "additive", include_self)
    return found.cpu(), right.cpu(), counts.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 16, 33, 1024])
def test_rows_are_prepared_as_the_reference_has_it(channels, dtype, device):
    random = torch.Generator().manual_seed(channels)
    prior = torch.randn(2, 7, channels, generator=random)
    largest = 4 if dtype == torch.float16 else 30
    prior = (prior * 10.0 ** torch.randint(-largest, largest, (2, 7, 1), generator=random)).to(dtype)
    prior[0, 0] = 0
    prior[0, 1, 0] = torch.inf
    prior[1, -1, 0] = torch.nan
    rounds = dtype == torch.float32
    found = [value.cpu() for value in torch.ops.drseg_native_cuda.prepare_prior(prior.to(device), rounds)]
    scaled, inverse = prepare_reference.prepare_prior(prior)
    torch.testing.assert_close(found[0], scaled, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found[1], inverse, rtol=1e-6, atol=0, equal_nan=True)
    if not rounds:
        assert found[2].numel() == found[3].numel() == 0
        return
    torch.testing.assert_close(found[2], scaled.half(), rtol=0, atol=0, equal_nan=True)
    lost = ((scaled.double() - scaled.half().double()).norm(dim=-1) / scaled.double().norm(dim=-1)).nan_to_num()
    assert found[3][0, 0] == found[3][0, 1] == found[3][1, -1] == 0
    lost[~inverse.isfinite()] = 0
    assert (found[3] >= lost).all() and (found[3] <= lost * 1.01 + 1e-12).all()


@pytest.mark.parametrize("grid,channels,k", [((8, 10), 128, 20), ((24, 24), 256, 75), ((30, 34), 64, 75)])
@pytest.mark.parametrize("kind", ["dino", "random"])
def test_few_scores_are_computed_again(kind, grid, channels, k, device):
    """A bound that is too loose, or products that are wrong, would hide behind the second computation."""
    random = torch.Generator().manual_seed(0)
    shape = (1, grid[0] * grid[1], channels)
    prior = dino_like_prior(1, *grid, channels, random) if kind == "dino" else torch.randn(shape, generator=random)
    found, expected, counts = choose(prior, grid, k, 1.0, device)
    assert torch.equal(found, expected)
    assert 0 < counts.float().mean() < 4 and counts.max() <= 24


@pytest.mark.parametrize("whose,tenth", [("candidates", 0.89), ("row", 0.89 / 2)])
def test_the_bound_is_no_larger_than_it_must_be(whose, tenth, device):
    prior, grid = against_each_other(whose), (1, 5)
    found, expected, counts = choose(prior, grid, 1, 4e-5, device, include_self=False)
    assert expected[0, 0] == 1 and torch.equal(found, expected) and counts[0, 0] == 3
    # and without a tenth of it the choice is wrong
    assert choose(prior, grid, 1, 4e-5, device, include_self=False, bound=tenth)[0][0, 0] == 2


@pytest.mark.promise("C4")
@pytest.mark.parametrize("sums", [truncating, lambda left, right, out: out.copy_(left.double() @ right.double().mT)])
def test_sums_of_a_tensor_core_are_within_the_slack(sums, device, monkeypatch):
    random = torch.Generator().manual_seed(5)
    monkeypatch.setattr(registration, "_multiply", sums)
    # the worst for what is cut off: terms of one sign, of one size
    for prior in (torch.rand(1, 30, 256, generator=random) + 1, dino_like_prior(1, 5, 6, 256, random)):
        found, expected, counts = choose(prior, (5, 6), 9, 0.5, device)
        assert torch.equal(found, expected) and counts.float().mean() < 8


@pytest.mark.promise("C10")
def test_copies_of_a_row_are_taken_from_the_lowest_index(device):
    prior, expected = copies()
    found, _, counts = choose(prior, (8, 9), 17, 0.0, device)
    assert torch.equal(found, expected) and counts.max() > 0


def test_rows_that_nothing_decides(device):
    """All alike, so that every score of a row is computed again."""
    prior = torch.full((1, 60, 24), 0.5)
    prior[0, 3] = torch.inf
    for k, include_self in ((5, True), (16, False)):
        found, expected, counts = choose(prior, (6, 10), k, 0.0, device, include_self=include_self)
        assert torch.equal(found, expected) and counts.max() == 58


# the emulator takes a quarter of a second for the largest
TIES = [
    (grid, k)
    for grid in [(3, 5), (1, 40), (40, 1), (17, 16)]
    for k in (1, 5, 14, 15)
    if not INTERPRETED or grid[0] != 17 or k in (5, 15)
]


@pytest.mark.promise("C2")
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("form", ["additive", "multiplicative", "product"])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("grid,k", TIES, ids=str)
def test_ties_and_a_node_that_is_not_finite(grid, k, include_self, form, rounded, device):
    prior, inverse, table = prepared(2, grid, 8, device)
    expected = reference.knn_graph(prior, inverse, table, k, form, include_self)
    # integers lose nothing
    short = (prior.half(), torch.zeros_like(inverse)) if rounded else ()
    got = registration._run_cuda(prior, inverse, table, k, form, include_self, *short)
    for value, right in zip(got, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.promise("C24")
@pytest.mark.parametrize("seed", [2, 3, 4, 5, 6])
def test_in_any_order_of_threads(seed, device, monkeypatch):
    monkeypatch.setenv("DRSEG_EMULATOR_SEED", str(seed))
    random = torch.Generator().manual_seed(seed)
    found, expected, _ = choose(dino_like_prior(2, 6, 7, 64, random), (6, 7), 9, 1.0, device)
    assert torch.equal(found, expected)


def test_images_in_parts_are_those_of_one_launch(device, monkeypatch):
    prior = torch.randn(5, 30, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(registration, "_TILE_BYTES", 4 * 30 * 30 * 2)
    found, expected, _ = choose(prior, (5, 6), 7, 1.0, device)
    assert torch.equal(found, expected)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert torch.equal(choose(prior, (5, 6), 7, 1.0, device)[0], expected)


@pytest.mark.promise("C8")
def test_the_oracle_agrees(device):
    prior = torch.randn(1, 42, 24, generator=torch.Generator().manual_seed(1))
    found, _, _ = choose(prior, (6, 7), 8, 1.0, device)
    scores = oracle.scores(prior, (6, 7), 1.0, "additive")
    scores[0].fill_diagonal_(torch.inf)
    assert torch.equal(found.long(), scores.topk(8).indices.sort(-1).values)
