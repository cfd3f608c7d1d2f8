# SPDX-License-Identifier: Apache-2.0
"""The selection contract where Triton chooses by rounded rows; ``test_interpreter.py`` runs it, or ``--gpu``.

Scores come rough here, so the contract is given those of the choice from its float64 oracle.
"""

from __future__ import annotations

import functools
import os

import contract_knn_graph
import oracle
import pytest
import test_knn_graph
import torch
from contract_knn_graph import CONFIGURATIONS, ROW_BY_ROW, on_small_graphs, prepared
from drseg_kernels import knn_graph as kernels
from drseg_kernels import knn_rounded
from drseg_kernels._launch import Selection
from drseg_kernels.prepare_prior import prepare_prior
from test_knn_graph import *  # noqa: F403
from torch import Tensor

from drseg_core import ops
from drseg_core.ops import _dispatch
from drseg_core.ops.knn_graph import reference
from drseg_core.testing import dino_like_prior

for _name in (
    *(name for name in dir(test_knn_graph) if name.startswith("test_") and not hasattr(contract_knn_graph, name)),
    # of what is the same on the way there
    "test_compiles_without_a_break_and_with_few_recompilations",
    "test_check_finite_names_the_node",
    "test_float16_norms_that_overflow",
    "test_empty",
    "test_layouts",
    "test_storage_offsets",
    "test_gap_rule_at_the_paper_size",
    "test_map_seen_as_tokens",
    "test_samples_are_independent_and_runs_repeat",
    "test_prior_is_not_written_and_gets_no_gradient",
    # some rows alone are chosen from float32 products
    "test_some_rows_are_those_of_all",
    "test_some_rows_of_the_op",
    "test_a_backend_that_knows_no_rows_chooses_for_all",
    "test_rows_that_are_none",
):
    del globals()[_name]


def rounded(function, device: str):
    """``knn_graph`` without scores, and the scores of its choice as the oracle has them."""

    @functools.wraps(function)
    def call(prior, grid, k, *, return_score=False, **options):
        index, rough = function(prior.to(device), grid, k, return_score="rough", **options)
        index, rough = index.cpu(), rough.cpu()
        if not return_score:
            return index
        prior, several = prior.detach(), prior.dim() == 3
        truth = oracle.scores(
            prior if several else prior[None], grid, options.get("decay", 1.0), options.get("form", "additive")
        )
        exact = (truth if several else truth[0]).gather(-1, index.long())
        assert ((rough - exact).abs() <= 3e-3 * (1 + exact.abs()))[rough.isfinite()].all()
        return index, torch.where(rough.isfinite(), exact.float(), rough)

    return call


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    on_gpu = request.config.getoption("--gpu")
    assert on_gpu or os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1, or pass --gpu"
    where = "cuda" if on_gpu else "cpu"
    op = rounded(ops.knn_graph, where)
    monkeypatch.setattr(ops, "knn_graph", op if on_gpu else on_small_graphs(op))

    def select(prior, inverse, table, k, form, include_self, backend):
        # integers lose nothing
        given = (prior, inverse, table), (prior.half(), torch.zeros_like(inverse))
        moved = [[value.to(where) for value in values] for values in given]
        chosen = _dispatch.resolve("knn_graph", prior, backend)
        return tuple(value.cpu() for value in chosen.run(*moved[0], k, form, include_self, *moved[1]))

    monkeypatch.setattr(test_knn_graph, "select", select if on_gpu else on_small_graphs(select))
    return where


@pytest.fixture
def backend(request):
    if getattr(getattr(request.node, "callspec", None), "params", {}).get("dtype", torch.float32) != torch.float32:
        pytest.skip("rows of half precision are not rounded")
    with ops.use_backend("triton"):
        yield "triton"


def choose(prior: Tensor, grid: tuple[int, int], k: int, decay: float, device: str, form: str = "additive", **options):
    """The choice by rounded rows and by the reference, and how many scores of a row were computed again."""
    scaled, inverse, short, residual = prepare_prior(prior.to(device), True)
    table = reference.decay_table(grid, decay, form, torch.float32, scaled.device)
    counts = torch.full(prior.shape[:2], -1, dtype=torch.int32, device=device)
    include_self = options.pop("include_self", True)
    given = (scaled, inverse, table, k, form, include_self)
    found, _ = kernels.knn_graph(*given, short, residual, counts=counts, **options)
    return found.cpu(), reference.knn_graph(*given)[0].cpu(), counts.cpu()


@pytest.mark.promise("C4")
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("channels", [1, 16, 33, 1024])
def test_residuals_are_bounds(channels, rows, device):
    random = torch.Generator().manual_seed(channels)
    prior = torch.randn(2, rows, channels, generator=random) * 10.0 ** torch.randint(
        -20, 20, (2, rows, 1), generator=random
    )
    prior[0, 0] = 0
    prior[1, -1, 0] = torch.nan
    # by rows, and as a map lies
    for form in (prior, prior.mT.contiguous().mT):
        scaled, _, short, residual = (value.cpu().double() for value in prepare_prior(form.to(device), True))
        lost = (scaled - short).norm(dim=-1) / scaled.norm(dim=-1)
        assert residual[0, 0] == residual[1, -1] == 0
        lost, residual = lost.nan_to_num(), torch.where(lost.isnan(), 0, residual)
        assert (residual >= lost).all() and (residual <= lost * 1.01 + 1e-12).all()


@pytest.mark.parametrize("kind", ["dino", "random"])
def test_few_scores_are_computed_again(kind, device):
    """A bound that is too loose, or products that are wrong, would hide behind the second computation."""
    random = torch.Generator().manual_seed(0)
    sizes_of_graphs = (((8, 10), 128, 20), ((24, 24), 256, 75))
    # the interpreter takes half a minute for one of 576 nodes
    for grid, channels, k in sizes_of_graphs[: 1 if kind == "random" and device == "cpu" else 2]:
        nodes = grid[0] * grid[1]
        prior = (
            dino_like_prior(1, *grid, channels, random)
            if kind == "dino"
            else torch.randn(1, nodes, channels, generator=random)
        )
        found, expected, counts = choose(prior, grid, k, 1.0, device)
        assert torch.equal(found, expected)
        assert 0 < counts.float().mean() < 4 and counts.max() <= 24


def against_each_other(whose: str) -> Tensor:
    """Five nodes (1, 5, 16): the second is the best neighbour of the first. Rounding takes from its score as much as it
    can, and gives as much to those of the next two: ``whose`` roundings do it, the candidates' or the row's own."""
    other = torch.tensor([0.5, -0.5] * 8)
    step, spare = 2.0**-12, 2.0**-22
    if whose == "candidates":
        low, high = torch.full((16,), 0.5 + step - spare), torch.full((16,), 0.5 + step + spare)
        return torch.stack([torch.full((16,), 0.5), low, high, high, other])[None]
    # rounding takes this away, which is what the row has of ``sign``
    sign = torch.tensor([1.0, -1.0] * 8)
    own = torch.full((16,), 0.625) + (step - spare) * sign
    own[0] -= 16 * step
    return torch.stack([own, sign / 2, -sign / 2, -sign / 2, -torch.ones(16) / 2])[None]


# a row is one of its own candidates, so its roundings are counted twice
@pytest.mark.parametrize("whose,tenth", [("candidates", 0.89), ("row", 0.89 / 2)])
def test_the_bound_is_no_larger_than_it_must_be(whose, tenth, device):
    prior, grid = against_each_other(whose), (1, 5)
    options = {"include_self": False, "sizes": ROW_BY_ROW}
    found, expected, counts = choose(prior, grid, 1, 4e-5, device, **options)
    assert expected[0, 0] == 1 and torch.equal(found, expected) and counts[0, 0] == 3
    # and without a tenth of it the choice is wrong
    scaled, inverse, short, residual = prepare_prior(prior.to(device), True)
    table = reference.decay_table(grid, 4e-5, "additive", torch.float32, scaled.device)
    index, _ = kernels.knn_graph(
        scaled, inverse, table, 1, "additive", False, short, residual * tenth, sizes=ROW_BY_ROW
    )
    assert index[0, 0].item() == 2


def check_ties(given: tuple[Tensor, ...], k: int, form: str, include_self: bool, chosen: Selection) -> None:
    prior, inverse, _ = given
    expected = reference.knn_graph(*given, k, form, include_self)
    # integers lose nothing
    rounded = (prior.half(), torch.zeros_like(inverse))
    got = kernels.knn_graph(*given, k, form, include_self, *rounded, sizes=chosen)
    for value, right in zip(got, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.promise("C2")
@pytest.mark.parametrize("chosen", [CONFIGURATIONS[2], ROW_BY_ROW], ids=str)
@pytest.mark.parametrize("form", ["additive", "multiplicative", "product"])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("k", [1, 5, 14, 15])
def test_ties_and_a_node_that_is_not_finite(k, include_self, form, chosen, device):
    check_ties(prepared(2, (3, 5), 8, device), k, form, include_self, chosen)


def copies() -> tuple[Tensor, Tensor]:
    """Rows (1, 72, 40), each twelve times, on a grid of (8, 9), and the right choice of 17 without a decay."""
    random = torch.Generator().manual_seed(3)
    prior = torch.randn(1, 6, 40, generator=random).repeat(1, 12, 1)[:, torch.randperm(72, generator=random)]
    # copies have one score, which the reference's product may round apart: the lowest indices are right
    unit = prior[0].double() / prior[0].double().norm(dim=-1, keepdim=True)
    key = (unit @ unit.mT).mul(2**20).round()
    key.fill_diagonal_(torch.inf)
    return prior, key.sort(dim=1, descending=True, stable=True).indices[None, :, :17].sort(-1).values.int()


@pytest.mark.promise("C10")
def test_copies_of_a_row_are_taken_from_the_lowest_index(device):
    prior, right = copies()
    for decay in (0.0, 0.5):
        found, expected, counts = choose(prior, (8, 9), 17, decay, device)
        assert torch.equal(found, expected if decay else right) and counts.max() > 0


def truncating(left: Tensor, right: Tensor, out: Tensor) -> None:
    """A tensor core's sums: 16 products and the sum so far, brought to the largest exponent and cut to 24 bits."""
    total = torch.zeros_like(out, dtype=torch.float64)
    for start in range(0, left.shape[-1], 16):
        a, b = (value[..., start : start + 16].double() for value in (left, right))
        terms = torch.cat([a[:, :, None] * b[:, None], total[..., None]], -1)
        unit = torch.ldexp(torch.ones(()).double(), torch.frexp(terms.abs().amax(-1)).exponent - 24)
        total = (terms / unit[..., None]).trunc().sum(-1) * unit
        # and the result is cut again where the sum is longer
        unit = torch.ldexp(torch.ones(()).double(), torch.frexp(total.abs()).exponent - 24)
        total = (total / unit).trunc() * unit
    out.copy_(total)


@pytest.mark.parametrize("channels", [64, 768, 1024])
def test_products_of_this_machine_are_within_the_slack(channels, device):
    """On a card the library's, of tensor cores; terms of one sign and of one size are the worst for what is cut off."""
    random = torch.Generator().manual_seed(channels)
    for prior in (torch.rand(2, 40, channels, generator=random) + 1, torch.randn(2, 40, channels, generator=random)):
        _, inverse, short, _ = prepare_prior(prior.to(device), True)
        product = torch.empty(2, 40, 40, device=device)
        knn_rounded.multiply(short, short, product)
        off = (product.double() - short.double() @ short.double().mT).abs() * inverse[:, :, None] * inverse[:, None]
        assert off.max() <= knn_rounded.slack_of(channels) / 2


@pytest.mark.promise("C4")
def test_sums_that_are_off_by_all_they_may_be_change_nothing(device, monkeypatch):
    """Rows that rounding leaves alone, so that the slack is all there is; every sum is off, away from the truth."""
    channels = 64
    prior = torch.full((1, 6, channels), 0.5)
    prior[0, 4:, ::2] *= -1
    off = torch.zeros(1, 6, 6)
    # the second is the best neighbour of the first, by a decay that float32 shows; it seems the worst of its kind
    off[0, 0, 1], off[0, 0, 2:4] = -1, 1
    wrong = 0.25 * channels * (1 + off * 17 / 16 * channels * 2.0**-23)
    exact = prior.double() @ prior.double().mT
    wrong = torch.where(exact == exact[0, 0, 0], wrong.double(), exact).float()
    monkeypatch.setattr(knn_rounded, "multiply", functools.partial(given_as, wrong))
    found, expected, _ = choose(prior, (1, 6), 1, 2.5e-6, device, include_self=False)
    assert torch.equal(found, expected) and expected[0, 0] == 1


@pytest.mark.promise("C12")
def test_a_row_of_zeros_has_exact_scores(device):
    prior = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0))
    prior[0, 3] = prior[0, 30] = 0
    found, expected, counts = choose(prior, (5, 8), 6, 1.0, device, sizes=CONFIGURATIONS[2])
    assert torch.equal(found, expected) and counts[0, 3] == counts[0, 30] == 0


def test_decay_as_a_factor_has_products_of_float32(device, monkeypatch):
    monkeypatch.setattr(kernels, "knn_rounded", None)
    found, expected, counts = choose(torch.randn(1, 30, 8), (5, 6), 4, 20.0, device, form="product")
    assert torch.equal(found, expected) and (counts == -1).all()


def given_as(product: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    out.copy_(product)


@pytest.mark.parametrize("sums", [truncating, lambda left, right, out: out.copy_(left.double() @ right.double().mT)])
def test_sums_of_a_tensor_core_are_within_the_slack(sums, device, monkeypatch):
    random = torch.Generator().manual_seed(5)
    channels = 512
    # the worst for what is cut off: terms of one sign, of one size
    for prior in (torch.rand(1, 30, channels, generator=random) + 1, dino_like_prior(1, 5, 6, channels, random)):
        _, inverse, short, residual = (value.cpu() for value in prepare_prior(prior.to(device), True))
        product = torch.empty(1, 30, 30)
        sums(short, short, product)
        exact = short.double() @ short.double().mT
        off = (product - exact).abs() * inverse[:, :, None] * inverse[:, None]
        assert off.max() <= knn_rounded.slack_of(channels) / 2
        with monkeypatch.context() as patched:
            patched.setattr(knn_rounded, "multiply", functools.partial(given_as, product))
            found, expected, counts = choose(prior, (5, 6), 9, 0.5, device)
        assert torch.equal(found, expected) and counts.float().mean() < 8


def test_sums_in_float16_are_not_relied_upon(device, monkeypatch):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "allow_fp16_accumulation"):
        pytest.skip("this torch has no such setting")
    monkeypatch.setattr(kernels, "knn_rounded", None)
    matmul.allow_fp16_accumulation = True
    try:
        found, expected, counts = choose(torch.randn(1, 30, 8), (5, 6), 4, 1.0, device)
    finally:
        matmul.allow_fp16_accumulation = False
    assert torch.equal(found, expected) and (counts == -1).all()
