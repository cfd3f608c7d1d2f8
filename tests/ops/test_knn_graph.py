# SPDX-License-Identifier: Apache-2.0
"""The selection contract, for every backend of ``knn_graph``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from typing import Any

import oracle
import pytest
import torch
from contract import LAYOUTS, SMALL, at_offset
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from drseg_core import ops
from drseg_core.errors import NumericalError
from drseg_core.ops import _dispatch
from drseg_core.ops.knn_graph import reference
from drseg_core.ops.knn_graph.cases import make_inputs
from drseg_core.ops.prepare_prior import reference as prepare_reference
from drseg_core.testing import CASES, dino_like_prior, numerics, vit_like_prior

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

BACKENDS = [
    row["backend"]
    for row in ops.backend_report()
    if row["op"] == "knn_graph" and row["device"] == "cpu" and row["available"]
]
FORMS = ("additive", "gauss", "multiplicative", "product")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# for what the reference has no way of its own: it would be compared with itself, or takes seconds for large grids
without_reference = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name != "reference"], indirect=True
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param
    assert ops.last_backend("knn_graph") == request.param


def check(inputs: dict, index: Tensor, score: Tensor, near_tie_share: float = 1.0) -> None:
    """The gap rule on every sample, against float64 scores of the same bits."""
    prior = inputs["prior"]
    include_self = inputs.get("include_self", True)
    truth = oracle.scores(prior, inputs["grid"], inputs.get("decay", 1.0), inputs.get("form", "additive"))
    assert index.dtype == torch.int32 and not index.requires_grad and not score.requires_grad
    for b in range(prior.shape[0]):
        problem = numerics.compare_selection(
            index[b],
            score[b],
            truth[b],
            numerics.affinity_tolerance(prior.dtype),
            include_self=include_self,
            near_tie_share=near_tie_share,
        )
        assert problem is None, problem


@pytest.mark.promise("C8")
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gap_rule(case, dtype, form, include_self, backend):
    inputs = {**make_inputs(case, dtype), "form": form, "include_self": include_self}
    inputs["k"] = min(inputs["k"], case.nodes - (not include_self))
    check(inputs, *ops.knn_graph(**inputs, return_score=True))


@pytest.mark.promise("C8")
def test_gap_rule_at_the_paper_size(backend):
    case = next(case for case in CASES if case.name == "paper_vitl_24x24")
    inputs = make_inputs(case)
    # the interpreter takes ten seconds for an image
    inputs["prior"] = inputs["prior"][: 1 if INTERPRETED else 2]
    check(inputs, *ops.knn_graph(**inputs, return_score=True), near_tie_share=numerics.NEAR_TIE_SHARE)


@pytest.mark.promise("C8")
@pytest.mark.parametrize("nodes", [1, 2, 31, 32, 33, 63, 64, 65, 97, 128, 129])
@pytest.mark.parametrize("k", [1, 2, 16])
def test_sizes_around_block_borders(nodes, k, backend):
    random = torch.Generator().manual_seed(nodes)
    inputs = {
        "prior": torch.randn(2, nodes, 17, generator=random),
        "grid": (1, nodes),
        "k": min(k, nodes),
        "decay": 0.5,
    }
    check(inputs, *ops.knn_graph(**inputs, return_score=True))


def select(
    prior: Tensor, inverse: Tensor, table: Tensor, k: int, form: str, include_self: bool, backend: str, **options: Any
):
    """What a backend computes, after normalisation and of any table: integers stay exact."""
    chosen = _dispatch.resolve("knn_graph", prior, backend)
    return chosen.run(prior, inverse, table, k, form, include_self, **options)


@pytest.mark.promise("C2")
@pytest.mark.parametrize("channels,largest", [(8, 1), (8, 3), (256, 3), (1024, 3)])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_integer_lattice_is_exact(channels, largest, include_self, dtype, backend):
    random = torch.Generator().manual_seed(channels)
    for grid, k in (((8, 8), 9), ((5, 13), 32), ((1, 97), 1), ((6, 6), 35)):
        nodes = grid[0] * grid[1]
        prior = torch.randint(-largest, largest + 1, (2, nodes, channels), generator=random).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        table = torch.randint(0, 4, grid, generator=random).to(wide)
        inverse = torch.ones(prior.shape[:2])
        index, score = select(prior, inverse, table, k, "additive", include_self, backend)
        exact = prior.double() @ prior.double().mT
        y, x = torch.arange(nodes) // grid[1], torch.arange(nodes) % grid[1]
        exact = exact - table.double()[(y[:, None] - y).abs(), (x[:, None] - x).abs()]
        key = exact.clone()
        key.diagonal(dim1=1, dim2=2).fill_(torch.inf if include_self else -torch.inf)
        # a stable sort keeps equal scores in ascending index: the first k are the answer, bit for bit
        expected = key.sort(dim=2, descending=True, stable=True).indices[..., :k].sort(-1).values
        assert torch.equal(index.long(), expected)
        assert torch.equal(score.double(), exact.gather(2, expected))
        for b in range(2):
            assert numerics.compare_selection(index[b], score[b], exact[b], 0.0, include_self=include_self) is None


# beyond the size up to which the native backend keeps all scores of an image, with sides that no block divides
LARGE = [(33, 35), (1, 1301), (1301, 1), (3, 401), (130, 9)]


@pytest.mark.promise("C2")
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", LARGE, ids=str)
@without_reference
def test_large_grids_are_exact(grid, form, include_self, backend):
    nodes = grid[0] * grid[1]
    random = torch.Generator().manual_seed(nodes)
    everyone = nodes - (not include_self) if grid == LARGE[0] else 700
    for k, channels in ((1, 3), (9, 24), (75, 6), (everyone, 5)):
        prior = torch.randint(-3, 4, (1, nodes, channels), generator=random).float()
        prior[0, 100:200] = 0
        # not a decay that falls with the distance: nothing may be left out because it is far
        table = torch.randint(0, 4, grid, generator=random).float()
        if form in ("multiplicative", "product"):
            table = 2.0**-table
        inverse = torch.ones(1, nodes)
        inverse[0, 5:9] = torch.nan
        got = select(prior, inverse, table, k, form, include_self, backend)
        expected = reference.knn_graph(prior, inverse, table, k, form, include_self)
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.promise("C8")
@pytest.mark.parametrize("decay", [0.0, 2.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gap_rule_on_large_grids(decay, dtype, backend):
    # smooth regions: with a strong decay a row needs to look at few blocks only
    inputs = {"prior": dino_like_prior(2, 37, 41, 48, torch.Generator().manual_seed(3)).to(dtype), "grid": (37, 41)}
    inputs |= {"k": 20, "decay": decay}
    check(inputs, *ops.knn_graph(**inputs, return_score=True))


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
@pytest.mark.parametrize("kind", ["dino", "random", "outliers", "integers"])
@without_reference
def test_grids_that_are_searched_coarsely_first(kind, form, backend):
    # more nodes and channels than it takes for the native backend to reduce rows to a few bits
    h, w, channels = 43, 50, 100
    random = torch.Generator().manual_seed(7)
    prior = torch.randn(1, h * w, channels, generator=random)
    if kind == "dino":
        prior = dino_like_prior(1, h, w, channels, random)
    elif kind == "outliers":
        prior[..., 3] *= 50
        prior[..., 17] += 400
        prior[0, 1000:1010] = prior[0, 5]
    elif kind == "integers":
        prior = torch.randint(-2, 3, prior.shape, generator=random).float()
    inputs = {"prior": prior, "grid": (h, w), "k": 30, "decay": 3.0, "form": form}
    check(inputs, *ops.knn_graph(**inputs, return_score=True))
    if kind == "integers":
        prior[0, 77] = torch.nan
        inverse = torch.where(torch.arange(h * w) == 77, torch.nan, 1.0)[None]
        table = torch.randint(0, 9, (h, w), generator=random).float()
        table = table if form == "additive" else 2.0**-table
        got = select(prior, inverse, table, 30, form, True, backend)
        expected = reference.knn_graph(prior, inverse, table, 30, form, True)
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", (1, 30, 400))
@without_reference
def test_a_coarse_search_of_whole_vectors_for_few_and_for_many_neighbours(k, backend):
    # rows of 112 float32 fill whole vectors, so the native backend reads them where they lie
    prior = dino_like_prior(2, 41, 53, 112, torch.Generator().manual_seed(3))
    inputs = {"prior": prior, "grid": (41, 53), "k": k, "decay": 1.0, "include_self": k < 400}
    check(inputs, *ops.knn_graph(**inputs, return_score=True))


@pytest.mark.parametrize("share", [0.005, 0.013])
@without_reference
def test_neighbours_that_few_bits_do_not_show(share, backend):
    # one channel is so large that whole multiples of a step lose the others, where the likeness to forty nodes lies;
    # all the rest are a little less like it, in the channel that shows
    random = torch.Generator().manual_seed(11)
    h, w, hidden = 43, 50, torch.zeros(100)
    hidden[50:] = torch.randn(50, generator=random) / 50**0.5
    prior = torch.zeros(h * w, 100)
    prior[:, 1:50] = torch.randn(h * w, 49, generator=random)
    prior = prior / prior.norm(dim=1).clamp_min(1e-9)[:, None]
    prior[:, 0] = 0.8 * share
    alike = torch.randperm(h * w, generator=random)[:45]
    prior[alike[:40]] = hidden
    prior[alike[40:]] = share * hidden
    prior[alike[40:], 0] = 1
    index = ops.knn_graph(prior[None], (h, w), 40, decay=0.0, include_self=False)
    expected = {*alike[40:].tolist(), *alike[:40].tolist()}
    for node in alike[40:].tolist():
        assert len(expected.intersection(index[0, node].tolist())) == 40


@pytest.mark.promise("C8")
@pytest.mark.parametrize("levels", [45, 127])
@without_reference
def test_what_few_bits_lose_of_a_neighbour(levels, backend):
    """The row is exact in so many levels, and so are rows a little like it; what is likest to it loses all likeness."""
    random = torch.Generator().manual_seed(13)
    h, w = 43, 50
    prior = torch.randn(h * w, 100, generator=random)
    prior[:, 0] = 0
    chosen = torch.randperm(h * w, generator=random)[:46]
    row, likest, like = int(chosen[0]), chosen[1:6], chosen[6:]
    # channels 16 apart are mixed: these sixteen groups stay apart, each of eight equal values
    prior[chosen] = 0
    prior[row, 0] = 1
    # less than half a level beside the largest value
    prior[likest, 0], prior[likest, 1] = 0.45 / levels, 1
    # one level exactly, as the others are smaller
    prior[like, 0] = 1 / (levels * 15**0.5)
    prior[like, 1:16] = 15**-0.5
    index = ops.knn_graph(prior[None], (h, w), 30, decay=0.0, include_self=False)[0, row].tolist()
    assert {*likest.tolist()} <= {*index} <= {*likest.tolist(), *like.tolist()}


def test_a_negative_decay_turns_scores_over(backend):
    random = torch.Generator().manual_seed(5)
    prior = torch.randint(-2, 3, (1, 43 * 50, 100), generator=random).float()
    table = torch.randint(-3, 4, (43, 50), generator=random).float()
    inverse = torch.ones(1, 43 * 50)
    got = select(prior, inverse, table, 30, "product", True, backend)
    expected = reference.knn_graph(prior, inverse, table, 30, "product", True)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.promise("C10")
def test_equal_features_on_a_large_grid_take_the_lowest_indices(backend):
    # 0.25 is exact in any order of summation; the native kernel gives equal rows equal scores whatever they hold
    for value in (0.3 if backend == "native" else 0.5, 0.0):
        for grid, channels in (((30, 40), 5), ((43, 50), 97)):
            nodes = grid[0] * grid[1]
            index = ops.knn_graph(torch.full((1, nodes, channels), value), grid, 7, decay=0.0)
            for i in (0, 3, 700, nodes - 1):
                assert index[0, i].tolist() == sorted({i} | set([j for j in range(8) if j != i][:6]))


@pytest.mark.promise("C10")
def test_all_equal_rows_take_the_lowest_indices(backend):
    for include_self in (True, False):
        index = ops.knn_graph(torch.ones(1, 30, 4), (5, 6), 7, decay=0.0, include_self=include_self)
        for i in range(30):
            others = [j for j in range(30) if j != i]
            expected = sorted([i, *others[:6]]) if include_self else others[:7]
            assert index[0, i].tolist() == expected


@pytest.mark.promise("C10")
def test_zeros_of_both_signs_are_ties(backend):
    # cosines of 1 and -1 times a decay of zero; 37 scores fill no whole registers
    nodes = 37
    prior = torch.where(torch.arange(nodes) % 2 == 0, 1.0, -1.0).view(1, nodes, 1)
    table = torch.zeros(1, nodes)
    table[0, 0] = 1
    for k in (9, nodes - 1):
        index, score = select(prior, torch.ones(1, nodes), table, k, "product", True, backend)
        for i in range(nodes):
            others = [j for j in range(nodes) if j != i]
            assert index[0, i].tolist() == sorted([i, *others[: k - 1]])
            assert score[0, i].count_nonzero() == 1


@pytest.mark.promise("C1")
@pytest.mark.parametrize("form", ["multiplicative", "product"])
def test_a_cosine_below_zero_is_zero_where_it_is_clamped(form, backend):
    sign = torch.tensor([1.0, 1, 1, -1, -1, -1])
    table = torch.tensor([[1.0, 0.5, 0.25], [0.5, 0.25, 0.125]])
    index, score = select(sign.view(1, 6, 1), torch.ones(1, 6), table, 6, form, True, backend)
    assert torch.equal(index[0], torch.arange(6, dtype=torch.int32).expand(6, 6))
    y, x = torch.arange(6) // 3, torch.arange(6) % 3
    cosine = sign[:, None] * sign
    cosine = cosine.clamp_min(0) if form == "multiplicative" else cosine
    assert torch.equal(score[0], cosine * table[(y[:, None] - y).abs(), (x[:, None] - x).abs()])


@pytest.mark.promise("C8")
@pytest.mark.parametrize("form", FORMS)
def test_a_pair_without_decay_is_no_candidate(form, backend):
    # of cells in another row the decay is NaN
    prior = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(0))
    table = torch.zeros(2, 6).fill_(0.5)
    table[1] = torch.nan
    index, score = select(prior, torch.ones(1, 12), table, 8, form, False, backend)
    for i in range(12):
        row = [j for j in range(6 * (i // 6), 6 * (i // 6) + 6) if j != i]
        assert index[0, i].tolist() == [*row, i, i, i]
        assert score[0, i, :5].isfinite().all() and (score[0, i, 5:] == -torch.inf).all()


def test_narrow_range(backend):
    # 1.00000x: scores differ in the last bits only, and many are equal
    random = torch.Generator().manual_seed(0)
    prior = torch.ones(1, 64, 16) + 3e-5 * torch.rand(1, 64, 16, generator=random)
    inputs = {"prior": prior, "grid": (8, 8), "k": 9, "decay": 0.0}
    check(inputs, *ops.knn_graph(**inputs, return_score=True))


@pytest.mark.promise("C5", "C6")
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_does_not_matter(scale, dtype, backend):
    inputs = make_inputs(CASES[2], dtype)
    scaled = {**inputs, "prior": (inputs["prior"].double() * scale).to(dtype)}
    check(scaled, *ops.knn_graph(**scaled, return_score=True))


@pytest.mark.promise("C6")
@pytest.mark.parametrize("exponent", [-100, -20, 20, 100])
def test_a_power_of_two_changes_no_bit(exponent, backend):
    inputs = make_inputs(CASES[2])
    expected = ops.knn_graph(**inputs, return_score=True)
    inputs["prior"] = inputs["prior"] * 2.0**exponent
    for got, value in zip(ops.knn_graph(**inputs, return_score=True), expected, strict=True):
        assert torch.equal(got, value)


@pytest.mark.promise("C5")
def test_float16_norms_that_overflow(backend):
    prior = torch.full((1, 12, 768), 9.25, dtype=torch.float16)
    prior[0, ::2, ::3] *= -6000
    assert prior.isfinite().all()
    inputs = {"prior": prior, "grid": (3, 4), "k": 5}
    check(inputs, *ops.knn_graph(**inputs, return_score=True))


BAD = {
    "nan": lambda row: row.fill_(torch.nan),
    "one_nan": lambda row: row[3:4].fill_(-torch.nan),
    "inf": lambda row: row[:1].fill_(torch.inf),
    "minus_inf": lambda row: row.fill_(-torch.inf),
    "mixed": lambda row: row.copy_(torch.tensor([torch.inf, -torch.inf]).repeat(row.numel())[: row.numel()]),
}


@pytest.mark.promise("C11")
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("which", [[0], [36], [5, 6, 20]])
def test_non_finite_nodes_keep_to_themselves(which, kind, form, include_self, backend):
    options = {"form": form, "include_self": include_self, "return_score": True}
    inputs = make_inputs(CASES[2])
    clean, k = inputs["prior"], inputs["k"]
    bad = clean.clone()
    for node in which:
        BAD[kind](bad[0, node])
    index, score = ops.knn_graph(bad, inputs["grid"], k, **options)
    healthy = [i for i in range(37) if i not in which]
    assert not torch.isin(index[0, healthy], torch.tensor(which, dtype=torch.int32)).any()
    for node in which:
        assert (index[0, node] == node).all() and score[0, node].isnan().all()
    expected, expected_score = ops.knn_graph(clean, inputs["grid"], k, **options)
    # the other sample does not notice
    assert torch.equal(index[1], expected[1]) and torch.equal(score[1], expected_score[1])
    # the other rows are as if the bad nodes had been at the far end of the ranking
    truth = oracle.scores(bad, inputs["grid"], 1.0, form)[0]
    for i in healthy:
        row = truth[i].clone()
        row[i] = torch.inf if include_self else -torch.inf
        chosen = index[0, i].long()
        threshold = row.sort(descending=True).values[k - 1]
        assert (row[chosen] >= threshold - 4e-6).all()


@pytest.mark.promise("C11")
def test_all_nodes_non_finite(backend):
    index, score = ops.knn_graph(torch.full((1, 6, 3), torch.nan), (2, 3), 4, return_score=True)
    assert torch.equal(index[0], torch.arange(6, dtype=torch.int32)[:, None].expand(6, 4)) and score.isnan().all()


@pytest.mark.promise("C9")
@pytest.mark.parametrize("grid", [(2, 3), (6, 8)], ids=str)
def test_too_few_finite_candidates_are_padded(grid, backend):
    prior = torch.randn(1, grid[0] * grid[1], 3, generator=torch.Generator().manual_seed(0))
    prior[0, 4:] = torch.nan
    index, score = ops.knn_graph(prior, grid, 6, return_score=True)
    assert index[0, 1].tolist() == [0, 1, 2, 3, 1, 1]
    assert (score[0, :4, 4:] == -torch.inf).all() and score[0, :4, :4].isfinite().all()
    mask = ops.padding_mask(index)
    assert mask[0, :4].sum(1).tolist() == [4, 4, 4, 4]


@pytest.mark.promise("C9")
def test_padding(backend):
    for include_self, candidates in ((True, 6), (False, 5)):
        prior = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
        index, score = ops.knn_graph(prior, (2, 3), 9, pad=True, include_self=include_self, return_score=True)
        check({"prior": prior, "grid": (2, 3), "include_self": include_self}, index, score)
        mask = ops.padding_mask(index, include_self=include_self)
        assert (mask.sum(-1) == candidates).all() and (score[~mask] == -torch.inf).all()
        assert (index.gather(2, (~mask).int().argsort(-1)[..., candidates:]) == torch.arange(6)[:, None]).all()


@pytest.mark.promise("C12")
def test_zero_vector_has_cosine_zero(backend):
    inputs = make_inputs(CASES[2])
    inputs["prior"][0, 7] = 0
    for form in FORMS:
        index, score = ops.knn_graph(**inputs, form=form, return_score=True)
        check({**inputs, "form": form}, index, score)
        assert 7 in index[0, 7]


@pytest.mark.promise("C10")
def test_constant_tile(backend):
    # a nodata tile: every affinity is the decay alone
    inputs = {"prior": torch.full((1, 49, 5), 0.3), "grid": (7, 7), "k": 9}
    check(inputs, *ops.knn_graph(**inputs, return_score=True))


@pytest.mark.promise("C13")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend):
    for dtype in DTYPES[:3]:
        inputs = make_inputs(CASES[2], dtype)
        inputs["prior"] = LAYOUTS[layout](inputs["prior"])
        check(inputs, *ops.knn_graph(**inputs, return_score=True))


@pytest.mark.promise("C13")
def test_storage_offsets(backend):
    inputs = make_inputs(CASES[2])
    for offset in (0, 1, 2, 3, 5, 7, 8):
        inputs["prior"] = at_offset(inputs["prior"], offset)
        check(inputs, *ops.knn_graph(**inputs, return_score=True))


@pytest.mark.promise("C13")
def test_map_seen_as_tokens(backend):
    feature_map = torch.randn(2, 9, 5, 6, generator=torch.Generator().manual_seed(0))
    inputs = {"prior": feature_map.flatten(2).transpose(1, 2), "grid": (5, 6), "k": 7}
    check(inputs, *ops.knn_graph(**inputs, return_score=True))


@pytest.mark.promise("C14")
@pytest.mark.parametrize("shape,grid,k", [((0, 6, 3), (2, 3), 4), ((2, 0, 3), (0, 5), 0), ((2, 6, 3), (2, 3), 0)])
def test_empty(shape, grid, k, backend):
    index, score = ops.knn_graph(torch.ones(shape), grid, k, return_score=True)
    assert index.shape == score.shape == (*shape[:2], k) and index.dtype == torch.int32
    check(
        {"prior": torch.ones(1, 6, 3), "grid": (2, 3)},
        *ops.knn_graph(torch.ones(1, 6, 3), (2, 3), 4, return_score=True),
    )


@pytest.mark.promise("C7")
def test_samples_are_independent_and_runs_repeat(backend):
    inputs = make_inputs(CASES[2])
    prior = inputs.pop("prior")
    # on a GPU the library multiplies, and takes another kernel for another number of images unless it is told not to
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or backend in ("triton", "cuda"))
    try:
        whole = ops.knn_graph(prior, **inputs, return_score=True)
        for b, pick in itertools.product(range(2), (lambda b: slice(b, b + 1), lambda b: b)):
            one = ops.knn_graph(prior[pick(b)], **inputs, return_score=True)
            assert all(torch.equal(got, value[pick(b)]) for got, value in zip(one, whole, strict=True))
    finally:
        torch.use_deterministic_algorithms(before)
    threads = torch.get_num_threads()
    for count in range(3 if INTERPRETED else 20):
        # the reference leaves its products to the BLAS, which may cut them by the number of threads
        torch.set_num_threads(threads if backend == "reference" else 1 + count % 3)
        again = ops.knn_graph(prior, **inputs, return_score=True)
        assert all(torch.equal(got, value) for got, value in zip(again, whole, strict=True))
    torch.set_num_threads(threads)


@pytest.mark.promise("C6")
def test_permuting_nodes_permutes_neighbours(backend):
    prior = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    plain = ops.knn_graph(prior, (1, 24), 5, decay=0.0)[0].long()
    moved = ops.knn_graph(prior[:, order], (1, 24), 5, decay=0.0)[0].long()
    for position, node in enumerate(order.tolist()):
        assert set(order[moved[position]].tolist()) == set(plain[node].tolist())


@pytest.mark.promise("C10")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_features_that_differ_by_a_power_of_two_are_ties(backend, dtype):
    # whole numbers, so that no sum rounds; every direction six times, in lengths from 2**-20 to 2**30
    random = torch.Generator().manual_seed(0)
    direction = torch.randint(-3, 4, (8, 12), generator=random)
    which = torch.randint(0, 8, (48,), generator=random)
    power = torch.randint(-20, 31, (48, 1), generator=random)
    alike = direction[which].to(dtype)
    prior = alike * torch.exp2(power.double()).to(dtype)
    index, score = ops.knn_graph(prior, (6, 8), 5, decay=0.0, return_score=True)
    same, equal = ops.knn_graph(alike, (6, 8), 5, decay=0.0, return_score=True)
    assert torch.equal(index, same) and torch.equal(score, equal)
    # the node itself, and of those that point where it does the first
    for node in range(48):
        others = [other for other in range(48) if which[other] == which[node] and other != node]
        chosen = set(index[node].tolist())
        assert chosen >= {node, *others[:4]}


def test_parallel_features_of_other_lengths_have_the_same_cosine_but_for_the_last_bits(backend):
    random = torch.Generator().manual_seed(0)
    direction = torch.randn(8, 12, generator=random)
    prior = direction[torch.arange(48) % 8] * (0.1 + torch.rand(48, 1, generator=random))
    _, score = ops.knn_graph(prior, (6, 8), 6, decay=0.0, return_score=True)
    assert torch.allclose(score, torch.ones(48, 6), atol=4e-7, rtol=0)


@pytest.mark.promise("C4")
def test_neither_autocast_nor_matmul_precision_reaches_the_affinities(backend):
    inputs = {"prior": vit_like_prior(CASES[5], torch.Generator().manual_seed(0)), "grid": (6, 7), "k": 9}
    expected = ops.knn_graph(**inputs, return_score=True)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = ops.knn_graph(**inputs, return_score=True)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.promise("C3", "C15")
def test_prior_is_not_written_and_gets_no_gradient(backend):
    inputs = make_inputs(CASES[2])
    copy = inputs["prior"].clone()
    inputs["prior"].requires_grad_()
    index, score = ops.knn_graph(**inputs, return_score=True)
    assert torch.equal(inputs["prior"], copy) and not score.requires_grad and not index.requires_grad


@pytest.mark.promise("C15")
def test_poisoned_allocations(backend):
    inputs = make_inputs(CASES[2])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        check(inputs, *ops.knn_graph(**inputs, return_score=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.promise("C11")
def test_check_finite_names_the_node(backend):
    prior = torch.zeros(2, 6, 5)
    prior[1, 4, :3] = torch.inf
    with pytest.raises(NumericalError, match=r"prior\[b=1, n=4\] has 3 non-finite values"):
        ops.knn_graph(prior, (2, 3), 2, check_finite=True)
    with pytest.raises(NumericalError, match=r"prior\[n=4\] has 3"):
        ops.knn_graph(prior[1], (2, 3), 2, check_finite=True)
    ops.knn_graph(torch.ones(2, 6, 5), (2, 3), 2, check_finite=True)


@pytest.mark.promise("C21")
def test_compiles_without_a_break_and_with_few_recompilations(backend):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(prior: Tensor, h: int, w: int) -> Tensor:
        return ops.knn_graph(prior, (h, w), 5, return_score=True)[0] + 1

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for h, w in ((4, 5), (6, 7), (3, 9), (8, 8), (5, 5), (7, 10)):
        prior = torch.randn(2, h * w, 6)
        assert torch.equal(compiled(prior, h, w), function(prior, h, w))
    assert counter.frame_count <= 3


@pytest.mark.promise("C21")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    inputs = make_inputs(CASES[0], dtype)
    prior, inverse = prepare_reference.prepare_prior(inputs["prior"])
    options = (*inputs["grid"], 3, 1.0, "additive", True, "auto")
    for form in (prior, prior.mT.contiguous().mT, prior.repeat(1, 1, 2)[..., ::2], prior[:1].expand(prior.shape)):
        opcheck(torch.ops.drseg.knn_graph.default, (form, inverse, None, None, *options))
        opcheck(torch.ops.drseg.knn_graph.default, (form, inverse, None, None, *options, 2.5))
        opcheck(torch.ops.drseg.knn_graph.default, (form, inverse, None, None, *options, None, [2, 9]))


def test_reference_gives_the_same_for_any_block():
    inputs = make_inputs(CASES[4])
    prior, inverse = prepare_reference.prepare_prior(inputs["prior"])
    table = reference.decay_table(inputs["grid"], 1.0, "additive", torch.float32, prior.device)
    for block in (1, 7, 64, 1000):
        index, score = reference.knn_graph(prior, inverse, table, 16, "additive", True, block=block)
        check(inputs, index, score)


@pytest.mark.parametrize("exponent", [-1060, -500, 500, 1000])
def test_scaling_float64_features_changes_nothing(exponent, backend):
    prior = torch.randn(2, 42, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # bits to spare, so that subnormal features are exact too
    prior = (prior * 2**10).round() / 2**10
    expected = ops.knn_graph(prior, (6, 7), 9, return_score=True)
    # in two steps: 2.0**-1060 is itself subnormal, and 2**10 * 2**1000 must stay in range
    half = 2.0 ** (exponent // 2)
    got = ops.knn_graph(prior * half * half, (6, 7), 9, return_score=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-150, 1e150, 1e160, 1e300])
def test_float64_features_of_any_size_have_the_same_neighbours(scale, backend):
    prior = torch.randn(2, 42, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    index, score = ops.knn_graph(prior, (6, 7), 9, return_score=True)
    rows = torch.ones(42, 1, dtype=torch.float64)
    rows[::2] = scale
    for scaled in (prior * scale, prior * rows):
        got, value = ops.knn_graph(scaled, (6, 7), 9, return_score=True)
        assert torch.equal(got, index)
        torch.testing.assert_close(value, score, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", ["additive", "gauss", "multiplicative", "product"])
def test_decay_stays_in_the_range_of_the_scores(form, backend):
    prior = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))
    for dtype, largest in ((torch.float32, 3.4e38), (torch.bfloat16, 3.4e38), (torch.float64, 1.7e308)):
        _, score = ops.knn_graph(prior.to(dtype), (2, 3), 3, decay=largest, form=form, return_score=True)
        assert score.isfinite().all()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=r"decay is too large; expected decay <= 3.403e\+38, got 1e\+300$"):
            ops.knn_graph(prior.to(dtype), (2, 3), 3, decay=1e300, form=form)


@functools.cache
def within(grid: tuple[int, int], radius: float) -> Tensor:
    """(N, N) bool: pairs of cells no farther apart than the radius, each by itself."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    squares = (y.flatten()[:, None] - y.flatten()).square() + (x.flatten()[:, None] - x.flatten()).square()
    nearest = torch.tensor([value for value in range(int(squares.max()) + 1) if math.sqrt(value) <= radius])
    return torch.isin(squares, nearest)


# below and beyond the size up to which the native backend keeps all scores; and one it searches coarsely first
@pytest.mark.parametrize(
    ("grid", "k", "channels", "radius"),
    [
        ((7, 9), 20, 5, 2.3),
        ((6, 8), 3, 16, 13**0.5),
        ((1, 50), 4, 4, 0.0),
        ((33, 35), 20, 6, 5.0),
        ((3, 401), 30, 6, 9.5),
        ((43, 50), 30, 100, 9.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_radius_is_a_limit(form, include_self, grid, k, channels, radius, backend):
    random = torch.Generator().manual_seed(channels)
    prior = torch.randn(1, grid[0] * grid[1], channels, generator=random)
    near = within(grid, radius)
    index, score = ops.knn_graph(
        prior, grid, k, decay=0.5, form=form, include_self=include_self, radius=radius, pad=True, return_score=True
    )
    truth = oracle.scores(prior, grid, 0.5, form)[0].masked_fill(~near, -torch.inf)
    problem = numerics.compare_selection(
        index[0], score[0], truth, numerics.affinity_tolerance(prior.dtype), include_self=include_self
    )
    assert problem is None, problem
    real = score[0] > -torch.inf
    assert torch.equal(real.sum(1), (near.sum(1) - int(not include_self)).clamp(max=k))


def test_a_radius_across_all_is_none(backend):
    inputs = make_inputs(CASES[2])
    expected = ops.knn_graph(**inputs, return_score=True)
    for radius in (36.0, 1e30):
        got = ops.knn_graph(**inputs, radius=radius, return_score=True)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.promise("C11")
def test_a_node_that_is_not_finite_within_a_radius(backend):
    prior = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(0))
    prior[0, 8] = torch.nan
    index, score = ops.knn_graph(prior, (5, 6), 3, radius=1.0, return_score=True)
    # the node above it has itself and two others left
    assert index[0, 2].tolist() == [1, 2, 3] and score[0, 2].isfinite().all()
    assert not (index[0, torch.arange(30) != 8] == 8).any()
    assert (index[0, 8] == 8).all() and score[0, 8].isnan().all()


@pytest.mark.promise("C9")
def test_a_radius_with_fewer_candidates_than_k():
    prior = torch.ones(1, 12, 2)
    # a corner of a grid sees itself, two neighbours and one across
    assert ops.knn_graph(prior, (3, 4), 4, radius=1.5)[0, 0].tolist() == [0, 1, 4, 5]
    with pytest.raises(
        ValueError, match=r"^knn_graph: k exceeds the candidates; expected k <= 4 \(of a corner within radius 1.5\), "
    ):
        ops.knn_graph(prior, (3, 4), 5, radius=1.5)
    with pytest.raises(ValueError, match=r"expected k <= 2 \(of a corner within radius 1\), got 3"):
        ops.knn_graph(prior, (3, 4), 3, radius=1, include_self=False)
    assert ops.knn_graph(prior, (3, 4), 4, radius=1, pad=True)[0, 0].tolist() == [0, 1, 4, 0]
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="radius is out of range; expected a finite number >= 0"):
            ops.knn_graph(prior, (3, 4), 2, radius=wrong)
    with pytest.raises(TypeError, match="radius must be a number; expected float, got str"):
        ops.knn_graph(prior, (3, 4), 2, radius="far")


@pytest.mark.promise("C2")
@pytest.mark.parametrize(
    "rows", [(0, 1), (7, 50), (100, 164), (1300, 1301), (0, 1301), (60, 60)], ids=lambda rows: f"{rows[0]}-{rows[1]}"
)
@pytest.mark.parametrize("grid", [(1, 1301), (33, 35), (6, 8)], ids=str)
def test_some_rows_are_those_of_all(grid, rows, backend):
    """Of scores that are exact in any order, and full of ties: rows that cut blocks, and that are none or all."""
    nodes = grid[0] * grid[1]
    rows = min(rows[0], nodes), min(rows[1], nodes)
    random = torch.Generator().manual_seed(nodes)
    prior = torch.randint(-2, 3, (2, nodes, 5), generator=random).float()
    prior[1, nodes // 3] = torch.nan
    table = torch.randint(0, 4, grid, generator=random).float()
    inverse = torch.ones(2, nodes).masked_fill(prior.isnan().any(-1), torch.nan)
    if not next(found for found in _dispatch.table("knn_graph") if found.name == backend).some_rows:
        pytest.skip("it chooses for all nodes")
    given = (prior, inverse, table, 9, "additive", False)
    expected = reference.knn_graph(*given)
    for value, right in zip(select(*given, backend, rows=rows), expected, strict=True):
        assert value.shape == (2, rows[1] - rows[0], 9)
        torch.testing.assert_close(value, right[:, rows[0] : rows[1]], rtol=0, atol=0, equal_nan=True)


def test_some_rows_of_the_op(backend):
    inputs = make_inputs(CASES[2])
    both = ops.knn_graph(**inputs, return_score=True)
    some = ops.knn_graph(**inputs, rows=(3, 20), return_score=True)
    assert torch.equal(some[0], both[0][:, 3:20])
    # the library of a GPU may round otherwise
    torch.testing.assert_close(some[1], both[1][:, 3:20])
    assert torch.equal(ops.knn_graph(**inputs, rows=torch.tensor([3, 20]).tolist()), both[0][:, 3:20])
    image = {**inputs, "prior": inputs["prior"][0]}
    assert torch.equal(ops.knn_graph(**image, rows=(0, 1)), both[0][0, :1])


def test_a_backend_that_knows_no_rows_chooses_for_all(monkeypatch):
    asked = []

    def whole(*arguments):
        asked.append(arguments)
        return reference.knn_graph(*arguments)

    table = tuple(
        dataclasses.replace(found, run=whole, some_rows=False, raw=False) if found.name == "reference" else found
        for found in _dispatch.table("knn_graph")
    )
    own = _dispatch.table
    monkeypatch.setattr(_dispatch, "table", lambda op: table if op == "knn_graph" else own(op))
    prior = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    index = ops.knn_graph(prior, (3, 4), 3, rows=(5, 9), backend="reference")
    assert len(asked) == 1 and index.shape == (1, 4, 3)
    assert torch.equal(index, ops.knn_graph(prior, (3, 4), 3)[:, 5:9])


def test_rows_that_are_none():
    prior = torch.ones(12, 2)
    for wrong, said in (
        ((3, 2), r"rows is out of range; expected first <= end <= N = 12, got 3, 2"),
        ((0, 13), r"expected first <= end <= N = 12, got 0, 13"),
        ((-1, 3), r"rows must not be negative; expected rows >= 0, got -1"),
        (5, r"rows is not a pair; expected \(first, end\), got 5"),
    ):
        with pytest.raises(ValueError, match=f"^knn_graph: .*{said}"):
            ops.knn_graph(prior, (3, 4), 2, rows=wrong)
    with pytest.raises(TypeError, match="rows must be an integer; expected int, got float"):
        ops.knn_graph(prior, (3, 4), 2, rows=(0, 2.5))
